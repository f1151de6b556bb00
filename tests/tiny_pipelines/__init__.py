"""Tiny pipelines of diffusers, one module for each family; every module there has VARIANTS."""
