"""HiDream-I1's compiled blocks at their published sizes: whole graphs, and how many of them a session takes."""

import pytest

from benchmarks.real_size.graphs import count_graphs


@pytest.mark.slow
def test_compiled_blocks_are_whole_graphs_and_new_ones_end() -> None:
    """Five sizes in four batches were more variants than torch allows, 8, and the ninth ended the session."""
    by_branches: dict[int, list[int]] = {}
    for row in count_graphs():
        by_branches.setdefault(row["branches"], []).append(row["new_graphs"])
    # the first square picture, and the first padded one; four branches after eight are nothing new
    assert by_branches == {2: [6, 3, 0, 0, 0], 8: [5, 3, 0, 0, 0], 1: [5, 3, 0, 0, 0], 4: [0] * 5}
