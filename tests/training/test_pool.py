"""Pictures drawn ahead of training: each depends on the seed and its own number alone."""

from pathlib import Path

import numpy as np
import pytest

from training import pool
from training.pool import picture_pool
from training.render import render
from training.scenes import CPU_TIER, is_held_out, sample_scene


def test_a_pool_is_the_same_in_another_folder_and_begins_as_a_shorter_one(tmp_path: Path) -> None:
    long = picture_pool(CPU_TIER, 6, 0, tmp_path / "a")
    assert long.shape == (6, 64, 64, 3) and long.dtype == np.uint8
    assert np.array_equal(long, picture_pool(CPU_TIER, 6, 0, tmp_path / "b"))
    assert np.array_equal(long[:2], picture_pool(CPU_TIER, 2, 0, tmp_path / "a"))


def test_another_seed_and_the_other_side_of_the_split_give_other_pictures(tmp_path: Path) -> None:
    first = picture_pool(CPU_TIER, 2, 0, tmp_path)
    assert not np.array_equal(first, picture_pool(CPU_TIER, 2, 1, tmp_path))
    assert not np.array_equal(first, picture_pool(CPU_TIER, 2, 0, tmp_path, held_out=True))


@pytest.mark.parametrize("held_out", [False, True])
def test_a_picture_shows_the_scene_that_its_number_and_the_split_sample(tmp_path: Path, held_out: bool) -> None:
    pictures = picture_pool(CPU_TIER, 3, 5, tmp_path, held_out=held_out)
    for i in range(3):
        rng = np.random.default_rng((5, int(held_out), i))
        scene = sample_scene(rng, CPU_TIER, held_out=held_out)
        assert is_held_out(scene) == held_out
        assert np.array_equal(pictures[i], render(scene, rng, CPU_TIER.image_size, CPU_TIER.roam))


def test_a_pool_that_is_there_is_not_drawn_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = picture_pool(CPU_TIER, 2, 0, tmp_path)
    monkeypatch.setattr(pool, "render", None)
    assert np.array_equal(picture_pool(CPU_TIER, 2, 0, tmp_path), first)
    assert [path.name for path in tmp_path.iterdir()] == ["pool-cpu-train-0-2.npy"]
