"""HiDream-I1 as diffusers draws with it: its own pipeline and its own transformer."""

from typing import Any

from diffusers import HiDreamImagePipeline, HiDreamImageTransformer2DModel, UniPCMultistepScheduler

from tests.tiny import TINY, make_inputs
from tests.tiny_pipelines.variant import Variant, quiet, seeded

LATENT_SIZE = 8


def transformer() -> Any:
    return seeded(HiDreamImageTransformer2DModel, **TINY | {"max_resolution": [LATENT_SIZE, LATENT_SIZE]})


def image() -> Any:
    scheduler = UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0)
    text_encoders = [None] * 8
    pipe = quiet(HiDreamImagePipeline(scheduler, None, *text_encoders, transformer()))
    pipe.default_sample_size = LATENT_SIZE
    return pipe


def text(batch: int, prefix: str = "", seed: int = 1) -> dict[str, Any]:
    inputs = make_inputs(batch, seed=seed)
    return {
        f"{prefix}prompt_embeds_t5": inputs.t5,
        f"{prefix}prompt_embeds_llama3": inputs.llama,
        f"{prefix}pooled_prompt_embeds": inputs.pooled,
    }


def guided(batch: int) -> dict[str, Any]:
    return text(batch) | text(batch, "negative_", seed=2) | {"guidance_scale": 2.0, "output_type": "latent"}


VARIANTS = [Variant("hidream", image, guided)]
