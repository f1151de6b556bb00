"""Puts the trained parts together as an ordinary diffusers folder.

    python -m training.assemble --vae training/runs/vae --text training/runs/text \
        --transformer training/runs/transformer/transformer --output assets/hidream-nano

What else lies in the output folder (model card, calibration) stays.
"""

import argparse
import json
import shutil
from collections.abc import Sequence
from pathlib import Path

import diffusers

from hi_diffusers.console import Parser, quiet_libraries, refuse_errors, run_script
from hi_diffusers.denoising.schedulers import make_scheduler
from training import encoders
from training.process import DIFFUSERS_FILES, require_files

PARTS = {
    "vae": ("diffusers", "AutoencoderKL"),
    "text_encoder": ("transformers", "CLIPTextModelWithProjection"),
    "text_encoder_2": ("transformers", "CLIPTextModelWithProjection"),
    "text_encoder_3": ("transformers", "T5EncoderModel"),
    "text_encoder_4": ("transformers", "LlamaForCausalLM"),
    "tokenizer": ("transformers", "PreTrainedTokenizerFast"),
    "tokenizer_2": ("transformers", "PreTrainedTokenizerFast"),
    "tokenizer_3": ("transformers", "PreTrainedTokenizerFast"),
    "tokenizer_4": ("transformers", "PreTrainedTokenizerFast"),
    "transformer": ("diffusers", "HiDreamImageTransformer2DModel"),
}
FLOW_SHIFT = 3.0


def assemble(vae: Path, text: Path, transformer: Path, output: Path) -> None:
    """Copy the parts into `output`, with UniPC as HiDream-I1-Full has it and the index that names every class."""
    output.mkdir(parents=True, exist_ok=True)
    for name in PARTS:
        source = {"vae": vae, "transformer": transformer}.get(name, text / name)
        shutil.rmtree(output / name, ignore_errors=True)
        shutil.copytree(source, output / name)
    scheduler = make_scheduler("unipc", FLOW_SHIFT)
    scheduler.save_pretrained(output / "scheduler")
    classes = PARTS | {"scheduler": ("diffusers", type(scheduler).__name__)}
    index = {"_class_name": "HiDreamImagePipeline", "_diffusers_version": diffusers.__version__}
    index |= dict(sorted(classes.items()))
    (output / "model_index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def run(args: argparse.Namespace) -> None:
    """Do what the flags say."""
    quiet_libraries()
    refuse_errors(require_files, "--vae", args.vae, DIFFUSERS_FILES)
    refuse_errors(require_files, "--text", args.text, encoders.FILES)
    refuse_errors(require_files, "--transformer", args.transformer, DIFFUSERS_FILES)
    assemble(args.vae, args.text, args.transformer, args.output)
    size = sum(path.stat().st_size for path in args.output.rglob("*") if path.is_file())
    print(f"{args.output}: {size / 1e6:.1f} MB")


def main(argv: Sequence[str] | None = None) -> int:
    """The command line."""
    parser = Parser(prog="python -m training.assemble", description=__doc__.splitlines()[0])
    parser.add_argument("--vae", type=Path, required=True, help="folder of the trained VAE")
    parser.add_argument("--text", type=Path, required=True, help="folder of the trained encoders and tokenizers")
    parser.add_argument("--transformer", type=Path, required=True, help="folder of the trained transformer")
    parser.add_argument("--output", type=Path, required=True, help="the model's folder")
    return run_script(run, parser, argv)


if __name__ == "__main__":
    raise SystemExit(main())
