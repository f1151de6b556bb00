"""What the recipes of the three trainings share: checks of settings, and curves over the steps."""


def require_positive(settings: object, *names: str) -> None:
    """Raises ValueError unless each of these settings is above zero."""
    for name in names:
        if not getattr(settings, name) > 0:
            raise ValueError(f"{name} must be above 0, got {getattr(settings, name)}")


def require_seed(settings: object) -> None:
    """Raises ValueError unless the setting `seed` is one that numpy takes."""
    if settings.seed < 0:
        raise ValueError(f"seed must be at least 0, got {settings.seed}")


def require_share(settings: object, *names: str) -> None:
    """Raises ValueError unless each of these settings is in 0 <= share < 1."""
    for name in names:
        if not 0 <= getattr(settings, name) < 1:
            raise ValueError(f"{name} must be at least 0 and below 1, got {getattr(settings, name)}")


def warmup_and_decay(step: int, num_steps: int, warmup_steps: int, decay_share: float) -> float:
    """Share of the learning rate at a step: a linear warm-up, a plateau, and a linear decay to zero at `num_steps`.

    The decay takes the last `decay_share` of the steps.
    """
    left = (num_steps - step) / (decay_share * num_steps)
    return max(0.0, min(1.0, (step + 1) / warmup_steps, left))


def average_decay(step: int, limit: float) -> float:
    """What the moving average of the weights keeps of itself after `step` steps; early it moves faster than `limit`."""
    return min(limit, (1 + step) / (10 + step))
