"""What lets a killed run go on: everything that it must remember, in one file, and the recipe that it is of."""

import pickle
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from training.process import written_whole


def save_checkpoint(path: Path, recipe: Any, state: dict[str, Any]) -> None:
    """Write `state` (tensors, plain values) and the recipe, a dataclass; a kill leaves the old file or the new one."""
    with written_whole(path) as partial:
        torch.save({"recipe": asdict(recipe), **state}, partial)


def load_checkpoint(path: Path, recipe: Any) -> dict[str, Any] | None:
    """What `save_checkpoint` wrote, its tensors on the CPU; None where there is nothing.

    Raises:
        ValueError: if the file is no checkpoint, or of another recipe; the message says in what they differ.
    """
    if not path.exists():
        return None
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        saved = state["recipe"]
    except (RuntimeError, EOFError, KeyError, TypeError, pickle.UnpicklingError):
        raise ValueError(f"{path} is not a checkpoint of this training; delete it to start anew") from None
    asked = asdict(recipe)
    differences = [
        f"{name} is {saved.get(name)} there and {asked.get(name)} here"
        for name in asked | saved
        if saved.get(name) != asked.get(name)
    ]
    if differences:
        raise ValueError(f"{path} is of another recipe: {', '.join(differences)}; delete it to start anew")
    return state
