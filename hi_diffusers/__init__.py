"""HiDream-I1 inference with forecast denoising steps.

from hi_diffusers import CacheConfig, SamplingOptions, generate, load_pipeline

pipe = load_pipeline("nano")
out = generate(pipe, SamplingOptions(prompt="a red circle on a blue background", seed=7), CacheConfig())
out.save("a.png")  # with everything that made it
"""

import importlib
import logging
from typing import TYPE_CHECKING, Any

__version__ = "0.2.0"

if TYPE_CHECKING:  # names that a type checker can follow
    from cache_functions import CacheConfig as CacheConfig
    from cache_functions import StepRecord as StepRecord
    from hi_diffusers.denoising.steps import Interrupted as Interrupted
    from hi_diffusers.engine.generation import (
        Generation as Generation,
    )
    from hi_diffusers.engine.generation import (
        generate as generate,
    )
    from hi_diffusers.engine.generation import (
        generate_batch as generate_batch,
    )
    from hi_diffusers.engine.loading import load_pipeline as load_pipeline
    from hi_diffusers.families.hidream.picture_pipelines import (
        HiDreamImageToImagePipeline as HiDreamImageToImagePipeline,
    )
    from hi_diffusers.families.hidream.picture_pipelines import (
        HiDreamInpaintPipeline as HiDreamInpaintPipeline,
    )
    from hi_diffusers.families.hidream.pipeline import HiDreamImagePipeline as HiDreamImagePipeline
    from hi_diffusers.families.hidream.prompts import PromptEmbeds as PromptEmbeds
    from hi_diffusers.families.hidream.transformer import (
        HiDreamImageTransformer2DModel as HiDreamImageTransformer2DModel,
    )
    from hi_diffusers.request.options import SamplingOptions as SamplingOptions

# Said whenever diffusers is imported beside bitsandbytes, whether or not anything is in 4 bits.
logging.getLogger("bitsandbytes.backends.cpu.ops").addFilter(lambda record: "gemm_4bit_forward" not in str(record.msg))

_HOMES = {
    "CacheConfig": "cache_functions",
    "Generation": "hi_diffusers.engine.generation",
    "HiDreamImagePipeline": "hi_diffusers.families.hidream.pipeline",
    "HiDreamImageToImagePipeline": "hi_diffusers.families.hidream.picture_pipelines",
    "HiDreamImageTransformer2DModel": "hi_diffusers.families.hidream.transformer",
    "HiDreamInpaintPipeline": "hi_diffusers.families.hidream.picture_pipelines",
    "Interrupted": "hi_diffusers.denoising.steps",
    "PromptEmbeds": "hi_diffusers.families.hidream.prompts",
    "SamplingOptions": "hi_diffusers.request.options",
    "StepRecord": "cache_functions",
    "generate": "hi_diffusers.engine.generation",
    "generate_batch": "hi_diffusers.engine.generation",
    "load_pipeline": "hi_diffusers.engine.loading",
}
__all__ = ["__version__", *_HOMES]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
