"""Draws with FLUX and Wan of diffusers, forecast, alone or on several ranks: ...pipeline_worker FILE ULYSSES."""

import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from cache_functions import CacheConfig
from forecasting import forecast
from hi_diffusers.console import quiet_libraries
from hi_diffusers.denoising.ranks import Split, join
from tests.tiny_pipelines import flux, wan
from tests.tiny_pipelines.variant import Variant

NAMES = ("flux dev", "flux dev, true guidance", "wan t2v", "wan i2v", "wan 2.2 t2v")
CACHES = {
    "uncached": CacheConfig.off(),
    "velocity": CacheConfig(target="velocity", full_steps=4),
    "x0": CacheConfig(target="x0", full_steps=4),
    "module": CacheConfig(target="module", full_steps=4),
}


def main(path: Path, ulysses: int) -> None:
    torch.set_num_threads(1)
    quiet_libraries()
    ranks = join(Split(ulysses), "cpu")[0] if ulysses > 1 else None
    drawn = {}
    for variant in [one for one in (*flux.VARIANTS, *wan.VARIANTS) if one.name in NAMES]:
        for name, cache in CACHES.items():
            pipe = variant.build()
            if ranks is not None:
                for denoiser in (pipe.transformer, getattr(pipe, "transformer_2", None)):
                    if denoiser is not None:
                        ranks.split_tokens(denoiser)
            drawn[f"{variant.name}: {name}"] = draw(variant, pipe, cache)
    if ranks is None or ranks.is_first:
        torch.save(drawn, path)
    if ranks is not None:
        dist.destroy_process_group()


def draw(variant: Variant, pipe: Any, cache: CacheConfig) -> Any:
    """Latents, kinds of the steps, and bytes of the cache on this rank."""
    if cache.is_off:
        return variant.draw(pipe), [], 0
    with forecast(pipe, cache) as session:
        latents = variant.draw(pipe)
    return latents, [one.kind for one in session.trace], max(one.cache_bytes for one in session.trace)


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
