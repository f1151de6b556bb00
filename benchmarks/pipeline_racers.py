"""The ways to draw with a stock pipeline of diffusers: uncached, forecast from outside, and the caches made for it."""

import contextlib
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import torch
from diffusers import TaylorSeerCacheConfig
from torch import Tensor, nn

from benchmarks.pipelines import Stock, copy_of
from cache_functions import CacheConfig, planned_full_steps
from forecasting import forecast

THRESHOLD = 4
TARGETS = ("velocity", "x0", "module")


class Clock:
    """Stands in for a pipeline's progress bar; notes when the denoising loop begins and when each step ends."""

    def __init__(self, device: torch.device):
        self.device, self.marks = device, [0.0]

    def __call__(self, iterable: Any = None, total: int | None = None) -> "Clock":
        return self

    def __enter__(self) -> "Clock":
        self.marks = [now(self.device)]
        return self

    def update(self, n: int = 1) -> None:
        """A step has ended."""
        self.marks.append(now(self.device))

    def __exit__(self, *error: object) -> None:
        return None

    def steps(self) -> tuple[float, ...]:
        """Seconds of every step."""
        return tuple(after - before for before, after in zip(self.marks[:-1], self.marks[1:], strict=True))


@dataclass(frozen=True)
class Drawing:
    """One drawing.

    Attributes:
        result: the picture, or its latents, fp32.
        steps: seconds of every step.
        whole: seconds of the pipeline's call.
    """

    result: Tensor
    steps: tuple[float, ...]
    whole: float

    @property
    def loop(self) -> float:
        """Seconds of the denoising loop."""
        return sum(self.steps)


@dataclass(frozen=True)
class Way:
    """One way to draw.

    Attributes:
        name, what: of it, and in a phrase.
        pipe: what it draws with.
        num_steps: denoising steps.
        full_steps: the steps that are computed whole.
        num_calls: calls of the transformer that are not answered from outside.
        context: what is entered around every drawing.
    """

    name: str
    what: str
    pipe: Any
    num_steps: int
    full_steps: tuple[int, ...]
    num_calls: int
    context: Callable[[], AbstractContextManager[Any]] = nullcontext

    @property
    def caches(self) -> bool:
        """Whether there are steps that are not computed whole."""
        return len(self.full_steps) < self.num_steps

    def draw(self, arguments: dict[str, Any], output_type: str = "pt") -> Drawing:
        """One picture, or its latents."""
        device = self.pipe.device
        clock = self.pipe.progress_bar = Clock(device)
        started = now(device)
        with self.context():
            found = self.pipe(**arguments, num_inference_steps=self.num_steps, output_type=output_type).images
        return Drawing(found.float(), clock.steps(), now(device) - started)


class PipelineCourse:
    """One pipeline with random weights, and everybody who draws with it.

    Args:
        stock: what is drawn with.
        pipe: diffusers' pipeline, which nobody changes for good.
    """

    def __init__(self, stock: Stock, pipe: Any):
        self.stock, self.pipe, self.num_steps = stock, pipe, stock.num_steps
        self.plan = tuple(planned_full_steps(CacheConfig(target="x0", fresh_threshold=THRESHOLD), self.num_steps))

    def ways(self) -> Iterator[Way]:
        """All that can be run here."""
        few = len(self.plan)
        yield self._stock("diffusers", "uncached", self.num_steps)
        for target in TARGETS:
            yield self._forecast(target)
        yield self._hook(
            "diffusers taylorseer",
            "diffusers' TaylorSeer hook, order 1, on the parts that target module forecasts",
            cache_identifiers=list(self.stock.family.forecast),
            skip_predict_identifiers=list(self.stock.family.needless),
        )
        yield self._hook("diffusers taylorseer lite", "the same hook on the last layer alone", use_lite_mode=True)
        if find_spec("cache_dit") is not None:
            yield self._cache_dit("cache-dit", "DBCache, F1B0, at our full steps", calibrates=False)
            yield self._cache_dit("cache-dit taylor", "the same with its TaylorSeer", calibrates=True)
        yield self._stock("diffusers fewer", "fewer steps", few)

    def idle(self) -> Way:
        """The pipeline with a transformer that answers at once: what a step costs beside it."""
        pipe = copy_of(self.pipe)
        pipe.transformer.forward = lambda hidden_states, **_: (hidden_states,)
        return Way("idle", "a transformer that answers at once", pipe, self.num_steps, (), self._calls(self.num_steps))

    def _calls(self, num_steps: int) -> int:
        return num_steps * self.stock.family.calls

    def _stock(self, name: str, what: str, num_steps: int) -> Way:
        return Way(name, what, self.pipe, num_steps, tuple(range(num_steps)), self._calls(num_steps))

    def _forecast(self, target: str) -> Way:
        cache = CacheConfig(target=target, fresh_threshold=THRESHOLD, max_order=1)
        calls = self._calls(self.num_steps if target == "module" else len(self.plan))
        what = f"`forecast`, taylor 1 on {target}"
        return Way(
            f"ours {target}", what, self.pipe, self.num_steps, self.plan, calls, lambda: forecast(self.pipe, cache)
        )

    def _hook(self, name: str, what: str, **identifiers: Any) -> Way:
        """diffusers' hook; its rule makes steps 0, 2, 6, 10, ... full."""
        pipe = copy_of(self.pipe)
        pipe.transformer.enable_cache(
            TaylorSeerCacheConfig(
                cache_interval=THRESHOLD,
                disable_cache_before_step=1,
                max_order=1,
                taylor_factors_dtype=pipe.dtype,
                **identifiers,
            )
        )
        full = (0, *range(2, self.num_steps, THRESHOLD))
        return Way(name, what, pipe, self.num_steps, full, self._calls(self.num_steps))

    def _cache_dit(self, name: str, what: str, calibrates: bool) -> Way:
        with contextlib.redirect_stdout(sys.stderr):  # where its log then goes
            import cache_dit

        pipe = copy_of(self.pipe)
        config = cache_dit.DBCacheConfig(
            Fn_compute_blocks=1,
            Bn_compute_blocks=0,
            max_warmup_steps=0,
            enable_separate_cfg=self.stock.family.calls > 1,
            num_inference_steps=self.num_steps,
            steps_computation_mask=[int(step in self.plan) for step in range(self.num_steps)],
            steps_computation_policy="static",
        )
        calibrator = cache_dit.TaylorSeerCalibratorConfig(taylorseer_order=1) if calibrates else None
        cache_dit.enable_cache(pipe, cache_config=config, calibrator_config=calibrator)
        return Way(name, what, pipe, self.num_steps, self.plan, self._calls(self.num_steps))


@contextlib.contextmanager
def counted(transformer: nn.Module) -> Iterator[Counter[str]]:
    """Counts the transformer's calls, and its evaluations: the calls in which the last block's attention computes."""
    counts: Counter[str] = Counter()
    last = [child for child in transformer.children() if isinstance(child, nn.ModuleList)][-1][-1]
    watched = {"calls": transformer, "evaluations": last.get_submodule("attn.to_q")}
    hooks = [module.register_forward_pre_hook(_counter(counts, name)) for name, module in watched.items()]
    try:
        yield counts
    finally:
        for hook in hooks:
            hook.remove()


def _counter(counts: Counter[str], name: str) -> Callable[..., None]:
    def count(*_: Any) -> None:
        counts[name] += 1

    return count


def now(device: torch.device) -> float:
    """Seconds, the device waited for."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
