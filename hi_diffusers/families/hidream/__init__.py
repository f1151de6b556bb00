"""HiDream-I1: transformer, pipeline, text encoders, files."""
