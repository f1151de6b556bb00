"""Pictures drawn from a picture, cached, beside simply drawing fewer steps.

    python -m benchmarks.starts
    python -m benchmarks.starts --write_inputs FOLDER    # pictures and prompts for calibrate.py, and nothing else

The bundled model draws held-out prompts over pictures of other held-out scenes, which the renderer of its training data
makes. Every picture is compared with the uncached one of the same input, prompt, seed and strength, as floats. What is
drawn is kept in a folder, so that a stopped run goes on.
"""

import argparse
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from benchmarks.quality_report import paired_difference, score
from benchmarks.report import RESULTS, write_json
from cache_functions import CacheConfig, settle
from hi_diffusers import SamplingOptions, generate_batch, load_pipeline
from hi_diffusers.console import Parser, quiet_libraries, run_script
from hi_diffusers.families.family import Model
from hi_diffusers.families.table import PRESETS
from hi_diffusers.pictures.inputs import InputPicture
from hi_diffusers.pictures.metrics import psnr
from training.evaluate import held_out_prompts
from training.render import render
from training.scenes import CPU_TIER, caption, sample_scene

INPUT_SEED, CALIBRATION_SEED, FIRST_SEED = 30_000, 31_000, 7_000
STRENGTHS = (0.4, 0.6, 0.8)
SHARES = (3, 5)  # one full step in so many
BATCH_SIZE = 16
FEWER = "simply fewer steps"
EDITS, EDITED, NUM_EDITED = 10, 0.4, 16


@dataclass(frozen=True)
class Row:
    """What one method did.

    Attributes:
        strength, drawn_steps, full_steps: which drawing.
        method: its name.
        psnr: dB of the float picture to the uncached one, of each input.
    """

    strength: float
    drawn_steps: int
    full_steps: int
    method: str
    psnr: tuple[float, ...]


class Pictures:
    """Draws all inputs with one setting.

    Args:
        model: what draws.
        count: number of inputs.

    Attributes:
        prompts, inputs: what is drawn over which picture.
        captions: what the pictures show.
    """

    def __init__(self, model: Model, count: int):
        self.model, self.prompts = model, held_out_prompts(CPU_TIER, count)
        rng = np.random.default_rng(INPUT_SEED)
        scenes = [sample_scene(rng, CPU_TIER, held_out=True) for _ in range(count)]
        rendered = [Image.fromarray(render(one, rng, CPU_TIER.image_size)) for one in scenes]
        self.inputs = [InputPicture.of(one) for one in rendered]
        self.captions = [caption(one) for one in scenes]

    def draw(self, cache: CacheConfig, **options: Any) -> list[np.ndarray]:
        """Float pictures [H,W,3]."""
        asked = [
            SamplingOptions(prompt, seed=FIRST_SEED + number, image=image, **options)
            for number, (prompt, image) in enumerate(zip(self.prompts, self.inputs, strict=True))
        ]
        batches = (asked[start : start + BATCH_SIZE] for start in range(0, len(asked), BATCH_SIZE))
        return [one.pixels for batch in batches for one in generate_batch(self.model, batch, cache)]


def methods(full_steps: int, drawn_steps: int) -> dict[str, CacheConfig]:
    """What is compared, by name; on an interval where one makes that budget, else on even steps."""
    schedule: dict[str, Any] = {"full_steps": full_steps}
    try:
        settle(CacheConfig(**schedule), drawn_steps)
    except ValueError:
        schedule |= {"schedule": "power", "exponent": 1.0}
    return {
        "best": CacheConfig.best(full_steps),
        "TaylorSeer, order 1": CacheConfig(target="module", **schedule),
        "velocity, order 1": CacheConfig(target="velocity", **schedule),
        "reuse": CacheConfig(target="module", basis="reuse", max_order=0, **schedule),
    }


def measure(pictures: Pictures, strength: float) -> list[Row]:
    """All methods at one strength."""
    num_steps = PRESETS["nano"].num_steps
    reference, rows = pictures.draw(CacheConfig.off(), strength=strength), list[Row]()
    drawn_steps = SamplingOptions("", image=pictures.inputs[0], strength=strength).drawn_steps(PRESETS["nano"])
    for share in SHARES:
        full_steps = -(-drawn_steps // share)
        drawn = {name: pictures.draw(one, strength=strength) for name, one in methods(full_steps, drawn_steps).items()}
        fewer = round(num_steps * full_steps / drawn_steps)
        drawn[FEWER] = pictures.draw(CacheConfig.off(), strength=strength, num_steps=fewer)
        for name, found in drawn.items():
            values = tuple(round(psnr(a, b), 4) for a, b in zip(found, reference, strict=True))
            rows.append(Row(strength, drawn_steps, full_steps, name, values))
    return rows


def summaries(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """One entry for each row, the default's difference to it paired by input."""
    found = []
    for row in rows:
        (best,) = (
            one for one in rows if (one.strength, one.full_steps, one.method) == (row.strength, row.full_steps, "best")
        )
        about = {"strength": row.strength, "drawn_steps": row.drawn_steps, "full_steps": row.full_steps}
        ahead = {} if row is best else {"best_minus_this": paired_difference(best, row)}
        found.append(about | {"method": row.method} | score(row.psnr) | ahead)
    return found


def drift(pictures: Pictures) -> dict[str, Any]:
    """What the VAE loses, and how colours move when a result is drawn from again and again, as what it shows.

    Returns:
        "round_trip": PSNR in dB of pictures that are encoded and decoded; and after 1, 2, ... EDITS times, of pictures
        that are only encoded and decoded, and of pictures that are drawn anew at strength EDITED: the mean distance of
        a picture's mean colour from the input's, in levels of 255.
    """
    before = np.stack([np.asarray(one.pixels(), np.float32) / 255 for one in pictures.inputs])
    model = pictures.model
    once = model.decode(model.encode_pictures(before))
    found: dict[str, Any] = {"round_trip": score([psnr(a, b) for a, b in zip(once, before, strict=True)])}
    coded, drawn = before, before
    moved: dict[str, list[float]] = {"encoded and decoded": [], f"drawn anew at strength {EDITED:g}": []}
    for edit in range(EDITS):
        coded = _in_8_bits(model.decode(model.encode_pictures(coded)))
        options = [
            SamplingOptions(prompt, seed=FIRST_SEED + 100 * edit + number, image=_as_image(one), strength=EDITED)
            for number, (prompt, one) in enumerate(zip(pictures.captions, drawn, strict=True))
        ]
        batches = (options[start : start + BATCH_SIZE] for start in range(0, len(options), BATCH_SIZE))
        drawn = np.stack([one.pixels for batch in batches for one in generate_batch(model, batch)])
        for values, now in zip(moved.values(), (coded, drawn), strict=True):
            shift = now.mean((1, 2)) - before.mean((1, 2))
            values.append(round(float(255 * np.linalg.norm(shift, axis=-1).mean()), 2))
    return found | {"colour_shift": moved}


def _as_image(pixels: np.ndarray) -> Image.Image:
    return Image.fromarray((pixels * 255).round().astype(np.uint8))


def _in_8_bits(pixels: np.ndarray) -> np.ndarray:
    return ((pixels * 255).round() / 255).astype(np.float32)


def write_inputs(folder: Path, count: int) -> None:
    """Pictures of scenes that training may have seen, and a prompt file for calibrate.py that names them.

    Every prompt is one of the bundled calibration's; its picture shows another scene.
    """
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(CALIBRATION_SEED)
    prompts = PRESETS["nano"].calibration_prompts.read_text(encoding="utf-8").splitlines()[:count]
    lines = []
    for number, prompt in enumerate(prompts):
        scene = sample_scene(rng, CPU_TIER)
        Image.fromarray(render(scene, rng, CPU_TIER.image_size)).save(folder / f"{number:03d}.png")
        lines.append(json.dumps({"prompt": prompt, "image": f"{number:03d}.png"}) + "\n")
    (folder / "prompts.jsonl").write_text("".join(lines), encoding="utf-8")


def run(args: argparse.Namespace) -> None:
    """Draw what is missing, and write the result file."""
    if args.write_inputs is not None:
        write_inputs(args.write_inputs, args.num_inputs)
        print(args.write_inputs / "prompts.jsonl")
        return
    quiet_libraries()
    args.folder.mkdir(parents=True, exist_ok=True)
    pictures = Pictures(load_pipeline("nano", device="cpu"), args.num_inputs)
    rows: list[Row] = []
    for strength in tqdm(STRENGTHS, unit="strength"):
        path = args.folder / f"{strength:g}-{args.num_inputs}.json"
        if not path.is_file():
            content = [vars(one) for one in measure(pictures, strength)]
            path.with_suffix(".partial").write_text(json.dumps(content), encoding="utf-8")
            path.with_suffix(".partial").replace(path)
        rows += [Row(**one) for one in json.loads(path.read_text(encoding="utf-8"))]
    path = args.folder / "drift.json"
    if not path.is_file():
        path.write_text(json.dumps(drift(Pictures(pictures.model, NUM_EDITED))), encoding="utf-8")
    about = json.loads(path.read_text(encoding="utf-8"))
    what = "PSNR in dB of float pictures to the uncached one of the same input, prompt, seed and strength"
    content = {
        "what": what,
        "num_inputs": args.num_inputs,
        "first_seed": FIRST_SEED,
        "drift": about,
        "rows": summaries(rows),
    }
    print(write_json(args.output, "starts", torch.device("cpu"), content))


def main(argv: Sequence[str] | None = None) -> int:
    """The command line."""
    parser = Parser(prog="python -m benchmarks.starts", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--num_inputs", type=int, default=64, help="default: %(default)s")
    parser.add_argument(
        "--folder", type=Path, default=Path("outputs/starts"), help="of what is drawn (default: %(default)s)"
    )
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder of the result file (default: %(default)s)")
    parser.add_argument("--write_inputs", type=Path, metavar="FOLDER", help="write inputs for calibrate.py, and stop")
    return run_script(run, parser, argv)


if __name__ == "__main__":
    raise SystemExit(main())
