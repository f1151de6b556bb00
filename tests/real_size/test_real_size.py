"""HiDream-I1 at its published size on a pretended accelerator: every way to draw, without numbers.

A tensor on the wrong device or of the wrong dtype raises or is found, as is a wait of the host for the device; and the
memory that is alive is held against the plan.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from benchmarks.pretended import Alive, Crossings, WrongOutputs, pretended_device, real_tensors, spread_evenly
from benchmarks.real_size.model import CACHES, build_pretended, drawings, in_tiles, stage_peaks
from benchmarks.real_size.operations import flops_of_ours, flops_of_steps
from benchmarks.report import RESULTS
from cache_functions import CacheConfig, settle
from cache_functions.calibration import SolverChoice, calibration_text
from hi_diffusers import SamplingOptions, generate_batch
from hi_diffusers.calibrating.lockstep import Lockstep
from hi_diffusers.calibrating.plan import sampler_sigmas
from hi_diffusers.calibrating.solving import rule_on
from hi_diffusers.engine.generation import denoise_batch, encode_prompts
from hi_diffusers.families.hidream import moe
from hi_diffusers.families.table import PRESETS
from hi_diffusers.memory.plan import Demand, plan_memory
from hi_diffusers.request.drawing import Drawing
from hi_diffusers.weights.source import ModelSource

FULL, DEV, FAST = (PRESETS[name] for name in ("full", "dev", "fast"))
BF16 = torch.bfloat16
SLOW = pytest.mark.slow
OFF = CacheConfig.off()
MODULE = CacheConfig(fresh_threshold=3)
# The files that copy between host and device: ours at the start alone, diffusers' samplers at every step.
START = {"embeddings.py", "denoiser.py", "pipeline.py", "start.py"}
SAMPLERS = {"scheduling_unipc_multistep.py", "torch_utils.py"}  # the latter draws noise
SINES = ("time_proj: torch.float32", "rotary_table: torch.float32")  # of timesteps and positions: fp32 by design


@pytest.fixture(scope="module")
def device() -> Iterator[torch.device]:
    with pretended_device() as found:
        yield found


@pytest.fixture(scope="module")
def full(device: torch.device) -> Any:
    return build_pretended(FULL, device)


def strange(wrong: WrongOutputs, device: torch.device) -> list[str]:
    """Outputs that are not as they should be."""
    return [one for one in wrong.found if not one.endswith(tuple(f"{name} on {device}" for name in SINES))]


def check(
    pipe: Any,
    many: list[Drawing],
    device: torch.device,
    source: ModelSource = ModelSource(),  # noqa: B008
) -> None:
    """Draw, and hold it against what was promised."""
    alive = Alive.beside(pipe, device)
    wrong, crossings = WrongOutputs(pipe.transformer, device, BF16), Crossings()
    try:
        peaks = stage_peaks(pipe, many, alive, crossings)
    finally:
        wrong.remove()
    assert strange(wrong, device) == []
    assert set(crossings.files) <= START | SAMPLERS
    assert crossings.files["embeddings.py"] + crossings.files["denoiser.py"] <= 3  # not at every step
    plan = plan_memory(Demand(many[0], source, BF16, len(many), fp8=pipe.fp8))
    assert alive.models == pytest.approx(plan.weights, rel=0.001)
    planned = {stage.name: sum(stage.tensors.values()) for stage in plan.stages}
    planned["denoise"] = max(planned["denoise"], planned.pop("begin", 0))  # one stage of the drawing
    assert planned == pytest.approx(peaks, rel=0.03)


@pytest.mark.parametrize(
    "cache",
    [
        OFF,
        MODULE,
        pytest.param(CacheConfig(fresh_threshold=3, max_order=2), marks=SLOW),
        CacheConfig(target="residual", fresh_threshold=3),
        pytest.param(CacheConfig(target="velocity", fresh_threshold=3), marks=SLOW),
        CacheConfig(target="x0", fresh_threshold=3, corrector=True),
        pytest.param(CacheConfig(target="velocity", schedule="power", exponent=1.5, full_steps=4), marks=SLOW),
        pytest.param(CacheConfig(fresh_threshold=3, anchor_dtype="fp8"), marks=SLOW),
        pytest.param(CacheConfig(fresh_threshold=3, anchor_dtype="bf16", target="velocity"), marks=SLOW),
        CacheConfig(fresh_threshold=3, anchor_device="cpu"),
    ],
    ids=lambda cache: "-".join(
        str(v) for v in (cache.target, cache.basis, cache.anchor_dtype, cache.anchor_device) if v
    ),
)
def test_full_draws(full: Any, device: torch.device, cache: CacheConfig) -> None:
    check(full, drawings(FULL, cache), device)


@SLOW
def test_anchors_keep_no_larger_tensor_alive(full: Any, device: torch.device) -> None:
    """A view would keep the text tokens beside it, 6 % of all blocks' anchors."""
    peaks = [
        stage_peaks(full, drawings(FULL, cache, num_steps=4), Alive.beside(full, device))["denoise"]
        for cache in (MODULE, OFF)
    ]
    planned = [
        sum(plan_memory(Demand(drawings(FULL, cache, num_steps=4)[0])).stages[1].tensors.values())
        for cache in (MODULE, OFF)
    ]
    assert 0.96 < (peaks[0] - peaks[1]) / (planned[0] - planned[1]) < 1.01


@SLOW
@pytest.mark.parametrize(("width", "height"), [(1360, 768), (1024, 1024), (768, 1360)])
@pytest.mark.parametrize("cache", [OFF, MODULE], ids=["off", "module"])
def test_a_batch_of_any_shape(full: Any, device: torch.device, cache: CacheConfig, width: int, height: int) -> None:
    check(full, drawings(FULL, cache, 4, num_steps=4, width=width, height=height), device)


@SLOW
@pytest.mark.parametrize(("width", "height"), [(1360, 768), (1024, 1024)])
@pytest.mark.parametrize("masked", [False, True], ids=["whole", "in part"])
def test_a_drawing_begins_with_a_picture(
    full: Any, device: torch.device, width: int, height: int, masked: bool
) -> None:
    image = Image.new("RGB", (width, height), "red")
    mask = Image.new("L", (width, height), 255) if masked else None
    cache = CacheConfig(target="x0", full_steps=2, schedule="power", exponent=1.0)
    settings = {"image": image, "mask_image": mask, "strength": 0.6}
    check(full, drawings(FULL, cache, 2, width=width, height=height, **settings), device)


@SLOW
def test_a_solver_draws(full: Any, device: torch.device, tmp_path: Path) -> None:
    options = drawings(FULL, OFF)[0].options
    with real_tensors():
        solver = rule_on(options, (0, 2, 4, 6))
    key = options.sampler(FULL).key("pretended", "solver")
    choices = {4: SolverChoice(solver, 40.0, 35.0)}
    path = tmp_path / "solver.json"
    path.write_text(calibration_text(key, None, sampler_sigmas(options), choices, {}))
    cache = CacheConfig(target="solver", full_steps=4, calibration=str(path))
    check(full, drawings(FULL, cache, 2), device)


@SLOW
@pytest.mark.parametrize("preset", [DEV, FAST], ids=["dev", "fast"])
def test_samplers_that_add_noise(device: torch.device, preset: Any) -> None:
    pipe = build_pretended(preset, device)
    check(pipe, drawings(preset, CacheConfig(target="x0", fresh_threshold=2, max_order=0, basis="reuse"), 2), device)


@SLOW
@pytest.mark.parametrize(
    ("cache", "count"),
    [(MODULE, 1), (OFF, 1), (OFF, 4), (MODULE, 4)],
)
def test_nf4_with_a_gptq_llama(device: torch.device, cache: CacheConfig, count: int) -> None:
    pipe = build_pretended(FULL, device, "nf4")
    check(pipe, drawings(FULL, cache, count, num_steps=4), device, ModelSource(quantization="nf4"))


@SLOW
@pytest.mark.parametrize("count", [1, 4])
def test_fp8_blocks(device: torch.device, count: int) -> None:
    check(build_pretended(FULL, device, fp8=True), drawings(FULL, OFF, count, num_steps=2), device)


@SLOW
def test_only_packed_experts_wait_for_the_device(
    full: Any, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Counting a layer's tokens is the one wait that the pretended device does not see: it is replaced there."""
    waits: list[int] = []

    def count(expert: torch.Tensor, num_experts: int) -> list[int]:
        waits.append(num_experts)
        return spread_evenly(expert, num_experts)

    monkeypatch.setattr(moe, "count_tokens", count)
    num_blocks, num_full = 48, 2
    for pipe, expected in ((full, 0), (build_pretended(FULL, device, fp8=True), num_blocks * num_full)):
        waits.clear()
        generate_batch(pipe, [SamplingOptions("a red fox in snow", seed=0, num_steps=num_full)], OFF)
        assert len(waits) == expected


@SLOW
def test_a_lora(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    from peft import LoraConfig, inject_adapter_in_model

    pipe = build_pretended(FULL, device)
    config = LoraConfig(r=16, lora_alpha=16, target_modules=["to_q", "to_k", "to_v", "to_out"])
    with monkeypatch.context() as there_already:  # nothing needs to be moved, and pretended modules cannot be
        there_already.setattr(torch.nn.Module, "to", lambda module, *_, **__: module)
        inject_adapter_in_model(config, pipe.transformer, low_cpu_mem_usage=True)
    for module in pipe.transformer.modules():
        for name, one in module.named_parameters(recurse=False):
            if one.device != device:  # as peft leaves them, to be filled from a file
                there = torch.empty(one.shape, dtype=BF16, device=device)
                setattr(module, name, torch.nn.Parameter(there, requires_grad=False))
    many = drawings(FULL, MODULE)
    wrong, crossings = WrongOutputs(pipe.transformer, device, BF16), Crossings()
    stage_peaks(pipe, many, Alive.beside(pipe, device), crossings)
    assert strange(wrong, device) == []
    assert set(crossings.files) <= START | SAMPLERS


@SLOW
def test_pictures_are_decoded_in_tiles(full: Any, device: torch.device) -> None:
    many = drawings(FULL, OFF, 2, num_steps=2)
    with in_tiles(full):
        peaks = stage_peaks(full, many, Alive.beside(full, device))
    (stage,) = (one for one in plan_memory(Demand(many[0], batch_size=2)).stages if one.name == "decode")
    assert peaks["decode"] == pytest.approx(sum(stage.tiled.values()), rel=0.05)
    assert peaks["decode"] < sum(stage.tensors.values()) / 2


@SLOW
def test_embeddings_that_come_from_the_disk_and_encoders_that_are_gone(full: Any, device: torch.device) -> None:
    many = drawings(FULL, MODULE)
    embeds = encode_prompts(full, [many[0].options]).to(torch.device("cpu"))
    encoders = {name: getattr(full, name) for name in full.components if name.startswith("text_encoder")}
    full.register_modules(**dict.fromkeys(encoders))
    try:
        latents = denoise_batch(full, many, embeds.to(device))
    finally:
        full.register_modules(**encoders)
    assert (latents.shape, latents.dtype, latents.device) == ((1, 16, 128, 128), torch.float32, device)


@SLOW
def test_calibrate_evaluates_all_runs(full: Any, device: torch.device) -> None:
    many = drawings(FULL, OFF, 3, num_steps=4)
    runs = Lockstep(full, many, 2)
    with real_tensors():
        solver = rule_on(many[0].options, (0, 2))
    latents = runs.run(solver)
    assert (latents.shape, latents.device.type) == ((3, 16, 128, 128), "cpu")


@SLOW
def test_the_whole_way_of_a_program(full: Any) -> None:
    asked = [SamplingOptions("a red fox in snow", seed=seed, num_steps=4) for seed in range(2)]
    pictures = generate_batch(full, asked, settle(MODULE, 4))
    assert [one.image.size for one in pictures] == [(1024, 1024)] * 2
    assert pictures[0].metadata["model"]["device"] == "fakegpu"
    assert pictures[0].trace[0].kind == "full"


@SLOW
def test_a_step_computes_what_the_result_file_says(full: Any, device: torch.device) -> None:
    (path,) = RESULTS.glob("real_size_flops_*.json")
    committed = json.loads(path.read_text(encoding="utf-8"))
    by_kind = flops_of_ours(full, device)
    assert by_kind == committed["full_step_by_kind"]["ours"]
    for name in ("module", "residual"):
        steps = flops_of_steps(full, drawings(FULL, CACHES[name], num_steps=5)[0])
        assert {kind: steps[kind] for kind in ("full", "forecast")} == {
            kind: committed["steps"][name][kind] for kind in ("full", "forecast")
        }
    # attention by its formula: all blocks' queries and keys, image tokens and the text's, of both branches
    image, text, width, blocks = 4096, 128, 2560, 48
    queries = (blocks - 1) * (image + 2 * text) + image  # the last block's image tokens alone
    assert by_kind["attention"] == 2 * 4 * queries * (image + 3 * text) * width
