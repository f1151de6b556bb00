"""Image-to-image and inpainting, with the arguments of diffusers' pipelines for FLUX in their order."""

from collections.abc import Callable
from typing import Any

import torch
from diffusers.pipelines.hidream_image.pipeline_output import HiDreamImagePipelineOutput
from torch import Tensor

from cache_functions import CacheConfig
from hi_diffusers.families.hidream.pipeline import HiDreamImagePipeline
from hi_diffusers.request.options import STRENGTH

OnStepEnd = Callable[[Any, int, Tensor, dict[str, Any]], dict[str, Any]]


class HiDreamImageToImagePipeline(HiDreamImagePipeline):
    """Draws a picture anew, as far as `strength` says."""

    def __call__(  # type: ignore[override]  # the order of diffusers' pipelines that start from a picture
        self,
        prompt: str | list[str] | None = None,
        prompt_2: str | list[str] | None = None,
        prompt_3: str | list[str] | None = None,
        prompt_4: str | list[str] | None = None,
        negative_prompt: str | list[str] | None = None,
        negative_prompt_2: str | list[str] | None = None,
        negative_prompt_3: str | list[str] | None = None,
        negative_prompt_4: str | list[str] | None = None,
        image: Any = None,
        height: int | None = None,
        width: int | None = None,
        strength: float = STRENGTH,
        num_inference_steps: int = 50,
        sigmas: list[float] | None = None,
        guidance_scale: float = 5.0,
        num_images_per_prompt: int = 1,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: Tensor | None = None,
        prompt_embeds_t5: Tensor | None = None,
        prompt_embeds_llama3: Tensor | None = None,
        negative_prompt_embeds_t5: Tensor | None = None,
        negative_prompt_embeds_llama3: Tensor | None = None,
        pooled_prompt_embeds: Tensor | None = None,
        negative_pooled_prompt_embeds: Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        attention_kwargs: dict[str, Any] | None = None,
        callback_on_step_end: OnStepEnd | None = None,
        callback_on_step_end_tensor_inputs: tuple[str, ...] | list[str] = ("latents",),
        max_sequence_length: int = 128,
        *,
        cache: CacheConfig | None = None,
    ) -> HiDreamImagePipelineOutput | tuple[Any]:
        """Draw; see `HiDreamImagePipeline.__call__`. `image` must be given."""
        _require(image=image)
        return super().__call__(
            prompt=prompt,
            prompt_2=prompt_2,
            prompt_3=prompt_3,
            prompt_4=prompt_4,
            negative_prompt=negative_prompt,
            negative_prompt_2=negative_prompt_2,
            negative_prompt_3=negative_prompt_3,
            negative_prompt_4=negative_prompt_4,
            image=image,
            height=height,
            width=width,
            strength=strength,
            num_inference_steps=num_inference_steps,
            sigmas=sigmas,
            guidance_scale=guidance_scale,
            num_images_per_prompt=num_images_per_prompt,
            generator=generator,
            latents=latents,
            prompt_embeds_t5=prompt_embeds_t5,
            prompt_embeds_llama3=prompt_embeds_llama3,
            negative_prompt_embeds_t5=negative_prompt_embeds_t5,
            negative_prompt_embeds_llama3=negative_prompt_embeds_llama3,
            pooled_prompt_embeds=pooled_prompt_embeds,
            negative_pooled_prompt_embeds=negative_pooled_prompt_embeds,
            output_type=output_type,
            return_dict=return_dict,
            attention_kwargs=attention_kwargs,
            callback_on_step_end=callback_on_step_end,
            callback_on_step_end_tensor_inputs=callback_on_step_end_tensor_inputs,
            max_sequence_length=max_sequence_length,
            cache=cache,
        )


class HiDreamInpaintPipeline(HiDreamImagePipeline):
    """Draws a part of a picture anew, and keeps the rest as it is."""

    def __call__(  # type: ignore[override]  # the order of diffusers' pipelines that start from a picture
        self,
        prompt: str | list[str] | None = None,
        prompt_2: str | list[str] | None = None,
        prompt_3: str | list[str] | None = None,
        prompt_4: str | list[str] | None = None,
        negative_prompt: str | list[str] | None = None,
        negative_prompt_2: str | list[str] | None = None,
        negative_prompt_3: str | list[str] | None = None,
        negative_prompt_4: str | list[str] | None = None,
        image: Any = None,
        mask_image: Any = None,
        height: int | None = None,
        width: int | None = None,
        strength: float = STRENGTH,
        num_inference_steps: int = 50,
        sigmas: list[float] | None = None,
        guidance_scale: float = 5.0,
        num_images_per_prompt: int = 1,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: Tensor | None = None,
        prompt_embeds_t5: Tensor | None = None,
        prompt_embeds_llama3: Tensor | None = None,
        negative_prompt_embeds_t5: Tensor | None = None,
        negative_prompt_embeds_llama3: Tensor | None = None,
        pooled_prompt_embeds: Tensor | None = None,
        negative_pooled_prompt_embeds: Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        attention_kwargs: dict[str, Any] | None = None,
        callback_on_step_end: OnStepEnd | None = None,
        callback_on_step_end_tensor_inputs: tuple[str, ...] | list[str] = ("latents",),
        max_sequence_length: int = 128,
        *,
        cache: CacheConfig | None = None,
    ) -> HiDreamImagePipelineOutput | tuple[Any]:
        """Draw; see `HiDreamImagePipeline.__call__`. `image` and `mask_image` must be given."""
        _require(image=image, mask_image=mask_image)
        return super().__call__(
            prompt=prompt,
            prompt_2=prompt_2,
            prompt_3=prompt_3,
            prompt_4=prompt_4,
            negative_prompt=negative_prompt,
            negative_prompt_2=negative_prompt_2,
            negative_prompt_3=negative_prompt_3,
            negative_prompt_4=negative_prompt_4,
            image=image,
            mask_image=mask_image,
            height=height,
            width=width,
            strength=strength,
            num_inference_steps=num_inference_steps,
            sigmas=sigmas,
            guidance_scale=guidance_scale,
            num_images_per_prompt=num_images_per_prompt,
            generator=generator,
            latents=latents,
            prompt_embeds_t5=prompt_embeds_t5,
            prompt_embeds_llama3=prompt_embeds_llama3,
            negative_prompt_embeds_t5=negative_prompt_embeds_t5,
            negative_prompt_embeds_llama3=negative_prompt_embeds_llama3,
            pooled_prompt_embeds=pooled_prompt_embeds,
            negative_pooled_prompt_embeds=negative_pooled_prompt_embeds,
            output_type=output_type,
            return_dict=return_dict,
            attention_kwargs=attention_kwargs,
            callback_on_step_end=callback_on_step_end,
            callback_on_step_end_tensor_inputs=callback_on_step_end_tensor_inputs,
            max_sequence_length=max_sequence_length,
            cache=cache,
        )


def _require(**given: Any) -> None:
    for name, value in given.items():
        if value is None:
            raise ValueError(f"{name} must be given: the pipeline starts from a picture")
