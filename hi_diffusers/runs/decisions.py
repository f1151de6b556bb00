"""The drawings of a prompt file's lines, decided once per set of options that lines override."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import Any, Protocol

from cache_functions import CacheConfig, CalibrationShelf
from hi_diffusers.preset import ModelPreset
from hi_diffusers.request.drawing import Drawing, decide
from hi_diffusers.request.options import SamplingOptions
from hi_diffusers.runs.inputs import InputHash, with_files
from hi_diffusers.runs.prompt_files import PromptLine

MAX_KEPT = 1024


class LineDecisions(Protocol):
    """The drawings of a run's lines."""

    def check(self, line: PromptLine) -> tuple[str, ...]:
        """Sentences on how a line is drawn differently from what it asks; raises ValueError if it cannot be drawn."""

    def drawing(self, line: PromptLine, seed: int) -> Any:
        """One picture of a line."""


class Decisions:
    """The drawings of a run.

    Args:
        preset: the model.
        base: options of every picture; a line may override them.
        cache: the requested cache; what it leaves open is decided for each line's options.
        calibrations: where the model's calibrations are; None: nowhere.
        folder: folder of the prompt file, in which the lines' pictures lie.
        of_pictures: options of the lines that start from a picture, unless they say otherwise.

    Attributes:
        inputs: hash over the pictures of the lines that were checked.

    Raises:
        ValueError: if base or cache cannot be drawn.
    """

    def __init__(
        self,
        preset: ModelPreset,
        base: SamplingOptions,
        cache: CacheConfig,
        calibrations: CalibrationShelf | None,
        folder: Path = Path(),
        of_pictures: Mapping[str, Any] = MappingProxyType({}),
    ):
        self.preset, self.options, self.cache, self.calibrations = preset, base, cache, calibrations
        self.folder, self.of_pictures, self.inputs = folder.resolve(), of_pictures, InputHash()
        self.base = decide(preset, base, cache, calibrations)
        self._known: dict[tuple[tuple[str, Any], ...], Drawing] = {}
        self._kinds: dict[tuple[Any, ...], Drawing] = {}

    def check(self, line: PromptLine) -> tuple[str, ...]:
        """Sentences on how a line is drawn differently from what it asks; raises ValueError if it cannot be drawn."""
        if not line.overrides:
            return ()
        own = self._own(line.overrides)
        replace(self.options, prompt=line.prompt, **own)  # refuses each value by itself
        drawing = self._of_overrides(line.overrides)
        one = drawing.options
        self.inputs.add(
            picture.sha256 for picture in (one.image, one.mask_image) if picture and {"image", "mask"} & set(own)
        )
        kind = (one.width, one.height, one.guided, one.num_steps, one.max_sequence_length, one.first_step)
        self._kinds.setdefault((*kind, one.image is None), drawing)
        return drawing.notices if set(line.overrides) - {"seed"} else ()

    def kinds(self) -> list[Drawing]:
        """The base's drawing, and of the lines that were checked one of each kind that takes memory of its own."""
        return [self.base, *self._kinds.values()]

    def drawing(self, line: PromptLine, seed: int) -> Drawing:
        """One picture of a line."""
        drawing = self._of_overrides(line.overrides).again(line.prompt, seed)
        negative = line.overrides.get("negative_prompt")
        if negative is None:
            return drawing
        return replace(drawing, options=replace(drawing.options, negative_prompt=negative))

    def _of_overrides(self, overrides: Mapping[str, Any]) -> Drawing:
        """The drawing with these overrides; prompts and seed are filled in later."""
        own = {name: value for name, value in overrides.items() if name != "seed"}
        if own.get("negative_prompt"):
            own["negative_prompt"] = "any"  # only whether there is one matters
        key = tuple(sorted(own.items()))
        if not key:
            return self.base
        if key not in self._known:
            if len(self._known) == MAX_KEPT:
                self._known.clear()
            options = replace(self.options, **self._own(own))
            self._known[key] = decide(self.preset, options, self.cache, self.calibrations)
        return self._known[key]

    def _own(self, overrides: Mapping[str, Any]) -> dict[str, Any]:
        """A line's options, with the files that its pictures name."""
        found = with_files(overrides, self.folder)
        return {**self.of_pictures, **found} if "image" in found else found
