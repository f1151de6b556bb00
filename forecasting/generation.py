"""One generation of a pipeline: the branches and steps between two calls of the scheduler's `set_timesteps`."""

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from cache_functions import (
    CacheConfig,
    CacheState,
    CalibrationShelf,
    Current,
    FeatureName,
    StepRecord,
    cache_init,
    cal_type,
    compute_or_forecast,
    resolve,
)
from cache_functions.config import BEST
from cache_functions.state import StepKind
from forecasting.branches import Branch, Key, named_tensors, num_outputs, tensors_of, version_of
from forecasting.corrector import Corrector
from forecasting.levels import Levels, adds_noise, previous_sample, sampler_of
from forecasting.memory import branch_bytes, free_bytes

MAX_CALLS = 64
"""Calls of denoisers without a step of the scheduler, after which a generation is given up."""
MOST_MORE_CALLS = 3
NOISE_TRIALS = 2
"""Steps that are tried for added noise: solvers of second order add none in their first one."""
X0 = FeatureName("x0")


@dataclass(frozen=True)
class StepSeen:
    """The information for an observer of a step. Tensors are of one shape, as the scheduler gets them.

    Attributes:
        record: record of the step.
        timestep: the scheduler's timestep.
        latents: the latents after the step.
        output: the model's output that the scheduler got, after guidance.
        x0: the denoised estimate, fp32; None if the scheduler's noise levels are not known.
    """

    record: StepRecord
    timestep: Any
    latents: Tensor
    output: Tensor
    x0: Tensor | None


class Generation:
    """One run over a schedule of noise levels.

    Args:
        scheduler: the pipeline's scheduler, with its timesteps set.
        asked: the configuration as it was asked for.
        guidance: classifier-free guidance scale.
        calibrations: where calibrations are; None: nowhere.
        trace: a record is added at every step.
        on_step: called after every step.

    Attributes:
        config: the resolved configuration.
        notices: sentences about choices that were made.
        first: index of the first drawn step in the scheduler's timesteps.
        num_steps: number of drawn steps.
        step: index of the running drawn step, -1 before the first.
        branches: the calls of a step.

    Raises:
        ValueError: if the configuration does not work with this scheduler.
    """

    def __init__(
        self,
        scheduler: Any,
        asked: CacheConfig,
        guidance: float,
        calibrations: CalibrationShelf | None,
        trace: list[StepRecord],
        on_step: Callable[[StepSeen], None] | None,
    ):
        self.scheduler, self.asked, self.guidance, self.calibrations = scheduler, asked, guidance, calibrations
        self.trace, self.on_step = trace, on_step
        begin = getattr(scheduler, "begin_index", None)
        self.first, self.begins_at_known_step = begin or 0, begin is not None
        self.branches: dict[Key, Branch] = {}
        self.step, self.calls, self.computed, self.most_calls = -1, 0, 0, 0
        self.counts: dict[tuple[Any, ...], int] = {}
        self.is_open = False  # whether a denoiser was called since the last step of the scheduler
        self.started = time.perf_counter()
        self.last: tuple[Tensor, int] | None = None  # the latents after the last step, and their version
        self._settle()

    def _settle(self) -> None:
        """Resolve the configuration for the steps that are drawn."""
        self.num_steps = len(self.scheduler.timesteps) - self.first
        sampler = sampler_of(self.scheduler, self.num_steps, self.guidance)
        asked = with_target(self.asked, sampler.renoises)
        try:
            self.levels: Levels | None = Levels.of(self.scheduler)
        except ValueError:
            if asked.target == "x0" or asked.corrector:
                raise
            self.levels = None
        if self.levels is None and asked.schedule == BEST and asked.target is None:
            if sampler.renoises:
                raise ValueError(f"{sampler.name} adds noise, and its noise levels are not known: take cache off")
            asked = replace(asked, target="velocity")
        if self.levels is not None:
            sampler = replace(sampler, sigmas=self.levels.relative[self.first :])
        resolution = resolve(asked, sampler, self.calibrations)
        self.config, self.notices = resolution.config, resolution.notices
        self.cache_dic: CacheState | None = None
        self.current: Current | None = None
        if self.config.target == "x0":
            self.cache_dic, self.current = self._new_state()
        self.corrector: Corrector | None = None
        if self.config.corrector:
            assert self.levels is not None
            self.corrector = Corrector(self.scheduler, self.levels, self.first + self.config.corrector_from)

    def _new_state(self) -> tuple[CacheState | None, Current]:
        sigmas = self.levels.sigmas[self.first :] if self.levels is not None else ()
        return cache_init(self.config, self.num_steps, sigmas)

    def enter(self, denoiser: int, context: str | None, inputs: Any) -> Branch:
        """A denoiser is called: begin a step if none is running, and decide whether this call is computed."""
        if not self.is_open:
            self._begin_step()
        self.calls += 1
        if self.step > 0 and self.calls > MOST_MORE_CALLS + 2 * self.most_calls:
            raise ValueError(
                f"the denoiser was called {self.calls} times in a step, and {self.most_calls} times before: another"
                " pipeline uses it inside of the context"
            )
        if self.calls > MAX_CALLS:
            raise ValueError(
                f"the denoiser was called {MAX_CALLS} times and {type(self.scheduler).__name__} took no step: this"
                " pipeline does not step the scheduler that it holds, and cannot be forecast"
            )
        tensors = tensors_of(inputs)
        call = (denoiser, context, tuple(tuple(one.shape) for one in tensors))
        key = (*call, self.counts.get(call, 0))
        self.counts[call] = key[-1] + 1
        branch = self.branches.get(key)
        if branch is None:
            branch = self.branches[key] = self._new_branch()
        if branch.constants.changed(named_tensors(inputs)):
            self._start_over(branch)
        branch.begin(self.step, self.current.kind if self.current is not None else None)
        self.computed += branch.kind == "full"
        return branch

    def _new_branch(self) -> Branch:
        target = str(self.config.target)
        if target == "x0":
            assert self.current is not None
            return Branch(target, None, self.current)
        return Branch(target, *self._new_state())

    def _begin_step(self) -> None:
        self.is_open, self.calls, self.computed = True, 0, 0
        self.counts.clear()
        self.started = time.perf_counter()
        self.step += 1
        if self.current is not None:
            cal_type(self.cache_dic, self.current, self.step)

    def _start_over(self, branch: Branch) -> None:
        """Another text, or another picture to edit: what was kept cannot forecast what follows."""
        branch.forget()
        if self.corrector is not None:
            self.corrector.forget()
        if self.cache_dic is not None and self.current is not None and self.current.kind == "forecast":
            self.cache_dic.free()
            cal_type(self.cache_dic, self.current, self.step)

    def compute_after_all(self, branch: Branch, is_first: bool) -> None:
        """Compute a call of a forecast step, because its parts get inputs of another shape than before.

        Args:
            is_first: whether this was found out at the call's first part, so that nothing was forecast yet.
        """
        if not is_first:
            raise ValueError(
                "target module needs parts whose inputs keep their shapes from step to step: take target velocity"
            )
        branch.compute_after_all()
        self.computed += 1

    @torch.compiler.disable
    def check_memory(self, num_parts: int, result: Any) -> None:
        """Refuse target module before anything large is kept, if what it will keep does not fit.

        Args:
            num_parts: number of parts that are forecast.
            result: the result of the first part of a branch's first call.
        """
        feature = result[0] if isinstance(result, tuple) else result
        needed = branch_bytes(self.config, self.num_steps, num_parts, feature) * len(self.branches) - self.num_bytes()
        free = free_bytes(feature.device if self.config.anchor_device is None else torch.device("cpu"))
        if needed > free:
            raise ValueError(
                f"target module would keep {needed / 2**30:.1f} GiB of features of {num_parts} parts, and"
                f" {free / 2**30:.1f} GiB are free: take target velocity, which keeps a few latents"
            )

    def end_step(self, take: Callable[..., Any], arguments: dict[str, Any]) -> Any:
        """The scheduler takes a step.

        Args:
            take: the scheduler's step, which takes the scheduler first.
            arguments: its arguments, by name.

        Returns:
            What the scheduler's step returns.
        """
        if not self.is_open:
            raise ValueError(
                f"{type(self.scheduler).__name__} took a step and no call of a denoiser was seen: this pipeline cannot"
                " be forecast, unless its denoiser was replaced inside of the context: leave it first"
            )
        if self.step == 0:
            self._check_first(arguments)
        if self.step < NOISE_TRIALS:
            self._check_noise(take, arguments)
        kind: StepKind = "full" if self.computed == self.calls else "forecast"
        x0 = self._estimate(arguments)
        if self.current is not None:
            assert x0 is not None and self.levels is not None
            estimate = x0
            x0, _ = compute_or_forecast(self.cache_dic, self.current, X0, lambda: (estimate, None))
            if self.current.kind == "forecast":
                self._replace_output(arguments, x0)
        if self.corrector is not None:
            assert x0 is not None
            self._correct(kind, x0, take, arguments)
        result = take(self.scheduler, **arguments)
        self._close(kind, x0, previous_sample(result), arguments)
        return result

    def _check_first(self, arguments: dict[str, Any]) -> None:
        """What the first step alone tells: where the schedule is begun, the batch, and what the scheduler is given."""
        timestep, sample = arguments.get("timestep"), arguments.get("sample")
        if not self.begins_at_known_step and isinstance(timestep, Tensor) and timestep.numel() == 1:
            places = (self.scheduler.timesteps == timestep.to(self.scheduler.timesteps.device)).nonzero()
            if len(places) and int(places[0]) != self.first:
                self._begin_at(int(places[0]))
        if self.config.is_off:
            return
        if isinstance(sample, Tensor):
            self.config.check_batch(len(sample))
        needs_x0 = self.config.target == "x0" or self.corrector is not None
        if not needs_x0:
            return
        output = arguments.get("model_output")
        if not isinstance(sample, Tensor) or not isinstance(output, Tensor) or sample.shape != output.shape:
            raise ValueError("target x0 and the corrector need latents and outputs of one shape: take target velocity")
        if arguments.get("per_token_timesteps") is not None:
            raise ValueError(
                "target x0 and the corrector need one noise level per step, and this pipeline gives one per token: take"
                " target velocity"
            )

    def _check_noise(self, take: Callable[..., Any], arguments: dict[str, Any]) -> None:
        """Refuse what forecasts noise, if a trial shows that the step adds some."""
        admitted = self.config.is_off or (self.config.target == "x0" and self.corrector is None)
        if not admitted and adds_noise(take, self.scheduler, arguments):
            raise ValueError(
                f"target must be x0, without the corrector, with {type(self.scheduler).__name__}, got"
                f" {self.config.target!r}: the pipeline makes it add fresh noise at every step"
            )

    def _begin_at(self, first: int) -> None:
        """The schedule is begun in its middle: plan the steps that are left. The first one is full in any case."""
        self.first = first
        shared, running = self.cache_dic, self.current
        self._settle()
        if shared is not None and running is not None:
            self.cache_dic, self.current = self._carried_over(shared, running)
        for branch in self.branches.values():
            if branch.cache_dic is None:
                branch.current = self.current or branch.current
            else:
                branch.cache_dic, branch.current = self._carried_over(branch.cache_dic, branch.current)

    def _carried_over(self, cache_dic: CacheState, current: Current) -> tuple[CacheState | None, Current]:
        """A new state with what was kept so far."""
        fresh, position = self._new_state()
        if fresh is None:
            return None, position
        fresh.anchors, fresh.full_steps = cache_dic.anchors, cache_dic.full_steps
        return fresh, replace(current, num_steps=position.num_steps)

    def _estimate(self, arguments: dict[str, Any]) -> Tensor | None:
        """The denoised estimate of the running step; None if nobody needs it or it cannot be known."""
        output, sample = arguments.get("model_output"), arguments.get("sample")
        needed = self.current is not None or self.corrector is not None or self.on_step is not None
        if not needed or self.levels is None or not isinstance(output, Tensor) or not isinstance(sample, Tensor):
            return None
        if output.shape != sample.shape:
            return None
        return self.levels.x0(self.first + self.step, sample.float(), output.float())

    def _replace_output(self, arguments: dict[str, Any], x0: Tensor) -> None:
        """Give the scheduler the output that means an x0, in the dtype to which it casts its result."""
        assert self.levels is not None
        output = self.levels.output(self.first + self.step, arguments["sample"].float(), x0)
        arguments["model_output"] = output.to(arguments["model_output"].dtype)

    def _correct(self, kind: StepKind, x0: Tensor, take: Callable[..., Any], arguments: dict[str, Any]) -> None:
        assert self.corrector is not None
        sample, output = arguments["sample"], arguments["model_output"]
        if self.last is not None and not _untouched(sample, *self.last):
            self.corrector.forget()
        if kind == "forecast":
            return

        def solve(output: Tensor, step: int, latents: Tensor) -> Tensor:
            timestep = self.scheduler.timesteps[step]
            moved = {"model_output": output, "timestep": timestep, "sample": latents}
            return previous_sample(take(self.scheduler, **(arguments | moved)))

        latents, result = self.corrector.at_full_step(self.first + self.step, sample.float(), x0, output.float(), solve)
        if result is not output:
            arguments |= {"sample": latents.to(sample.dtype), "model_output": result.to(output.dtype)}

    def _close(self, kind: StepKind, x0: Tensor | None, latents: Tensor, arguments: dict[str, Any]) -> None:
        if latents.device.type == "cuda":
            torch.cuda.synchronize(latents.device)
        self.most_calls = max(self.most_calls, self.calls)
        self.is_open, self.last = False, (latents, version_of(latents))
        seconds = time.perf_counter() - self.started
        record = StepRecord(self.step, kind, seconds, self.computed, self.num_bytes())
        self.trace.append(record)
        if self.is_done:
            self.free()
        if self.on_step is not None:
            output = arguments["model_output"]
            self.on_step(StepSeen(record, arguments.get("timestep"), latents, output, x0))

    @property
    def is_done(self) -> bool:
        """Whether the last step was taken."""
        return not self.is_open and self.step + 1 >= self.num_steps

    def num_bytes(self) -> int:
        """Bytes of all kept features."""
        states = [self.cache_dic, *(branch.cache_dic for branch in self.branches.values())]
        return sum(one.num_bytes() for one in states if one is not None)

    def free(self) -> None:
        """Drop everything that was kept."""
        self.branches.clear()
        if self.cache_dic is not None:
            self.cache_dic.free()
        if self.corrector is not None:
            self.corrector.forget()
        self.last = None

    def check_output(self, output: Any) -> None:
        """Refuse what needs the whole model in one tensor, if the denoiser returns several."""
        if (self.config.target == "x0" or self.config.corrector) and num_outputs(output) > 1:
            raise ValueError(
                f"target x0 and the corrector know one result, and this denoiser has {num_outputs(output)}: take target"
                " velocity, without the corrector"
            )


def with_target(config: CacheConfig, renoises: bool) -> CacheConfig:
    """A configuration with a target: "velocity", or "x0" where noise is added; `best` chooses its own."""
    if config.target is not None or config.is_off or config.schedule == BEST:
        return config
    return replace(config, target="x0" if renoises else "velocity")


def _untouched(sample: Tensor, last: Tensor, version: int) -> bool:
    """Whether latents are those after the last step, however they were cast."""
    if sample is last:
        return version_of(last) == version
    return sample.shape == last.shape and torch.equal(sample, last.to(sample.dtype))
