"""The flags that the scripts share, and what they say in the packages' own terms."""

import argparse
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from types import MappingProxyType
from typing import Any

from cache_functions import CacheConfig, schedule_names
from cache_functions.anchors import ANCHOR_DEVICES, ANCHOR_DTYPES
from cache_functions.budget import full_steps_for
from cache_functions.config import QUALITIES, TARGETS
from cache_functions.named import CACHES, cache_with
from cache_functions.resolve import BEST_RENOISING, BEST_RULE
from hi_diffusers.denoising.ranks import Split
from hi_diffusers.denoising.schedulers import SCHEDULERS
from hi_diffusers.families.table import PRESETS
from hi_diffusers.pictures.inputs import FITS
from hi_diffusers.pictures.safety import DEFAULT_CHECKER, SafetySettings
from hi_diffusers.request.options import MAX_TOKENS, STRENGTH, SamplingOptions, parse_resolution
from hi_diffusers.request.placement import DTYPES, Placement
from hi_diffusers.stock.pipeline_class import PUBLISHED
from hi_diffusers.stock.request import StockOptions
from hi_diffusers.stock.source import StockSource
from hi_diffusers.weights.source import QUANTIZATIONS, ModelSource
from taylor_utils import basis_names
from taylor_utils.bases.learned import PRIORS
from taylor_utils.bases.newton import ABSCISSAE

OUR_PIPELINE = "HiDreamImagePipeline"
# Flags that have no effect with --pipeline: of our model and its sampler, and of what is done instead of drawing.
OF_OUR_MODEL = ["model_type", "model_path", "llama", "quantization", "transformer", "encoder_device", "fp8"]
OF_OUR_MODEL += ["scheduler", "shift", "fit"]
INSTEAD_OF_DRAWING = ("plan", "save_quantized", "encode_only", "embeds", "embeds_cache_gb")
# Flags that have no effect without --pipeline.
FOR_PIPELINES = ("true_cfg", "guidance_2", "num_frames", "fps")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags that every script shares: the model, the sampler, the cache, the device."""
    add_model_arguments(parser)
    sampling = parser.add_argument_group("sampling (defaults: the model's own)")
    sampling.add_argument("--negative_prompt", help="what the picture should not show; needs --guidance above 1")
    sampling.add_argument(
        "--seed", type=int, help="seed, 0 to 2^64 - 1, or -1 for a random one (default: random; sampling.py: 0)"
    )
    sampling.add_argument("--width", type=int, help="width in pixels")
    sampling.add_argument("--height", type=int, help="height in pixels")
    sampling.add_argument("--resolution", metavar="WxH", help="width and height at once, e.g. 1360x768")
    sampling.add_argument("--num_steps", type=int, help="denoising steps, 1 to 1000")
    sampling.add_argument("--guidance", type=float, help="classifier-free guidance scale; 1 or less turns guidance off")
    sampling.add_argument("--scheduler", choices=SCHEDULERS, help="the sampler")
    sampling.add_argument("--shift", type=float, help="shift of the scheduler's noise levels")
    sampling.add_argument(
        "--max_sequence_length", type=int, help=f"tokens per prompt, 8 to {MAX_TOKENS}; longer prompts are cut"
    )
    add_picture_arguments(parser)
    add_cache_arguments(parser)


def add_picture_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of a picture to start from."""
    group = parser.add_argument_group("a picture to start from")
    group.add_argument(
        "--image",
        type=Path,
        action="append",
        default=[],
        metavar="FILE",
        help="the picture; repeatable for pipelines that take several",
    )
    group.add_argument(
        "--mask",
        dest="mask_image",
        type=_mask_file,
        metavar="FILE",
        help="picture of the same size: what is white is drawn anew, what is black stays as it is, soft edges count",
    )
    group.add_argument(
        "--strength",
        type=float,
        help=f"share of the steps that is drawn, above 0 to 1 (default: {STRENGTH:g}; with --mask 1)",
    )
    group.add_argument(
        "--fit",
        choices=FITS,
        help="how a picture of another shape is fitted: cover cuts two sides, pad adds black bars (default: cover)",
    )


def add_rank_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags that share one picture between the processes of torchrun."""
    ranks = parser.add_argument_group("one picture on several GPUs (started with torchrun --nproc_per_node N)")
    ranks.add_argument(
        "--ulysses", type=int, default=1, metavar="N", help="split the picture's tokens over N processes (default: 1)"
    )
    ranks.add_argument(
        "--guidance_parallel",
        action="store_true",
        help="compute the two branches of guidance in two processes, or with --ulysses in two groups of them",
    )


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags that name the model's files and its device."""
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
        help="GPU memory that may be used, in GiB; decides what is offloaded (default: auto, the free memory)",
    )
    model.add_argument(
        "--transformer", metavar="FILE", help=".safetensors or .gguf file that holds the transformer alone"
    )
    model.add_argument(
        "--lora",
        action="append",
        default=[],
        metavar="FILE[:SCALE]",
        help="LoRA file, folder or hub repository, with its scale (default: 1); repeatable",
    )
    model.add_argument(
        "--device",
        default="auto",
        help="device that draws, e.g. cpu, cuda, cuda:1 or mps (default: auto: CUDA, else MPS, else CPU)",
    )
    model.add_argument(
        "--encoder_device",
        metavar="DEVICE",
        help="device of the text encoders, e.g. cpu or cuda:1 (default: same as --device)",
    )
    model.add_argument(
        "--compile",
        action="store_true",
        help="compile attention and feed-forward: a slower first picture, faster next ones",
    )
    model.add_argument(
        "--fp8",
        action="store_true",
        help="fp8 matrix products in the transformer's blocks: Ada, Hopper and later GPUs; emulated elsewhere",
    )
    model.add_argument(
        "--attention_backend",
        metavar="NAME",
        help="attention backend of diffusers, e.g. flash or sage (default: torch's choice)",
    )
    model.add_argument(
        "--dtype", choices=DTYPES, help="dtype of the weights (default: auto: bf16 on CUDA, fp32 elsewhere)"
    )


def add_pipeline_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of pipelines of diffusers that are not ours."""
    group = parser.add_argument_group("any pipeline of diffusers", "Options that a pipeline does not take are refused.")
    group.add_argument(
        "--pipeline",
        metavar="ID|FOLDER",
        help=f"draw with this pipeline of diffusers: a repository's owner/name, a folder, or {', '.join(PUBLISHED)}",
    )
    group.add_argument("--true_cfg", type=float, help="classifier-free guidance of models with embedded guidance")
    group.add_argument("--guidance_2", type=float, help="guidance of a second expert")
    group.add_argument("--num_frames", type=int, help="frames of a video")
    group.add_argument("--fps", type=int, help="frames per second of a video")


def check_pipeline_flags(args: argparse.Namespace) -> None:
    """Raise ValueError for flags without effect. A HiDream folder becomes --model_path: our own pipeline draws it."""
    if args.pipeline is None:
        for name in FOR_PIPELINES:
            if getattr(args, name, None):
                raise ValueError(f"{name} has no effect without --pipeline")
        return
    source = stock_source_from(args)
    is_ours = source.index.get("_class_name") == OUR_PIPELINE
    for name in (*FOR_PIPELINES, "model_path") if is_ours else (*OF_OUR_MODEL, *INSTEAD_OF_DRAWING):
        if getattr(args, name, None):
            what = "a HiDream folder, which our own pipeline draws" if is_ours else "--pipeline: drop one of them"
            raise ValueError(f"{name} has no effect with {what}")
    if not is_ours and getattr(args, "ulysses", None) is not None and split_from(args).size > 1:
        raise ValueError(
            "ulysses and --guidance_parallel split our own model's pictures; of pipelines see docs/scaling.md"
        )
    if is_ours:
        args.model_path, args.pipeline = source.where, None


def stock_source_from(args: argparse.Namespace) -> StockSource:
    """The pipeline that the flags name."""
    return StockSource(
        args.pipeline,
        args.revision,
        args.device,
        args.dtype or "auto",
        tuple(args.lora),
        args.compile,
        args.attention_backend,
        args.vram,
    )


def stock_options_from(
    args: argparse.Namespace, prompt: str, base: Mapping[str, Any] = MappingProxyType({})
) -> StockOptions:
    """The options of a pipeline's drawing: a flag replaces the value in `base`; raises ValueError naming the flag."""
    given = {one.name: getattr(args, one.name, None) for one in fields(StockOptions)}
    given["width"], given["height"] = _size_from(args)
    settings = dict(base) | {name: value for name, value in given.items() if value is not None}
    return StockOptions(**(settings | {"prompt": prompt, "images": tuple(args.image)}))


def _vram(text: str) -> float | None:
    if text == "auto":
        return None
    try:
        gib = float(text)
    except ValueError:
        gib = 0.0
    if not 0 < gib < 10_000:
        raise argparse.ArgumentTypeError(f"must be auto, or a number of GiB above 0, got {text!r}")
    return gib


def source_from(args: argparse.Namespace) -> ModelSource:
    """The model's files, as the flags name them."""
    return ModelSource(
        args.model_path,
        args.revision,
        args.llama,
        args.quantization or "none",
        args.transformer,
        tuple(args.lora),
    )


def split_from(args: argparse.Namespace) -> Split:
    """How a picture is split over processes, from the flags."""
    return Split(args.ulysses, args.guidance_parallel)


def placement_from(args: argparse.Namespace) -> Placement:
    """Device, dtype and other settings of the computation, from the flags."""
    return Placement(
        device=args.device,
        dtype=args.dtype or "auto",
        encoder_device=args.encoder_device,
        compiled=args.compile,
        fp8=args.fp8,
        attention_backend=args.attention_backend,
    )


def add_cache_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the cache's flags."""
    cache = parser.add_argument_group("cache", "Most steps are forecast from a few computed ones, the full steps.")
    rule, noisy = (", ".join(f"{name} {value}" for name, value in one.items()) for one in (BEST_RULE, BEST_RENOISING))
    cache.add_argument(
        "--cache",
        choices=tuple(CACHES),
        help=f"best: what measured best, from a calibration if one fits, else {rule} (where the sampler adds noise"
        f" {noisy}); taylorseer and hicache: as published; off: compute all steps (default: best, or taylorseer where"
        " another flag names a part of the rule)",
    )
    cache.add_argument(
        "--full_steps",
        type=int,
        help="number of full (computed) steps (default: a quarter of the steps; with --cache best more of few)",
    )
    grades = ", ".join(f"{name} {least:g} dB" for name, least in QUALITIES.items())
    cache.add_argument(
        "--quality",
        choices=tuple(QUALITIES),
        help="the fewest full steps with which, by the calibration, nine in ten pictures have this PSNR to the uncached"
        f" one: {grades} (default: --full_steps)",
    )
    cache.add_argument(
        "--speedup", type=float, help="sets --full_steps to the number of steps divided by this, rounded up"
    )
    cache.add_argument(
        "--target",
        choices=[target for target in TARGETS if target != "off"],
        help="what is forecast (default: module, or x0 where the sampler adds noise at every step)",
    )
    cache.add_argument("--basis", choices=basis_names(), help="forecast rule (default: taylor)")
    cache.add_argument("--schedule", choices=schedule_names(), help="which steps are full (default: interval)")
    cache.add_argument(
        "--fresh_threshold", type=int, help="schedule interval: steps from one full step to the next (default: 4)"
    )
    cache.add_argument("--max_order", type=int, help="order of the expansion, 0 to 6 (default: 1)")
    cache.add_argument("--first_enhance", type=int, help="number of leading full steps (default: 1)")
    cache.add_argument("--last_enhance", type=int, help="schedule interval: number of final full steps (default: 0)")
    cache.add_argument(
        "--step_mask",
        dest="mask",
        type=_steps,
        metavar="0,4,...",
        help="schedule mask: the full steps (default: the calibration's)",
    )
    cache.add_argument("--exponent", type=float, help="schedule power: above 1 is dense at the start (default: 2)")
    cache.add_argument(
        "--sigma", type=float, help="bases taylor and hermite: scaling of the expansion (default: 1 and 0.5)"
    )
    cache.add_argument("--abscissa", choices=ABSCISSAE, help="basis newton: variable of the expansion (default: step)")
    cache.add_argument(
        "--corrector",
        action=argparse.BooleanOptionalAction,
        default=None,
        help="redo the steps between two full ones once the second is known; targets velocity and x0 (default: no)",
    )
    cache.add_argument("--corrector_from", type=int, help="first step that the corrector redoes (default: 0)")
    cache.add_argument(
        "--anchor_dtype", choices=tuple(ANCHOR_DTYPES), help="dtype of the kept features (default: as computed)"
    )
    cache.add_argument(
        "--anchor_device",
        choices=ANCHOR_DEVICES,
        help="cpu: keep features in host memory, which is slower (default: on the GPU)",
    )
    cache.add_argument("--calibration", metavar="FILE", help="calibration file of calibrate.py (default: looked up)")
    cache.add_argument(
        "--calibration_dir",
        type=Path,
        metavar="FOLDER",
        help="folder that is searched for calibrations before the model's own",
    )
    cache.add_argument(
        "--extra",
        dest="extras",
        action="append",
        type=_extra,
        metavar="NAME=VALUE",
        help="setting of a basis or schedule from another package; repeatable",
    )
    cache.add_argument(
        "--prior",
        choices=PRIORS,
        help="basis learned: rule that the weights are pulled towards (default: the calibration's)",
    )
    cache.add_argument("--ridge", type=float, help="basis learned: strength of that pull (default: the calibration's)")


def _extra(text: str) -> tuple[str, Any]:
    name, equals, value = text.partition("=")
    if not (equals and name.isidentifier()):
        raise argparse.ArgumentTypeError(f"must be NAME=VALUE, got {text!r}")
    try:
        return name, json.loads(value)
    except ValueError:
        return name, value  # plain text


def _steps(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(step) for step in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be steps such as 0,4,8, got {text!r}") from None


def _mask_file(text: str) -> Path:
    if re.fullmatch(r"[\d,\s]+", text) and not Path(text).exists():
        raise argparse.ArgumentTypeError(f"must be a picture, got {text!r}: full steps are given by --step_mask")
    return Path(text)


def options_from(args: argparse.Namespace, prompt: str, base: dict[str, Any]) -> SamplingOptions:
    """The picture's options: a flag replaces the value in `base` (another picture's settings, or none).

    Raises:
        ValueError: naming the flag, its value and what is allowed.
    """
    given = {field.name: getattr(args, field.name, None) for field in fields(SamplingOptions)}
    given["width"], given["height"] = _size_from(args)
    given["image"] = _only(args.image)
    settings = base | {name: value for name, value in given.items() if value is not None}
    return SamplingOptions(**(settings | {"prompt": prompt}))


def _only(images: Sequence[Path]) -> Path | None:
    """The one picture to start from, or None."""
    if len(images) > 1:
        raise ValueError(f"image must be given once without --pipeline, got {len(images)}")
    return images[0] if images else None


def cache_from(args: argparse.Namespace, base: CacheConfig, num_steps: int) -> CacheConfig:
    """The cache's configuration: the flags over `base` (the preset's or another picture's), as in `cache_with`.

    Args:
        num_steps: number of denoising steps, which --speedup divides.

    Raises:
        ValueError: if a flag is out of its domain, or would have no effect.
    """
    names = [field.name for field in fields(CacheConfig)]
    given = {name: getattr(args, name) for name in names if getattr(args, name, None) is not None}
    if args.speedup is not None:
        if "full_steps" in given or "fresh_threshold" in given:
            raise ValueError(
                f"speedup {args.speedup:g} sets the number of full steps: drop full_steps and fresh_threshold"
            )
        if args.cache == "off" or (args.cache is None and base.is_off):
            raise ValueError("speedup has no effect with the cache off: drop speedup, or give --cache best")
        given["full_steps"] = full_steps_for(args.speedup, num_steps)
    if "extras" in given:
        given["extras"] = dict(given["extras"])
    if "mask" in given:
        given.setdefault("schedule", "mask")
    return cache_with(args.cache, base, given)


def _size_from(args: argparse.Namespace) -> tuple[int | None, int | None]:
    """Width and height, given each or by --resolution."""
    if args.resolution is None:
        return args.width, args.height
    if args.width is not None or args.height is not None:
        raise ValueError(f"resolution {args.resolution} must not be given together with width or height")
    return parse_resolution(args.resolution)


def add_server_arguments(serving: argparse._ArgumentGroup) -> None:
    """Add the flags of a script that serves: its certificate, and the names and sites that it answers."""
    serving.add_argument("--ssl_certfile", type=Path, metavar="FILE", help="certificate file for https")
    serving.add_argument("--ssl_keyfile", type=Path, metavar="FILE", help="private key of the certificate")
    serving.add_argument(
        "--allowed_host",
        action="append",
        default=[],
        metavar="NAME",
        help="name by which the server is reached, e.g. behind a proxy; repeatable (always: localhost and addresses)",
    )
    serving.add_argument(
        "--allow_origin",
        action="append",
        default=[],
        metavar="SITE",
        help="another site whose pages may use this server, e.g. https://example.org; repeatable (default: none)",
    )
    add_safety_arguments(serving)


def add_limit_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of what a stranger's request may ask for."""
    limits = parser.add_argument_group("limits of one request")
    for name, default, what in (
        ("max_steps", 100, "denoising steps per request"),
        ("max_images", 4, "pictures per request"),
        ("max_prompt_chars", 2000, "characters per prompt"),
    ):
        said = f"maximum number of {what} (default: %(default)s)"
        limits.add_argument(f"--{name}", type=int, default=default, help=said)


def add_calibration_argument(parser: argparse.ArgumentParser) -> None:
    """Add the flag that names calibrations, for scripts whose requests choose the cache."""
    parser.add_argument(
        "--calibration_dir",
        type=Path,
        metavar="FOLDER",
        help="folder that is searched first for calibrations of the cache",
    )


def add_safety_arguments(group: Any) -> None:
    """Add the safety filter's flags to a parser or to one of its groups."""
    group.add_argument("--use_nsfw_filter", action="store_true", help="withhold pictures that --safety_checker flags")
    group.add_argument(
        "--safety_checker",
        metavar="MODEL",
        help="image classifier of transformers (hub id or folder) that has the label nsfw (default:"
        f" {DEFAULT_CHECKER})",
    )
    group.add_argument(
        "--safety_threshold",
        type=float,
        help="probability from which a picture is withheld, above 0 to 1 (default: 0.5)",
    )


def safety_from(args: argparse.Namespace) -> SafetySettings | None:
    """The safety filter's settings from the flags; None without --use_nsfw_filter.

    Raises:
        ValueError: naming a flag that is out of its domain or has no effect.
    """
    given = {"model": args.safety_checker, "threshold": args.safety_threshold}
    given = {name: value for name, value in given.items() if value is not None}
    if not args.use_nsfw_filter:
        for name in given:
            raise ValueError(f"safety_{'checker' if name == 'model' else name} has no effect without --use_nsfw_filter")
        return None
    return SafetySettings(**given)
