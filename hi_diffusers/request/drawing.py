"""A decided request: model, options and cache of one picture. It is decided once, then passed on."""

from dataclasses import dataclass, replace

from cache_functions import CacheConfig, CalibrationShelf, resolve
from hi_diffusers.preset import ModelPreset
from hi_diffusers.request.options import ResolvedOptions, SamplingOptions


@dataclass(frozen=True)
class Drawing:
    """One picture to be drawn, with nothing left open.

    Attributes:
        preset: the model.
        options: options of the picture.
        cache: cache configuration.
        notices: sentences about choices made for the user, or differences from the request.
    """

    preset: ModelPreset
    options: ResolvedOptions
    cache: CacheConfig
    notices: tuple[str, ...] = ()

    def uncached(self) -> "Drawing":
        """The same picture with every step computed."""
        return replace(self, cache=CacheConfig.off(), notices=())

    def again(self, prompt: str, seed: int) -> "Drawing":
        """The same settings with another prompt and seed."""
        return replace(self, options=replace(self.options, prompt=prompt, seed=seed))


def decide(
    preset: ModelPreset,
    options: SamplingOptions,
    cache: CacheConfig | None = None,
    calibrations: CalibrationShelf | None = None,
) -> Drawing:
    """Fill in what a request leaves open, and check that it can be drawn.

    Args:
        preset: the model.
        options: what to draw.
        cache: how to cache; None is the preset's default.
        calibrations: where the model's calibrations are; None: nowhere.

    Raises:
        ValueError: if options or cache cannot work, naming the setting.
    """
    resolved = options.resolve(preset)
    resolution = resolve(cache or preset.cache, resolved.sampler(preset), calibrations)
    return Drawing(preset, resolved, resolution.config, (*resolved.notices, *resolution.notices))
