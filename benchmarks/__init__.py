"""Measurements that are reported, never asserted. Run with `python -m benchmarks.speed`."""
