"""The functions by which a network uses the cache."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

from torch import Tensor

from cache_functions.anchors import PackedAnchor
from cache_functions.state import CacheState, Current, FeatureName

Rest = TypeVar("Rest")


def forecasts(cache_dic: CacheState | None, current: Current | None, target: str) -> bool:
    """Whether features of `target` are forecast in the running step, so that their inputs need not be computed."""
    return (
        cache_dic is not None
        and current is not None
        and current.kind == "forecast"
        and cache_dic.config.target == target
    )


@dataclass(frozen=True)
class Kept:
    """The anchors and weights of the forecasts of several features.

    Attributes:
        anchors: the tensors of each feature at the last full steps, oldest first; packed if the configuration asks.
        weights: one per anchor.
        step: index of the running step.
    """

    anchors: list[list[Tensor | PackedAnchor]]
    weights: tuple[float, ...]
    step: int


def kept_features(cache_dic: CacheState | None, current: Current | None, names: Sequence[FeatureName]) -> Kept | None:
    """The anchors and weights of several features of one target, for code that sums them all at once.

    Returns:
        None if the running step does not forecast that target.
    """
    if cache_dic is None or current is None or not forecasts(cache_dic, current, names[0].target):
        return None
    return Kept([cache_dic.anchors[name] for name in names], current.weights, current.step)


def compute_or_forecast(
    cache_dic: CacheState | None,
    current: Current | None,
    name: FeatureName,
    compute: Callable[[], tuple[Tensor, Rest]],
) -> tuple[Tensor, Rest | None]:
    """Compute a feature and keep it if it is the target's, or forecast it from the kept ones.

    Args:
        cache_dic: the generation's anchors; None means no caching.
        current: the running step, as `cal_type` left it.
        name: name of the feature.
        compute: returns (feature, rest), where `rest` is anything else that the caller needs of a computed step.

    Returns:
        (feature, rest): `compute`'s own result when it was called, (forecast, None) when it was not.
    """
    if cache_dic is None or current is None or name.target != cache_dic.config.target:
        return compute()
    if current.kind == "forecast":
        return cache_dic.forecast(name, current.weights), None
    feature, rest = compute()
    keep_feature(cache_dic, current, name, feature)
    return feature, rest


def keep_feature(cache_dic: CacheState, current: Current, name: FeatureName, feature: Tensor) -> None:
    """Keep a feature of the running full step; the schedule learns what error a forecast of it would have had."""
    if current.weights and name in cache_dic.anchors:
        cache_dic.observe(feature, cache_dic.forecast(name, current.weights))
    cache_dic.keep(name, feature)
