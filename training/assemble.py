"""Puts the trained parts together as an ordinary diffusers folder: `python -m training.assemble --output assets/hidream-nano`."""

import argparse
import json
import shutil
from pathlib import Path

import diffusers

from hi_diffusers.schedulers import make_scheduler

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
    """Copy the parts into `output`, with UniPC as HiDream-I1-Full has it and the index that names every class.

    What else lies in `output` (model card, calibration) stays.
    """
    output.mkdir(parents=True, exist_ok=True)
    for name in PARTS:
        source = {"vae": vae, "transformer": transformer}.get(name, text / name)
        shutil.rmtree(output / name, ignore_errors=True)
        shutil.copytree(source, output / name)
    scheduler = make_scheduler("unipc", FLOW_SHIFT)
    scheduler.save_pretrained(output / "scheduler")
    classes = PARTS | {"scheduler": ("diffusers", type(scheduler).__name__)}
    index = {"_class_name": "HiDreamImagePipeline", "_diffusers_version": diffusers.__version__} | dict(sorted(classes.items()))
    (output / "model_index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def main(argv: list[str] | None = None) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m training.assemble", description=__doc__)
    for part in ("vae", "text", "transformer"):
        parser.add_argument(f"--{part}", type=Path, required=True, help=f"folder of the trained {part}")
    parser.add_argument("--output", type=Path, required=True, help="the model's folder")
    args = parser.parse_args(argv)
    assemble(args.vae, args.text, args.transformer, args.output)
    size = sum(path.stat().st_size for path in args.output.rglob("*") if path.is_file())
    print(f"{args.output}: {size / 1e6:.1f} MB")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
