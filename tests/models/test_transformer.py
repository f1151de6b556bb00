"""The transformer and the cache: what a forecast step leaves out, what is kept, what is refused."""

import re
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from peft import LoraConfig
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from cache_functions import CacheConfig, CacheState, FeatureName, cache_init, cal_type
from hi_diffusers.families.hidream.embeddings import Rotary
from hi_diffusers.families.hidream.transformer import HiDreamImageTransformer2DModel
from tests.tiny import TINY, TINY_BLOCKS, TINY_WIDTH, Inputs, make_inputs, make_tiny, relative_error

SIZES = [(8, 8), (8, 12)]
LEFT_OUT = [
    *("attn1", "to_q", "to_out", "to_k_t", "to_out_t", "q_rms_norm", "k_rms_norm_t"),
    *("ff_i", "ff_t", "gate", "shared_experts", "norm1_i", "norm1_t", "norm3_i", "norm3_t", "adaLN_modulation"),
]
NUM_TOKENS = {(8, 8): 16, (8, 12): 64}  # other than square pictures are padded to the largest grid


@pytest.fixture(autouse=True)
def no_grad() -> Iterator[None]:
    with torch.no_grad():
        yield


@pytest.fixture(scope="module")
def model() -> HiDreamImageTransformer2DModel:
    return make_tiny()


def run(
    model: HiDreamImageTransformer2DModel,
    inputs: Inputs,
    config: CacheConfig,
    num_steps: int,
    on_step: Callable[[int, str], None] | None = None,
) -> tuple[list[Tensor], CacheState | None]:
    """Evaluate the same latents at falling timesteps. Returns (what each step gave, the cache)."""
    cache_dic, current = cache_init(config, num_steps)
    conditioning = model.prepare(*inputs.text, inputs.grid)
    outputs = []
    for step in range(num_steps):
        kind = cal_type(cache_dic, current)
        if on_step is not None:
            on_step(step, kind)
        at = inputs.at(900.0 - 40 * step)
        context = {"conditioning": conditioning, "cache_dic": cache_dic, "current": current}
        outputs.append(model(at.latents, at.timesteps, **context, return_dict=False)[0])
    return outputs, cache_dic


def count_calls(model: HiDreamImageTransformer2DModel, inputs: Inputs, config: CacheConfig) -> dict[str, Counter]:
    """Module name -> number of calls, for one full and one forecast step."""
    calls = {"full": Counter(), "forecast": Counter()}
    kind = None

    def begin(step: int, step_kind: str) -> None:
        nonlocal kind
        kind = step_kind

    def count(name: str) -> Callable[..., None]:
        return lambda *_: calls[kind].update([name]) if kind else None

    hooks = [module.register_forward_hook(count(name)) for name, module in model.named_modules()]
    try:
        run(model, inputs, config, 2, begin)
    finally:
        for hook in hooks:
            hook.remove()
    return calls


# What a forecast step leaves out


def test_a_forecast_step_calls_nothing_but_embedders_and_the_final_layer(model: HiDreamImageTransformer2DModel) -> None:
    calls = count_calls(model, make_inputs(), CacheConfig(fresh_threshold=2))
    in_blocks = {name for name in calls["forecast"] if "_stream_blocks" in name}
    blocks = r"(double|single)_stream_blocks\.\d+(\.block(\.adaLN_modulation\.0)?)?"
    assert [name for name in in_blocks if not re.fullmatch(blocks, name)] == [], "adaLN_modulation.0 is a SiLU"
    others = {name.partition(".")[0] for name in calls["forecast"]} - {"double_stream_blocks", "single_stream_blocks"}
    assert others == {"", "x_embedder", "t_embedder", "final_layer"}


@pytest.mark.parametrize("part", LEFT_OUT)
def test_a_part_that_forecast_steps_leave_out_is_called_on_full_steps(
    model: HiDreamImageTransformer2DModel, part: str
) -> None:
    calls = count_calls(model, make_inputs(), CacheConfig(fresh_threshold=2))
    in_blocks = {kind: [name for name in calls[kind] if "block" in name and name.endswith(part)] for kind in calls}
    assert in_blocks["full"] and not in_blocks["forecast"]


def test_captions_and_pooled_text_are_embedded_once_a_generation(model: HiDreamImageTransformer2DModel) -> None:
    calls = count_calls(model, make_inputs(), CacheConfig(fresh_threshold=2))
    for kind in calls:
        assert not [name for name in calls[kind] if name.startswith(("caption_projection", "p_embedder"))]


def test_the_rotary_table_is_made_once_a_generation_and_not_read_on_forecast_steps(
    model: HiDreamImageTransformer2DModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    made, rotated = [], Counter()
    model.rotary_table.register_forward_hook(lambda *_: made.append(1))
    for name in ("rotate", "rotate_in_place"):
        rotate = getattr(Rotary, name)
        counted = lambda *args, rotate=rotate: rotated.update([kinds[-1]]) or rotate(*args)  # noqa: E731
        monkeypatch.setattr(Rotary, name, counted)
    kinds: list[str] = []
    run(model, make_inputs(), CacheConfig(fresh_threshold=2), 4, lambda step, kind: kinds.append(kind))
    assert len(made) == 1
    assert kinds.count("forecast") == 2 and rotated["full"] > 0 and rotated["forecast"] == 0


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_a_forecast_steps_matrix_products_are_embedders_gates_and_final_layer(
    model: HiDreamImageTransformer2DModel, size: tuple[int, int]
) -> None:
    """Of every block, two of its modulation's rows: the gates of the image's attention and feed-forward."""
    inputs = make_inputs(2, *size)
    batch, tokens, width, patch = 2, NUM_TOKENS[size], TINY_WIDTH, 16
    conditioning = model.prepare(*inputs.text, inputs.grid)
    cache_dic, current = cache_init(CacheConfig(fresh_threshold=2), 2)
    for _ in range(2):
        cal_type(cache_dic, current)
        with FlopCounterMode(display=False) as counter:
            model(inputs.latents, inputs.timesteps, conditioning=conditioning, cache_dic=cache_dic, current=current)
    patches = 2 * 2 * batch * tokens * patch * width
    timestep = 2 * batch * (256 * width + width * width)
    gates = TINY_BLOCKS * 2 * 2 * batch * width * width
    final_modulation = 2 * batch * width * 2 * width
    assert counter.get_total_flops() == patches + timestep + gates + final_modulation


def test_the_gates_are_rows_of_the_whole_modulation(model: HiDreamImageTransformer2DModel) -> None:
    temb = torch.randn(2, TINY_WIDTH, generator=torch.Generator().manual_seed(0))
    for stack in (model.double_stream_blocks, model.single_stream_blocks):
        modulation = stack[0].block.adaLN_modulation
        for gate, whole in zip(modulation.image_gates(temb), modulation.modulations(temb), strict=False):
            torch.testing.assert_close(gate.gate, whole.gate)


def test_a_lora_on_the_modulation_reaches_forecast_steps() -> None:
    model, inputs, config = make_tiny(), make_inputs(), CacheConfig(fresh_threshold=2)
    without, _ = run(model, inputs, config, 2)
    model.add_adapter(LoraConfig(r=3, target_modules=r".*adaLN_modulation\.1", init_lora_weights=False))
    outputs, _ = run(model, inputs, config, 2)
    model.fuse_lora()
    model.unload_lora()
    merged, _ = run(model, inputs, config, 2)
    assert relative_error(without[1], merged[1]) > 1e-2
    assert relative_error(outputs[1], merged[1]) <= 1e-5


# Where the cache must change nothing


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize(
    "config",
    [CacheConfig.off(), CacheConfig(fresh_threshold=1), CacheConfig(target="x0", fresh_threshold=3)],
    ids=["off", "fresh_threshold=1", "another target"],
)
def test_the_output_is_bit_identical_to_that_without_a_cache(
    model: HiDreamImageTransformer2DModel, config: CacheConfig, size: tuple[int, int]
) -> None:
    inputs = make_inputs(2, *size)
    outputs, _ = run(model, inputs, config, 4)
    for step, output in enumerate(outputs):
        assert torch.equal(output, model(*inputs.at(900.0 - 40 * step).positional, return_dict=False)[0])


def test_full_steps_of_a_cached_run_are_bit_identical_to_uncached_ones(model: HiDreamImageTransformer2DModel) -> None:
    inputs = make_inputs()
    uncached, _ = run(model, inputs, CacheConfig.off(), 7)
    cached, _ = run(model, inputs, CacheConfig(fresh_threshold=3), 7)
    assert [torch.equal(a, b) for a, b in zip(cached, uncached, strict=True)] == [step % 3 == 0 for step in range(7)]


def test_a_second_generation_is_bit_identical_to_the_first(model: HiDreamImageTransformer2DModel) -> None:
    config = CacheConfig(fresh_threshold=3, max_order=2)
    first, _ = run(model, make_inputs(), config, 8)
    run(model, make_inputs(1, 8, 12, seed=4), config, 5)
    second, _ = run(model, make_inputs(), config, 8)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_a_feature_that_does_not_change_is_forecast_as_it_is(model: HiDreamImageTransformer2DModel) -> None:
    """At one timestep and the same latents every step has the same features, so a forecast has to repeat the output."""
    inputs = make_inputs().at(500.0)
    conditioning = model.prepare(*inputs.text, inputs.grid)
    cache_dic, current = cache_init(CacheConfig(fresh_threshold=3, max_order=1), 6)
    outputs = []
    for _ in range(6):
        cal_type(cache_dic, current)
        context = {"conditioning": conditioning, "cache_dic": cache_dic, "current": current}
        outputs.append(model(inputs.latents, inputs.timesteps, **context, return_dict=False)[0])
    assert max(relative_error(output, outputs[0]) for output in outputs) <= 1e-5


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_pictures_of_a_batch_do_not_see_each_other(
    model: HiDreamImageTransformer2DModel, size: tuple[int, int]
) -> None:
    inputs = make_inputs(3, *size)
    outputs, _ = run(model, inputs, CacheConfig(fresh_threshold=2), 4)
    for index in range(3):
        one = slice(index, index + 1)
        single = Inputs(*(tensor[one] for tensor in inputs.positional[:3]), inputs.llama[:, one], inputs.pooled[one])
        alone, _ = run(model, single, CacheConfig(fresh_threshold=2), 4)
        assert max(relative_error(a[one], b) for a, b in zip(outputs, alone, strict=True)) <= 1e-5


# What is kept


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("max_order", [0, 1, 2])
def test_the_image_tokens_of_two_features_a_block_are_kept_and_nothing_else(
    model: HiDreamImageTransformer2DModel, max_order: int, size: tuple[int, int]
) -> None:
    _, cache_dic = run(model, make_inputs(2, *size), CacheConfig(fresh_threshold=2, max_order=max_order), 8)
    expected = (max_order + 1) * 2 * TINY_BLOCKS * 2 * NUM_TOKENS[size] * TINY_WIDTH * 4
    assert cache_dic.num_bytes() == expected
    anchors = [anchor for kept in cache_dic.anchors.values() for anchor in kept]
    storages = {anchor.untyped_storage().data_ptr(): anchor.untyped_storage().nbytes() for anchor in anchors}
    assert len(storages) == len(anchors) and sum(storages.values()) == expected


def test_every_blocks_features_have_names_of_their_own(model: HiDreamImageTransformer2DModel) -> None:
    _, cache_dic = run(model, make_inputs(), CacheConfig(), 1)
    assert sorted(cache_dic.anchors) == sorted(
        FeatureName("module", layer, part) for layer in range(TINY_BLOCKS) for part in ("attention", "feed_forward")
    )


def test_a_forecast_step_changes_no_anchor(model: HiDreamImageTransformer2DModel) -> None:
    inputs = make_inputs()
    _, after_full = run(model, inputs, CacheConfig(fresh_threshold=4), 1)
    _, after_forecasts = run(model, inputs, CacheConfig(fresh_threshold=4), 4)
    for name, kept in after_full.anchors.items():
        assert torch.equal(kept[0], after_forecasts.anchors[name][0])


# Conditioning


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_conditioning_stands_for_the_text(model: HiDreamImageTransformer2DModel, size: tuple[int, int]) -> None:
    inputs = make_inputs(2, *size)
    conditioning = model.prepare(*inputs.text, inputs.grid)
    for timestep in (900.0, 300.0):
        at = inputs.at(timestep)
        reused = model(at.latents, at.timesteps, conditioning=conditioning, return_dict=False)[0]
        assert torch.equal(reused, model(*at.positional, return_dict=False)[0])


@pytest.mark.parametrize("size", [(12, 8), (16, 16)], ids=str)
def test_conditioning_of_another_grid_is_refused(model: HiDreamImageTransformer2DModel, size: tuple[int, int]) -> None:
    conditioning = model.prepare(*make_inputs(2, *size).text, (size[0] // 2, size[1] // 2))
    other = make_inputs(2, 8, 12)
    with pytest.raises(ValueError, match=r"prepared for \(\d+, \d+\) patches, hidden_states have \(4, 6\)"):
        model(other.latents, other.timesteps, conditioning=conditioning)


# The class


def test_gradient_checkpointing_is_not_claimed(model: HiDreamImageTransformer2DModel) -> None:
    assert not model._supports_gradient_checkpointing
    with pytest.raises(ValueError, match="gradient checkpointing"):
        model.enable_gradient_checkpointing()


def test_the_output_is_a_latent_in_training_too() -> None:
    model, inputs = make_tiny(), make_inputs()
    expected = model(*inputs.positional).sample
    assert torch.equal(model.train()(*inputs.positional).sample, expected)


def test_parameters_of_one_dtype_give_an_output_of_that_dtype() -> None:
    model, inputs = make_tiny().to(torch.bfloat16), make_inputs().to(torch.bfloat16)
    outputs, cache_dic = run(model, inputs, CacheConfig(fresh_threshold=2), 2)
    assert {output.dtype for output in outputs} == {torch.bfloat16}
    assert {anchor.dtype for kept in cache_dic.anchors.values() for anchor in kept} == {torch.bfloat16}


def test_a_saved_model_is_loaded_bit_identically(model: HiDreamImageTransformer2DModel, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path)
    loaded = HiDreamImageTransformer2DModel.from_pretrained(tmp_path)
    inputs = make_inputs()
    assert torch.equal(loaded(*inputs.positional).sample, model(*inputs.positional).sample)
    assert {key: loaded.config[key] for key in TINY} == {key: model.config[key] for key in TINY}


# Refusals


def test_llama_layers_must_name_one_layer_a_block() -> None:
    for layers in (None, [0, 1]):
        with pytest.raises(ValueError, match=r"llama_layers must name one layer for each of the 5 blocks, got"):
            HiDreamImageTransformer2DModel(**{**TINY, "llama_layers": layers})


def test_a_picture_of_too_many_patches_is_refused(model: HiDreamImageTransformer2DModel) -> None:
    with pytest.raises(ValueError, match="8 x 12 patches is more than the model's 64"):
        model(*make_inputs(1, 16, 24).positional)


def test_states_of_too_few_llama_layers_are_refused(model: HiDreamImageTransformer2DModel) -> None:
    inputs = make_inputs()
    with pytest.raises(ValueError, match="reads Llama layers up to 4, got states of 3 layers"):
        model.prepare(inputs.t5, inputs.llama[:3], inputs.pooled, inputs.grid)


@pytest.mark.parametrize("missing", range(3))
def test_text_must_be_given(model: HiDreamImageTransformer2DModel, missing: int) -> None:
    inputs = make_inputs()
    text = [None if index == missing else tensor for index, tensor in enumerate(inputs.text)]
    with pytest.raises(ValueError, match="text must be given, as three embeddings or as conditioning"):
        model(inputs.latents, inputs.timesteps, *text)


def test_timesteps_must_be_given(model: HiDreamImageTransformer2DModel) -> None:
    inputs = make_inputs()
    with pytest.raises(ValueError, match="timesteps"):
        model(inputs.latents, None, *inputs.text)


@pytest.mark.parametrize("missing", ["img_ids", "img_sizes", "hidden_states_masks"])
def test_patches_need_positions_sizes_and_mask(model: HiDreamImageTransformer2DModel, missing: str) -> None:
    inputs = make_inputs()
    extra = {"img_ids": torch.zeros(2, 16, 3), "img_sizes": [(4, 4)] * 2, "hidden_states_masks": torch.ones(2, 16)}
    del extra[missing]
    with pytest.raises(ValueError, match="three dimensions need img_ids, img_sizes and hidden_states_masks"):
        model(torch.zeros(2, 16, 16), *inputs.positional[1:], **extra)


def test_pictures_of_one_batch_must_have_one_size(model: HiDreamImageTransformer2DModel) -> None:
    inputs = make_inputs()
    with pytest.raises(ValueError, match=r"one size, got \[\(2, 8\), \(4, 4\)\]"):
        extra = (torch.zeros(2, 16, 3), [(4, 4), (2, 8)], torch.ones(2, 16))
        model(torch.zeros(2, 16, 16), *inputs.positional[1:], *extra)
