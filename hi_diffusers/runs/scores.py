"""Scores of saved pictures that need extra packages or weights, and scores measured in another environment."""

import contextlib
import csv
import importlib.util
import io
import math
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from hi_diffusers.runs.comparison import Run

CLIP_MODEL = "openai/clip-vit-large-patch14"
IMAGE_REWARD_MODEL = "ImageReward-v1.0"
RUNS = ("a", "b")

Scorer = Callable[[Image.Image, str], float]


def lpips_distance() -> Callable[[Image.Image, Image.Image], float]:
    """LPIPS (arXiv 1801.03924, AlexNet) between two pictures; raises ImportError where the package is absent."""
    import lpips
    import torch

    network = lpips.LPIPS(net="alex", verbose=False)

    def distance(one: Image.Image, other: Image.Image) -> float:
        first, second = (
            torch.from_numpy(np.asarray(image) / 127.5 - 1).float().permute(2, 0, 1)[None] for image in (one, other)
        )
        with torch.no_grad():
            return float(network(first, second))

    return distance


def clip_score(model: str = CLIP_MODEL) -> Scorer:
    """100 x the cosine between a picture's and its prompt's CLIP embeddings (arXiv 2104.08718 without the floor at 0).

    Args:
        model: hub id or folder of a CLIP model of transformers.
    """
    import torch
    from transformers import CLIPModel, CLIPProcessor

    network = CLIPModel.from_pretrained(model, use_safetensors=True).eval()
    processor = CLIPProcessor.from_pretrained(model)

    def score(image: Image.Image, prompt: str) -> float:
        inputs = processor(text=[prompt], images=[image], return_tensors="pt", padding=True, truncation=True)
        with torch.no_grad():
            outputs = network(**inputs)
        return 100 * float(torch.cosine_similarity(outputs.image_embeds, outputs.text_embeds))

    return score


def image_reward() -> Scorer:
    """ImageReward-v1.0 (arXiv 2304.05977); raises ImportError where the package is absent."""
    import ImageReward

    network = ImageReward.load(IMAGE_REWARD_MODEL)
    return lambda image, prompt: float(network.score(prompt, image))


def is_installed(package: str) -> bool:
    """Whether a package is installed."""
    return importlib.util.find_spec(package) is not None


def read_scores(path: Path) -> dict[str, dict[str, dict[tuple[int, int], float]]]:
    """Scores measured elsewhere: {name: {"a" or "b": {(index, image): value}}}.

    Args:
        path: a CSV file with the columns run ("a" or "b"), index, image, and one column per score.

    Raises:
        ValueError: naming the line that cannot be read.
    """
    found: dict[str, dict[str, dict[tuple[int, int], float]]] = {}
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"scores {path} is not UTF-8: {error.reason} at byte {error.start}") from None
    with io.StringIO(text, newline="") as file:
        rows = csv.DictReader(file)
        names = [name for name in rows.fieldnames or () if name not in ("run", "index", "image")]
        if not names or not {"run", "index", "image"} <= set(rows.fieldnames or ()):
            raise ValueError(f"scores {path} must have the columns run, index, image and one column per score")
        for row in rows:
            try:
                if row["run"] not in RUNS:
                    raise ValueError(f"run must be a or b, got {row['run']!r}")
                key = (int(row["index"]), int(row["image"]))
                if None in row or None in row.values():
                    raise ValueError(f"must have {len(rows.fieldnames or ())} cells, as the first line has")
                for name in names:
                    if key in found.get(name, {}).get(row["run"], {}):
                        raise ValueError(f"scores prompt {key[0]}, image {key[1]} of run {row['run']} a second time")
                    if not math.isfinite(float(row[name])):
                        raise ValueError(f"{name} must be a finite number, got {row[name]}")
                    found.setdefault(name, {run: {} for run in RUNS})[row["run"]][key] = float(row[name])
            except (TypeError, ValueError) as error:
                raise ValueError(f"scores {path}, line {rows.line_num}: {error}") from error
    if not found:
        raise ValueError(f"scores {path} holds no score")
    return found


def scene_claims(runs: Sequence[Run], keys: Sequence[tuple[int, int]]) -> list[str]:
    """For each run of the bundled model, how many claims of the prompts its pictures satisfy.

    Empty if the checker is not installed (only a clone has it) or no prompt is in its grammar.
    """
    if not is_installed("training"):
        return []
    from training.checker import Checker, accuracy
    from training.scenes import CPU_TIER, parse_caption

    def states_claims(key: tuple[int, int]) -> bool:
        with contextlib.suppress(ValueError):
            return bool(parse_caption(runs[0].lines[key]["prompt"]))
        return False

    keys = [key for key in keys if states_claims(key)]
    if not keys:
        return []
    checker = Checker(CPU_TIER)
    return [
        str(accuracy(checker.check(np.asarray(run.picture(key)), run.lines[key]["prompt"]) for key in keys))
        for run in runs
    ]
