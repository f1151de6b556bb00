"""--like: the settings of a picture drawn before."""

import argparse
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from cache_functions import CacheConfig
from cache_functions.calibration import BY_HASH
from cache_functions.solver import SOLVER
from hi_diffusers.console import Refusal
from hi_diffusers.engine.session import Session
from hi_diffusers.families.table import DEFAULT_MODEL, PRESETS
from hi_diffusers.pictures.inputs import OF_PIXELS
from hi_diffusers.pictures.metadata import SECTIONS, read_metadata
from hi_diffusers.preset import ModelPreset
from hi_diffusers.request.drawing import Drawing
from hi_diffusers.request.options import ResolvedOptions, SamplingOptions
from hi_diffusers.request.placement import Placement
from hi_diffusers.stock.request import StockOptions
from hi_diffusers.weights.identity import ModelIdentity
from hi_diffusers.weights.source import ModelSource

INPUTS = {"image": "image", "mask_image": "mask"}  # option -> flag
MAX_SETTINGS_BYTES = 1_000_000
DTYPES = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}


def read_beside(path: Path) -> dict[str, Any]:
    """The settings in the file beside a video; raises ValueError if they are none."""
    settings = path.with_name(f"{path.name}.json")
    if settings.stat().st_size > MAX_SETTINGS_BYTES:
        raise ValueError(f"{settings} is larger than {MAX_SETTINGS_BYTES} bytes")
    try:
        found = json.loads(settings.read_text(encoding="utf-8"))
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, dict) or any(not isinstance(found.get(name, {}), dict) for name in SECTIONS):
        raise ValueError(f"{settings} does not hold the settings of a video")
    return found


@dataclass(frozen=True)
class Like:
    """A picture's metadata; empty without --like.

    Attributes:
        path: the picture; None without --like.
        metadata: what is embedded in it. It is not trusted: nothing in it is opened as a file.
    """

    path: Path | None = None
    metadata: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def read(cls, path: Path | None) -> "Like":
        """Read a picture's metadata.

        Raises:
            Refusal: if it has none.
        """
        if path is None:
            return cls()
        try:
            return cls(
                path, read_beside(path) if path.with_name(f"{path.name}.json").is_file() else read_metadata(path)
            )
        except OSError as error:
            raise Refusal(f"--like must be a picture drawn before, got {path}: {error.strerror}") from error
        except ValueError as error:
            raise Refusal(f"--like must be a picture drawn before: {error}") from error

    def __bool__(self) -> bool:
        return self.path is not None

    @property
    def model(self) -> dict[str, Any]:
        """The metadata's section about the model."""
        found: dict[str, Any] = self.metadata.get("model", {})
        return found

    def model_type(self) -> str:
        """The name of the picture's model, which must be a preset's.

        Raises:
            Refusal: if there is no preset of that name.
        """
        if "pipeline" in self.model:
            raise Refusal(f"--like {self.path} was drawn by {self.model.get('class')}: give --pipeline")
        name = self.model.get("model_type", DEFAULT_MODEL)
        if not isinstance(name, str) or name not in PRESETS:
            raise Refusal(f"--like {self.path} names a model that is not known here: give --model_type")
        return name

    def prompt(self, default: str) -> str:
        """The picture's prompt; the default without a picture."""
        found: str = self.metadata.get("options", {}).get("prompt", default)
        return found

    def of_pipeline(self, class_name: str) -> tuple[dict[str, Any], CacheConfig]:
        """The options, as fields of `StockOptions`, and the cache of a pipeline's picture.

        Raises:
            Refusal: if the picture was drawn by another class of pipeline.
        """
        if self.model.get("class") != class_name:
            raise Refusal(f"--like {self.path} was drawn by {self.model.get('class', 'HiDream')}, not {class_name}")
        cache = self._known("cache", CacheConfig)
        self._check_calibration(cache)
        options = {
            name: value
            for name, value in self._known("options", StockOptions).items()
            if name not in ("images", "mask_image")
        }
        return options, CacheConfig(**cache)

    def dtype(self, given: str | None) -> str:
        """The dtype that is given, else the picture's, else auto."""
        return given or DTYPES.get(str(self.model.get("dtype")), "auto")

    def differences_of_pipeline(self, files: str, loras: list[str]) -> Iterator[str]:
        """Sentences about what a pipeline's picture was drawn with, and this one is not.

        Args:
            files: fingerprint of the pipeline's files.
            loras: hashes and scales of the LoRAs.
        """
        if self.model.get("files") != files:
            yield f"{self.path} was drawn with other files (weights, text encoders or scheduler) than those given"
        if self.model.get("loras", []) != loras:
            yield f"{self.path} was drawn with other LoRAs than those given: {self.model.get('loras') or 'none'}"
        if self.model.get("batch", 1) != 1:
            yield f"{self.path} was drawn in a batch: alone it may differ by a grey level"

    def images(self) -> list[str]:
        """The SHA-256 of the pictures that it was drawn from, the mask's last."""
        options = self.metadata.get("options", {})
        return [*options.get("images", []), *([options["mask_image"]] if options.get("mask_image") else [])]

    def options(self) -> dict[str, Any]:
        """The picture's options, as fields of `SamplingOptions`, without the pictures that it was drawn from."""
        return {name: value for name, value in self._known("options", SamplingOptions).items() if name not in INPUTS}

    def check_pictures(self, images: Sequence[Path], mask: Path | None) -> None:
        """Refuse a picture that was drawn from others, if those are not given; a picture must not open files.

        Args:
            images, mask: the pictures that are given.

        Raises:
            Refusal: naming the flag, and the file by its hash.
        """
        options = self.metadata.get("options", {})
        for (name, flag), given in zip(INPUTS.items(), (images, mask), strict=True):
            if options.get(name) is not None and not given:
                which = str(options[name])
                known = f"whose SHA-256 is {which}"
                if which.startswith(OF_PIXELS):
                    known = "that was given in Python"
                raise Refusal(f"--like {self.path} was drawn from another picture: give --{flag} FILE, the one {known}")

    def cache(self, preset: ModelPreset, renoises: bool, target: str | None) -> CacheConfig:
        """The picture's cache configuration; the preset's without a picture.

        Args:
            renoises: whether the scheduler that is asked for adds noise at every step.
            target: the target that is asked for, or None.
        """
        settings = self._known("cache", CacheConfig)
        self._check_calibration(settings)
        base = CacheConfig(**settings) if self else preset.cache
        if renoises and base.target == SOLVER:
            return CacheConfig.best(base.full_steps)  # a solver cannot draw with noise that is added on the way
        if renoises and target is None and base.target not in (None, "x0", "off"):
            base = replace(base, target=None)  # the scheduler that is asked for does not allow the picture's target
        return base

    def decided(
        self, session: Session, options: SamplingOptions, cache: CacheConfig, args: argparse.Namespace
    ) -> tuple[Drawing, list[str]]:
        """The drawing, and a sentence where the picture's calibration does not fit its other settings.

        Raises:
            ValueError: if it cannot be drawn.
        """
        try:
            return session.decide(options, cache), []
        except ValueError as error:
            if not self or args.calibration is not None or "calibration does not fit" not in str(error):
                raise
            anew = f"the cache of {self.path} does not fit these settings and is chosen anew: {error}"
            return session.decide(options, CacheConfig.best()), [anew]

    def source(self, args: argparse.Namespace, source: ModelSource) -> ModelSource:
        """The flags' files, quantized as the picture's model was unless a flag says otherwise."""
        if args.quantization or args.transformer:
            return source
        return replace(source, quantization=self.model.get("quantization", "none"))

    def placement(self, args: argparse.Namespace, placement: Placement) -> Placement:
        """The flags' placement, with the picture's dtype and fp8 setting unless a flag says otherwise."""
        return replace(placement, dtype=self.dtype(args.dtype), fp8=args.fp8 or self.model.get("fp8") is True)

    def differences(self, own: ModelIdentity, options: ResolvedOptions) -> Iterator[str]:
        """Sentences about other weights, LoRAs or pictures to start from than those that are given."""
        drawn_from = self.metadata.get("options", {})
        for name, flag in INPUTS.items():
            picture = getattr(options, name)
            before = str(drawn_from.get(name) or OF_PIXELS)
            if picture is not None and not before.startswith(OF_PIXELS) and picture.sha256 != before:
                other = f"another {flag} than {picture.file}"
                yield f"{self.path} was drawn from {other}, of which the SHA-256 is {before}"
        fingerprint = self.model.get("fingerprint", own.fingerprint)
        if fingerprint != own.fingerprint:
            yield f"{self.path} was drawn with other weights ({fingerprint}) than those loaded ({own.fingerprint})"
        loras = list(self.model.get("loras", ()))
        if self and loras != list(own.loras):
            yield f"{self.path} was drawn with other LoRAs than those given: {', '.join(loras) or 'none'}"

    def _check_calibration(self, settings: Mapping[str, Any]) -> None:
        """Refuse a calibration that is named by a path: a picture must not open files."""
        calibration = settings.get("calibration")
        if calibration is not None and not str(calibration).startswith(BY_HASH):
            raise Refusal(
                f"--like {self.path} names a calibration by a path, and only a hash is accepted: give --calibration"
            )

    def _known(self, section: str, kind: type) -> dict[str, Any]:
        settings: dict[str, Any] = self.metadata.get(section, {})
        unknown = set(settings) - {one.name for one in fields(kind)}
        if unknown:
            raise Refusal(f"--like names settings that this version does not know: {', '.join(sorted(unknown))}")
        return settings
