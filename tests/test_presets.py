import itertools

import pytest

from cache_functions import CacheConfig
from hi_diffusers import SamplingOptions
from hi_diffusers.families.table import PRESETS, find_preset
from hi_diffusers.preset import fit_size, is_fitted, unknown_words
from training import scenes

NANO, FULL = PRESETS["nano"], PRESETS["full"]
SIZES = list(itertools.product((1, 40, 64, 100, 777, 1024, 4096), repeat=2))


@pytest.mark.parametrize(
    ("name", "repo", "num_steps", "guidance", "shift", "scheduler"),
    [
        ("full", "HiDream-ai/HiDream-I1-Full", 50, 5.0, 3.0, "unipc"),
        ("dev", "HiDream-ai/HiDream-I1-Dev", 28, 0.0, 6.0, "lcm"),
        ("fast", "HiDream-ai/HiDream-I1-Fast", 16, 0.0, 3.0, "lcm"),
    ],
)
def test_a_hidream_model_is_drawn_as_it_was_published(
    name: str, repo: str, num_steps: int, guidance: float, shift: float, scheduler: str
) -> None:
    preset = find_preset(name)
    assert (preset.repo, preset.num_steps, preset.guidance) == (repo, num_steps, guidance)
    assert (preset.shift, preset.scheduler) == (shift, scheduler)
    assert (preset.area, preset.multiple, preset.max_sequence_length) == (1024 * 1024, 16, 128)
    assert preset.llama_repo == "meta-llama/Llama-3.1-8B-Instruct", "the model was trained with Instruct"


@pytest.mark.parametrize(("nano", "hidream"), [("nano", "full"), ("nano-dev", "dev"), ("nano-fast", "fast")])
def test_a_nano_preset_stands_in_for_its_hidream_model(nano: str, hidream: str) -> None:
    ours, theirs = find_preset(nano), find_preset(hidream)
    for name in ("num_steps", "shift", "scheduler"):
        assert getattr(ours, name) == getattr(theirs, name)
    assert (ours.guidance > 1) == (theirs.guidance > 1)


def test_only_the_nano_presets_come_with_the_package() -> None:
    assert [name for name, preset in PRESETS.items() if preset.folder is not None] == ["nano", "nano-dev", "nano-fast"]


@pytest.mark.parametrize("preset", PRESETS.values(), ids=PRESETS)
def test_every_preset_is_cached_by_default(preset) -> None:
    assert preset.cache == CacheConfig.best()


@pytest.mark.parametrize("preset", PRESETS.values(), ids=PRESETS)
def test_a_preset_is_found_by_the_name_it_carries(preset) -> None:
    assert find_preset(preset.name) is preset


@pytest.mark.parametrize("name", ["nano2", "", "FULL", "../full"])
def test_an_unknown_model_is_refused_with_the_known_ones(name: str) -> None:
    with pytest.raises(ValueError) as refused:
        find_preset(name)
    assert str(refused.value) == f"model_type must be one of nano, nano-dev, nano-fast, full, dev, fast, got {name!r}"


def test_the_bundled_model_s_example_is_a_caption_of_its_world() -> None:
    assert scenes.parse_caption(NANO.example) is not None


def test_the_bundled_model_lies_beside_the_packages_of_a_clone() -> None:
    assert NANO.folder.parts[-2:] == ("assets", "hidream-nano")


@pytest.mark.parametrize(
    "size", [(1024, 1024), (768, 1360), (1360, 768), (880, 1168), (1168, 880), (1248, 832), (832, 1248)]
)
def test_the_official_sizes_are_drawn_as_they_are(size: tuple[int, int]) -> None:
    assert fit_size(*size, FULL.area, FULL.multiple) == size


def test_a_size_is_scaled_to_the_model_s_area() -> None:
    assert fit_size(512, 512, FULL.area, FULL.multiple) == (1024, 1024)
    assert fit_size(1280, 720, FULL.area, FULL.multiple) == (1360, 768)


@pytest.mark.parametrize("preset", [NANO, FULL], ids=["nano", "full"])
def test_a_fitted_size_is_whole_patches_within_the_area_and_less_than_a_patch_off_the_shape(preset) -> None:
    for width, height in SIZES:
        scale = (preset.area / (width * height)) ** 0.5
        if min(width, height) * scale < preset.multiple:
            continue
        fitted = fit_size(width, height, preset.area, preset.multiple)
        assert fitted[0] * fitted[1] <= preset.area
        for side, wanted in zip(fitted, (width * scale, height * scale), strict=True):
            assert side % preset.multiple == 0
            assert 0 <= wanted - side + 1e-6 < preset.multiple + 1e-6, f"{width}x{height} became {fitted}"


def test_a_shape_of_which_nothing_would_be_left_is_refused() -> None:
    with pytest.raises(ValueError, match="width x height must not be as extreme as 6400x10"):
        fit_size(6400, 10, NANO.area, NANO.multiple)


def test_a_fitted_size_is_told_from_others_and_stays() -> None:
    """320x576 is fitted to 752x1360, which fitted again would become 752x1376."""
    assert fit_size(320, 576, 1024 * 1024, 16) == (752, 1360)
    assert is_fitted(752, 1360, 1024 * 1024, 16)
    assert not is_fitted(320, 576, 1024 * 1024, 16)
    assert not is_fitted(752, 1361, 1024 * 1024, 16)
    preset = PRESETS["full"]
    once = SamplingOptions("a", width=320, height=576).resolve(preset)
    again = SamplingOptions("a", width=once.width, height=once.height).resolve(preset)
    assert (again.width, again.height) == (once.width, once.height)
    assert again.notices == ()


def test_nano_s_vocabulary_is_what_its_world_can_say() -> None:
    tier = scenes.CPU_TIER
    shown = {*scenes.COLOURS, *tier.shapes, *tier.pictograms, *tier.sizes, *tier.background_kinds}
    absent = {*scenes.SHAPES, *scenes.PICTOGRAMS, *scenes.SIZES, *scenes.FINISHES} - shown
    assert NANO.vocabulary == set(scenes.vocabulary()) - absent
    assert all(name in NANO.world for name in (*tier.shapes, *tier.pictograms))


def test_words_that_nano_was_never_taught_are_told_though_its_tokenizer_has_them() -> None:
    assert unknown_words("A red cat, a heart; a zebra on a Blue background.", NANO.vocabulary) == [
        "cat",
        "heart",
        ";",
        "zebra",
    ]
