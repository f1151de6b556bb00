"""Cache and diffusers' context parallelism together: FLUX and Wan, two processes over gloo."""

import pytest
import torch

from tests.parallel.test_ranks import torchrun


@pytest.mark.slow
def test_forecast_pipelines_draw_over_two_ranks_what_they_draw_alone(tmp_path):
    found = []
    for count in (1, 2):
        done = torchrun(count, "-m", "tests.parallel.pipeline_worker", tmp_path / f"{count}.pt", count)
        assert done.returncode == 0, done.stderr
        found.append(torch.load(tmp_path / f"{count}.pt", weights_only=True))
    alone, shared = found
    assert len(alone) == 20 and set(alone) == set(shared)
    for name in alone:
        (latents, kinds, kept), (expected, of_one, whole) = shared[name], alone[name]
        assert kinds == of_one
        assert (latents - expected).abs().max() < 1e-5 * expected.abs().max(), name
        assert kept == (whole / 2 if name.endswith("module") else whole), name
