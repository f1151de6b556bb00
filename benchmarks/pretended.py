"""A pretended accelerator: tensors have a shape, a dtype and a device there, but no numbers.

What only numbers can show, such as quality or time, it cannot show. But a tensor on another device raises, as does
whatever makes the host wait for a number, and the memory that is alive can be counted.
"""

import contextlib
import traceback
import weakref
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from diffusers.image_processor import VaeImageProcessor
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.utils._mode_utils import no_dispatch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend
from torch.utils.flop_counter import register_flop_formula

from hi_diffusers.engine import generation
from hi_diffusers.families.hidream import moe
from hi_diffusers.request import options
from hi_diffusers.weights import fp8

NAME = "fakegpu"
real_tensors = unset_fake_temporarily  # a context within `pretended_device`
COPIES = (torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default)


@contextlib.contextmanager
def pretended_device() -> Iterator[torch.device]:
    """A context in which new tensors are pretended, and in which a device may be used that does not exist.

    There plain experts are stacked, attention is one kernel and fp8 is multiplied, as on a new GPU. Schedulers' tables
    are real, since the host reads them. Where the host reads the device at the end of a drawing, it finds black pixels.
    """
    if torch._C._get_privateuse1_backend_name() != NAME:
        _setup_privateuseone_for_python_backend(NAME)

    def real_tables(*args: Any) -> Any:
        with real_tensors():
            return make_tables(*args)

    make_tables = options.timed_scheduler
    changes = (
        mock.patch.object(options, "timed_scheduler", real_tables),
        mock.patch.object(nn.functional, "scaled_dot_product_attention", _attention),
        mock.patch.object(moe, "STACKED_ON", (NAME,)),
        mock.patch.object(moe, "STACKED_TYPES", (FakeTensor,)),
        mock.patch.object(moe, "count_tokens", spread_evenly),
        mock.patch.object(generation, "_check_finite", lambda latents: None),
        mock.patch.object(VaeImageProcessor, "postprocess", _black),
        mock.patch.object(fp8, "multiplies_fp8", lambda device: device.type == NAME),
    )
    with contextlib.ExitStack() as stack:
        for change in changes:
            stack.enter_context(change)
        stack.enter_context(pretended := FakeTensorMode(allow_non_fake_inputs=True))
        stack.enter_context(_RealTables(pretended))
        stack.enter_context(torch.no_grad())
        yield torch.device(NAME, 0)


class _RealTables(TorchDispatchMode):
    """Computes with real tensors on the CPU as usual, and lets them be brought to the device."""

    def __init__(self, pretended: FakeTensorMode):
        super().__init__()
        self.pretended = pretended

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        given = list(_tensors([args, kwargs]))
        if given and not any(isinstance(one, FakeTensor) for one in given):
            if torch.device(kwargs.get("device") or "cpu").type != NAME:
                with no_dispatch():
                    return function(*args, **kwargs)
            args = tuple(self.pretended.from_tensor(one) if isinstance(one, Tensor) else one for one in args)
        return function(*args, **kwargs)


def _attention(query: Tensor, key: Tensor, value: Tensor, **settings: Any) -> Tensor:
    """The kernel that a GPU takes, which does not write the matrix of scores."""
    if settings.get("attn_mask") is not None:
        return torch.ops.aten._scaled_dot_product_efficient_attention(
            query, key, value, settings["attn_mask"], compute_log_sumexp=False
        )[0]
    return torch.ops.aten._scaled_dot_product_flash_attention(query, key, value)[0]


def spread_evenly(expert: Tensor, num_experts: int) -> list[int]:
    """Equal numbers of tokens for all experts, since the true ones are not known here; the last gets the rest."""
    count = expert.numel() // num_experts
    return [count] * (num_experts - 1) + [expert.numel() - count * (num_experts - 1)]


def _black(processor: Any, pixels: Tensor, output_type: str) -> np.ndarray:
    """Pictures [B,H,W,3] of the decoded pixels' size."""
    batch, channels, height, width = pixels.shape
    return np.zeros((batch, height, width, channels), np.float32)


class Alive(TorchDispatchMode):
    """Counts the bytes of the tensors that are alive on a device.

    Args:
        device: the device.

    Attributes:
        now: bytes at this moment.
        most: bytes at the worst moment since it was set to `now`.
        models: name -> bytes of a model that was there before.
    """

    def __init__(self, device: torch.device):
        super().__init__()
        self.device, self.now, self.most = device, 0, 0
        self.seen: set[int] = set()
        self.models: dict[str, int] = {}

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        for one in result if isinstance(result, tuple | list) else (result,):
            if isinstance(one, Tensor) and one.device == self.device:
                self._count(one.untyped_storage())
        return result

    @classmethod
    def beside(cls, pipe: Any, device: torch.device) -> "Alive":
        """A counter that knows the weights of a pipeline."""
        alive = cls(device)
        for name, one in pipe.components.items():
            if isinstance(one, nn.Module):
                alive.count(name, one)
        return alive

    def count(self, name: str, model: nn.Module) -> None:
        """Count a model that was there before."""
        before = self.now
        for one in (*model.parameters(), *model.buffers()):
            if one.device == self.device:
                self._count(one.untyped_storage())
        self.models[name] = self.now - before

    def _count(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self.seen:
            return
        self.seen.add(key)
        self.now += size
        self.most = max(self.most, self.now)
        weakref.finalize(storage, self._forget, key, size)

    def _forget(self, key: int, size: int) -> None:
        self.seen.discard(key)
        self.now -= size


class Crossings(TorchDispatchMode):
    """Counts the copies between devices that the host waits for, by the file that asks for them."""

    def __init__(self) -> None:
        super().__init__()
        self.files: Counter[str] = Counter()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        if function in COPIES and not self._is_asynchronous(function, args, kwargs or {}):
            source = args[1] if function is COPIES[1] else args[0]
            if source.device.type != result.device.type:
                self.files[_asking_file()] += 1
        return result

    @staticmethod
    def _is_asynchronous(function: Any, args: Any, kwargs: dict[str, Any]) -> bool:
        return bool(kwargs.get("non_blocking") or (function is COPIES[1] and len(args) > 2 and args[2]))


def _asking_file() -> str:
    """The file of the innermost frame that is not torch's or this one."""
    for frame in reversed(traceback.extract_stack()):
        if "/torch/" not in frame.filename and frame.filename != __file__:
            return Path(frame.filename).name
    return ""


class WrongOutputs:
    """Notes the modules whose output has another device or dtype, until `remove` is called.

    Attributes:
        found: "module: dtype on device" of each.
    """

    def __init__(self, model: nn.Module, device: torch.device, dtype: torch.dtype):
        self.device, self.dtype = device, dtype
        self.found: list[str] = []
        self.hooks = [one.register_forward_hook(self._look(name)) for name, one in model.named_modules()]

    def remove(self) -> None:
        """Stop looking."""
        for hook in self.hooks:
            hook.remove()

    def _look(self, name: str) -> Any:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            for one in _tensors(output):
                if one.device != self.device or (one.is_floating_point() and one.dtype != self.dtype):
                    self.found.append(f"{name}: {one.dtype} on {one.device}")

        return hook


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        yield from _tensors(list(value.values()))
    elif isinstance(value, tuple | list):
        for one in value:
            yield from _tensors(one)


@register_flop_formula(torch.ops.aten._grouped_mm)
def _grouped_flops(rows: Any, weights: Any, *_: Any, **__: Any) -> int:
    """Operations of rows [N,I] times weights [E,I,O]."""
    return int(2 * rows[0] * rows[1] * weights[2])


@register_flop_formula(torch.ops.aten._scaled_mm_v2)
def _scaled_flops(rows: Any, weights: Any, *_: Any, **__: Any) -> int:
    """Operations of rows [N,I] times weights [I,O]."""
    return int(2 * rows[0] * rows[1] * weights[1])
