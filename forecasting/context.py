"""`forecast`: the context in which a pipeline's steps are forecast."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from cache_functions import CacheConfig, CalibrationShelf
from forecasting.generation import StepSeen
from forecasting.session import Session


@contextmanager
def forecast(
    pipe: Any,
    config: CacheConfig,
    *,
    guidance: float = 0.0,
    calibrations: CalibrationShelf | None = None,
    on_step: Callable[[StepSeen], None] | None = None,
) -> Iterator[Session]:
    """Within this context a pipeline of diffusers computes the full steps and forecasts the others.

    Args:
        pipe: any pipeline that calls its denoiser, then its scheduler's `step`.
        config: how to cache; target None is "velocity", or "x0" where the scheduler adds noise at every step.
        guidance: classifier-free guidance scale, by which a calibration and the default's budget are chosen.
        calibrations: where calibrations are; None: nowhere.
        on_step: called after every step.

    Yields:
        The session: `trace`, `num_bytes()`, `notices`.

    Raises:
        ValueError: on entering or at the first step, if the pipeline cannot be forecast in this way.
    """
    session = Session(pipe, config, guidance, calibrations, on_step)
    session.attach()
    try:
        yield session
    finally:
        session.detach()
