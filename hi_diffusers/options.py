"""What a user asks for: the options of a drawing, and the flags that all scripts share."""

import argparse
import math
import secrets
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from cache_functions import CacheConfig, Sampler, schedule_names
from cache_functions.anchors import ANCHOR_DEVICES, ANCHOR_DTYPES
from cache_functions.budget import full_steps_for
from cache_functions.config import BEST, MAX_STEPS, OPEN_TO_BEST, TARGETS
from cache_functions.resolve import BEST_RENOISING, BEST_RULE
from hi_diffusers.model_files import QUANTIZATIONS, ModelSource
from hi_diffusers.placement import Placement
from hi_diffusers.presets import PRESETS, ModelPreset, fit_size, is_fitted
from hi_diffusers.schedulers import RENOISING, SCHEDULERS
from taylor_utils import basis_names
from taylor_utils.bases.learned import PRIORS
from taylor_utils.bases.newton import ABSCISSAE

MAX_SEED = 2**63 - 1
MAX_TOKENS = 218  # HiDream's authors: longer CLIP inputs than 77 work up to here
MAX_SIDE = 16384
CACHES = {
    "best": CacheConfig.best,
    "taylorseer": CacheConfig.taylorseer,
    "hicache": CacheConfig.hicache,
    "off": CacheConfig.off,
}
# What of a cache's settings goes with its schedule, and with its basis: naming another one drops them.
OF_SCHEDULE = ("fresh_threshold", "last_enhance", "full_steps", "mask", "exponent")
OF_BASIS = ("max_order", "sigma", "abscissa", "prior", "ridge", "calibration")
DEVICES = ("auto", "cpu", "cuda", "mps")
DTYPES = ("auto", "fp32", "bf16", "fp16")


@dataclass(frozen=True)
class SamplingOptions:
    """One drawing. None is the preset's value; a seed that is not given is drawn, and recorded.

    Attributes:
        prompt: what to draw.
        negative_prompt: what guidance leads away from.
        seed: 0 to 2^63 - 1.
        width, height: pixels; scaled to the model's area, keeping their shape.
        num_steps: denoising steps, 1 to 1000.
        guidance: classifier-free guidance scale, 0 to 100; none up to 1.
        scheduler: one of "unipc", "euler", "lcm".
        shift: of the sampler's noise levels, above 0 to 100.
        max_sequence_length: tokens of a prompt, 8 to 218.
    """

    prompt: str
    negative_prompt: str = ""
    seed: int | None = None
    width: int | None = None
    height: int | None = None
    num_steps: int | None = None
    guidance: float | None = None
    scheduler: str | None = None
    shift: float | None = None
    max_sequence_length: int | None = None

    def __post_init__(self) -> None:
        for name in ("prompt", "negative_prompt"):
            if not isinstance(getattr(self, name), str):
                raise ValueError(f"{name} must be text, got {getattr(self, name)!r}")
            if not _is_unicode(getattr(self, name)):
                raise ValueError(f"{name} must be Unicode text, got half a character in {getattr(self, name)!r}")
        _check_whole("seed", self.seed, 0, MAX_SEED)
        _check_whole("width", self.width, 1, MAX_SIDE)
        _check_whole("height", self.height, 1, MAX_SIDE)
        _check_whole("num_steps", self.num_steps, 1, MAX_STEPS)
        _check_number("guidance", self.guidance, 0.0, 100.0)
        _check_number("shift", self.shift, 0.01, 100.0)
        for name in ("guidance", "shift"):
            if getattr(self, name) is not None:
                object.__setattr__(self, name, float(getattr(self, name)))  # 2 and 2.0 make the same file
        if self.scheduler is not None and self.scheduler not in SCHEDULERS:
            raise ValueError(f"scheduler must be one of {', '.join(SCHEDULERS)}, got {self.scheduler!r}")
        _check_whole("max_sequence_length", self.max_sequence_length, 8, MAX_TOKENS)

    def resolve(self, preset: ModelPreset) -> "ResolvedOptions":
        """Take what was left open from the preset, and fit the size to the model.

        Raises:
            ValueError: if the size cannot be drawn.
        """
        given = {field.name: getattr(self, field.name) for field in fields(self)}
        defaults = {
            name: getattr(preset, name) for name, value in given.items() if value is None and hasattr(preset, name)
        }
        side = math.isqrt(preset.area)
        asked = (self.width or side, self.height or side)
        grid = (preset.area, preset.multiple)
        size = asked if is_fitted(*asked, *grid) else fit_size(*asked, *grid)
        seed = secrets.randbelow(2**32) if self.seed is None else self.seed
        settings = given | defaults | {"width": size[0], "height": size[1], "seed": seed}
        resolved = ResolvedOptions(**settings, notices=())
        return replace(resolved, notices=tuple(self._notices(asked, resolved, preset)))

    def _notices(self, asked: tuple[int, int], resolved: "ResolvedOptions", preset: ModelPreset) -> Iterator[str]:
        if asked != (resolved.width, resolved.height):
            yield (
                f"{asked[0]}x{asked[1]} is drawn as {resolved.width}x{resolved.height}: {preset.name} draws about"
                f" {preset.area} pixels, in multiples of {preset.multiple}"
            )
        if self.negative_prompt and not resolved.guided:
            yield f"the negative prompt has no effect at guidance {resolved.guidance:g}; it takes more than 1"


@dataclass(frozen=True)
class ResolvedOptions:
    """`SamplingOptions` with nothing left open.

    Attributes:
        notices: sentences about what is drawn differently from what was asked.
    """

    prompt: str
    negative_prompt: str
    seed: int
    width: int
    height: int
    num_steps: int
    guidance: float
    scheduler: str
    shift: float
    max_sequence_length: int
    notices: tuple[str, ...]

    @property
    def renoises(self) -> bool:
        """Whether the sampler adds fresh noise at every step."""
        return self.scheduler in RENOISING

    @property
    def guided(self) -> bool:
        """Whether both guidance branches are evaluated."""
        return self.guidance > 1

    def sampler(self, preset: ModelPreset) -> Sampler:
        """What the cache must know of how a model draws with these options."""
        name = f"the {self.scheduler} scheduler of {preset.name}"
        return Sampler(name, self.scheduler, self.num_steps, self.shift, self.guidance, self.renoises)

    def settings(self) -> dict[str, object]:
        """Everything that makes the picture, JSON-able."""
        return {field.name: getattr(self, field.name) for field in fields(self) if field.name != "notices"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags that every script shares: the model, the sampler, the cache, the device."""
    add_model_arguments(parser)
    sampling = parser.add_argument_group("sampling (defaults: the model's own)")
    sampling.add_argument("--negative_prompt", help="what guidance leads away from")
    sampling.add_argument("--seed", type=int, help="0 to 2^63 - 1 (default: drawn and printed; sampling.py takes 0)")
    sampling.add_argument("--width", type=int, help="in pixels")
    sampling.add_argument("--height", type=int, help="in pixels")
    sampling.add_argument("--resolution", metavar="WxH", help="both at once, such as 1360x768")
    sampling.add_argument("--num_steps", type=int, help="denoising steps, 1 to 1000")
    sampling.add_argument("--guidance", type=float, help="classifier-free guidance scale; up to 1 there is none")
    sampling.add_argument("--scheduler", choices=SCHEDULERS, help="the sampler")
    sampling.add_argument("--shift", type=float, help="of the sampler's noise levels")
    sampling.add_argument(
        "--max_sequence_length", type=int, help=f"tokens of a prompt, 8 to {MAX_TOKENS}; longer prompts are cut"
    )
    add_cache_arguments(parser)


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """The model's part of the shared flags."""
    model = parser.add_argument_group("model")
    model.add_argument(
        "-m", "--model_type", choices=tuple(PRESETS), help="which model draws (default: nano, the small bundled one)"
    )
    model.add_argument(
        "--model_path",
        help="folder of the model's files in the diffusers layout, or a hub repository's owner/name (default: the"
        " model's own)",
    )
    model.add_argument("--revision", help="branch, tag or commit of that repository (default: main)")
    model.add_argument(
        "--llama",
        help="folder or repository of Llama-3.1-8B-Instruct: plain, nf4 or GPTQ-INT4 (default: in the model's folder,"
        " else meta-llama's, with nf4 the GPTQ-INT4 one)",
    )
    model.add_argument(
        "--quantization", choices=QUANTIZATIONS, help="nf4: transformer and T5 in 4 bits (default: none)"
    )
    model.add_argument(
        "--vram",
        type=_vram,
        metavar="auto|GIB",
        help="what may be used of the GPU's memory; how the model is kept follows from it (default: auto, what is"
        " free)",
    )
    model.add_argument(
        "--transformer", metavar="FILE", help=".safetensors or .gguf file that holds the transformer alone"
    )
    model.add_argument(
        "--lora",
        action="append",
        default=[],
        metavar="FILE[:SCALE]",
        help="a LoRA: file, folder or hub repository, and its scale (default: 1); give it again for another one",
    )
    model.add_argument("--device", choices=DEVICES, default="auto", help="where it runs (default: auto)")
    model.add_argument(
        "--encoder_device", metavar="DEVICE", help="where the text encoders run, such as cpu or cuda:1 (default: there)"
    )
    model.add_argument(
        "--compile",
        action="store_true",
        help="compile attention and feed-forward: the first picture takes longer, the next ones less",
    )
    model.add_argument(
        "--fp8",
        action="store_true",
        help="multiply in fp8 in the transformer's blocks, which Ada, Hopper and later cards do; elsewhere emulated",
    )
    model.add_argument(
        "--attention_backend", metavar="NAME", help="one of diffusers', such as flash or sage (default: torch's choice)"
    )
    model.add_argument("--dtype", choices=DTYPES, help="of the weights (default: auto: bf16 on CUDA, fp32 elsewhere)")


def _vram(text: str) -> float | None:
    if text == "auto":
        return None
    try:
        gib = float(text)
    except ValueError:
        gib = 0.0
    if not 0 < gib < 10_000:
        raise argparse.ArgumentTypeError(f"must be auto, or GiB above 0, got {text!r}")
    return gib


def source_from(args: argparse.Namespace) -> ModelSource:
    """Which files the flags name."""
    return ModelSource(
        args.model_path,
        args.revision,
        args.llama,
        args.quantization or "none",
        args.transformer,
        tuple(args.lora),
    )


def placement_from(args: argparse.Namespace) -> Placement:
    """Where and how the flags say that the model computes."""
    return Placement(
        device=args.device,
        dtype=args.dtype or "auto",
        encoder_device=args.encoder_device,
        compiled=args.compile,
        fp8=args.fp8,
        attention_backend=args.attention_backend,
    )


def add_cache_arguments(parser: argparse.ArgumentParser) -> None:
    """The cache's part of the shared flags."""
    cache = parser.add_argument_group("cache", "Most steps are forecast from a few computed ones, the full steps.")
    rule, noisy = (", ".join(f"{name} {value}" for name, value in one.items()) for one in (BEST_RULE, BEST_RENOISING))
    cache.add_argument(
        "--cache",
        choices=tuple(CACHES),
        help=f"best: what measured best, from a calibration if one fits, else {rule} (where the sampler adds noise"
        f" {noisy}); taylorseer and hicache: as published; off: compute all steps (default: best, or taylorseer where"
        " another flag names a part of the rule)",
    )
    cache.add_argument("--full_steps", type=int, help="the budget: how many steps are full (default: a quarter)")
    cache.add_argument("--speedup", type=float, help="the same as the number of steps over it, rounded up")
    cache.add_argument(
        "--target",
        choices=[target for target in TARGETS if target != "off"],
        help="what is forecast (default: module, or x0 where the sampler adds noise at every step)",
    )
    cache.add_argument("--basis", choices=basis_names(), help="the rule of the forecast (default: taylor)")
    cache.add_argument("--schedule", choices=schedule_names(), help="which steps are full (default: interval)")
    cache.add_argument(
        "--fresh_threshold", type=int, help="schedule interval: every how many steps one is full (default: 4)"
    )
    cache.add_argument("--max_order", type=int, help="order of the expansion, 0 to 6 (default: 1)")
    cache.add_argument("--first_enhance", type=int, help="number of leading full steps (default: 1)")
    cache.add_argument("--last_enhance", type=int, help="schedule interval: number of final full steps (default: 0)")
    cache.add_argument(
        "--mask", type=_steps, metavar="0,4,...", help="schedule mask: the full steps (default: the calibration's)"
    )
    cache.add_argument("--exponent", type=float, help="schedule power: above 1 is dense at the start (default: 2)")
    cache.add_argument("--sigma", type=float, help="bases taylor, hermite: their scaling (default: 1 and 0.5)")
    cache.add_argument("--abscissa", choices=ABSCISSAE, help="basis newton: of what it is one of (default: step)")
    cache.add_argument(
        "--corrector",
        action=argparse.BooleanOptionalAction,
        default=None,
        help="redo an interval once its end is known; targets velocity and x0 (default: no)",
    )
    cache.add_argument("--corrector_from", type=int, help="first step that it redoes (default: 0)")
    cache.add_argument(
        "--anchor_dtype", choices=tuple(ANCHOR_DTYPES), help="how what is kept is stored (default: as it was computed)"
    )
    cache.add_argument(
        "--anchor_device",
        choices=ANCHOR_DEVICES,
        help="cpu: keep it in the host's memory, which takes longer (default: on the card)",
    )
    cache.add_argument("--calibration", metavar="FILE", help="what calibrate.py wrote (default: looked up)")
    cache.add_argument(
        "--calibration_dir", type=Path, metavar="FOLDER", help="where it is looked up beside the model's own folder"
    )
    cache.add_argument("--prior", choices=PRIORS, help="basis learned: rule it leans to (default: the calibration's)")
    cache.add_argument("--ridge", type=float, help="basis learned: how strongly (default: the calibration's)")


def _steps(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(step) for step in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be steps such as 0,4,8, got {text!r}") from None


def options_from(args: argparse.Namespace, prompt: str, base: dict[str, object]) -> SamplingOptions:
    """Flags over `base` (settings of another picture, or nothing) over the preset's values.

    Raises:
        ValueError: naming the flag, its value and what is allowed.
    """
    given = {field.name: getattr(args, field.name, None) for field in fields(SamplingOptions)}
    if args.resolution is not None:
        if args.width is not None or args.height is not None:
            raise ValueError(f"resolution {args.resolution} must not be given together with width or height")
        given["width"], given["height"] = _parse_resolution(args.resolution)
    settings = base | {name: value for name, value in given.items() if value is not None}
    return SamplingOptions(**(settings | {"prompt": prompt}))


def cache_from(args: argparse.Namespace, base: CacheConfig, num_steps: int) -> CacheConfig:
    """The cache's flags over `base` (the preset's, or another picture's), as in `cache_with`.

    Args:
        num_steps: steps of the drawing, which --speedup is a share of.

    Raises:
        ValueError: if a flag is out of its domain, or would have no effect.
    """
    names = [field.name for field in fields(CacheConfig)]
    given = {name: getattr(args, name) for name in names if getattr(args, name, None) is not None}
    if args.speedup is not None:
        if "full_steps" in given or "fresh_threshold" in given:
            raise ValueError(f"speedup {args.speedup:g} sets the budget: give it alone")
        if args.cache == "off" or (args.cache is None and base.is_off):
            raise ValueError("speedup has no effect with the cache off: drop it, or give --cache best")
        given["full_steps"] = full_steps_for(args.speedup, num_steps)
    if "mask" in given:
        given.setdefault("schedule", "mask")
    return cache_with(args.cache, base, given)


def cache_with(name: str | None, base: CacheConfig, given: Mapping[str, Any]) -> CacheConfig:
    """Settings over one of CACHES, or over `base`.

    A setting that names a rule of its own starts from `taylorseer` where `base` is `best`, and from it drops what
    belongs to another schedule or basis.

    Args:
        name: of CACHES; None is `base`.
        given: fields of `CacheConfig`.

    Raises:
        ValueError: if one is out of its domain, or would have no effect.
    """
    if name is not None:
        base = CACHES[name]()
        chosen = sorted(set(given) - set(OPEN_TO_BEST)) if base.schedule == BEST else []
        if chosen:
            raise ValueError(f"{chosen[0]} is chosen by cache best: drop it, or drop best")
    elif base.schedule == BEST and set(given) - set(OPEN_TO_BEST):
        base = CacheConfig.taylorseer()
    if base.is_off and given:
        raise ValueError(f"{next(iter(given))} has no effect with the cache off: drop it, or take cache best")
    return replace(base, **(_dropped(base, given) | dict(given)))


def _dropped(base: CacheConfig, given: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of `base` that go with what is replaced, at their defaults."""
    names: set[str] = set()
    if given.get("schedule", base.schedule) != base.schedule:
        names.update(OF_SCHEDULE)
    if given.get("basis", base.basis) != base.basis:
        names.update(OF_BASIS)
    if {"full_steps", "fresh_threshold", "mask"} & set(given):
        names.update(("full_steps", "fresh_threshold", "mask"))
    defaults = {field.name: field.default for field in fields(CacheConfig)}
    return {name: defaults[name] for name in names}


def _parse_resolution(text: str) -> tuple[int, int]:
    width, _, height = text.lower().partition("x")
    if not (width.isascii() and width.isdigit() and height.isascii() and height.isdigit()):
        raise ValueError(f"resolution must be WIDTHxHEIGHT such as 1360x768, got {text!r}")
    return int(width), int(height)


def _is_unicode(text: str) -> bool:
    return not any("\ud800" <= char <= "\udfff" for char in text)


def _check_whole(name: str, value: int | None, low: int, high: int) -> None:
    if value is None:
        return
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise ValueError(f"{name} must be a whole number from {low} to {high}, got {value!r}")


def _check_number(name: str, value: float | None, low: float, high: float) -> None:
    if value is None:
        return
    if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:
        raise ValueError(f"{name} must be a number from {low:g} to {high:g}, got {value!r}")
