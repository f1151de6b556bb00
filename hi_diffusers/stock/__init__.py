"""Pipelines of diffusers that are not ours: opened, drawn with the cache from outside, written to files."""
