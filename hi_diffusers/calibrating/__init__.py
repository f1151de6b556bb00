"""How calibrate.py finds the best forecasts for a model and sampler: draw, fit, and choose by drawing."""
