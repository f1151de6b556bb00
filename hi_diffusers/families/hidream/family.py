"""This family's implementation of `hi_diffusers.families.family.Family`."""

from collections.abc import Callable
from pathlib import Path

from hi_diffusers.families.family import Model, TokenCount
from hi_diffusers.families.hidream.files import encoders_fingerprint, locate, stated_quantization
from hi_diffusers.families.hidream.prompts import PromptEmbeds, count_tokens
from hi_diffusers.families.hidream.shapes import TILE, shapes
from hi_diffusers.preset import ModelPreset
from hi_diffusers.request.placement import Placement
from hi_diffusers.weights.source import ModelFiles, ModelSource, Parts

__all__ = [
    "embeds",
    "encoders_fingerprint",
    "is_quantized",
    "load",
    "locate",
    "save_quantized",
    "shapes",
    "tile",
    "token_counter",
]

embeds = PromptEmbeds
tile = TILE


def load(preset: ModelPreset, source: ModelSource, files: ModelFiles, placement: Placement, parts: Parts) -> Model:
    """See `Family.load`."""
    from hi_diffusers.families.hidream.load import load  # here: diffusers and transformers take seconds to import

    return load(preset, source, files, placement, parts)


def token_counter(preset: ModelPreset, files: ModelFiles) -> Callable[[str, int], TokenCount]:
    """See `Family.token_counter`."""
    from hi_diffusers.families.hidream.load import load_tokenizers

    tokenizers = load_tokenizers(files)
    return lambda prompt, limit: count_tokens(tokenizers, prompt, limit, preset.vocabulary)


def is_quantized(preset: ModelPreset, source: ModelSource) -> bool:
    """See `Family.is_quantized`."""
    return stated_quantization(preset, source) != "none"


def save_quantized(model: Model, folder: Path) -> None:
    """See `Family.save_quantized`."""
    from hi_diffusers.families.hidream.load import save_quantized
    from hi_diffusers.families.hidream.pipeline import HiDreamImagePipeline

    assert isinstance(model, HiDreamImagePipeline)
    save_quantized(model, folder)
