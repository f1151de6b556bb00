"""Feed-forwards: SwiGLU, and the sparse mixture of experts of the image tokens.

Every token goes to `num_activated` of E experts, and to one shared expert. Tokens are sorted by expert once, so that
each expert sees one slice. If the experts' weights are slices of one stacked tensor, all slices go through one
grouped matrix product and the host never waits for the device; otherwise (quantized experts, LoRA, hooks, or when
gradients are wanted) a loop over the experts needs the slice lengths on the host, one wait per call.

Shapes: N tokens of the whole batch, k experts per token, D width, F hidden width.
"""

from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hi_diffusers.families.hidream.fast_paths import HasFastPaths
from hi_diffusers.families.hidream.layers import swiglu_hidden

GROUPED_ROW_BYTES = 16
# Devices on which grouped products are tested, and types of parameters without arithmetic of their own.
STACKED_ON: tuple[str, ...] = ("cpu", "cuda")
STACKED_TYPES: tuple[type, ...] = (nn.Parameter,)


class SwiGLU(HasFastPaths, nn.Module):
    """w2(silu(w1 x) * w3 x), arXiv 2002.05202; the hidden width is 2/3 of `hidden`, rounded up to 256."""

    def __init__(self, width: int, hidden: int):
        super().__init__()
        hidden = swiglu_hidden(hidden)
        self.w1 = nn.Linear(width, hidden, bias=False)
        self.w2 = nn.Linear(hidden, width, bias=False)
        self.w3 = nn.Linear(width, hidden, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        if self.takes("fewer_passes"):
            return self.w2(F.silu(self.w1(x), inplace=True).mul_(self.w3(x)))
        return self.w2(F.silu(self.w1(x)) * self.w3(x))


@dataclass(frozen=True)
class Routing:
    """The experts of each token.

    Attributes:
        expert: [N,k] expert indices, int64.
        weight: [N,k] softmax scores of the chosen experts; they do not sum to 1.
    """

    expert: Tensor
    weight: Tensor


class MoEGate(nn.Module):
    """Scores every expert for every token and keeps the k best."""

    def __init__(self, width: int, num_experts: int, num_activated: int):
        super().__init__()
        self.num_activated = num_activated
        self.weight = nn.Parameter(torch.randn(num_experts, width) / width**0.5)

    def forward(self, tokens: Tensor) -> Routing:
        scores = F.linear(tokens, self.weight).softmax(dim=-1)
        weight, expert = scores.topk(self.num_activated, dim=-1, sorted=False)
        return Routing(expert, weight)


@dataclass(frozen=True)
class ExpertStack:
    """The one copy of all routed experts' weights; the experts' parameters are slices of it.

    Attributes:
        up: [E,2F,D], w1 above w3.
        down: [E,D,F], w2.
    """

    up: Tensor
    down: Tensor


class MoEFeedForward(HasFastPaths, nn.Module):
    """A mixture of experts: k of E routed experts per token, plus the shared one.

    Args:
        width: D.
        hidden: hidden width before SwiGLU's 2/3; the shared expert has half of it.
        num_experts: E.
        num_activated: k.
    """

    def __init__(self, width: int, hidden: int, num_experts: int, num_activated: int):
        super().__init__()
        self.shared_experts = SwiGLU(width, hidden // 2)
        self.experts = nn.ModuleList([SwiGLU(width, hidden) for _ in range(num_experts)])
        self.gate = MoEGate(width, num_experts, num_activated)
        self._stack: ExpertStack | None = None

    def forward(self, x: Tensor) -> Tensor:
        """[...,D] to [...,D]."""
        tokens = x.reshape(-1, x.shape[-1])
        routing = self.gate(tokens)
        num_activated = self.gate.num_activated
        order = routing.expert.flatten().argsort(stable=True)
        inverse = order.argsort()
        by_expert = _SelectRows.apply(tokens, order, inverse, num_activated)
        if self._stack is None or torch.is_grad_enabled():
            mixed = self._loop(by_expert, routing)
        else:
            mixed = self._grouped(by_expert, routing, self._stack)
        by_token = _SelectRows.apply(mixed, inverse, order, 1).unflatten(0, (-1, num_activated))
        shared = self.shared_experts(tokens)
        if self.takes("fewer_passes"):
            for rows, weight in zip(by_token.unbind(1), routing.weight.split(1, dim=1), strict=True):
                shared.addcmul_(rows, weight)
            return shared.view(x.shape)
        routed = (by_token * routing.weight.unsqueeze(-1)).sum(dim=1)
        return (routed + shared).view(x.shape)

    def _grouped(self, by_expert: Tensor, routing: Routing, stack: ExpertStack) -> Tensor:
        experts = torch.arange(len(self.experts), device=by_expert.device)
        ends = (routing.expert.flatten()[:, None] == experts).sum(dim=0).cumsum(dim=0).to(torch.int32)
        gate, up = _grouped_mm(by_expert, stack.up, ends).chunk(2, dim=-1)
        hidden = F.silu(gate).mul_(up) if self.takes("fewer_passes") else F.silu(gate) * up
        return _grouped_mm(hidden, stack.down, ends)

    def _loop(self, by_expert: Tensor, routing: Routing) -> Tensor:
        slices = by_expert.split(count_tokens(routing.expert, len(self.experts)))
        return torch.cat([expert(rows) for expert, rows in zip(self.experts, slices, strict=True) if len(rows)])

    @property
    def _routed(self) -> list[SwiGLU]:
        """The experts that tokens are routed to."""
        return cast("list[SwiGLU]", list(self.experts))

    def stack_experts(self, allowed: bool = True) -> None:
        """Make the experts' parameters slices of one tensor again, if they are not and can be.

        Anything that replaces a parameter's memory (loading, `.to`, deepcopy, offloading) breaks the stack; this is
        called before every generation, outside compiled code, and costs a few comparisons if nothing changed.

        Args:
            allowed: False drops the stack, for models whose weights are moved by hooks.
        """
        if not allowed or not self._is_stackable():
            self._stack = None
        elif self._stack is None or not self._is_stacked(self._stack):
            self._stack = self._build_stack()

    def _is_stackable(self) -> bool:
        linears = [linear for expert in self._routed for linear in (expert.w1, expert.w2, expert.w3)]
        weights = [linear.weight for linear in linears if _is_plain(linear)]
        return (
            len(weights) == len(linears)
            and len({(weight.dtype, weight.device) for weight in weights}) == 1
            and weights[0].dtype in (torch.float32, torch.bfloat16, torch.float16)
            and weights[0].device.type in STACKED_ON
            and all(weight.shape[-1] * weight.element_size() % GROUPED_ROW_BYTES == 0 for weight in weights)
        )

    def _is_stacked(self, stack: ExpertStack) -> bool:
        hidden = stack.down.shape[-1]
        return all(
            _is_same_memory(parameter, part) and parameter.dtype == part.dtype and parameter.device == part.device
            for index, expert in enumerate(self._routed)
            for parameter, part in (
                (expert.w1.weight, stack.up[index, :hidden]),
                (expert.w3.weight, stack.up[index, hidden:]),
                (expert.w2.weight, stack.down[index]),
            )
        )

    @torch.inference_mode(False)  # inference tensors could not be trained afterwards
    @torch.no_grad()
    def _build_stack(self) -> ExpertStack:
        stack = ExpertStack(
            up=torch.stack([torch.cat((expert.w1.weight, expert.w3.weight)) for expert in self._routed]),
            down=torch.stack([expert.w2.weight for expert in self._routed]),
        )
        hidden = stack.down.shape[-1]
        for index, expert in enumerate(self._routed):
            expert.w1.weight.data = stack.up[index, :hidden]
            expert.w3.weight.data = stack.up[index, hidden:]
            expert.w2.weight.data = stack.down[index]
        return stack

    def _apply(self, fn: Any, recurse: bool = True) -> "MoEFeedForward":
        self._stack = None  # else the old memory would be kept beside the moved parameters
        return super()._apply(fn, recurse)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_stack": None}  # a copy's parameters are not slices of this stack


def count_tokens(expert: Tensor, num_experts: int) -> list[int]:
    """How many tokens each expert gets; the host waits for the device to know it."""
    counts: list[int] = expert.flatten().bincount(minlength=num_experts).tolist()
    return counts


def _is_same_memory(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors begin at the same element of the same storage, which need not have an address."""
    storages = one.untyped_storage()._cdata == other.untyped_storage()._cdata
    return storages and one.storage_offset() == other.storage_offset()


def _grouped_mm(rows: Tensor, weights: Tensor, ends: Tensor) -> Tensor:
    """Multiply rows [N,I] by weights [E,O,I] to [N,O]; expert e's rows end at ends[e]."""
    if torch.compiler.is_compiling() and rows.dtype != torch.bfloat16:
        return _opaque_grouped_mm(rows, weights, ends)
    return F.grouped_mm(rows, weights.mT, offs=ends)


# torch 2.13 runs grouped_mm in fp32 and fp16, but its tracer knows the shape for bf16 only.
@torch.library.custom_op("hi_diffusers::grouped_mm", mutates_args=())
def _opaque_grouped_mm(rows: Tensor, weights: Tensor, ends: Tensor) -> Tensor:
    return F.grouped_mm(rows, weights.mT, offs=ends)


@_opaque_grouped_mm.register_fake
def _(rows: Tensor, weights: Tensor, ends: Tensor) -> Tensor:
    return rows.new_empty(rows.shape[0], weights.shape[1])


class _SelectRows(torch.autograd.Function):
    """Selects rows[index // copies]; the gradient is also a selection and a sum, not a scatter."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, index: Tensor, inverse: Tensor, copies: int) -> Tensor:
        ctx.save_for_backward(inverse)
        ctx.copies = copies
        return rows.index_select(0, index // copies if copies > 1 else index)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        (inverse,) = ctx.saved_tensors
        gradient = gradient.index_select(0, inverse)
        if ctx.copies > 1:
            gradient = gradient.unflatten(0, (-1, ctx.copies)).sum(dim=1)
        return gradient, None, None, None


def _is_plain(linear: nn.Module) -> bool:
    hooked = hasattr(linear, "_hf_hook") or hasattr(linear, "_diffusers_hook")
    return type(linear) is nn.Linear and type(linear.weight) in STACKED_TYPES and not hooked
