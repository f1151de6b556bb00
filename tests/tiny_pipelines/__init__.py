"""Tiny pipelines of diffusers, one module for each family, with VARIANTS; `folders` writes complete folders of some.

`folders`, `variant` and `__main__` have no VARIANTS.
"""
