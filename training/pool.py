"""Pictures drawn ahead of training and kept in a file, so that the training core never waits for the renderer."""

import sys
from pathlib import Path

import numpy as np

from training.process import written_whole
from training.render import render
from training.scenes import Tier, sample_scene


def picture_pool(tier: Tier, count: int, seed: int, folder: Path, *, held_out: bool = False) -> np.ndarray:
    """`count` pictures of sampled scenes, uint8 [count, H, W, 3], mapped from a file in `folder`, drawn if missing.

    Picture i depends on `seed`, i and the split alone. The file's name holds the arguments but no version of the
    renderer: delete it after a change there.
    """
    path = folder / f"pool-{tier.name}-{'held-out' if held_out else 'train'}-{seed}-{count}.npy"
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        pictures = np.empty((count, tier.image_size, tier.image_size, 3), np.uint8)
        for i in range(count):
            rng = np.random.default_rng((seed, int(held_out), i))
            pictures[i] = render(sample_scene(rng, tier, held_out=held_out), rng, tier.image_size, tier.roam)
            if i % 1000 == 0:
                print(f"\rdrawing pictures {i}/{count}", end="", file=sys.stderr, flush=True)
        print(f"\rdrawing pictures {count}/{count}", file=sys.stderr)
        with written_whole(path) as partial, partial.open("wb") as file:
            np.save(file, pictures)
    return np.load(path, mmap_mode="r")
