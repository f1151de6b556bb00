"""Everybody draws from the same weights and noise, and computes as many steps as the table says."""

import inspect
import re
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import peers, pipeline_peers
from benchmarks.ceilings import forward_flops, measure_ceilings
from benchmarks.pipeline_racers import PipelineCourse, counted
from benchmarks.pipelines import FAMILIES, find_stock
from benchmarks.racers import TARGETS, Course, Lap, Racer
from benchmarks.report import Result, Timing
from benchmarks.sizes import Subject, find_size
from forecasting.parts import parts
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


@pytest.mark.slow
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


@pytest.mark.slow
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
    [
        (["--rounds", "0"], "rounds must be"),
        (["--size", "real", "--device", "cpu"], "must be measured on cuda"),
        (["--family", "flux", "--rounds", "0"], "rounds must be"),
        (["--family", "flux", "--size", "nano"], "has size small alone, got nano"),
    ],
)
def test_a_bad_flag_is_one_line(flags, said, capsys):
    assert peers.main([*flags, "--without_cache_dit"]) == 2
    assert said in capsys.readouterr().err


def test_without_cache_dit_it_says_how_to_have_it(capsys, monkeypatch):
    monkeypatch.setattr(peers, "find_spec", lambda name: None)
    for flags in (["--size", "nano"], ["--family", "flux"]):
        assert peers.main(flags) == 2
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


CACHES = {"ours velocity", "ours x0", "ours module", "diffusers taylorseer", "diffusers taylorseer lite"}
CACHE_DIT = {"cache-dit", "cache-dit taylor"} if find_spec("cache_dit") else set()


@pytest.fixture(scope="module", params=FAMILIES)
def tiny_course(request: pytest.FixtureRequest) -> PipelineCourse:
    stock = find_stock(request.param, "tiny")
    return PipelineCourse(stock, stock.build(CPU, torch.float32, 0))


@pytest.fixture(scope="module")
def tiny_result(tiny_course: PipelineCourse) -> Result:
    return pipeline_peers.measure(tiny_course.stock, tiny_course.stock, SETTINGS)


def test_everybody_calls_the_transformer_of_another_family_as_often_as_planned(tiny_course):
    arguments, calls = tiny_course.stock.arguments(tiny_course.pipe, 0), tiny_course.stock.family.calls
    for way in [*tiny_course.ways(), tiny_course.idle()]:
        with counted(way.pipe.transformer) as counts:
            drawing = way.draw(arguments, "latent")
        assert counts["calls"] == way.num_calls, way.name
        assert counts["evaluations"] == len(way.full_steps) * calls, way.name
        assert len(drawing.steps) == way.num_steps and 0 < drawing.loop < drawing.whole, way.name
        if way.name in CACHES | CACHE_DIT | {"diffusers fewer"}:
            assert len(way.full_steps) == len(tiny_course.plan) == 3


def test_a_pipeline_of_another_family_is_left_as_it_was(tiny_course):
    arguments = tiny_course.stock.arguments(tiny_course.pipe, 0)
    uncached, *others = tiny_course.ways()
    before = uncached.draw(arguments).result
    for way in others:
        way.draw(arguments)
    assert uncached.draw(arguments).result.equal(before)
    weights = {parameter.data_ptr() for parameter in tiny_course.pipe.transformer.parameters()}
    for way in others:
        assert {parameter.data_ptr() for parameter in way.pipe.transformer.parameters()} == weights, way.name


def test_every_way_to_draw_another_family_has_its_rows(tiny_result):
    ways = CACHES | CACHE_DIT | {"diffusers", "diffusers fewer"}
    assert {name.removeprefix("way, ") for name in tiny_result.facts if name.startswith("way, ")} == ways
    timings, ratios = {one.name for one in tiny_result.timings}, {one.name: one for one in tiny_result.ratios}
    assert {f"{part}.{way}" for part in ("loop", "whole") for way in ways} <= timings
    for way in CACHES | CACHE_DIT:
        assert {f"step.{way}.full", f"step.{way}.forecast", f"deep.{way}.forecast"} <= timings
        assert ratios[f"{way}, loop"].bound == pytest.approx(3 / 10)
        assert ratios[f"deep {way}, own cost"].value < ratios[f"deep {way}, forecast step"].value
    assert ("skipped" in tiny_result.settings["cache-dit"]) == (find_spec("cache_dit") is None)
    assert "sanity only" in tiny_result.facts["way, ours x0"] and "nothing about quality" in tiny_result.to_markdown()


def test_nobody_draws_another_family_far_from_the_uncached_one(tiny_result):
    for name, row in tiny_result.facts.items():
        if name.startswith("way, "):
            assert float(re.findall(r"([\d.e+-]+) from uncached", row)[0]) < 0.2, name


def test_diffusers_hook_is_given_the_parts_of_target_module(tiny_course):
    family, transformer = tiny_course.stock.family, tiny_course.pipe.transformer
    names = {id(module): name for name, module in transformer.named_modules()}
    for is_forecast, patterns in ((True, family.forecast), (False, family.needless)):
        ours = {names[id(part.module)] for part in parts(transformer) if part.is_forecast == is_forecast}
        assert ours == {name for name in names.values() if any(re.fullmatch(one, name) for one in patterns)}


@pytest.mark.parametrize("family", FAMILIES)
def test_the_deep_size_has_as_many_blocks_as_the_real_model(family):
    real = inspect.signature(type(find_stock(family, "tiny").build(CPU, torch.float32, 0).transformer)).parameters
    deep = find_stock(family, "deep").transformer
    layers = {name: layers for name, layers in deep.items() if name.startswith("num_") and name.endswith("layers")}
    assert layers == {name: real[name].default for name in layers}


def test_another_family_is_measured_from_the_command_line(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(peers, "find_stock", lambda family, size: find_stock(family, "tiny"))
    flags = ["--family", "flux", "--rounds", "1", "--device", "cpu", "--without_cache_dit", "--output", str(tmp_path)]
    assert peers.main(flags) == 0
    assert {file.suffix for file in tmp_path.glob("peers_flux-tiny_*")} == {".md", ".json"}
    assert capsys.readouterr().out.startswith("# peers, size flux-tiny")
