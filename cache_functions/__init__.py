"""The cache: which steps are computed, which features are kept, and the one function that a network calls.

cache_dic, current = cache_init(CacheConfig(), num_steps=50)
for _ in range(50):
    cal_type(cache_dic, current)                      # full or forecast?
    feature, rest = compute_or_forecast(cache_dic, current, name, compute)
"""

from cache_functions.budget import planned_full_steps, settle
from cache_functions.cache_init import cache_init
from cache_functions.cal_type import cal_type, make_full
from cache_functions.calibration import Calibration, CalibrationKey, CalibrationShelf
from cache_functions.config import CacheConfig
from cache_functions.feature import compute_or_forecast, forecasts, kept_features
from cache_functions.resolve import Resolution, Sampler, resolve
from cache_functions.schedules import schedule_names
from cache_functions.state import CacheState, Current, FeatureName
from cache_functions.trace import StepRecord, count_steps

__all__ = [
    "CacheConfig",
    "CacheState",
    "Calibration",
    "CalibrationKey",
    "CalibrationShelf",
    "Current",
    "FeatureName",
    "Resolution",
    "Sampler",
    "StepRecord",
    "cache_init",
    "cal_type",
    "compute_or_forecast",
    "count_steps",
    "forecasts",
    "kept_features",
    "make_full",
    "planned_full_steps",
    "resolve",
    "schedule_names",
    "settle",
]
