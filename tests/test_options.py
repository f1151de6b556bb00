import argparse
import json
from dataclasses import fields

import pytest

from cache_functions import CacheConfig
from hi_diffusers.families.table import PRESETS
from hi_diffusers.flags import add_arguments, cache_from, options_from
from hi_diffusers.request.options import ResolvedOptions, SamplingOptions

NANO, FAST, FULL = PRESETS["nano"], PRESETS["nano-fast"], PRESETS["full"]
OF_THE_PRESET = ("num_steps", "guidance", "scheduler", "shift", "max_sequence_length")


def parse(*argv: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    return parser.parse_args(argv)


@pytest.mark.parametrize(
    ("name", "values", "allowed"),
    [
        ("prompt", (None, 7, ["a"]), "text"),
        ("negative_prompt", (None, b"a"), "text"),
        ("seed", (-2, 2**64, 1.5, "7", True), "a whole number from 0 to 18446744073709551615"),
        ("width", (0, -8, 16385, 64.0, "64"), "a whole number from 1 to 16384"),
        ("height", (0, -8, 16385, 64.0, True), "a whole number from 1 to 16384"),
        ("num_steps", (0, -1, 1001, 2.5, "9"), "a whole number from 1 to 1000"),
        ("guidance", (-0.1, 100.1, float("nan"), float("inf"), "3", True), "a number from 0 to 100"),
        ("shift", (0, 0.0, -3, 101, float("nan"), "3"), "a number from 0.01 to 100"),
        ("scheduler", ("ddim", "", "UNIPC", 3), "one of unipc, euler, lcm"),
        ("max_sequence_length", (7, 219, 32.0, "32"), "a whole number from 8 to 218"),
    ],
)
def test_a_value_out_of_its_domain_is_refused_with_name_value_and_what_is_allowed(
    name: str, values: tuple, allowed: str
) -> None:
    for value in values:
        with pytest.raises(ValueError) as refused:
            SamplingOptions(**({"prompt": "a", "width": 64, "height": 64} | {name: value}))
        assert str(refused.value) == f"{name} must be {allowed}, got {value!r}"


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("seed", (0, 2**63 - 1, 2**64 - 1)),
        ("num_steps", (1, 1000)),
        ("guidance", (0, 1.0, 100)),
        ("shift", (0.01, 1, 100)),
        ("scheduler", ("unipc", "euler", "lcm")),
        ("max_sequence_length", (8, 218)),
    ],
)
def test_the_ends_of_a_domain_are_allowed(name: str, values: tuple) -> None:
    for value in values:
        assert getattr(SamplingOptions("a", **{name: value}).resolve(NANO), name) == value


def test_a_side_that_is_not_given_is_the_model_s() -> None:
    wide, tall = SamplingOptions("a", width=128).resolve(NANO), SamplingOptions("a", height=128).resolve(NANO)
    both = SamplingOptions("a", width=128, height=64).resolve(NANO)
    assert (wide.width, wide.height) == (tall.height, tall.width) == (both.width, both.height) == (88, 40)
    assert "128x64" in wide.notices[0] and "64x128" in tall.notices[0]


@pytest.mark.parametrize("preset", PRESETS.values(), ids=PRESETS)
def test_what_is_left_open_is_the_preset_s(preset) -> None:
    resolved = SamplingOptions("a").resolve(preset)
    assert {name: getattr(resolved, name) for name in OF_THE_PRESET} == {
        name: getattr(preset, name) for name in OF_THE_PRESET
    }
    assert resolved.width * resolved.height == preset.area and resolved.width == resolved.height
    assert resolved.notices == ()


def test_what_is_given_is_not_the_preset_s() -> None:
    given = {"num_steps": 7, "guidance": 0.0, "scheduler": "euler", "shift": 1.0, "max_sequence_length": 8, "seed": 0}
    resolved = SamplingOptions("a", **given).resolve(NANO)
    assert {name: getattr(resolved, name) for name in given} == given


def test_a_seed_that_is_not_given_is_drawn_anew_each_time() -> None:
    seeds = {SamplingOptions("a").resolve(NANO).seed for _ in range(8)}
    assert len(seeds) > 1
    assert all(0 <= seed < 2**32 for seed in seeds)


def test_resolved_settings_resolve_to_themselves() -> None:
    resolved = SamplingOptions("a", width=100, height=60).resolve(NANO)
    again = SamplingOptions(**resolved.settings()).resolve(NANO)
    assert again.settings() == resolved.settings()
    assert again.notices == (), "a size that was changed once must not change again"


def test_settings_survive_json() -> None:
    settings = SamplingOptions("red \N{ARTIST PALETTE}", seed=2**63 - 1).resolve(NANO).settings()
    assert json.loads(json.dumps(settings)) == settings


def test_a_size_that_is_drawn_differently_is_said_with_both_sizes() -> None:
    resolved = SamplingOptions("a", width=512, height=512).resolve(FULL)
    assert (resolved.width, resolved.height) == (1024, 1024)
    (notice,) = resolved.notices
    assert "512x512" in notice and "1024x1024" in notice and "full" in notice


def test_a_size_that_is_drawn_as_it_is_is_not_mentioned() -> None:
    assert SamplingOptions("a", width=1360, height=768).resolve(FULL).notices == ()


def test_an_extreme_shape_is_refused() -> None:
    with pytest.raises(ValueError, match="16384x1"):
        SamplingOptions("a", width=16384, height=1).resolve(NANO)


@pytest.mark.parametrize("guidance", [0.0, 0.5, 1.0])
def test_a_negative_prompt_without_guidance_is_said_to_have_no_effect(guidance: float) -> None:
    (notice,) = SamplingOptions("a", "b", guidance=guidance).resolve(NANO).notices
    assert "negative prompt" in notice and f"{guidance:g}" in notice


def test_a_negative_prompt_with_guidance_is_not_mentioned() -> None:
    assert SamplingOptions("a", "b", guidance=1.01).resolve(NANO).notices == ()


def test_two_branches_are_evaluated_above_a_guidance_of_1_only() -> None:
    assert [SamplingOptions("a", guidance=g).resolve(NANO).guided for g in (0, 1.0, 1.01)] == [False, False, True]


def test_lcm_alone_adds_noise_at_every_step() -> None:
    renoising = [s for s in ("unipc", "euler", "lcm") if SamplingOptions("a", scheduler=s).resolve(NANO).renoises]
    assert renoising == ["lcm"]


# Flags.


def test_every_option_and_every_setting_of_the_cache_has_a_flag() -> None:
    flags = set(vars(parse()))
    assert {field.name for field in fields(SamplingOptions)} - {"prompt"} <= flags
    assert {field.name for field in fields(CacheConfig)} <= flags


def test_no_flag_at_all_leaves_everything_to_the_preset() -> None:
    assert options_from(parse(), "a", {}) == SamplingOptions("a")
    assert cache_from(parse(), CacheConfig(), 50) == CacheConfig()


def test_flags_reach_the_options() -> None:
    argv = (
        "--seed 5 --width 80 --height 48 --num_steps 9 --guidance 2.5 --scheduler euler --shift 2 --negative_prompt b"
    )
    args = parse(*argv.split(), "--max_sequence_length", "16")
    assert options_from(args, "a", {}) == SamplingOptions("a", "b", 5, 80, 48, 9, 2.5, "euler", 2.0, 16)


def test_flags_reach_the_cache() -> None:
    argv = "--cache taylorseer --target x0 --basis taylor --schedule interval --fresh_threshold 3 --max_order 2"
    args = parse(*argv.split(), "--first_enhance", "2", "--last_enhance", "1")
    expected = CacheConfig("x0", "taylor", "interval", fresh_threshold=3, max_order=2, first_enhance=2, last_enhance=1)
    assert cache_from(args, CacheConfig(), 50) == expected


BEST = CacheConfig.best()


def asked(*argv: str, base: CacheConfig = BEST) -> CacheConfig:
    return cache_from(parse(*argv), base, 50)


@pytest.mark.parametrize(
    ("name", "config"),
    [("best", BEST), ("taylorseer", CacheConfig()), ("hicache", CacheConfig.hicache()), ("off", CacheConfig.off())],
)
def test_the_cache_s_name_is_its_setting(name: str, config: CacheConfig) -> None:
    assert asked("--cache", name, base=CacheConfig(max_order=3)) == config


def test_budget_target_and_calibration_leave_the_best_the_best() -> None:
    config = asked("--full_steps", "8", "--target", "velocity", "--calibration", "a.json")
    assert config == CacheConfig(schedule="best", full_steps=8, target="velocity", calibration="a.json")


def test_a_flag_that_names_a_rule_starts_from_the_published_setting_where_the_best_is_the_default() -> None:
    assert asked("--basis", "hermite", "--full_steps", "10") == CacheConfig(basis="hermite", full_steps=10)
    assert asked("--fresh_threshold", "6") == CacheConfig(fresh_threshold=6)
    assert asked("--corrector", "--target", "x0") == CacheConfig(target="x0", corrector=True)


def test_a_rule_beside_the_best_asked_for_by_name_is_refused() -> None:
    with pytest.raises(ValueError, match=r"^basis is chosen by cache best: drop it"):
        asked("--cache", "best", "--basis", "hermite")


def test_a_speedup_is_a_budget() -> None:
    assert asked("--speedup", "4") == CacheConfig(schedule="best", full_steps=13)
    assert asked("--cache", "taylorseer", "--speedup", "4") == CacheConfig(full_steps=13)


@pytest.mark.parametrize("other", ["--full_steps", "--fresh_threshold"])
def test_a_speedup_beside_another_budget_is_refused(other: str) -> None:
    with pytest.raises(
        ValueError, match=r"^speedup 4 sets the number of full steps: drop full_steps and fresh_threshold"
    ):
        asked("--speedup", "4", other, "5")


def test_a_mask_is_its_own_schedule() -> None:
    assert asked("--step_mask", "0,4,9") == CacheConfig(schedule="mask", mask=(0, 4, 9))


def test_another_budget_replaces_the_one_of_another_picture() -> None:
    drawn = CacheConfig(target="module", fresh_threshold=4)
    assert asked("--full_steps", "10", base=drawn) == CacheConfig(target="module", full_steps=10)
    drawn = CacheConfig(schedule="mask", mask=(0, 4), full_steps=2, target="x0")
    assert asked("--step_mask", "0,5", base=drawn) == CacheConfig(schedule="mask", mask=(0, 5), target="x0")


def test_another_schedule_or_basis_drops_what_went_with_the_one_before() -> None:
    drawn = CacheConfig(schedule="power", exponent=3.0, full_steps=9, basis="taylor", sigma=0.7, max_order=2)
    assert asked("--schedule", "cosine", base=drawn) == CacheConfig(
        schedule="cosine", basis="taylor", sigma=0.7, max_order=2
    )
    assert asked("--basis", "reuse", base=drawn) == CacheConfig(
        schedule="power", exponent=3.0, full_steps=9, basis="reuse"
    )


@pytest.mark.parametrize("text", ["80x48", "80X48"])
def test_a_resolution_is_both_sides(text: str) -> None:
    options = options_from(parse("--resolution", text), "a", {})
    assert (options.width, options.height) == (80, 48)


@pytest.mark.parametrize("text", ["80", "80x", "x48", "80x48x3", "80*48", "-80x48", "8 0x48", "８０x48", "axb", ""])
def test_a_resolution_of_another_form_is_refused(text: str) -> None:
    with pytest.raises(ValueError) as refused:
        options_from(parse(f"--resolution={text}"), "a", {})
    assert str(refused.value) == f"resolution must be WIDTHxHEIGHT such as 1360x768, got {text!r}"


@pytest.mark.parametrize("side", ["--width", "--height"])
def test_a_resolution_beside_a_side_is_refused(side: str) -> None:
    with pytest.raises(ValueError, match="resolution 80x48 must not be given together with width or height"):
        options_from(parse("--resolution", "80x48", side, "64"), "a", {})


def test_a_flag_counts_more_than_another_picture_s_setting_which_counts_more_than_the_preset_s() -> None:
    base = {"prompt": "b", "seed": 1, "num_steps": 9}
    options = options_from(parse("--seed", "2"), "a", base)
    assert (options.prompt, options.seed, options.num_steps, options.guidance) == ("a", 2, 9, None)


def test_a_flag_of_zero_counts_as_given() -> None:
    options = options_from(parse("--seed", "0", "--guidance", "0"), "a", {"seed": 5, "guidance": 3.0})
    assert (options.seed, options.guidance) == (0, 0.0)


def test_an_empty_negative_prompt_counts_as_given() -> None:
    assert options_from(parse("--negative_prompt", ""), "a", {"negative_prompt": "b"}).negative_prompt == ""


@pytest.mark.parametrize(
    "flag", ["--target x0", "--basis taylor", "--schedule interval", "--fresh_threshold 3", "--max_order 0"]
)
def test_a_setting_of_a_cache_that_is_off_is_refused_by_name(flag: str) -> None:
    name = flag.split()[0].removeprefix("--")
    for args, base in (
        (parse("--cache", "off", *flag.split()), CacheConfig()),
        (parse(*flag.split()), CacheConfig.off()),
    ):
        with pytest.raises(ValueError, match=f"^{name} has no effect with the cache off"):
            cache_from(args, base, 50)


def test_a_cache_that_was_off_can_be_switched_on() -> None:
    args = parse("--cache", "taylorseer", "--max_order", "2")
    assert cache_from(args, CacheConfig.off(), 50) == CacheConfig(max_order=2)


def test_a_flag_of_the_cache_counts_more_than_another_picture_s_setting() -> None:
    base = CacheConfig(target="x0", fresh_threshold=5, max_order=2)
    assert cache_from(parse("--max_order", "0"), base, 50) == CacheConfig("x0", fresh_threshold=5, max_order=0)


def test_the_cache_s_own_refusal_names_the_flag() -> None:
    with pytest.raises(ValueError, match=r"^fresh_threshold must be a whole number from 1 to 1000, got 0$"):
        cache_from(parse("--fresh_threshold", "0"), CacheConfig(), 50)


def test_notices_are_no_setting() -> None:
    assert "notices" not in SamplingOptions("a", width=512, height=512).resolve(FULL).settings()
    assert {field.name for field in fields(ResolvedOptions)} - {"notices"} == {
        field.name for field in fields(SamplingOptions)
    }
