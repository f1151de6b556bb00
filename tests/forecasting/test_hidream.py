"""Stock diffusers with the bundled model's weights, forecast from outside, draws what our own pipeline draws."""

from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from diffusers import UniPCMultistepScheduler
from torch import Tensor

from cache_functions import CacheConfig, count_steps
from forecasting import forecast
from hi_diffusers import HiDreamImagePipeline, load_pipeline
from hi_diffusers.families.hidream.prompts import PromptEmbeds

GUIDANCE = 2.0
NUM_STEPS = 50


@pytest.fixture(scope="module")
def ours() -> HiDreamImagePipeline:
    return load_pipeline("nano", device="cpu")


@pytest.fixture(scope="module")
def stock(ours: HiDreamImagePipeline, nano_folder: Path) -> Any:
    """diffusers' pipeline and diffusers' transformer."""
    transformer = diffusers.HiDreamImageTransformer2DModel.from_pretrained(nano_folder / "transformer")
    encoders = dict.fromkeys(
        f"{kind}{number}" for kind in ("text_encoder", "tokenizer") for number in ("", "_2", "_3", "_4")
    )
    pipe = diffusers.HiDreamImagePipeline(
        scheduler=UniPCMultistepScheduler.from_config(ours.scheduler.config),
        vae=ours.vae,
        transformer=transformer,
        **encoders,
    )
    pipe.default_sample_size = transformer.config.max_resolution[0]
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def embeds(ours: HiDreamImagePipeline) -> tuple[PromptEmbeds, PromptEmbeds]:
    return ours.encode(["a red circle on a blue background"], 128), ours.encode([""], 128)


def arguments(embeds: tuple[PromptEmbeds, PromptEmbeds]) -> dict[str, Any]:
    positive, negative = embeds
    return {
        "prompt_embeds_t5": positive.t5,
        "prompt_embeds_llama3": positive.llama,
        "pooled_prompt_embeds": positive.pooled,
        "negative_prompt_embeds_t5": negative.t5,
        "negative_prompt_embeds_llama3": negative.llama,
        "negative_pooled_prompt_embeds": negative.pooled,
        "num_inference_steps": NUM_STEPS,
        "guidance_scale": GUIDANCE,
        "height": 64,
        "width": 64,
        "output_type": "pt",
        "generator": torch.Generator().manual_seed(7),
    }


CONFIGS = {
    "velocity taylor": CacheConfig(target="velocity"),
    "velocity hermite on cosine": CacheConfig(
        target="velocity", basis="hermite", max_order=2, schedule="cosine", full_steps=13
    ),
    "velocity newton on sigma": CacheConfig(target="velocity", basis="newton", abscissa="sigma", max_order=2),
    "x0 reuse": CacheConfig(target="x0", basis="reuse", max_order=0),
    "x0 taylor": CacheConfig(target="x0"),
    "module": CacheConfig(target="module"),
    "velocity, corrector": CacheConfig(target="velocity", corrector=True),
    "x0, corrector": CacheConfig(target="x0", corrector=True),
    "best of x0": CacheConfig(target="x0", schedule="best"),
    "best of x0, 8 full steps": CacheConfig(target="x0", schedule="best", full_steps=8),
    "best of velocity": CacheConfig(target="velocity", schedule="best"),
}


def picture(result: Any) -> Tensor:
    return result[0].float()


def test_uncached_both_draw_the_same(ours: HiDreamImagePipeline, stock: Any, embeds: Any) -> None:
    assert (picture(stock(**arguments(embeds))) - picture(ours(**arguments(embeds)))).abs().max() < 1e-5


@pytest.mark.parametrize("name", CONFIGS)
def test_forecast_from_outside_draws_what_our_own_pipeline_draws(
    ours: HiDreamImagePipeline, stock: Any, embeds: Any, name: str
) -> None:
    config = CONFIGS[name]
    own = picture(ours(**arguments(embeds), cache=config))
    with forecast(stock, config, guidance=GUIDANCE, calibrations=ours.calibrations) as session:
        outside = picture(stock(**arguments(embeds)))
    assert count_steps(session.trace, "full") < NUM_STEPS / 3
    assert (outside - own).abs().max() < 1e-5
    if "best" in name:
        assert not session.notices, "a calibration was expected"


def test_forecast_around_our_own_pipeline_draws_what_its_cache_draws(ours: HiDreamImagePipeline, embeds: Any) -> None:
    own = picture(ours(**arguments(embeds), cache=CONFIGS["x0, corrector"]))
    with forecast(ours, CONFIGS["x0, corrector"]):
        outside = picture(ours(**arguments(embeds)))
        with pytest.raises(ValueError, match="no call of a denoiser was seen"):
            ours(**arguments(embeds), cache=CacheConfig(target="x0"))
    assert (outside - own).abs().max() < 1e-5
