"""The memory plan against the bytes of tensors that are really there, or would be on the meta device."""

import contextlib
import itertools
import re
import weakref
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.architecture import meta_components
from cache_functions import CacheConfig
from hi_diffusers import SamplingOptions, generate, load_pipeline
from hi_diffusers.commands import inference
from hi_diffusers.families.hidream import family
from hi_diffusers.families.hidream.moe import MoEFeedForward
from hi_diffusers.families.hidream.shapes import ENCODERS
from hi_diffusers.families.table import PRESETS, find_family
from hi_diffusers.memory import fitting
from hi_diffusers.memory import plan as memory_plan
from hi_diffusers.memory.plan import CUDA_RESERVE, STRATEGIES, Demand, plan_memory, ways_out
from hi_diffusers.memory.sizes import forward_bytes
from hi_diffusers.request.drawing import Drawing
from hi_diffusers.weights.source import GIB, ModelSource

PROMPT = "a large yellow circle on a blue background"
NANO, FULL = PRESETS["nano"], PRESETS["full"]
NF4 = ModelSource(quantization="nf4")


def demand(preset: Any, cache: CacheConfig, source: ModelSource = ModelSource(), **more: Any) -> Demand:  # noqa: B008
    """What drawing the prompt asks of a card."""
    return Demand(Drawing(preset, resolved(preset), cache), source, **more)


def resolved(preset: Any, **options: Any) -> Any:
    return SamplingOptions(PROMPT, seed=1, **options).resolve(preset)


def stored_bytes(module: torch.nn.Module) -> int:
    """Of all parameters, with what quantization keeps beside them."""
    total = 0
    for parameter in module.parameters():
        total += parameter.numel() * parameter.element_size()
        state = getattr(parameter, "quant_state", None)
        if state is not None:
            total += state.absmax.numel() * state.absmax.element_size()
    return total


@pytest.mark.parametrize(("quantization", "dtype"), [("none", "fp32"), ("none", "bf16"), ("nf4", "bf16")])
def test_the_weights_are_those_that_loading_makes(nano_folder: Path, quantization: str, dtype: str) -> None:
    pipe = load_pipeline("nano", device="cpu", quantization=quantization, dtype=dtype)
    precision = {"fp32": torch.float32, "bf16": torch.bfloat16}[dtype]
    plan = plan_memory(demand(NANO, CacheConfig.off(), ModelSource(quantization=quantization), dtype=precision))
    for name, planned in plan.weights.items():
        assert planned == pytest.approx(stored_bytes(getattr(pipe, name)), rel=0.02), name


@pytest.mark.parametrize(
    "cache",
    [
        CacheConfig(target="module", max_order=1),
        CacheConfig(target="module", max_order=2, fresh_threshold=2),
        CacheConfig(target="residual"),
        CacheConfig(target="velocity"),
        CacheConfig(target="x0", max_order=2, fresh_threshold=2),
    ],
    ids=lambda cache: f"{cache.target}-{cache.max_order}",
)
@pytest.mark.parametrize("guidance", [0.0, 2.0])
def test_the_anchors_are_those_that_a_drawing_keeps(nano_folder: Path, cache: CacheConfig, guidance: float) -> None:
    options = SamplingOptions(PROMPT, seed=1, num_steps=12, guidance=guidance)
    drawn = generate(load_pipeline("nano", device="cpu"), options, cache)
    kept = max(record.cache_bytes for record in drawn.trace)
    plan = plan_memory(Demand(Drawing(NANO, options.resolve(NANO), cache), dtype=torch.float32))
    (denoise,) = (stage for stage in plan.stages if stage.name == "denoise")
    assert denoise.tensors["anchors"] == pytest.approx(kept, rel=0.02)


def test_the_published_sizes() -> None:
    """17.1 B parameters, and the figures of the models' own files."""
    plain = plan_memory(demand(FULL, CacheConfig.off()))
    assert plain.weights["transformer"] / GIB == pytest.approx(31.86, rel=0.02)
    assert plain.weights["text_encoder_3"] / GIB == pytest.approx(9.52e9 / GIB, rel=0.02)
    assert plain.weights["text_encoder_4"] / GIB == pytest.approx(15.0 - 0.98, rel=0.02)
    packed = plan_memory(demand(FULL, CacheConfig.off(), NF4))
    assert packed.weights["text_encoder_4"] / GIB == pytest.approx(4.4, rel=0.02)
    kept = plan_memory(demand(FULL, CacheConfig(target="module"), NF4))
    assert kept.stages[1].tensors["anchors"] / GIB == pytest.approx(7.5, rel=0.02)


class LiveBytes(TorchDispatchMode):
    """The most bytes of tensors alive at once, of those made while the mode is on.

    Args:
        there: tensors that are no news, nor are views of them.
    """

    def __init__(self, there: Iterable[torch.Tensor]):
        super().__init__()
        self.now = self.most = 0
        self.seen = {tensor.untyped_storage()._cdata for tensor in there}

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else (result,):
            if isinstance(tensor, torch.Tensor):
                self._count(tensor.untyped_storage())
        return result

    def _count(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key in self.seen:
            return
        self.seen.add(key)
        size = storage.nbytes()
        self.now += size
        self.most = max(self.most, self.now)
        weakref.finalize(storage, self._forget, key, size)

    def _forget(self, key: int, size: int) -> None:
        self.now -= size
        self.seen.discard(key)


def test_a_forward_of_the_full_size_holds_what_is_planned(monkeypatch: pytest.MonkeyPatch) -> None:
    """On the meta device: the shapes are the real ones, and nothing is allocated."""
    # the meta device would write out the matrix of scores, which no attention kernel of a GPU does
    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", lambda query, **_: torch.empty_like(query))
    shapes = find_family(FULL).shapes(FULL, ModelSource())
    transformer = meta_components(FULL)["transformer"].to(torch.bfloat16).eval().requires_grad_(False)
    latents = torch.empty(2, 16, 128, 128, dtype=torch.bfloat16, device="meta")
    sizes = ((2, 128, 4096), (32, 2, 128, 4096), (2, 2048))
    text = [torch.empty(size, dtype=torch.bfloat16, device="meta") for size in sizes]
    conditioning, timesteps = transformer.prepare(*text, (64, 64)), torch.empty(2, device="meta")
    for module in transformer.modules():
        if isinstance(module, MoEFeedForward):  # as on CUDA; what is on the meta device is not stacked by itself
            module._stack = module._build_stack()
    live = LiveBytes([*transformer.parameters(), *conditioning.llama, conditioning.text, conditioning.pooled, latents])
    with live, torch.no_grad():
        transformer(latents, timesteps, conditioning=conditioning, return_dict=False)
    planned = forward_bytes(shapes, resolved(FULL), 2, torch.bfloat16)
    assert planned == pytest.approx(live.most, rel=0.1)


def test_full_in_nf4_fits_a_card_of_24_gib() -> None:
    budget = 24 * GIB - CUDA_RESERVE
    latents = plan_memory(demand(FULL, CacheConfig(target="x0"), NF4), budget)
    module = plan_memory(demand(FULL, CacheConfig(target="module"), NF4), budget)
    assert (latents.choice, module.choice) == (("resident", False), ("free encoders", False))


def test_what_cannot_fit_is_told_with_what_would() -> None:
    drawing = demand(FULL, CacheConfig(target="module"))
    plan = plan_memory(drawing, 4 * GIB)
    assert plan.strategy is None
    assert plan.sentence() == "does not fit into 4.0 GiB: even with group offload it needs 10.7 GiB"
    assert ways_out(drawing, 4 * GIB) == [
        "--cache best, which keeps a few latents (group offload)",
        "--anchor_device cpu (group offload)",
        "--device cpu",
    ]


def test_the_milder_strategy_is_taken() -> None:
    plan = plan_memory(demand(FULL, CacheConfig(target="x0")))
    ways = [(name, tiled) for name in STRATEGIES for tiled in (False, True)]
    peaks = [plan.peak(*way) for way in ways]
    assert peaks == sorted(peaks, reverse=True)
    for way, peak in zip(ways, peaks, strict=True):
        chosen = replace(plan, budget=peak).choice
        assert chosen is not None and plan.peak(*chosen) == peak and ways.index(chosen) <= ways.index(way)
    assert replace(plan, budget=peaks[-1] - 1).choice is None


def test_encoders_on_another_device_take_nothing_of_the_card() -> None:
    drawing = demand(FULL, CacheConfig(target="x0"), NF4)
    apart = plan_memory(replace(drawing, encoders_elsewhere=True))
    assert apart.peak("resident") == plan_memory(drawing).peak("free encoders")
    assert "free encoders" not in apart.strategies


def test_anchors_are_counted_as_they_are_kept() -> None:
    def anchors(**how: str) -> int:
        cache = CacheConfig(target="module", **how)
        return plan_memory(demand(FULL, cache)).stages[1].tensors["anchors"]

    assert anchors(anchor_dtype="fp8") * 2 == anchors() == anchors(anchor_dtype="bf16")
    assert anchors(anchor_device="cpu") == 0


# The command line.


@pytest.fixture
def budgets(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Pretend that the device has a budget, in bytes."""

    def set_budget(value: int | None) -> None:
        monkeypatch.setattr(fitting, "memory_budget", lambda device, vram: value)

    yield set_budget


def test_running_out_while_drawing_ends_in_what_would_help(
    nano_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def run_out(*_: Any, **__: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(inference, "draw_with_progress", run_out)
    assert inference.main([PROMPT, "--device", "cpu", "--cache", "taylorseer", "-o", str(tmp_path / "a.png")]) == 1
    assert "out of memory: close other programs on the GPU, or give " in capsys.readouterr().err


def pixels(path: Path) -> np.ndarray:
    from PIL import Image

    return np.asarray(Image.open(path))


def test_encoders_that_are_freed_change_no_pixel(
    nano_folder: Path, tmp_path: Path, budgets: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = [PROMPT, "--seed", "3", "--num_steps", "8", "--guidance", "2", "--device", "cpu", "-o"]
    assert inference.main([*argv, str(tmp_path / "resident.png")]) == 0
    plan = plan_memory(demand(NANO, CacheConfig(target="x0"), dtype=torch.float32))
    budgets((plan.peak("resident") + plan.peak("free encoders")) // 2)
    assert inference.main([*argv, str(tmp_path / "freed.png")]) == 0
    assert "free encoders: " in capsys.readouterr().err
    assert np.array_equal(pixels(tmp_path / "resident.png"), pixels(tmp_path / "freed.png"))


def test_offloading_is_refused_where_the_hosts_memory_is_too_small(
    budgets: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(memory_plan.psutil, "virtual_memory", lambda: SimpleNamespace(total=30 * GIB))
    budgets(7 * GIB)
    assert inference.main(["-m", "full", "--device", "cpu", "--dtype", "bf16"]) == 2
    error = capsys.readouterr().err
    assert "group offload needs" in error and "GiB of host memory, and this machine has 30.0: give" in error


def test_what_does_not_fit_is_refused_before_loading(
    tmp_path: Path, budgets: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(family, "locate", lambda *_: pytest.fail("looked for files"))
    budgets(4 * GIB)
    assert (
        inference.main(["-m", "full", "--cache", "taylorseer", "--device", "cpu", "-o", str(tmp_path / "a.png")]) == 2
    )
    (line,) = (line for line in capsys.readouterr().err.splitlines() if "error" in line)
    assert "does not fit into 4.0 GiB" in line and "--device cpu" in line


@pytest.mark.parametrize(
    ("model", "quantization", "cache"),
    itertools.product(("full", "dev", "fast"), ("none", "nf4"), ("off", "taylorseer", "best")),
)
def test_a_plan_needs_no_files(model: str, quantization: str, cache: str, capsys: pytest.CaptureFixture[str]) -> None:
    with contextlib.suppress(SystemExit):
        assert inference.main(["--plan", "-m", model, "--quantization", quantization, "--cache", cache]) == 0
    out = capsys.readouterr().out
    assert [line.split()[0] for line in out.splitlines()[1:4]] == ["encode", "denoise", "decode"]
    assert all(name in out for name in (*ENCODERS, "transformer", "vae"))


def test_a_plan_that_does_not_fit_says_what_would(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory_plan.psutil, "virtual_memory", lambda: SimpleNamespace(total=128 * GIB))
    assert inference.main(["--plan", "-m", "full", "--quantization", "nf4", "--vram", "8"]) == 2
    out, err = capsys.readouterr()
    assert "does not fit into 7.2 GiB" in out and "does not fit into 7.2 GiB" in err
    assert err.endswith(
        "give no --quantization, so that layers are copied to the card one by one (group offload), or --device cpu\n"
    )


def test_a_plan_that_the_host_cannot_hold_is_refused_with_what_fits(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory_plan.psutil, "virtual_memory", lambda: SimpleNamespace(total=24 * GIB))
    assert inference.main(["--plan", "-m", "full", "--vram", "24"]) == 2
    assert (
        "GiB of host memory, and this machine has 24.0: give --quantization nf4 (resident)" in capsys.readouterr().err
    )
    monkeypatch.setattr(memory_plan.psutil, "virtual_memory", lambda: SimpleNamespace(total=128 * GIB))
    assert inference.main(["--plan", "-m", "full", "--vram", "24"]) == 0
    assert "with --quantization nf4 everything would stay on the card" in capsys.readouterr().out


def test_a_plan_says_seconds_where_they_were_measured(capsys: pytest.CaptureFixture[str]) -> None:
    assert inference.main(["--plan"]) == 0 and "seconds: 0.23 with 13 of 50" in capsys.readouterr().out
    assert (
        inference.main(["--plan", "-m", "full"]) == 0 and "seconds: none measured for full" in capsys.readouterr().out
    )


def test_the_table_of_cards_is_what_the_plan_says(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory_plan.psutil, "virtual_memory", lambda: SimpleNamespace(total=128 * GIB))
    text = (Path(__file__).parents[1] / "docs" / "models.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (\d+) GB \| `([^`]+)` \| ([a-z ]+?)(?: \(.*\))? \| ([\d.]+ GiB) \|$", text, re.MULTILINE)
    assert len(rows) >= 6
    for card, command, way, peak in rows:
        assert inference.main([*command.split(), "--plan", "--vram", card]) == 0
        lines = capsys.readouterr().out.splitlines()
        assert any(line.startswith(f"{way}: ") and f", {peak} of " in line for line in lines)


@pytest.mark.parametrize("vram", ["0", "-1", "much", "nan"])
def test_a_senseless_vram_is_refused(vram: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert inference.main([PROMPT, "--vram", vram]) == 2
    assert f"--vram: must be auto, or a number of GiB above 0, got {vram!r}" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("given", "said"),
    [("--anchor_device cpu", "--anchor_device cpu has no effect"), ("--vram 8", "--vram has no effect on cpu")],
)
def test_what_has_no_effect_on_a_cpu_is_said(
    given: str, said: str, nano_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = [
        PROMPT,
        *given.split(),
        "--full_steps",
        "1",
        "--device",
        "cpu",
        "--num_steps",
        "2",
        "-o",
        str(tmp_path / "a.png"),
    ]
    assert inference.main(argv) == 0
    assert said in capsys.readouterr().err
