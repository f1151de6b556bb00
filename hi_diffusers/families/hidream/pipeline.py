"""The pipeline: encode the prompt, denoise with the cache, decode.

Encoding and components are diffusers' own; the denoising loop is ours. Shapes: B pictures, C latent channels.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch
from diffusers.pipelines.hidream_image.pipeline_hidream_image import calculate_shift, retrieve_timesteps
from diffusers.pipelines.hidream_image.pipeline_output import HiDreamImagePipelineOutput
from diffusers.utils.torch_utils import randn_tensor
from PIL import Image
from torch import Tensor
from transformers import LlamaModel

from cache_functions import CacheConfig, CalibrationShelf, resolve
from forecasting.levels import sampler_of
from hi_diffusers.denoising.cached import denoise_with_cache
from hi_diffusers.denoising.ranks import Ranks
from hi_diffusers.denoising.start import Start, begin_at, first_step
from hi_diffusers.denoising.steps import Change, Interrupted, StepEnd
from hi_diffusers.families.family import TokenCount
from hi_diffusers.families.hidream.arguments import Given
from hi_diffusers.families.hidream.denoiser import GuidedDenoiser
from hi_diffusers.families.hidream.prompts import PromptEmbeds, count_tokens
from hi_diffusers.families.hidream.stock import HUB, arguments_for, as_ours, check_encoders, recognise
from hi_diffusers.families.hidream.transformer import HiDreamImageTransformer2DModel
from hi_diffusers.preset import ModelPreset, fit_size
from hi_diffusers.weights.identity import ModelIdentity, find_calibrations
from hi_diffusers.weights.source import ModelFiles, ModelSource


class HiDreamImagePipeline(diffusers.HiDreamImagePipeline):
    """diffusers' pipeline with our transformer, our denoising loop and the cache.

    A component may be None if the call does not need it: the encoders if embeddings are given, the VAE for
    `output_type="latent"`.
    """

    _optional_components = [
        "vae",
        "text_encoder",
        "tokenizer",
        "text_encoder_2",
        "tokenizer_2",
        "text_encoder_3",
        "tokenizer_3",
        "text_encoder_4",
        "tokenizer_4",
        "transformer",
    ]

    # See `hi_diffusers.families.family.Model`.
    fp8 = False
    notices: tuple[str, ...] = ()
    ranks: Ranks | None = None  # the processes that draw together, set by `draw_with`
    origin: tuple[Path, str | None] | None = None  # folder and repository of its files

    _denoiser: GuidedDenoiser | None = None  # while it draws

    # Every component is a parameter without a default: that is how diffusers tells components from settings. By the
    # types of its own models `from_pipe` tells which of another pipeline's it may take over.
    def __init__(
        self,
        scheduler: Any,
        vae: diffusers.AutoencoderKL | None,
        text_encoder: Any,
        tokenizer: Any,
        text_encoder_2: Any,
        tokenizer_2: Any,
        text_encoder_3: Any,
        tokenizer_3: Any,
        text_encoder_4: Any,
        tokenizer_4: Any,
        transformer: HiDreamImageTransformer2DModel | diffusers.HiDreamImageTransformer2DModel | None,
    ):
        transformer = as_ours(transformer)
        super().__init__(
            scheduler,
            vae,
            text_encoder,
            tokenizer,
            text_encoder_2,
            tokenizer_2,
            text_encoder_3,
            tokenizer_3,
            text_encoder_4,
            tokenizer_4,
            transformer,
        )
        if transformer is not None:
            self.default_sample_size = transformer.config.max_resolution[0]

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | Path, **kwargs: Any) -> "HiDreamImagePipeline":
        """Load a diffusers folder or hub repository, with our transformer and a Llama without its head.

        Arguments as in diffusers; components given as arguments are not loaded. Without a dtype all are fp32. The
        pipeline knows its preset, its identity and its calibrations where the files are a known model's.
        """
        folder, repo = Path(pretrained_model_name_or_path), None
        if not folder.is_dir():
            repo = str(pretrained_model_name_or_path)
            folder = Path(cls.download(repo, **{key: kwargs[key] for key in HUB if key in kwargs}))
        if "torch_dtype" in kwargs:
            kwargs["dtype"] = kwargs.pop("torch_dtype")
        if kwargs.get("dtype") is None:
            kwargs["dtype"] = torch.float32
        for name, model in (("transformer", HiDreamImageTransformer2DModel), ("text_encoder_4", LlamaModel)):
            if name not in kwargs and (folder / name).is_dir():
                of_diffusers = model is HiDreamImageTransformer2DModel
                kwargs[name] = model.from_pretrained(folder / name, **arguments_for(name, of_diffusers, kwargs))
        pipe = super().from_pretrained(folder, **kwargs)
        pipe.origin = (folder, repo)
        return pipe

    @cached_property
    def preset(self) -> ModelPreset | None:
        """The model's preset, set by `load_pipeline`, else recognised from the folder; None if unknown."""
        return None if self.origin is None else recognise(*self.origin)

    @cached_property
    def calibrations(self) -> CalibrationShelf | None:
        """Where the model's calibrations are; None: nowhere."""
        if self.preset is None or self.origin is None:
            return None
        return find_calibrations(self.preset, ModelSource(model_path=str(self.origin[0])))

    @cached_property
    def identity(self) -> ModelIdentity | None:
        """The identity of its weights; None if unknown."""
        if self.preset is None or self.origin is None:
            return None
        known = None if self.calibrations is None else self.calibrations.model
        return ModelIdentity.of(self.preset, ModelFiles(self.origin[0]), "none", known)

    def save_pretrained(self, save_directory: str | Path, **kwargs: Any) -> None:
        """Write a folder that diffusers itself can load, too: its transformer has the same files."""
        if self.transformer is not None:
            self.register_to_config(transformer=("diffusers", HiDreamImageTransformer2DModel.__name__))
        super().save_pretrained(save_directory, **kwargs)

    def _get_llama3_prompt_embeds(
        self,
        prompt: str | list[str],
        max_sequence_length: int = 128,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> Tensor:
        """All hidden states but the embedding, [L,B,T,4096]; no attention maps, no key-value cache, no head."""
        inputs = self.tokenizer_4(
            [prompt] if isinstance(prompt, str) else prompt,
            padding="max_length",
            max_length=min(max_sequence_length, self.tokenizer_4.model_max_length),
            truncation=True,
            return_tensors="pt",
        ).to(device or self._execution_device)
        outputs = self.text_encoder_4(
            inputs.input_ids, attention_mask=inputs.attention_mask, output_hidden_states=True, use_cache=False
        )
        states = torch.stack(outputs.hidden_states[1:])
        return states if dtype is None else states.to(dtype)

    @torch.no_grad()
    def encode(
        self, prompts: list[str], max_sequence_length: int, negative_prompts: list[str] | None = None
    ) -> PromptEmbeds:
        """Encode a batch of prompts.

        Args:
            prompts: B prompts.
            max_sequence_length: tokens that prompts are padded or cut to.
            negative_prompts: B negative prompts; None without guidance.

        Returns:
            Embeddings of B prompts, or of [negative, positive] with guidance.
        """
        t5, negative_t5, llama, negative_llama, pooled, negative_pooled = self.encode_prompt(
            prompts,
            negative_prompt=negative_prompts,
            do_classifier_free_guidance=negative_prompts is not None,
            max_sequence_length=max_sequence_length,
        )
        embeds = PromptEmbeds(t5, llama, pooled)
        if negative_prompts is None:
            return embeds
        return embeds.after(PromptEmbeds(negative_t5, negative_llama, negative_pooled))

    def draw_with(self, ranks: Ranks) -> None:
        """Share all drawings with the other ranks, each of which must have loaded the same model and draw the same."""
        ranks.split.check(True, heads=self.transformer.config.num_attention_heads)
        ranks.split_tokens(self.transformer)
        self.ranks = ranks

    def draw_noise(self, batch_size: int, width: int, height: int, generator: Any = None) -> Tensor:
        """Initial latents [B,C,H,W], fp32, for pictures of width x height pixels."""
        shape = self._latent_shape(batch_size, width, height)
        return randn_tensor(shape, generator=generator, device=self._execution_device, dtype=torch.float32)

    def _latent_shape(self, batch_size: int, width: int, height: int) -> tuple[int, int, int, int]:
        factor = self.vae_scale_factor
        return batch_size, self.transformer.config.in_channels, height // factor, width // factor

    @torch.no_grad()
    def encode_pictures(self, pixels: np.ndarray) -> Tensor:
        """The latents [B,C,H,W], fp32, of pictures [B,H,W,3], float32 in 0..1: the VAE's mean, without noise."""
        inputs = torch.from_numpy(pixels).movedim(-1, 1).to(self._execution_device, self.vae.dtype)
        latents = self.vae.encode(2 * inputs - 1).latent_dist.mode().float()
        return (latents - (self.vae.config.shift_factor or 0.0)) * self.vae.config.scaling_factor

    def denoiser(self, embeds: PromptEmbeds, scheduler: Any, guidance: float) -> GuidedDenoiser:
        """The network for these embeddings, for a loop of the caller's; `condition` must be called first."""
        return GuidedDenoiser(self.transformer, scheduler.timesteps, embeds, guidance, gated=False)

    @torch.no_grad()
    def denoise(
        self,
        latents: Tensor,
        embeds: PromptEmbeds,
        *,
        scheduler: Any,
        guidance: float,
        cache: CacheConfig,
        generator: Any = None,
        attention_kwargs: dict[str, Any] | None = None,
        on_step_end: Callable[[StepEnd], Change | None] | None = None,
        start: Start | None = None,
    ) -> Tensor:
        """Run the denoising loop.

        Args:
            latents: noise [B,C,H,W], or a noised picture.
            embeds: embeddings of B prompts, or of [negative, positive] if guidance is above 1.
            scheduler: a scheduler with its timesteps set.
            guidance: classifier-free guidance scale; 1 or less turns guidance off.
            cache: resolved configuration.
            generator: one or B generators for samplers that add noise.
            attention_kwargs: {"scale": ...} scales LoRA.
            on_step_end: called after every step; may change what the next one starts from.
            start: the picture that is drawn anew; None: the drawing starts from noise.

        Returns:
            Denoised latents [B,C,H,W], fp32.
        """
        # packed anchors are forecast block by block, and so need no gates
        packed = cache.anchor_dtype is not None or cache.anchor_device is not None
        gated = not cache.is_off and cache.target in (None, "module") and not packed
        timesteps = scheduler.timesteps
        denoiser = GuidedDenoiser(self.transformer, timesteps, embeds, guidance, gated, attention_kwargs, self.ranks)
        self._denoiser = denoiser
        try:
            return denoise_with_cache(latents, denoiser, scheduler, cache, generator, on_step_end, start)
        finally:
            self._denoiser = None
            self.maybe_free_model_hooks()

    @torch.no_grad()
    def decode(self, latents: Tensor, output_type: str = "np") -> Any:
        """Decode latents [B,C,H,W]: "np" float [B,H,W,3] in 0..1, "pt" float [B,3,H,W], "pil"; "latent": no change."""
        if output_type == "latent":
            return latents
        latents = latents / self.vae.config.scaling_factor + (self.vae.config.shift_factor or 0.0)
        decoded = self.vae.decode(latents.to(self.vae.dtype), return_dict=False)[0]
        return self.image_processor.postprocess(decoded.float(), output_type=output_type)

    @property
    def current_timestep(self) -> float | None:
        """The timestep of the step that is computed, which some of diffusers' caches ask for; None between drawings."""
        return None if self._denoiser is None else self._denoiser.timestep

    @property
    def drawing_device(self) -> torch.device:
        """The device that it computes on."""
        return self._execution_device

    @property
    def drawing_dtype(self) -> torch.dtype:
        """The dtype of the transformer's weights."""
        return self.transformer.dtype

    def count_tokens(self, prompt: str, limit: int) -> TokenCount:
        """Count the tokens of a prompt that is cut to `limit` tokens."""
        tokenizers = (self.tokenizer, self.tokenizer_2, self.tokenizer_3, self.tokenizer_4)
        return count_tokens(tokenizers, prompt, limit, self.preset.vocabulary if self.preset else None)

    def release(self) -> None:
        """Move offloaded components back to host memory."""
        self.maybe_free_model_hooks()

    def preview(self, x0: Tensor) -> Image.Image:
        """Decode the first picture of a denoised estimate [B,C,H,W]."""
        return self.decode(x0[:1], "pil")[0]

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | list[str] | None = None,
        prompt_2: str | list[str] | None = None,
        prompt_3: str | list[str] | None = None,
        prompt_4: str | list[str] | None = None,
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int = 50,
        sigmas: list[float] | None = None,
        guidance_scale: float = 5.0,
        negative_prompt: str | list[str] | None = None,
        negative_prompt_2: str | list[str] | None = None,
        negative_prompt_3: str | list[str] | None = None,
        negative_prompt_4: str | list[str] | None = None,
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
        callback_on_step_end: Callable[[Any, int, Tensor, dict[str, Any]], dict[str, Any]] | None = None,
        callback_on_step_end_tensor_inputs: tuple[str, ...] | list[str] = ("latents",),
        max_sequence_length: int = 128,
        *,
        prompt_embeds: list[Tensor] | None = None,
        negative_prompt_embeds: list[Tensor] | None = None,
        cache: CacheConfig | None = None,
        image: Any = None,
        mask_image: Any = None,
        strength: float = 1.0,
    ) -> HiDreamImagePipelineOutput | tuple[Any]:
        """Draw, with diffusers' arguments in diffusers' order.

        Args:
            latents: noise; with an image what the first step that is drawn begins with.
            prompt_embeds, negative_prompt_embeds: [T5's, Llama's], deprecated in diffusers but still accepted.
            cache: how to cache; open settings are filled in for the scheduler. None is off.
            image: pictures to start from, see `Given`; one for all prompts, or one for each picture that is drawn.
            mask_image: what of them is drawn anew, white; a soft edge counts.
            strength: with `image`: share of the steps that is drawn, above 0 to 1.

        The other arguments are diffusers'. The requested size keeps its shape and is scaled to the model's area; the
        size of a picture to start from is the default.
        """
        given = Given.of(image, mask_image, strength)
        if given is not None and width is None and height is None:
            width, height = given.size
        width, height = self._fit_size(width, height)
        if prompt_embeds is not None:
            prompt_embeds_t5, prompt_embeds_llama3 = prompt_embeds
        if negative_prompt_embeds is not None:
            negative_prompt_embeds_t5, negative_prompt_embeds_llama3 = negative_prompt_embeds
        if prompt is not None:
            check_encoders(self)
        self.check_inputs(
            prompt,
            prompt_2,
            prompt_3,
            prompt_4,
            negative_prompt,
            negative_prompt_2,
            negative_prompt_3,
            negative_prompt_4,
            prompt_embeds_t5,
            prompt_embeds_llama3,
            negative_prompt_embeds_t5,
            negative_prompt_embeds_llama3,
            pooled_prompt_embeds,
            negative_pooled_prompt_embeds,
            callback_on_step_end_tensor_inputs,
        )
        num_steps = num_inference_steps if sigmas is None else len(sigmas)
        first = first_step(num_steps, strength)
        sampler = sampler_of(self.scheduler, num_steps, guidance_scale)
        sampler = replace(sampler, has_branches=True, first_step=first)
        cache = resolve(cache or CacheConfig.off(), sampler, self.calibrations).config
        self._guidance_scale, self._attention_kwargs, self._interrupt = guidance_scale, attention_kwargs, False
        guided = guidance_scale > 1
        t5, negative_t5, llama, negative_llama, pooled, negative_pooled = self.encode_prompt(
            prompt=prompt,
            prompt_2=prompt_2,
            prompt_3=prompt_3,
            prompt_4=prompt_4,
            negative_prompt=negative_prompt,
            negative_prompt_2=negative_prompt_2,
            negative_prompt_3=negative_prompt_3,
            negative_prompt_4=negative_prompt_4,
            do_classifier_free_guidance=guided,
            prompt_embeds_t5=prompt_embeds_t5,
            prompt_embeds_llama3=prompt_embeds_llama3,
            negative_prompt_embeds_t5=negative_prompt_embeds_t5,
            negative_prompt_embeds_llama3=negative_prompt_embeds_llama3,
            pooled_prompt_embeds=pooled_prompt_embeds,
            negative_pooled_prompt_embeds=negative_pooled_prompt_embeds,
            num_images_per_prompt=num_images_per_prompt,
            max_sequence_length=max_sequence_length,
        )
        embeds = PromptEmbeds(t5, llama, pooled)
        shape = self._latent_shape(len(pooled), width, height)
        if latents is not None and latents.shape != shape:
            raise ValueError(f"latents must have the shape {shape}, got {tuple(latents.shape)}")
        if guided:
            embeds = embeds.after(PromptEmbeds(negative_t5, negative_llama, negative_pooled))
        self._set_timesteps(num_inference_steps, sigmas, first)
        inputs = None if given is None else given.fitted(len(pooled), width, height)
        start = None if inputs is None else Start.of(self.encode_pictures(inputs.pictures), inputs.masks)
        if latents is None:
            latents = self.draw_noise(len(pooled), width, height, generator)
            if start is not None and first:
                latents = start.noised(latents, float(self.scheduler.sigmas[0]))

        def on_step_end(end: StepEnd) -> Change | None:
            progress.update()
            change = Change(latents=end.latents)
            if callback_on_step_end is not None:
                change = self._call_back(callback_on_step_end, callback_on_step_end_tensor_inputs, end)
            if self._interrupt:
                raise Interrupted(change.latents)
            return change

        with self.progress_bar(total=self._num_timesteps) as progress:
            try:
                latents = self.denoise(
                    latents.to(self._execution_device),
                    embeds,
                    scheduler=self.scheduler,
                    guidance=guidance_scale,
                    cache=cache,
                    generator=generator,
                    attention_kwargs=attention_kwargs,
                    on_step_end=on_step_end,
                    start=start,
                )
            except (
                Interrupted
            ) as interrupted:  # a callback set `_interrupt`: the latents so far are decoded, as in diffusers
                (latents,) = interrupted.args
        try:
            if inputs is None or inputs.masks is None or output_type == "latent":
                images = self.decode(latents, output_type)
            else:
                images = self._as_output(inputs.keep_rest(self.decode(latents)), output_type)
        finally:
            self.maybe_free_model_hooks()
        return HiDreamImagePipelineOutput(images=images) if return_dict else (images,)

    def _fit_size(self, width: int | None, height: int | None) -> tuple[int, int]:
        side = self.default_sample_size * self.vae_scale_factor
        return fit_size(width or side, height or side, side * side, 2 * self.vae_scale_factor)

    def _as_output(self, pixels: np.ndarray, output_type: str) -> Any:
        """Pictures [B,H,W,3], float in 0..1, as `decode` returns them."""
        if output_type == "pil":
            return self.image_processor.numpy_to_pil(pixels)
        return torch.from_numpy(pixels).movedim(-1, 1) if output_type == "pt" else pixels

    def _set_timesteps(self, num_steps: int, sigmas: list[float] | None, first: int) -> None:
        dynamic = getattr(self.scheduler.config, "use_dynamic_shifting", False)
        shift = {"mu": calculate_shift(self.transformer.max_seq)} if dynamic else {}
        retrieve_timesteps(self.scheduler, num_steps, self._execution_device, sigmas=sigmas, **shift)
        begin_at(self.scheduler, first)
        self._num_timesteps = len(self.scheduler.timesteps)

    def _call_back(self, callback: Any, wanted: tuple[str, ...] | list[str], end: StepEnd) -> Change:
        tensors = {
            "latents": end.latents,
            "prompt_embeds_t5": end.embeds.t5,
            "prompt_embeds_llama3": end.embeds.llama,
            "pooled_prompt_embeds": end.embeds.pooled,
        }
        changed = callback(self, end.record.index, end.timestep, {name: tensors[name] for name in wanted}) or {}
        after = {**tensors, **changed}
        same = all(after[name] is tensors[name] for name in tensors if name != "latents")
        embeds = PromptEmbeds(after["prompt_embeds_t5"], after["prompt_embeds_llama3"], after["pooled_prompt_embeds"])
        return Change(after["latents"], None if same else embeds, self._guidance_scale)
