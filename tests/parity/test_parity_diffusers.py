"""Our transformer against diffusers' class of the same name: same weights in, same output out.

In fp32 the two differ by rounding: at most 1e-5 of the output's largest magnitude. In bf16 they differ by at most
2e-2 of it, which is no more than diffusers' own bf16 output is from its fp32 one.
"""

import copy

import pytest
import torch
from peft import LoraConfig

from hi_diffusers.families.hidream.moe import MoEFeedForward
from hi_diffusers.families.hidream.transformer import HiDreamImageTransformer2DModel
from tests.tiny import FULL_SIZE, TINY, Inputs, Oracle, make_inputs, make_oracle, make_ours, randomize, relative_error

FP32 = 1e-5
BF16 = 2e-2
SIZES = [(8, 8), (16, 16), (8, 12), (12, 8), (4, 32)]
LORA_TARGETS = {
    "attention": r".*attn1\.(to_q|to_k|to_v|to_out)(_t)?",
    "experts": r".*experts\.\d+\.w[123]",
    "every linear layer": r".*(to_[qkv](_t)?|to_out(_t)?|w[123]|adaLN_modulation\.1|linear(_[12])?|x_embedder\.proj)",
}


def evaluate(model: torch.nn.Module, inputs: Inputs) -> torch.Tensor:
    return model(*inputs.positional, return_dict=False)[0]


def feed_forwards(model: torch.nn.Module) -> list[MoEFeedForward]:
    return [module for module in model.modules() if isinstance(module, MoEFeedForward)]


def evaluate_looped(model: HiDreamImageTransformer2DModel, inputs: Inputs) -> torch.Tensor:
    """A forward whose experts run one after the other."""
    conditioning = model.prepare(*inputs.text, inputs.grid)
    for feed_forward in feed_forwards(model):
        feed_forward.stack_experts(allowed=False)
    return model(inputs.latents, inputs.timesteps, conditioning=conditioning, return_dict=False)[0]


def add_lora(oracle: Oracle, ours: HiDreamImageTransformer2DModel, targets: str) -> None:
    """The same random LoRA on both."""
    lora = LoraConfig(r=3, lora_alpha=6, target_modules=targets, init_lora_weights=False)
    for model in (oracle, ours):
        model.add_adapter(copy.deepcopy(lora))
    randomize(oracle, seed=7)
    ours.load_state_dict(oracle.state_dict())


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_outputs_agree_for_every_shape_with_stacked_experts(pair, size: tuple[int, int], batch: int) -> None:
    oracle, ours = pair
    inputs = make_inputs(batch, *size)
    assert relative_error(evaluate(ours, inputs), evaluate(oracle, inputs)) <= FP32
    assert all(feed_forward._stack is not None for feed_forward in feed_forwards(ours))


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_outputs_agree_for_every_shape_with_looped_experts(pair, size: tuple[int, int], batch: int) -> None:
    oracle, ours = pair
    inputs = make_inputs(batch, *size)
    assert relative_error(evaluate_looped(ours, inputs), evaluate(oracle, inputs)) <= FP32


@pytest.mark.parametrize("name", ["latents", "timesteps", "t5", "llama", "pooled"])
def test_every_input_reaches_the_output(pair, name: str) -> None:
    """Otherwise the agreement would say little."""
    oracle, _ = pair
    inputs = make_inputs()
    changed = make_inputs(seed=2)
    mixed = {**vars(inputs), name: inputs.timesteps - 300 if name == "timesteps" else getattr(changed, name)}
    assert relative_error(evaluate(oracle, Inputs(**mixed)), evaluate(oracle, inputs)) > 1e-2


@pytest.mark.parametrize("size", [(8, 8), (8, 12)], ids=str)
@pytest.mark.parametrize("targets", ["attention", "experts", "every linear layer"])
def test_outputs_agree_with_a_lora(targets: str, size: tuple[int, int]) -> None:
    oracle = make_oracle()
    ours, inputs = make_ours(oracle), make_inputs(2, *size)
    without = evaluate(ours, inputs)
    add_lora(oracle, ours, LORA_TARGETS[targets])
    expected = evaluate(oracle, inputs)
    assert relative_error(without, expected) > 1e-2, "the LoRA changes nothing"
    assert relative_error(evaluate(ours, inputs), expected) <= FP32
    assert all((feed_forward._stack is not None) == (targets == "attention") for feed_forward in feed_forwards(ours))


def test_a_lora_scale_acts_as_in_diffusers() -> None:
    oracle = make_oracle()
    ours, inputs = make_ours(oracle), make_inputs()
    add_lora(oracle, ours, LORA_TARGETS["every linear layer"])
    halved = {"attention_kwargs": {"scale": 0.5}, "return_dict": False}
    expected = oracle(*inputs.positional, **halved)[0]
    assert relative_error(evaluate(oracle, inputs), expected) > 1e-2
    assert relative_error(ours(*inputs.positional, **halved)[0], expected) <= FP32


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_patches_with_positions_sizes_and_mask_agree(pair, size: tuple[int, int]) -> None:
    oracle, ours = pair
    inputs = make_inputs(2, *size)
    patches, mask, sizes, positions = oracle.patchify(inputs.latents)
    mask = torch.ones(patches.shape[:2]) if mask is None else mask
    arguments = (patches, *inputs.positional[1:], positions, sizes, mask, None, False)
    expected = oracle(*arguments)[0]
    assert relative_error(expected, evaluate(oracle, inputs)) <= FP32
    assert relative_error(ours(*arguments)[0], expected) <= FP32


def test_the_callers_positions_and_mask_are_used_as_in_diffusers(pair) -> None:
    oracle, ours = pair
    inputs = make_inputs(2, 8, 8)
    patches, _, sizes, positions = oracle.patchify(inputs.latents)
    mask = (torch.rand(patches.shape[:2], generator=torch.Generator().manual_seed(0)) > 0.3).float()
    arguments = (patches, *inputs.positional[1:], positions.flip(1), sizes, mask, None, False)
    expected = oracle(*arguments)[0]
    assert relative_error(expected, evaluate(oracle, inputs)) > 1e-2
    assert relative_error(ours(*arguments)[0], expected) <= FP32


def test_positions_given_beside_latents_are_ignored_as_in_diffusers(pair) -> None:
    oracle, ours = pair
    inputs = make_inputs()
    positions = {"img_ids": torch.zeros(2, 16, 3), "img_sizes": [(4, 4), (4, 4)], "return_dict": False}
    expected = oracle(*inputs.positional, **positions)[0]
    assert relative_error(ours(*inputs.positional, **positions)[0], expected) <= FP32


def test_a_mask_given_beside_latents_is_refused_as_in_diffusers(pair) -> None:
    inputs = make_inputs()
    extra = (torch.zeros(2, 16, 3), [(4, 4), (4, 4)], torch.ones(2, 16))
    for model in pair:
        with pytest.raises(ValueError, match="hidden_states_masks"):
            model(*inputs.positional, *extra)


def test_the_output_has_diffusers_form(pair) -> None:
    oracle, ours = pair
    inputs = make_inputs()
    expected, actual = oracle(*inputs.positional), ours(*inputs.positional)
    assert type(actual) is type(expected)
    assert relative_error(actual.sample, expected.sample) <= FP32


@pytest.mark.parametrize(
    "changes",
    [
        {"num_routed_experts": 0},
        {"num_activated_experts": 1},
        {"num_routed_experts": 3, "num_activated_experts": 3},
        {"axes_dims_rope": [4, 2, 2]},
        {"out_channels": 6},
        {"num_attention_heads": 1, "attention_head_dim": 18, "axes_dims_rope": [8, 6, 4]},
    ],
    ids=lambda changes: ", ".join(changes),
)
@pytest.mark.parametrize("size", [(8, 8), (8, 12)], ids=str)
def test_other_configurations_agree(changes: dict, size: tuple[int, int]) -> None:
    """Plain feed-forwards, one or all experts active, a half-rotated head, unlike channels, rows that do not stack."""
    oracle = make_oracle(**changes)
    ours, inputs = make_ours(oracle), make_inputs(2, *size)
    assert relative_error(evaluate(ours, inputs), evaluate(oracle, inputs)) <= FP32


@pytest.mark.parametrize("size", [(8, 8), (8, 12)], ids=str)
@pytest.mark.parametrize("changes", [{"num_routed_experts": 0}, {"num_activated_experts": 4}, {}], ids=str)
def test_bf16_outputs_agree_within_bf16s_own_error(changes: dict, size: tuple[int, int]) -> None:
    """Where tokens choose experts, a rounding may send one elsewhere and change it as a whole; so only where they have
    no choice are single values compared."""
    oracle = make_oracle(**changes)
    inputs = make_inputs(2, *size)
    exact = evaluate(oracle, inputs)
    oracle.to(torch.bfloat16)
    ours, inputs = make_ours(oracle).to(torch.bfloat16), inputs.to(torch.bfloat16)
    expected, actual = evaluate(oracle, inputs), evaluate(ours, inputs)
    assert actual.dtype == torch.bfloat16
    assert mean_error(actual, exact) <= 1.5 * mean_error(expected, exact)
    if changes:
        assert relative_error(actual, expected) <= BF16


def mean_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    return ((actual.double() - expected.double()).abs().mean() / expected.double().abs().mean()).item()


def test_weights_go_both_ways(pair) -> None:
    oracle, ours = pair
    theirs = make_oracle(seed=3)
    theirs.load_state_dict(ours.state_dict())
    inputs = make_inputs()
    assert torch.equal(evaluate(theirs, inputs), evaluate(oracle, inputs))


@pytest.mark.parametrize("changes", [{}, {"num_routed_experts": 0}], ids=["experts", "plain"])
def test_keys_shapes_and_configuration_are_diffusers(changes: dict) -> None:
    with torch.device("meta"):
        oracle = Oracle(**{**TINY, **changes})
        ours = HiDreamImageTransformer2DModel.from_config(dict(oracle.config))
    assert shapes(ours) == shapes(oracle)
    assert {key: value for key, value in ours.config.items() if not key.startswith("_")} == {
        key: value for key, value in oracle.config.items() if not key.startswith("_")
    }


def test_the_published_configuration_has_diffusers_keys_and_17_billion_parameters() -> None:
    with torch.device("meta"):
        oracle = Oracle(**FULL_SIZE)
        ours = HiDreamImageTransformer2DModel(**FULL_SIZE)
    assert shapes(ours) == shapes(oracle)
    assert round(sum(parameter.numel() for parameter in ours.parameters()) / 1e6) == 17106


def shapes(model: torch.nn.Module) -> dict[str, torch.Size]:
    return {key: tensor.shape for key, tensor in model.state_dict().items()}
