"""The numbering of a run's pictures follows from its configuration alone."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest

from hi_diffusers.runs.prompt_files import PromptLine
from hi_diffusers.runs.units import Numbering, Shard, Task

RUN = Numbering(num_prompts=5, num_images=2, base_seed=0, suffix=".png", unit_size=3)
LINES = [PromptLine(index, index + 1, f"prompt {index}") for index in range(5)]


def units(numbering: Numbering = RUN, due: Sequence[int] | None = None) -> list[list[Task]]:
    wanted = np.ones(numbering.num_pictures, bool) if due is None else np.zeros(numbering.num_pictures, bool)
    wanted[list(due or ())] = True
    return list(numbering.units(LINES, wanted))


def test_units_are_fixed_ranges_of_pictures() -> None:
    assert [[task.number for task in unit] for unit in units()] == [[0, 1, 2], [3, 4, 5], [6, 7, 8], [9]]
    assert [(task.line.index, task.image) for task in units()[1]] == [(1, 1), (2, 0), (2, 1)]


def test_a_unit_with_one_picture_missing_is_drawn_whole_for_that_one() -> None:
    (unit,) = units(due=[4])
    assert [(task.number, task.wanted) for task in unit] == [(3, False), (4, True), (5, False)]


def test_no_unit_is_made_when_nothing_is_due() -> None:
    assert units(due=[]) == []


def test_shards_share_the_units_without_overlap() -> None:
    shares = [RUN.of_shard(Shard(index, 2)) for index in range(2)]
    assert not (shares[0] & shares[1]).any()
    assert (shares[0] | shares[1]).all()
    assert np.flatnonzero(shares[1]).tolist() == [3, 4, 5, 9]


def test_a_seed_depends_on_base_seed_prompt_and_image_alone() -> None:
    other_split = replace(RUN, unit_size=1, suffix=".jpg")
    assert [task.seed for unit in units() for task in unit] == [t.seed for unit in units(other_split) for t in unit]
    seeds = {RUN.seed(line, image) for line in LINES for image in range(2)}
    assert len(seeds) == 10
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert replace(RUN, base_seed=1).seed(LINES[0], 0) not in seeds


def test_a_line_with_a_seed_of_its_own_counts_on_from_it() -> None:
    line = PromptLine(0, 1, "a", {"seed": 7})
    assert [RUN.seed(line, image) for image in range(2)] == [7, 8]


@pytest.mark.parametrize(
    ("num_prompts", "num_images", "number", "name"),
    [
        (200, 1, 7, "00007_00.png"),
        (200, 4, 7, "00001_03.png"),
        (9_999, 1, 9_998, "09998_00.png"),
        (10_000, 1, 9_999, "00009/09999_00.png"),
        (2_000_000, 1, 1_234_567, "01234/1234567_00.png"),
        (1, 200, 150, "00000_150.png"),
    ],
)
def test_file_names_are_as_wide_as_the_run_needs(num_prompts: int, num_images: int, number: int, name: str) -> None:
    assert Numbering(num_prompts, num_images, 0, ".png", 1).file_name(number) == name


def test_indices_and_limit_choose_prompts_with_all_their_pictures() -> None:
    assert np.flatnonzero(RUN.of_prompts("0,2-3", None)).tolist() == [0, 1, 4, 5, 6, 7]
    assert np.flatnonzero(RUN.of_prompts("0,2-3", 3)).tolist() == [0, 1, 4, 5]
    assert RUN.of_prompts(None, None).all()


@pytest.mark.parametrize("indices", ["", "a", "3-1", "-1", "5", "1-", "0,,1", "²"])
def test_indices_that_are_none_are_refused(indices: str) -> None:
    with pytest.raises(ValueError, match="indices must be numbers and ranges like 0-49,180, up to 4"):
        RUN.of_prompts(indices, None)


def test_a_limit_below_one_and_a_shard_out_of_range_are_refused() -> None:
    with pytest.raises(ValueError, match="limit must be at least 1, got 0"):
        RUN.of_prompts(None, 0)
    for index, count in ((2, 2), (0, 0), (-1, 2)):
        with pytest.raises(ValueError, match=f"shard must be I/N with I from 0 to N - 1, got {index}/{count}"):
            Shard(index, count)
