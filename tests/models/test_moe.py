"""The mixture of experts: its value, its gradients, and the one tensor that all experts' weights are slices of.

Whatever replaces a parameter's memory takes it out of that tensor. Each such way is a row of REPLACED: the output
must still be diffusers', and the weights must still exist once.
"""

import copy
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import accelerate
import pytest
import torch
import torch.nn.functional as F
from diffusers.hooks import apply_layerwise_casting
from peft import LoraConfig
from torch import Tensor, nn

from hi_diffusers.families.hidream.moe import MoEFeedForward
from hi_diffusers.families.hidream.transformer import HiDreamImageTransformer2DModel
from tests.tiny import Inputs, Oracle, make_inputs, make_oracle, make_ours, make_tiny, randomize, relative_error

WIDTH = 32
CPU = torch.device("cpu")


def feed_forwards(model: nn.Module) -> list[MoEFeedForward]:
    return [module for module in model.modules() if isinstance(module, MoEFeedForward)]


def are_stacked(model: nn.Module) -> bool:
    """Whether the feed-forwards use a stack: all of them or none."""
    stacked = {feed_forward._stack is not None for feed_forward in feed_forwards(model)}
    assert len(stacked) == 1, "some feed-forwards are stacked and some are not"
    return stacked.pop()


@torch.no_grad()
def evaluate(model: nn.Module, inputs: Inputs) -> Tensor:
    return model(*inputs.positional, return_dict=False)[0]


def make_feed_forward(seed: int = 0, stacked: bool = False, num_experts: int = 4, num_activated: int = 2):
    feed_forward = MoEFeedForward(WIDTH, 4 * WIDTH, num_experts, num_activated)
    randomize(feed_forward, seed)
    feed_forward.stack_experts(allowed=stacked)
    return feed_forward


def draw_tokens(seed: int = 1) -> Tensor:
    return torch.randn(2, 10, WIDTH, generator=torch.Generator().manual_seed(seed))


def compute_densely(feed_forward: MoEFeedForward, x: Tensor) -> Tensor:
    """Every expert sees every token; scores outside the best k are set to 0."""
    scores = F.linear(x, feed_forward.gate.weight).softmax(-1)
    kept = scores.topk(feed_forward.gate.num_activated, dim=-1)
    scores = torch.zeros_like(scores).scatter(-1, kept.indices, kept.values)
    routed = [score[..., None] * expert(x) for score, expert in zip(scores.unbind(-1), feed_forward.experts)]  # noqa: B905
    return sum(routed) + feed_forward.shared_experts(x)


# Value


@pytest.mark.parametrize("stacked", [True, False], ids=["stacked", "looped"])
@pytest.mark.parametrize("num_activated", [1, 2, 4])
def test_the_output_is_the_scored_sum_of_the_best_experts(num_activated: int, stacked: bool) -> None:
    feed_forward, x = make_feed_forward(stacked=stacked, num_activated=num_activated), draw_tokens()
    with torch.no_grad():
        actual = feed_forward(x)
        assert relative_error(actual, compute_densely(feed_forward, x)) <= 1e-6
    assert (feed_forward._stack is not None) == stacked


@pytest.mark.parametrize("stacked", [True, False], ids=["stacked", "looped"])
def test_experts_that_no_token_goes_to_are_no_trouble(stacked: bool) -> None:
    feed_forward, x = make_feed_forward(stacked=stacked), draw_tokens().abs()
    with torch.no_grad():
        feed_forward.gate.weight.copy_(torch.tensor([-9.0, 3.0, -9.0, 9.0])[:, None].expand(4, WIDTH))
        assert relative_error(feed_forward(x), compute_densely(feed_forward, x)) <= 1e-6


# One copy of the weights


def assert_weights_exist_once(model: nn.Module) -> None:
    """The memory behind all parameters and stacks is as large as the parameters, and experts lie in the stack."""
    tensors = [*model.parameters(), *model.buffers()]
    num_bytes = sum(tensor.nbytes for tensor in tensors)
    for feed_forward in feed_forwards(model):
        if feed_forward._stack is not None:
            for part, names in ((feed_forward._stack.up, ("w1", "w3")), (feed_forward._stack.down, ("w2",))):
                inside = {
                    getattr(expert, name).weight.untyped_storage().data_ptr()
                    for expert in feed_forward.experts
                    for name in names
                }
                assert inside == {part.untyped_storage().data_ptr()}
                tensors.append(part)
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}
    assert sum(storages.values()) == num_bytes


def test_expert_weights_exist_once() -> None:
    model = make_tiny()
    evaluate(model, make_inputs())
    assert are_stacked(model)
    assert_weights_exist_once(model)


def test_the_stack_is_made_once() -> None:
    model, inputs = make_tiny(), make_inputs()
    evaluate(model, inputs)
    stacks = [feed_forward._stack for feed_forward in feed_forwards(model)]
    evaluate(model, inputs)
    assert all(feed_forward._stack is stack for feed_forward, stack in zip(feed_forwards(model), stacks, strict=True))


def test_weights_written_in_place_reach_the_stack() -> None:
    feed_forward, x = make_feed_forward(stacked=True), draw_tokens()
    optimizer = torch.optim.SGD(feed_forward.parameters(), lr=0.1)
    feed_forward(x).square().mean().backward()
    with torch.no_grad():
        before = feed_forward(x)
        optimizer.step()
        assert relative_error(feed_forward(x), before) > 1e-3
        assert relative_error(feed_forward(x), compute_densely(feed_forward, x)) <= 1e-6


def test_a_model_used_in_inference_mode_can_be_trained_afterwards() -> None:
    model, inputs = make_tiny(), make_inputs()
    with torch.inference_mode():
        model(*inputs.positional)
    model.requires_grad_(True)
    model(*inputs.positional, return_dict=False)[0].square().mean().backward()


# What replaces a parameter's memory


def reload(low_cpu_mem_usage: bool) -> Callable[..., HiDreamImageTransformer2DModel]:
    def replace(model: HiDreamImageTransformer2DModel, folder: Path) -> HiDreamImageTransformer2DModel:
        model.save_pretrained(folder)
        return type(model).from_pretrained(folder, low_cpu_mem_usage=low_cpu_mem_usage)

    return replace


def make_other(model: HiDreamImageTransformer2DModel) -> HiDreamImageTransformer2DModel:
    """A stacked model of the same configuration with other weights."""
    other = type(model).from_config(dict(model.config))
    randomize(other, seed=9)
    evaluate(other, make_inputs())
    return other


def assign(model: HiDreamImageTransformer2DModel, folder: Path) -> HiDreamImageTransformer2DModel:
    state = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    other = make_other(model)
    other.load_state_dict(state, assign=True)
    return other


def load_in_place(model: HiDreamImageTransformer2DModel, folder: Path) -> HiDreamImageTransformer2DModel:
    other = make_other(model)
    other.load_state_dict(model.state_dict())
    return other


REPLACED = {
    "from_pretrained": reload(low_cpu_mem_usage=True),
    "from_pretrained without low_cpu_mem_usage": reload(low_cpu_mem_usage=False),
    "deepcopy": lambda model, folder: copy.deepcopy(model),
    "pickle": lambda model, folder: pickle.loads(pickle.dumps(model)),
    "load_state_dict": load_in_place,
    "load_state_dict with assign": assign,
    "to another dtype and back": lambda model, folder: model.double().float(),
    "bfloat16": lambda model, folder: model.to(torch.bfloat16),
    "double": lambda model, folder: model.double(),
}


@pytest.mark.parametrize("way", REPLACED)
def test_the_output_is_still_diffusers_when_memory_was_replaced(way: str, tmp_path: Path) -> None:
    rounded = way == "bfloat16"  # a rounding may send a token to another expert; then all experts are active
    oracle, inputs = make_oracle(num_activated_experts=4 if rounded else 2), make_inputs()
    model = make_ours(oracle)
    evaluate(model, inputs)
    model = REPLACED[way](model, tmp_path).eval()
    oracle, inputs = oracle.to(model.dtype), inputs.to(model.dtype)
    assert relative_error(evaluate(model, inputs), evaluate(oracle, inputs)) <= (2e-2 if rounded else 1e-5)
    assert are_stacked(model) == (model.dtype != torch.float64), "a grouped product exists for 32 and 16 bits"
    assert_weights_exist_once(model)


@pytest.mark.parametrize("way", ["deepcopy", "pickle", "bfloat16", "double"])
def test_neither_a_copy_nor_a_moved_model_holds_on_to_the_old_stack(way: str, tmp_path: Path) -> None:
    """Between the replacement and the next generation there would be two copies of the weights."""
    model = make_tiny()
    evaluate(model, make_inputs())
    assert are_stacked(model)
    assert not are_stacked(REPLACED[way](model, tmp_path))


def test_a_deepcopy_shares_no_memory_with_its_original() -> None:
    model, inputs = make_tiny(), make_inputs()
    before = evaluate(model, inputs)
    other = copy.deepcopy(model)
    evaluate(other, inputs)
    randomize(other, seed=5)
    assert torch.equal(evaluate(model, inputs), before)


def test_a_stacked_model_is_saved_at_its_own_size_and_diffusers_reads_it(tmp_path: Path) -> None:
    oracle, inputs = make_oracle(), make_inputs()
    model = make_ours(oracle)
    evaluate(model, inputs)
    assert are_stacked(model)
    model.save_pretrained(tmp_path)
    num_bytes = sum(parameter.nbytes for parameter in model.parameters())
    assert 0 <= (tmp_path / "diffusion_pytorch_model.safetensors").stat().st_size - num_bytes < 0.05 * num_bytes
    assert torch.equal(evaluate(Oracle.from_pretrained(tmp_path), inputs), evaluate(oracle, inputs))


# What the stack must make way for


def test_an_expert_of_another_kind_of_layer_is_called() -> None:
    class Doubled(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * super().forward(x)

    feed_forward, x = make_feed_forward(stacked=True), draw_tokens()
    feed_forward.experts[1].w2.__class__ = Doubled
    feed_forward.stack_experts()
    with torch.no_grad():
        assert feed_forward._stack is None
        assert relative_error(feed_forward(x), compute_densely(feed_forward, x)) <= 1e-6


def test_a_lora_on_experts_acts_and_the_stack_returns_without_it() -> None:
    model, inputs = make_tiny(), make_inputs()
    before = evaluate(model, inputs)
    model.add_adapter(LoraConfig(r=3, target_modules=r".*experts\.\d+\.w[123]", init_lora_weights=False))
    assert relative_error(evaluate(model, inputs), before) > 1e-2
    assert not are_stacked(model)
    model.unload_lora()
    assert relative_error(evaluate(model, inputs), before) <= 1e-6
    assert are_stacked(model)
    assert_weights_exist_once(model)


def test_fp8_layerwise_casting_acts_as_on_diffusers_class() -> None:
    oracle, inputs = make_oracle(), make_inputs()
    model = make_ours(oracle)
    exact = evaluate(model, inputs)
    model.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)
    skipped = HiDreamImageTransformer2DModel._skip_layerwise_casting_patterns
    apply_layerwise_casting(oracle, torch.float8_e4m3fn, torch.float32, skip_modules_pattern=skipped)
    expected = evaluate(oracle, inputs)
    assert relative_error(expected, exact) > 1e-3
    assert relative_error(evaluate(model, inputs), expected) <= 1e-5
    block = model.double_stream_blocks[0].block
    assert block.ff_i.experts[0].w1.weight.dtype == block.attn1.to_q.weight.dtype == torch.float8_e4m3fn
    assert block.adaLN_modulation[1].weight.dtype == block.attn1.q_rms_norm.weight.dtype == torch.float32
    assert not are_stacked(model)


def offload_sequentially(model: nn.Module, folder: Path) -> None:
    accelerate.cpu_offload(model, execution_device=CPU)


def offload_blocks(model: nn.Module, folder: Path) -> None:
    accelerate.cpu_offload(model, execution_device=CPU, preload_module_classes=model._no_split_modules)


def offload_groups(kind: str, to_disk: bool) -> Callable[[nn.Module, Path], None]:
    def offload(model: nn.Module, folder: Path) -> None:
        settings: dict[str, Any] = {"offload_type": kind}
        if kind == "block_level":
            settings["num_blocks_per_group"] = 1
        if to_disk:
            settings["offload_to_disk_path"] = str(folder)
        model.enable_group_offload(onload_device=CPU, offload_device=CPU, **settings)
        if to_disk:  # what was not read back from the disk would be seen
            for parameter in model.parameters():
                parameter.data.fill_(float("nan"))

    return offload


OFFLOADED = {
    "one layer after another": offload_sequentially,
    "one block after another": offload_blocks,
    "groups of blocks": offload_groups("block_level", to_disk=False),
    "groups of blocks, to disk": offload_groups("block_level", to_disk=True),
    "single layers": offload_groups("leaf_level", to_disk=False),
    "single layers, to disk": offload_groups("leaf_level", to_disk=True),
}


@pytest.mark.parametrize("way", OFFLOADED)
def test_an_offloaded_model_gives_diffusers_output_and_is_not_stacked(way: str, tmp_path: Path) -> None:
    oracle, inputs = make_oracle(), make_inputs()
    model = make_ours(oracle)
    evaluate(model, inputs)
    OFFLOADED[way](model, tmp_path)
    for _ in range(2):
        assert relative_error(evaluate(model, inputs), evaluate(oracle, inputs)) <= 1e-5
    assert not are_stacked(model)


@pytest.mark.parametrize("way", OFFLOADED)
def test_an_offloaded_model_prepares_the_conditioning(way: str, tmp_path: Path) -> None:
    """The denoising loop calls `prepare` before any forward, when hooks of the whole model have not run yet."""
    oracle, inputs = make_oracle(), make_inputs()
    model = make_ours(oracle)
    OFFLOADED[way](model, tmp_path)
    with torch.no_grad():
        conditioning = model.prepare(*inputs.text, inputs.grid)
        actual = model(inputs.latents, inputs.timesteps, conditioning=conditioning, return_dict=False)[0]
    assert relative_error(actual, evaluate(oracle, inputs)) <= 1e-5


def test_the_stack_returns_when_offloading_ends() -> None:
    model, inputs = make_tiny(), make_inputs()
    before = evaluate(model, inputs)
    accelerate.cpu_offload(model, execution_device=CPU)
    evaluate(model, inputs)
    accelerate.hooks.remove_hook_from_module(model, recurse=True)
    assert torch.equal(evaluate(model, inputs), before)
    assert are_stacked(model)


# Gradients


def test_gradients_are_those_of_the_dense_computation() -> None:
    feed_forward, x = make_feed_forward().double(), draw_tokens().double()
    for stacked_before in (False, True):
        gradients = []
        for compute in (feed_forward, lambda tokens: compute_densely(feed_forward, tokens)):
            tokens = x.clone().requires_grad_()
            weights = list(feed_forward.parameters())
            gradients.append(torch.autograd.grad(compute(tokens).sin().sum(), [tokens, *weights]))
        for actual, expected in zip(*gradients, strict=True):
            torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-11, msg=f"stacked before: {stacked_before}")
        feed_forward.float().stack_experts()
        feed_forward.double()


def test_gradients_pass_the_numerical_check() -> None:
    feed_forward = make_feed_forward(num_experts=3).double()
    x = draw_tokens()[:1, :2].double().requires_grad_()
    assert torch.autograd.gradcheck(feed_forward, (x,))


def test_gradients_are_those_of_diffusers_training_path() -> None:
    oracle, inputs = make_oracle(), make_inputs()
    model = make_ours(oracle)
    evaluate(model, inputs)
    gradients = []
    for trained in (oracle, model):
        trained.train().requires_grad_(True)
        # diffusers' output is laid out otherwise in training; this loss does not see the order.
        trained(*inputs.positional, return_dict=False)[0].square().sum().backward()
        gradients.append({name: parameter.grad for name, parameter in trained.named_parameters()})
    expected, actual = gradients
    assert expected.keys() == actual.keys()
    for name, gradient in expected.items():
        assert (gradient is None) == (actual[name] is None), name
        if gradient is not None and gradient.any():
            assert relative_error(actual[name], gradient) <= 1e-4, name
