"""A session: one pipeline of diffusers, forecast from outside."""

import contextlib
import threading
from collections.abc import Callable, Iterator
from typing import Any

import torch
from diffusers import ModelMixin, SchedulerMixin
from torch import nn

from cache_functions import CacheConfig, CalibrationShelf, StepRecord
from cache_functions.schedules import decides_on_the_way
from forecasting.branches import Branch
from forecasting.generation import Generation, StepSeen
from forecasting.levels import named_arguments
from forecasting.parts import Part, parts
from forecasting.watching import unwatch, watch


class Session:
    """Stands in the way of a pipeline's denoisers and of its scheduler.

    Args:
        pipe: a pipeline of diffusers.
        config: how to cache; target None is "velocity", or "x0" where the scheduler adds noise at every step.
        guidance: classifier-free guidance scale, by which a calibration and the default's budget are chosen.
        calibrations: where calibrations are; None: nowhere.
        on_step: called after every step.

    Attributes:
        trace: a record of every step of the last generation.
        notices: sentences about choices that were made for it.
        resolved: the configuration that it was drawn with, all settings filled in.
        generation: the running generation; None before `set_timesteps` and after the last step.
    """

    def __init__(
        self,
        pipe: Any,
        config: CacheConfig,
        guidance: float = 0.0,
        calibrations: CalibrationShelf | None = None,
        on_step: Callable[[StepSeen], None] | None = None,
    ):
        self.pipe, self.config, self.guidance = pipe, config, guidance
        self.calibrations, self.on_step = calibrations, on_step
        self.trace: list[StepRecord] = []
        self.notices: tuple[str, ...] = ()
        self.resolved = config
        self.scheduler, self.denoisers = find_scheduler(pipe), find_denoisers(pipe)
        self.generation: Generation | None = None
        self.has_begun, self.thread = False, 0
        self.context: str | None = None
        self.running: Branch | None = None
        self.parts: dict[int, Part] = {}
        self.seen: set[Part] = set()

    def attach(self) -> None:
        """Begin to watch the pipeline.

        Raises:
            ValueError: if it is forecast already, or cannot be forecast in this way.
        """
        check(self.config, self.pipe, self.denoisers)
        try:
            watch(self.pipe, self, {"__call__": _draw})
            watch(self.scheduler, self, {"set_timesteps": _set_timesteps, "step": _step})
            for denoiser in self.denoisers:
                watch(denoiser, self, {"__call__": _call, "cache_context": _cache_context})
        except ValueError:
            self.detach()
            raise

    def detach(self) -> None:
        """Leave the pipeline as it was, and keep nothing but the trace."""
        self.forget()
        for one in (self.pipe, self.scheduler, *self.denoisers):
            unwatch(one, self)

    def num_bytes(self) -> int:
        """Bytes of all features that are kept now."""
        return self.generation.num_bytes() if self.generation is not None else 0

    def forget(self) -> None:
        """Drop the running generation."""
        if self.generation is not None:
            self.generation.free()
        self.generation, self.has_begun, self.running = None, False, None
        for part in self.parts.values():
            unwatch(part.module, self)
        self.parts.clear()

    def begin(self) -> None:
        """A generation begins: `set_timesteps` was called."""
        self.forget()
        self.thread = threading.get_ident()
        self.trace.clear()
        self.has_begun = True

    def open(self) -> Generation:
        """The running generation, made at the first call of a denoiser, when the scheduler knows where it begins."""
        if self.generation is None:
            check(self.config, self.pipe, self.denoisers)  # what may have changed inside of the context
            self._check_scheduler()
            self.generation = Generation(
                self.scheduler, self.config, self.guidance, self.calibrations, self.trace, self.on_step
            )
            self.notices, self.resolved = self.generation.notices, self.generation.config
            if self.generation.config.target == "module":
                self._watch_parts()
        return self.generation

    def check_thread(self) -> None:
        """Raise ValueError if the pipeline is drawing in another thread."""
        if self.has_begun and self.thread != threading.get_ident():
            raise ValueError("inside of the context a pipeline draws in one thread at a time")

    def _check_scheduler(self) -> None:
        if find_scheduler(self.pipe) is not self.scheduler:
            raise ValueError("the pipeline's scheduler was replaced inside of the context: leave it first")

    def _watch_parts(self) -> None:
        found = [part for denoiser in self.denoisers for part in parts(denoiser)]
        if not any(part.is_forecast for part in found):
            raise ValueError(
                f"target module knows no part of {type(self.denoisers[0]).__name__}'s blocks: take target velocity"
            )
        for part in found:
            if id(part.module) in self.parts:
                raise ValueError(
                    f"target module needs parts of one block each, and {part.name} of block {part.layer} stands in"
                    " several: take target velocity"
                )
            watch(part.module, self, {"__call__": _call_part})
            self.parts[id(part.module)] = part

    @torch.compiler.disable(recursive=False)
    def call(self, compute: Callable[[], Any], denoiser: Any, inputs: Any) -> Any:
        """A denoiser is called: answer, or let it compute."""
        if self.running is not None:
            return compute()
        if not self.has_begun:
            self._check_scheduler()
            return compute()
        self.check_thread()
        generation = self.open()
        branch = generation.enter(self.denoisers.index(denoiser), self.context, inputs)
        if branch.kind == "forecast" and branch.target != "module":
            return branch.answer()
        self.running = branch
        self.seen.clear()
        try:
            output = compute()
        finally:
            self.running = None
        if branch.kind == "full":
            generation.check_output(output)
            branch.keep_output(output)
        return output

    @torch.compiler.disable(recursive=False)
    def call_part(self, compute: Callable[[], Any], module: nn.Module, inputs: Any) -> Any:
        """A part of a block is called: forecast its result, or keep it."""
        branch, part = self.running, self.parts.get(id(module))
        if branch is None or part is None:
            return compute()
        if part in self.seen:
            raise ValueError(
                f"target module needs parts that are called once, and {part.name} of block {part.layer} is called"
                " several times: take target velocity"
            )
        self.seen.add(part)
        assert self.generation is not None
        if branch.kind == "forecast":
            if branch.can_forecast(part, inputs):
                return branch.forecast_part(part)
            self.generation.compute_after_all(branch, is_first=len(self.seen) == 1)
        result = compute()
        if not branch.parts and part.is_forecast:
            num_parts = sum(one.is_forecast for one in self.parts.values()) // len(self.denoisers)
            self.generation.check_memory(num_parts, result)
        branch.keep_part(part, inputs, result)
        return result

    def step(self, take: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """The scheduler takes a step."""
        if not self.has_begun:
            return take(self.scheduler, *args, **kwargs)
        generation = self.open()
        result = generation.end_step(take, named_arguments(self.scheduler, args, kwargs))
        if generation.is_done:
            self.forget()
        return result


def find_scheduler(pipe: Any) -> Any:
    """The scheduler of a pipeline; raises ValueError if it has none."""
    found = [one for one in pipe.components.values() if isinstance(one, SchedulerMixin)]
    if not found:
        raise ValueError(f"{type(pipe).__name__} has no scheduler, so its steps cannot be seen")
    return found[0]


def find_denoisers(pipe: Any) -> list[nn.Module]:
    """The networks that a pipeline calls at every step.

    They are its models of diffusers, or other torch modules, that neither encode nor decode; where some are named
    transformer or unet, those alone.

    Raises:
        ValueError: if there is none.
    """
    networks = {name: one for name, one in pipe.components.items() if isinstance(one, nn.Module)}
    named = [one for name, one in networks.items() if name.startswith(("transformer", "unet"))]
    found = named or [
        one
        for one in networks.values()
        if (isinstance(one, ModelMixin) or not type(one).__module__.startswith("transformers."))
        and not hasattr(one, "decode")
    ]
    if not found:
        raise ValueError(f"{type(pipe).__name__} has no denoiser among {', '.join(networks) or 'its components'}")
    return found


def check(config: CacheConfig, pipe: Any, denoisers: list[nn.Module]) -> None:
    """Raise ValueError for what cannot work, whatever is drawn."""
    if config.is_off:
        return
    if config.target == "residual":
        raise ValueError("target residual is known of HiDream's own transformer only: take velocity, x0 or module")
    for denoiser in denoisers:
        name = type(denoiser).__name__
        if getattr(denoiser, "is_cache_enabled", False):
            raise ValueError(f"diffusers' own cache is switched on for {name}: call disable_cache first")
        if getattr(denoiser, "_parallel_config", None) is not None and decides_on_the_way(config.schedule):
            raise ValueError(
                f"schedule {config.schedule} decides by errors, which differ between the ranks of {name}'s context"
                " parallelism: they would wait for each other forever"
            )
    guider = getattr(pipe, "guider", None)
    if config.target == "x0" and getattr(guider, "momentum_buffer", None) is not None:
        raise ValueError(
            f"target x0 would let {type(guider).__name__}, which averages over the steps, see outputs of past steps:"
            " take target velocity"
        )


def _draw(session: Session, original: Any, pipe: Any, *args: Any, **kwargs: Any) -> Any:
    session.check_thread()
    try:
        return original(pipe, *args, **kwargs)
    except BaseException:
        session.forget()  # what comes next may be another pipeline with the same network
        raise


def _set_timesteps(session: Session, original: Any, scheduler: Any, *args: Any, **kwargs: Any) -> Any:
    session.check_thread()
    result = original(scheduler, *args, **kwargs)
    session.begin()
    return result


def _step(session: Session, original: Any, scheduler: Any, *args: Any, **kwargs: Any) -> Any:
    return session.step(original, args, kwargs)


@torch.compiler.disable(recursive=False)  # torch.compile(denoiser) inside of the context compiles what it calls
def _call(session: Session, original: Any, denoiser: Any, *args: Any, **kwargs: Any) -> Any:
    return session.call(lambda: original(denoiser, *args, **kwargs), denoiser, (args, kwargs))


@torch.compiler.disable(recursive=False)  # in a compiled block: the part itself may be compiled
def _call_part(session: Session, original: Any, module: Any, *args: Any, **kwargs: Any) -> Any:
    return session.call_part(lambda: original(module, *args, **kwargs), module, (args, kwargs))


@contextlib.contextmanager
def _cache_context(session: Session, original: Any, denoiser: Any, name: str, **more: Any) -> Iterator[None]:
    before, session.context = session.context, name
    try:
        with original(denoiser, name, **more):
            yield
    finally:
        session.context = before
