"""The polynomial through the anchors, by Newton's divided differences: exact for any gaps.

It is computed in Lagrange's form, which gives the same polynomial as weights of the anchors.
"""

import math
from collections.abc import Sequence

ABSCISSAE = ("step", "sigma", "log_snr")
LEAST_SIGMA = 1e-3


def weights(
    anchors: Sequence[int], step: int, max_order: int, *, abscissa: str = "step", sigmas: Sequence[float] = ()
) -> list[float]:
    """One weight per anchor, oldest first.

    The order is lowered by one if the step is farther from the newest anchor than the oldest anchor is, since a high
    order is least accurate beyond the span of its anchors.

    Args:
        abscissa: variable of the polynomial: the step's index, its noise level sigma, or its log-SNR
            log((1 - sigma) / sigma) with sigma clamped to 1e-3 .. 1 - 1e-3.
        sigmas: noise level of every step of the generation, for abscissae sigma and log_snr.

    Raises:
        ValueError: for an unknown abscissa, or missing noise levels.
    """
    if abscissa not in ABSCISSAE:
        raise ValueError(f"abscissa must be one of {', '.join(ABSCISSAE)}, got {abscissa!r}")
    if abscissa != "step" and len(sigmas) <= step:
        raise ValueError(f"abscissa {abscissa} needs the noise level of step {step}, got only {len(sigmas)} levels")
    counted = anchors[-max_order - 1 :]
    if len(counted) > 1 and step - counted[-1] > counted[-1] - counted[0]:
        counted = counted[1:]
    newest_at = {_position(anchor, abscissa, sigmas): anchor for anchor in counted}  # clamped sigmas can coincide
    at = _position(step, abscissa, sigmas)
    by_anchor = {
        anchor: math.prod((at - other) / (own - other) for other in newest_at if other != own)
        for own, anchor in newest_at.items()
    }
    return [by_anchor.get(anchor, 0.0) for anchor in anchors]


def _position(step: int, abscissa: str, sigmas: Sequence[float]) -> float:
    if abscissa == "step":
        return float(step)
    if abscissa == "sigma":
        return sigmas[step]
    sigma = min(max(sigmas[step], LEAST_SIGMA), 1 - LEAST_SIGMA)
    return math.log((1 - sigma) / sigma)
