"""HiDream-I1 inference with forecast denoising steps.

from hi_diffusers import CacheConfig, SamplingOptions, generate, load_pipeline

pipe = load_pipeline("nano")
out = generate(pipe, SamplingOptions(prompt="a red circle on a blue background", seed=7), CacheConfig())
out.save("a.png")  # with everything that made it
"""

import importlib
from typing import Any

__version__ = "0.1.0"

_HOMES = {
    "CacheConfig": "cache_functions",
    "Generation": "hi_diffusers.engine.generation",
    "HiDreamImagePipeline": "hi_diffusers.families.hidream.pipeline",
    "HiDreamImageTransformer2DModel": "hi_diffusers.families.hidream.transformer",
    "Interrupted": "hi_diffusers.denoising.steps",
    "PromptEmbeds": "hi_diffusers.families.hidream.prompts",
    "SamplingOptions": "hi_diffusers.request.options",
    "StepRecord": "hi_diffusers.denoising.steps",
    "generate": "hi_diffusers.engine.generation",
    "generate_batch": "hi_diffusers.engine.generation",
    "load_pipeline": "hi_diffusers.engine.loading",
}
__all__ = ["__version__", *_HOMES]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
