"""What a pipeline of diffusers takes: read from its call's signature, and from one row for what that does not tell."""

import inspect
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Literal


@dataclass(frozen=True)
class Traits:
    """The properties of a pipeline class that its call's signature does not tell.

    Attributes:
        guided_by: what holds the classifier-free guidance scale: an argument, "guider" (a component) or "" (nothing:
            the scale is an input of a distilled network).
        multiple: width and height are multiples of this.
        frames: numbers of frames are a multiple of this, plus one.
        fps: frames per second of its videos.
        needs_image: whether it edits pictures.
        needs_mask: whether a mask says what of them.
        decodes_in_fp32: whether its decoder loses detail in half precision.
        defaults: options, by name, where the pipeline's own default is none that anybody uses.
    """

    guided_by: str = "guidance_scale"
    multiple: int = 16
    frames: int = 4
    fps: int = 24
    needs_image: bool = False
    needs_mask: bool = False
    decodes_in_fp32: bool = False
    defaults: Mapping[str, Any] = field(default_factory=dict)


TRUE_CFG_SCALE = "true_cfg_scale"
EDITS = Traits(guided_by=TRUE_CFG_SCALE, needs_image=True, defaults={"negative_prompt": " "})
TRAITS = {
    "FluxPipeline": Traits(guided_by=TRUE_CFG_SCALE),
    "FluxKontextPipeline": Traits(guided_by=TRUE_CFG_SCALE, needs_image=True),
    "FluxImg2ImgPipeline": Traits(guided_by=TRUE_CFG_SCALE, needs_image=True),
    "FluxInpaintPipeline": Traits(guided_by=TRUE_CFG_SCALE, needs_image=True, needs_mask=True),
    "Flux2Pipeline": Traits(guided_by=""),
    "QwenImagePipeline": Traits(guided_by=TRUE_CFG_SCALE, defaults={"negative_prompt": " "}),
    "QwenImageImg2ImgPipeline": EDITS,
    "QwenImageInpaintPipeline": replace(EDITS, needs_mask=True),
    "QwenImageEditPipeline": EDITS,
    "QwenImageEditPlusPipeline": EDITS,
    "HunyuanImagePipeline": Traits(guided_by="guider"),
    "HunyuanVideoPipeline": Traits(guided_by=TRUE_CFG_SCALE),
    "HunyuanVideoImageToVideoPipeline": Traits(guided_by=TRUE_CFG_SCALE, needs_image=True),
    "HunyuanVideo15Pipeline": Traits(guided_by="guider"),
    "WanPipeline": Traits(fps=16, decodes_in_fp32=True),
    "WanImageToVideoPipeline": Traits(fps=16, needs_image=True, decodes_in_fp32=True),
    "CogVideoXPipeline": Traits(fps=8),
    "LTXPipeline": Traits(multiple=32, frames=8),
    "LTX2Pipeline": Traits(multiple=32, frames=8),
}
# Name of an option -> names of the call's arguments that it may set.
ARGUMENTS = {
    "prompt": ("prompt", "class_labels"),
    "negative_prompt": ("negative_prompt",),
    "width": ("width",),
    "height": ("height",),
    "num_steps": ("num_inference_steps",),
    "guidance": ("guidance_scale",),
    "true_cfg": (TRUE_CFG_SCALE,),
    "guidance_2": ("guidance_scale_2",),
    "num_frames": ("num_frames",),
    "fps": ("frame_rate",),
    "max_sequence_length": ("max_sequence_length",),
    "images": ("image",),
    "mask_image": ("mask_image",),
    "strength": ("strength",),
}


@dataclass(frozen=True)
class PipelineClass:
    """A pipeline class of diffusers.

    Attributes:
        class_name: name of the class.
        labels: names of classes by number, for pipelines that draw classes.
        has_second_expert: whether a second denoiser takes over on the way.
    """

    class_name: str
    labels: Mapping[int, str] = field(default_factory=dict)
    has_second_expert: bool = False

    @classmethod
    def of(cls, index: Mapping[str, Any]) -> "PipelineClass":
        """The class of a folder whose model_index.json has this content.

        Raises:
            ValueError: if diffusers has no such class.
        """
        import diffusers

        name = index.get("_class_name")
        if not isinstance(name, str) or not name.endswith("Pipeline") or not hasattr(diffusers, name):
            raise ValueError(f"pipeline must be of a class of diffusers {diffusers.__version__}, got {name!r}")
        labels = index.get("id2label")
        numbered = labels.items() if isinstance(labels, dict) else ()
        found = {int(number): str(text) for number, text in numbered if str(number).isdecimal()}
        made = cls(name, found, isinstance(index.get("boundary_ratio"), float))
        required = [one for one, default in made.signature.items() if default is inspect.Parameter.empty]
        known = {argument for arguments in ARGUMENTS.values() for argument in arguments}
        if "num_inference_steps" not in made.signature or set(required) - known - {"args", "kwargs"}:
            lacks = ", ".join(sorted(set(required) - known)) or "num_inference_steps"
            raise ValueError(f"pipeline {name} cannot be drawn here: its call has other arguments ({lacks})")
        return made

    @property
    def traits(self) -> Traits:
        """Its row in TRAITS, or the values that hold for most."""
        return TRAITS.get(self.class_name, Traits())

    @cached_property
    def signature(self) -> dict[str, Any]:
        """Argument of its call -> default."""
        import diffusers

        parameters = inspect.signature(getattr(diffusers, self.class_name).__call__).parameters
        return {name: one.default for name, one in parameters.items() if name != "self"}

    def argument(self, option: str) -> str | None:
        """The argument that an option sets; None if the pipeline does not take it."""
        return next((one for one in ARGUMENTS[option] if one in self.signature), None)

    def takes(self, option: str) -> bool:
        """Whether the pipeline takes an option."""
        if option == "guidance" and self.traits.guided_by == "guider":
            return True
        if option == "fps":
            return self.is_video
        if option == "guidance_2" and not self.has_second_expert:
            return False
        return self.argument(option) is not None

    def options(self) -> list[str]:
        """The options that it takes."""
        return [name for name in ARGUMENTS if self.takes(name)]

    def default(self, option: str) -> Any:
        """An option's default; None if it has none."""
        if option == "fps":
            return self.traits.fps if self.is_video else None
        if option in self.traits.defaults:
            return self.traits.defaults[option]
        argument = self.argument(option)
        found = self.signature[argument] if argument is not None else None
        return None if found is inspect.Parameter.empty else found

    @property
    def guided_option(self) -> Literal["guidance", "true_cfg"] | None:
        """The option that is the classifier-free guidance scale; None if there is none."""
        by = self.traits.guided_by
        return None if not by else "true_cfg" if by == TRUE_CFG_SCALE else "guidance"

    @property
    def is_video(self) -> bool:
        """Whether it makes videos."""
        return "num_frames" in self.signature

    @property
    def draws_classes(self) -> bool:
        """Whether it draws classes instead of prompts."""
        return "class_labels" in self.signature


@dataclass(frozen=True)
class PublishedModel:
    """A published model.

    Attributes:
        repo: its repository.
        options: the options that it is published with, where the pipeline's own defaults differ.
    """

    repo: str
    options: Mapping[str, Any] = field(default_factory=dict)


HD = {"width": 1280, "height": 720}
PUBLISHED = {
    "flux-dev": PublishedModel("black-forest-labs/FLUX.1-dev", {"num_steps": 50, "width": 1024, "height": 1024}),
    "flux-schnell": PublishedModel(
        "black-forest-labs/FLUX.1-schnell", {"num_steps": 4, "guidance": 0.0, "max_sequence_length": 256}
    ),
    "flux-kontext": PublishedModel("black-forest-labs/FLUX.1-Kontext-dev", {"guidance": 2.5}),
    "qwen-image": PublishedModel("Qwen/Qwen-Image", {"width": 1328, "height": 1328}),
    "qwen-image-edit": PublishedModel("Qwen/Qwen-Image-Edit"),
    "wan2.1-t2v-1.3b": PublishedModel("Wan-AI/Wan2.1-T2V-1.3B-Diffusers"),
    "wan2.1-t2v-14b": PublishedModel("Wan-AI/Wan2.1-T2V-14B-Diffusers", HD),
    "wan2.2-t2v-a14b": PublishedModel(
        "Wan-AI/Wan2.2-T2V-A14B-Diffusers", HD | {"num_steps": 40, "guidance": 4.0, "guidance_2": 3.0}
    ),
    "hunyuan-video": PublishedModel("hunyuanvideo-community/HunyuanVideo"),
    "hunyuan-video-1.5": PublishedModel("hunyuanvideo-community/HunyuanVideo-1.5-Diffusers-480p_t2v"),
    "dit-xl": PublishedModel("facebook/DiT-XL-2-256"),
    "z-image": PublishedModel("Tongyi-MAI/Z-Image", {"guidance": 4.0}),
    "sd3.5": PublishedModel("stabilityai/stable-diffusion-3.5-large", {"guidance": 3.5}),
}
"""Short names of published models."""
