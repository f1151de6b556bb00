"""The denoising loop, and what wraps it: the schedulers, the corrector, what a step tells its observers."""
