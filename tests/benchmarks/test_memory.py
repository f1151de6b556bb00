"""benchmarks.memory without a GPU: what it builds draws, and packs what the plan says."""

from dataclasses import replace

import pytest
import torch

from benchmarks import memory
from benchmarks.architecture import build
from cache_functions import CacheConfig, settle
from hi_diffusers import SamplingOptions
from hi_diffusers.families.hidream.shapes import ENCODERS
from hi_diffusers.families.table import PRESETS
from hi_diffusers.memory.plan import Demand, plan_memory
from hi_diffusers.request.drawing import Drawing
from hi_diffusers.weights.source import ModelSource
from tests.test_memory_plan import stored_bytes


def test_without_a_gpu_it_says_what_there_is_instead(capsys: pytest.CaptureFixture[str]) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    assert memory.main([]) == 2
    assert "inference.py --plan" in capsys.readouterr().err


def test_the_built_model_draws_and_packs_what_the_plan_says(nano_folder: object) -> None:
    """At nano's size on a CPU; bytes are counted, peaks are not."""
    device, preset = torch.device("cpu"), PRESETS["nano"]
    options = SamplingOptions("", seed=0, guidance=2.0).resolve(preset)
    drawing = Drawing(preset, options, CacheConfig.off())
    demand = Demand(drawing, ModelSource(quantization="nf4"), torch.bfloat16)
    pipe = build(preset, device, torch.bfloat16, "nf4")
    planned = plan_memory(demand).weights
    for name in set(planned) - {"text_encoder_4"}:
        assert stored_bytes(getattr(pipe, name)) == pytest.approx(planned[name], rel=0.02), name
    for cache, strategy in memory.CACHES.values():
        one = replace(demand, drawing=replace(drawing, cache=settle(cache, memory.NUM_STEPS)))
        rows = memory.measure(pipe, one, strategy, device, lambda: 1)
        assert [row["stage"] for row in rows] == ["encode", "denoise", "decode"]
    assert all(getattr(pipe, name) is None for name in ENCODERS)
