"""The paper's schedule: after `first_enhance` full steps, every `fresh_threshold`-th step is full.

Source: TaylorSeer, arXiv 2503.06923 (there N is `fresh_threshold`). `last_enhance` is ours: that many final steps
are always full.
"""

DEFAULT_FRESH_THRESHOLD = 4


def plan(
    num_steps: int,
    *,
    fresh_threshold: int = DEFAULT_FRESH_THRESHOLD,
    first_enhance: int = 1,
    last_enhance: int = 0,
) -> list[int]:
    """The full steps: at the start, at the end, and `fresh_threshold` after the last one."""
    full_steps = [0]
    for step in range(1, num_steps):
        enhanced = step < first_enhance or step >= num_steps - last_enhance
        if enhanced or step - full_steps[-1] >= fresh_threshold:
            full_steps.append(step)
    return full_steps
