"""The drawings of a prompt file's lines, decided once per set of options that lines override."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Protocol

from cache_functions import CacheConfig, CalibrationShelf
from hi_diffusers.preset import ModelPreset
from hi_diffusers.request.drawing import Drawing, decide
from hi_diffusers.request.options import SamplingOptions
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

    Raises:
        ValueError: if base or cache cannot be drawn.
    """

    def __init__(
        self, preset: ModelPreset, base: SamplingOptions, cache: CacheConfig, calibrations: CalibrationShelf | None
    ):
        self.preset, self.options, self.cache, self.calibrations = preset, base, cache, calibrations
        self.base = decide(preset, base, cache, calibrations)
        self._known: dict[tuple[tuple[str, Any], ...], Drawing] = {}
        self._kinds: dict[tuple[Any, ...], Drawing] = {}

    def check(self, line: PromptLine) -> tuple[str, ...]:
        """Sentences on how a line is drawn differently from what it asks; raises ValueError if it cannot be drawn."""
        if not line.overrides:
            return ()
        replace(self.options, prompt=line.prompt, **line.overrides)  # refuses each value by itself
        drawing = self._of_overrides(line.overrides)
        one = drawing.options
        self._kinds.setdefault((one.width, one.height, one.guided, one.num_steps, one.max_sequence_length), drawing)
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
            self._known[key] = decide(self.preset, replace(self.options, **own), self.cache, self.calibrations)
        return self._known[key]
