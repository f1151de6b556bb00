"""Draws the same pictures as one of several ranks, or alone: python -m tests.parallel.worker FILE ULYSSES GUIDANCE."""

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from hi_diffusers import CacheConfig, Interrupted, SamplingOptions
from hi_diffusers.console import quiet_libraries
from hi_diffusers.denoising.ranks import Ranks, Split, join
from hi_diffusers.engine.following import follow
from hi_diffusers.engine.generation import draw_batch
from hi_diffusers.engine.session import Session
from hi_diffusers.families.table import find_preset
from hi_diffusers.request.placement import Placement
from hi_diffusers.weights.identity import find_calibrations
from hi_diffusers.weights.source import ModelSource
from tests.lora_file import write_lora

OPTIONS: dict[str, Any] = {"seed": 3, "num_steps": 20}
DRAWN: dict[str, tuple[dict[str, Any], CacheConfig]] = {
    "uncached": ({}, CacheConfig.off()),
    "module": ({}, CacheConfig.taylorseer()),
    "residual": ({}, CacheConfig(target="residual")),
    "velocity": ({}, CacheConfig(target="velocity")),
    "x0": ({}, CacheConfig(target="x0")),
    "solver": ({"num_steps": 50}, CacheConfig.best()),
    "padded": ({"width": 80, "height": 48}, CacheConfig.taylorseer()),
    "adaptive": ({}, CacheConfig(target="module", schedule="adaptive", full_steps=6)),
    "from a picture": ({"image": Image.new("RGB", (64, 64), "teal"), "strength": 0.6}, CacheConfig.taylorseer()),
    "without guidance": ({"guidance": 1}, CacheConfig.taylorseer()),
}
PROMPTS = ("a large red circle on a blue background", "a small green star on a white background")


def main(path: Path, split: Split) -> None:
    """Draw all, twice; the first rank writes pixels, kinds of the steps, and bytes of the cache."""
    torch.set_num_threads(1)
    quiet_libraries()
    if split.size == 1:
        draw(path, None)
        return
    ranks, device = join(split, "cpu")
    if ranks.is_first:
        draw(path, ranks)
    else:
        follow(ranks, device)
    ranks.leave()


def draw(path: Path, ranks: Ranks | None) -> None:
    preset, drawn = find_preset("nano"), {}
    assert preset.folder is not None
    write_lora(preset.folder, path.with_name("lora.safetensors"))
    sources = {"LoRA": {"loras": (f"{path.with_name('lora.safetensors')}:0.7",)}, "nf4": {"quantization": "nf4"}}
    plain = open_session(ModelSource(), ranks)
    for name, (options, cache) in DRAWN.items():
        drawn[name] = draw_twice(plain, options, cache, PROMPTS[:1])
    drawn["batch"] = draw_twice(plain, {}, CacheConfig.taylorseer(), PROMPTS)
    interrupt(plain)
    for name, given in sources.items():
        drawn[name] = draw_twice(open_session(ModelSource(**given), ranks), {}, CacheConfig.taylorseer(), PROMPTS[:1])
    torch.save(drawn, path)


def open_session(source: ModelSource, ranks: Ranks | None) -> Session:
    session = Session(find_preset("nano"), source, Placement(device="cpu"))
    session.calibrations = find_calibrations(session.preset, source)
    if ranks is not None:
        session.share_with(ranks, "cpu")
    return session


def draw_twice(session: Session, options: dict[str, Any], cache: CacheConfig, prompts: tuple[str, ...]) -> Any:
    """Pixels, kinds of the steps, and bytes of the cache on this rank."""
    drawings = [session.decide(SamplingOptions(prompt, **(OPTIONS | options)), cache) for prompt in prompts]
    _, embeds = session.encode(drawings)
    pictures, again = (draw_batch(session.model, drawings, embeds=embeds) for _ in range(2))
    pixels = np.stack([one.pixels for one in pictures])
    assert pixels.tobytes() == np.stack([one.pixels for one in again]).tobytes(), "drawn again it is another picture"
    trace = pictures[0].trace
    return torch.from_numpy(pixels), [one.kind for one in trace], max(one.cache_bytes for one in trace)


def interrupt(session: Session) -> None:
    """Stop a drawing on all ranks; the next one is as if nothing had been."""
    drawing = session.decide(SamplingOptions(PROMPTS[0], **OPTIONS), CacheConfig.taylorseer())
    _, embeds = session.encode([drawing])
    with pytest.raises(Interrupted):
        draw_batch(session.model, [drawing], embeds=embeds, on_step=lambda record, _: record.index < 3)
    with pytest.raises(ZeroDivisionError):
        draw_batch(session.model, [drawing], embeds=embeds, on_step=lambda record, _: 1 / 0)
    draw_batch(session.model, [drawing], embeds=embeds)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Split(int(sys.argv[2]), bool(int(sys.argv[3]))))
