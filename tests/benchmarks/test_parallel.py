"""The benchmark of several ranks: its arithmetic, its refusals, and a run."""

import json

import pytest

from benchmarks import parallel
from hi_diffusers.denoising.ranks import Split


def test_bytes_of_a_step_by_hand():
    sizes = {"image": 8, "text": 4, "width": 4, "blocks": 2, "itemsize": 2, "latent_bytes": 100}
    # two branches; of queries and outputs 16 and 8 tokens, of keys and values 20 in both blocks; half of a rank's half
    # goes to the other rank
    attention, velocity = parallel.exchanged(Split(2), **sizes)
    assert (attention, velocity) == (2 * (2 * (16 + 8) + 2 * (20 + 20)) * 4 * 2 // 2 // 2, 0)
    assert parallel.exchanged(Split(1, True), **sizes) == (0, 100)
    assert parallel.exchanged(Split(2, True), **sizes) == (attention // 2, 100)


def test_what_is_expected_says_that_it_was_computed():
    computed = parallel.expected()
    assert computed["what"].startswith("computed, not measured")
    rows = computed["rows"]
    assert rows["one rank"]["NVLink 4"]["ratio"] == 1
    assert 1.9 < rows["ulysses 2"]["NVLink 4"]["ratio"] < rows["guidance"]["NVLink 4"]["ratio"] == 2
    assert rows["ulysses 4"]["PCIe 4.0 x16"]["ratio"] < rows["ulysses 2 x guidance"]["PCIe 4.0 x16"]["ratio"]


@pytest.mark.parametrize("ranks", ["3", "1,16", "0", "two"])
def test_other_numbers_of_ranks_are_refused(ranks, capsys):
    assert parallel.main(["--device", "cpu", "--ranks", ranks]) == 2
    assert "--ranks must be some of 1, 2, 4, 8" in capsys.readouterr().err


@pytest.mark.slow
def test_a_run_over_two_ranks(tmp_path, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    flags = ["--ranks", "1,2", "--num_steps", "3", "--rounds", "1", "--loops", "1", "--output", str(tmp_path)]
    assert parallel.main(["--device", "cpu", "--size", "nano", *flags]) == 0
    (path,) = tmp_path.glob("parallel_nano_*.json")
    measured = json.loads(path.read_text())["measured"]
    assert set(measured) == {"one rank", "guidance", "ulysses 2"}
    for name, row in measured.items():
        assert row["uncached"]["largest difference"] < 1e-4
        assert row["taylorseer"]["cache MiB a rank"] * row["ranks"] == pytest.approx(
            measured["one rank"]["taylorseer"]["cache MiB a rank"], abs=0.01
        ), name
