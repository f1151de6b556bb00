"""Forecasting arithmetic: the weights of kept features at a later step.

Steps are indices. Anchors are the full steps whose features are kept, listed oldest first. A basis turns
(anchors, step) into one weight per anchor; `weighted_sum` applies the weights to the kept tensors.
"""

from taylor_utils.bases import basis_names, basis_settings, basis_weights
from taylor_utils.combine import weighted_sum
from taylor_utils.derivatives import derivative_approximation, taylor_formula

__all__ = [
    "basis_names",
    "basis_settings",
    "basis_weights",
    "derivative_approximation",
    "taylor_formula",
    "weighted_sum",
]
