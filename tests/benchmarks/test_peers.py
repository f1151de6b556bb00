"""Everybody draws from the same weights and noise, and computes as many steps as the table says."""

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import peers
from benchmarks.ceilings import forward_flops, measure_ceilings
from benchmarks.racers import TARGETS, Course, Lap, Racer
from benchmarks.report import Result, Timing
from benchmarks.sizes import Subject, find_size
from hi_diffusers.families.hidream.fast_paths import FastPaths

CPU = torch.device("cpu")
SETTINGS = peers.Settings(CPU, torch.float32, 0, 1, 1)


@pytest.fixture(scope="module")
def course(nano_folder: Path) -> Course:
    return peers.build_course(find_size("nano"), SETTINGS)


@pytest.fixture(scope="module")
def result(nano_folder: Path) -> Result:
    return peers.measure(find_size("nano"), SETTINGS)


def full_steps(racer: Any, course: Course) -> int:
    """How often the last block's experts were asked."""
    calls = []
    gate = racer.transformer.single_stream_blocks[-1].block.ff_i.gate
    hook = gate.register_forward_hook(lambda *_: calls.append(1))
    with torch.no_grad():
        racer.run(course.subject.inputs.latents, course.subject.inputs.embeds)
    hook.remove()
    return len(calls)


def test_every_contender_computes_as_many_whole_steps_as_it_says(course):
    found = {racer.name: (full_steps(racer, course), racer.full_steps) for racer in course.racers()}
    assert {name: made for name, (made, _) in found.items()} == {name: said for name, (_, said) in found.items()}
    assert {said for name, (_, said) in found.items() if name not in ("diffusers", "ours", "ours plain")} == {13}


def test_the_uncached_ones_draw_the_same_picture_over_the_same_tensors(course):
    racers = {racer.name: racer for racer in course.racers()}
    inputs = course.subject.inputs
    with torch.no_grad():
        laps = {name: racers[name].run(inputs.latents, inputs.embeds) for name in ("diffusers", "ours", "ours plain")}
    for name in ("ours", "ours plain"):
        torch.testing.assert_close(laps[name].latents, laps["diffusers"].latents, rtol=1e-3, atol=1e-3)
    theirs = dict(racers["diffusers"].transformer.named_parameters())
    for name, parameter in course.pipe.transformer.named_parameters():
        assert parameter.data_ptr() == theirs[name].data_ptr(), name


def test_the_plain_contender_leaves_the_faster_ways_on(course):
    plain = next(racer for racer in course.racers() if racer.name == "ours plain")
    with torch.no_grad():
        plain.run(course.subject.inputs.latents, course.subject.inputs.embeds)
    assert all(
        module.fast_paths == FastPaths()
        for module in course.pipe.transformer.modules()
        if hasattr(module, "fast_paths")
    )


def test_every_target_stands_beside_its_goal_and_its_bound(result):
    ratios = {ratio.name: ratio for ratio in result.ratios}
    assert ratios["uncached"].goal == pytest.approx(1 / 1.3)
    for target in TARGETS:
        assert ratios[f"ours {target}"].bound == pytest.approx(13 / 50)
        assert ratios[f"ours {target}"].goal is None, "size small has goals for targets"
    assert ratios["ours over diffusers taylorseer"].goal == 1.0


def test_size_small_has_a_goal_for_every_target(course):
    racers = list(course.racers())
    loops = {racer.name: Timing(racer.name, "", (1.0,)) for racer in racers}
    ratios = {one.name: one for one in peers.ratios_of(racers, loops, find_size("small"), CPU)}
    for target, share in (("module", 0.80), ("residual", 0.93), ("velocity", 0.93), ("x0", 0.93)):
        assert ratios[f"ours {target}"].goal == pytest.approx(13 / 50 / share)


def test_wholes_ceilings_and_quality_are_told(result):
    facts = result.facts
    assert facts["quality, ours"].startswith("PSNR median 100")
    assert "of at most" in facts["whole picture, ours x0"] and "26 model evaluations" in facts["whole picture, ours x0"]
    assert "TFLOP/s" in facts["a full step"] and "GB/s" in facts["a forecast step, module"]
    assert ("cache-dit" in facts["contenders"]) == (find_spec("cache_dit") is not None)


def test_the_flops_of_a_forward_are_those_of_its_matrix_products():
    size = find_size("nano")
    subject = Subject.build(size, CPU, torch.float32, 0)
    before = subject.call_ours()
    once = forward_flops(subject)
    assert once == forward_flops(subject)
    torch.testing.assert_close(subject.call_ours(), before)
    parameters = sum(p.numel() for n, p in subject.transformers.ours.named_parameters() if "experts" in n)
    assert once > 2 * parameters  # each expert's weights meet at least one token


def test_ceilings_are_rates():
    ceilings = measure_ceilings(CPU, torch.float32)
    assert 1e9 < ceilings.flops < 1e15 and 1e8 < ceilings.bytes < 1e13


@pytest.mark.parametrize(
    ("flags", "said"),
    [(["--rounds", "0"], "rounds must be"), (["--size", "real", "--device", "cpu"], "must be measured on cuda")],
)
def test_a_bad_flag_is_one_line(flags, said, capsys):
    assert peers.main([*flags, "--without_cache_dit"]) == 2
    assert said in capsys.readouterr().err


def test_without_cache_dit_it_says_how_to_have_it(capsys, monkeypatch):
    monkeypatch.setattr(peers, "find_spec", lambda name: None)
    assert peers.main(["--size", "nano"]) == 2
    assert "pip install .[cache-dit]" in capsys.readouterr().err


def test_everybody_runs_once_a_round_and_the_short_ones_once_before():
    ran: list[str] = []

    def racer(name: str, full_steps: int) -> Racer:
        def run(noise: torch.Tensor, embeds: object) -> Lap:
            ran.append(name)
            return Lap(noise, float(len(ran)))

        return Racer(name, "", full_steps, run, torch.nn.Identity())

    laps = peers.race([racer("whole", 50), racer("cached", 13)], torch.zeros(1), None, rounds=3)
    assert ran == ["cached", "whole", "cached", "cached", "whole", "whole", "cached"]
    assert {name: len(found) for name, found in laps.items()} == {"whole": 3, "cached": 3}
