"""The memory plan against the bytes of tensors that are really there, or would be on the meta device."""

import contextlib
import itertools
import json
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from cache_functions import CacheConfig
from hi_diffusers import SamplingOptions, generate, load_pipeline
from hi_diffusers.commands import inference, sampling
from hi_diffusers.families.hidream import family
from hi_diffusers.families.hidream.shapes import ENCODERS
from hi_diffusers.families.table import PRESETS
from hi_diffusers.memory import fitting
from hi_diffusers.memory import plan as memory_plan
from hi_diffusers.memory.plan import CUDA_RESERVE, STRATEGIES, Demand, plan_memory, ways_out
from hi_diffusers.request.drawing import Drawing
from hi_diffusers.runs.plan import demand as run_demand
from hi_diffusers.runs.plan import make_plan, open_session
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


def test_anchors_in_host_memory_are_counted_there() -> None:
    there = plan_memory(demand(FULL, CacheConfig(target="module", anchor_device="cpu")), host_budget=4 * GIB)
    here = plan_memory(demand(FULL, CacheConfig(target="module")))
    anchors = here.stages[1].tensors["anchors"]
    assert there.host("resident") - here.host("resident") == anchors
    assert not there.fits_host("resident") and replace(here, host_budget=4 * GIB).fits_host("resident")


def test_a_lora_on_the_disk_is_counted(tmp_path: Path) -> None:
    path = tmp_path / "style.safetensors"
    with path.open("wb") as file:
        file.truncate(GIB)
    plain, with_lora = (
        plan_memory(demand(FULL, CacheConfig.off(), ModelSource(loras=loras)))
        for loras in ((), (f"{path}:0.8", "someone/not-here"))
    )
    assert with_lora.weights["transformer"] - plain.weights["transformer"] == GIB


def test_a_run_is_planned_by_the_line_that_needs_most(nano_folder: Path, tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.jsonl"
    lines = [{"prompt": PROMPT}, {"prompt": PROMPT, "guidance": 4, "num_steps": 20}, {"prompt": PROMPT, "seed": 3}]
    prompts.write_text("\n".join(map(json.dumps, lines)))
    argv = ["--prompt_file", str(prompts), "--output_dir", str(tmp_path / "out"), "--guidance", "0"]
    plan = make_plan(sampling.build_parser().parse_args([*argv, "--device", "cpu", "--target", "module"]))
    options = run_demand(plan, open_session(plan)).drawing.options
    assert (options.guidance, options.num_steps) == (4, 20)


def test_a_run_that_does_not_fit_downloads_nothing(
    tmp_path: Path, budgets: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(family, "locate", lambda *_: pytest.fail("looked for files"))
    budgets(4 * GIB)
    prompts = tmp_path / "prompts.txt"
    prompts.write_text(PROMPT)
    argv = ["-m", "full", "--device", "cpu", "--cache", "taylorseer", "--prompt_file", str(prompts)]
    assert sampling.main([*argv, "--output_dir", str(tmp_path / "out")]) == 2
    assert "does not fit into 4.0 GiB" in capsys.readouterr().err and not (tmp_path / "out").exists()


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
    of_layers = "; not checked: group offload" if quantization == "none" else ""
    checked = "checked at the published sizes, on shapes alone: resident, free encoders, offload (docs/models.md)"
    expected = f"{checked}{of_layers}; on a GPU: nothing yet"
    assert expected in out.splitlines()


def test_a_plan_that_does_not_fit_says_what_would(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory_plan.psutil, "virtual_memory", lambda: SimpleNamespace(total=128 * GIB))
    assert inference.main(["--plan", "-m", "full", "--quantization", "nf4", "--vram", "8"]) == 2
    out, err = capsys.readouterr()
    assert "does not fit into 7.2 GiB" in out and "does not fit into 7.2 GiB" in err
    assert err.endswith(
        "give no --quantization, so that layers are copied to the card one by one (group offload), or --device cpu"
        " (see docs/models.md#memory)\n"
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
    assert "to keep everything on the card: --quantization nf4" in capsys.readouterr().out


def test_a_plan_says_seconds_where_they_were_measured(capsys: pytest.CaptureFixture[str]) -> None:
    assert inference.main(["--plan"]) == 0
    out = capsys.readouterr().out
    assert "seconds: 0.23 with 13 of 50" in out and "published sizes" not in out
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
