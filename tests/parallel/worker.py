"""Draws the same pictures as one of several ranks, or alone: python -m tests.parallel.worker FILE ULYSSES GUIDANCE."""

import sys
from pathlib import Path

import torch

from hi_diffusers import CacheConfig, SamplingOptions, generate, load_pipeline
from hi_diffusers.console import quiet_libraries
from hi_diffusers.denoising.ranks import join

OPTIONS = {"seed": 3, "num_steps": 20}
DRAWN = {
    "uncached": ({}, CacheConfig.off()),
    "module": ({}, CacheConfig.taylorseer()),
    "residual": ({}, CacheConfig(target="residual")),
    "velocity": ({}, CacheConfig(target="velocity")),
    "x0": ({}, CacheConfig(target="x0")),
    "solver": ({"num_steps": 50}, CacheConfig.best()),
    "padded": ({"width": 80, "height": 48}, CacheConfig.taylorseer()),
    "adaptive": ({}, CacheConfig(target="module", schedule="adaptive", full_steps=6)),
    "without guidance": ({"guidance": 1}, CacheConfig.taylorseer()),
}


def main(path: Path, ulysses: int, guidance: bool) -> None:
    """Draw all, twice; the first rank writes pixels, kinds of the steps, and bytes of the cache."""
    torch.set_num_threads(1)
    quiet_libraries()
    pipe = load_pipeline("nano", device="cpu")
    if ulysses > 1 or guidance:
        ranks, _ = join(ulysses, guidance, "cpu")
        pipe.draw_with(ranks)
    drawn = {}
    for name, (options, cache) in DRAWN.items():
        prompt = "a large red circle on a blue background"
        picture, again = (generate(pipe, SamplingOptions(prompt, **(OPTIONS | options)), cache) for _ in range(2))
        assert picture.pixels.tobytes() == again.pixels.tobytes(), f"{name}: drawn again it is another picture"
        kept = max(one.cache_bytes for one in picture.trace)
        drawn[name] = (torch.from_numpy(picture.pixels), [one.kind for one in picture.trace], kept)
    if pipe.ranks is None or pipe.ranks.is_first:
        torch.save(drawn, path)


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), bool(int(sys.argv[3])))
