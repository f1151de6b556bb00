"""The page: what its fields, buttons and pictures do besides drawing."""

import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gradio as gr

from hi_diffusers.demo import figures
from hi_diffusers.demo.desk import DRAW_PATIENCE, Desk
from hi_diffusers.demo.drawings import ESCAPE_STOPS, GONE, QUIET, Drawings, failures_as_sentences
from hi_diffusers.demo.history import Entry
from hi_diffusers.demo.layout import FIELDS, FREE_SIZE, TITLE, classes_of, examples_of, is_example, lay_out, sizes_for
from hi_diffusers.demo.logs import sentence
from hi_diffusers.demo.serving import DRAWING
from hi_diffusers.demo.settings import values_of
from hi_diffusers.demo.starts import received, refreshed, to_paint_on
from hi_diffusers.demo.studio import Studio
from hi_diffusers.pictures.inputs import FITS, InputPicture
from hi_diffusers.pictures.metadata import parse_metadata
from hi_diffusers.preset import ModelPreset, fit_size, is_fitted, sizes_of
from hi_diffusers.request.options import STRENGTH
from hi_diffusers.service.loader import Loader
from hi_diffusers.service.offered import OfferedModel, TokenCounter
from hi_diffusers.service.requests import OF_CACHE, Limits, Request

CHANGE_PATIENCE = 0.5  # seconds that a change of a field waits for others' schedules to be computed
KEPT_SECONDS = 3600  # how long pictures stay on the server
TOLD_OF = QUIET | {"queue": True}  # gradio shows a raised error only with a queue


class Page:
    """The page that a visitor sees.

    Args:
        models: the offered models, by name.
        chosen: the model that is selected at first.
        studio, loader: the studio that draws, and the loader that knows how much memory it keeps.
        limits: limits of one request.
    """

    def __init__(self, models: Mapping[str, OfferedModel], chosen: str, studio: Studio, loader: Loader, limits: Limits):
        self.desk, self.studio, self.loader, self.counter = Desk(models, limits), studio, loader, TokenCounter()
        with gr.Blocks(title=TITLE, analytics_enabled=False) as self.blocks:
            self.parts = lay_out(models, chosen, limits, KEPT_SECONDS)
            self.drawings = Drawings(self.parts, self.desk, studio, self.counter)
            self._connect_fields()
            self._connect_pictures()
            self.drawings.connect()
            gr.api(self.drawings.generate, api_name="generate", concurrency_limit=1, concurrency_id=DRAWING)

    def _connect_fields(self) -> None:
        """Connect the fields that depend on other fields."""
        parts, fields, ask, settings = self.parts, self.parts.fields, self.parts.ask, self.parts.settings
        latest = QUIET | {"trigger_mode": "always_last"}
        of_model = [fields[name] for name in ("size", "num_steps", "guidance", "prompt")]
        looks = [ask.examples, parts.outcome.picture, parts.outcome.slider, parts.outcome.gallery]
        asked = [fields["model"], ask.prompt, ask.start.image]
        fields["model"].input(self.on_model, asked, [*of_model, fields["width"], fields["height"], *looks], **QUIET)
        told = [settings.expected, *(fields[name] for name in ("negative_prompt", "width", "height"))]
        changes = [fields[name].change for name in FIELDS if name not in ("prompt", "negative_prompt", "seed")]
        gr.on([*changes, self.blocks.load], self.on_change, parts.inputs, told, **latest)
        prompts = [ask.prompt.change, fields["model"].change, self.blocks.load]
        self.blocks.load(None, js=ESCAPE_STOPS)
        gr.on(prompts, self.on_prompt, [ask.prompt, fields["model"]], ask.tokens, **latest)
        ask.examples.click(lambda sample: sample[0], ask.examples, ask.prompt, **QUIET)
        settings.random_seed.click(lambda: "", None, fields["seed"], **QUIET)
        settings.same_seed.click(lambda seed: seed, parts.last_seed, fields["seed"], **QUIET)

    def _connect_pictures(self) -> None:
        """Connect what loads a picture's settings, or takes a picture to start from."""
        parts, fields, start, outcome = self.parts, self.parts.fields, self.parts.ask.start, self.parts.outcome
        started = [start.accordion, start.file, start.image, start.painting, start.paint]
        sizes = [fields["size"], fields["width"], fields["height"]]
        start.file.upload(self.on_picture, [start.file, fields["model"]], [*started, *sizes], **TOLD_OF)
        start.file.clear(lambda: self._start_from(None), None, started, **QUIET)
        outcome.use.click(self.on_use, [parts.shown, fields["model"]], [*started, *sizes], **TOLD_OF)
        loaded = [*dict.fromkeys([*parts.inputs, *started, parts.settings.expected])]
        upload = parts.settings.upload
        upload.upload(self.on_upload, [upload, start.image], loaded, **TOLD_OF)
        shown = [parts.shown, *(getattr(outcome, name) for name in (*GONE, "stage", "report"))]
        outcome.gallery.select(self.on_chosen, parts.history, [*loaded, *shown], **TOLD_OF)
        before = [outcome.before, parts.shown]
        outcome.before.input(self.on_before, before, [outcome.picture, outcome.slider], **TOLD_OF)

    def on_model(self, name: str, prompt: str, image: InputPicture | None) -> list[Any]:
        """Show another model's sizes, steps, guidance and examples."""
        with failures_as_sentences():
            preset = self.desk.check({"model": name, "prompt": ""}, CHANGE_PATIENCE).model.preset
            size, width, height = _size_fields(preset, *(image.size if image else sizes_of(preset)[0]))
        return [
            size,
            min(preset.num_steps, self.desk.limits.num_steps),
            preset.guidance,
            preset.example if not prompt or is_example(prompt) else prompt,
            width,
            height,
            gr.update(samples=examples_of(preset)),
            *(gr.update(elem_classes=classes_of(preset)) for _ in range(3)),
        ]

    def on_picture(self, path: str, model: str) -> dict[Any, Any]:
        """Start from a picture: show it for painting, and draw at its shape."""
        try:
            return self._started_from(path, model)
        except ValueError as error:
            gr.Warning(sentence(error))
            return self._start_from(None)

    def on_use(self, shown: Entry | None, model: str) -> dict[Any, Any]:
        """Start from the picture that is shown."""
        with failures_as_sentences():
            if shown is None:
                raise ValueError("no picture is shown")
            _check_present(shown.path)
            return self._started_from(shown.path, model)

    def _started_from(self, path: str, model: str) -> dict[Any, Any]:
        """The page's update with a picture to start from, at its shape; raises ValueError."""
        image = received(path, "image", self.desk.limits.upload_pixels)
        preset = self.desk.check({"model": model, "prompt": ""}, DRAW_PATIENCE).model.preset
        sizes = dict(zip(("size", "width", "height"), _size_fields(preset, *image.size), strict=True))
        return self._start_from(image) | {self.parts.fields[name]: value for name, value in sizes.items()}

    def _start_from(self, image: InputPicture | None, mask: InputPicture | None = None) -> dict[Any, Any]:
        """The page's update with a picture to start from, or none."""
        start = self.parts.ask.start
        return {
            start.accordion: gr.skip() if image is None else gr.update(open=True),
            start.file: None if image is None else str(refreshed(image).file),
            start.image: image,
            start.painting: gr.update(visible=image is not None),
            start.paint: None if image is None else to_paint_on(image, mask),
        }

    def on_before(self, wanted: bool, shown: Entry | None) -> list[Any]:
        """Show what the picture started from beside it, or the picture alone."""
        if shown is None or shown.start is None:
            return [gr.skip(), gr.skip()]
        with failures_as_sentences():
            _check_present(shown.path, shown.start.fitted)
        both = (shown.start.fitted, shown.path)
        return [gr.update(value=shown.path, visible=not wanted), gr.update(value=both, visible=wanted)]

    def on_change(self, *inputs: Any) -> list[Any]:
        """Show what the cache will do with these settings, and the fields that they need."""
        values = dict(zip(FIELDS, inputs, strict=True))
        is_free = values["size"] == FREE_SIZE
        try:
            request = self.desk.of_fields(values, CHANGE_PATIENCE)
            line = self._expectation(request)
            guided = request.options.guided
        except ValueError as error:
            line, guided = figures.refusal(sentence(error)), True
        return [line, gr.update(visible=guided), gr.update(visible=is_free), gr.update(visible=is_free)]

    def on_prompt(self, prompt: str, name: str) -> str:
        """Show how much of the prompt the model reads."""
        try:
            request = self.desk.check({"prompt": prompt, "model": name}, CHANGE_PATIENCE)
        except ValueError as error:
            return figures.refusal(str(error))
        if not request.options.prompt.strip():
            return figures.refusal("The prompt is empty: the model draws what it likes.")
        return figures.token_note(self.counter.count(request.model, request.options))

    def on_upload(self, data: bytes, image: InputPicture | None) -> dict[Any, Any]:
        """Load the settings of a picture from the visitor's disk; its pixels are never decoded."""
        with failures_as_sentences():
            try:
                metadata = parse_metadata(io.BytesIO(data), "the file", max_pixels=self.desk.limits.upload_pixels)
                return self._fill(metadata, image)
            except ValueError as error:
                raise ValueError(f"No settings were loaded: {error}.") from error

    def on_chosen(self, history: list[Entry], chosen: gr.SelectData) -> dict[Any, Any]:
        """Load the settings of a picture of this visit, and show the picture with its download button."""
        with failures_as_sentences():
            if not isinstance(chosen.index, int) or not 0 <= chosen.index < len(history):
                raise ValueError("that picture is no longer on the server")
            entry = history[chosen.index]
            start = entry.start
            pictures = () if start is None else (start.image, start.mask)
            _check_present(entry.path, *(str(one.file) for one in pictures if one is not None))
            return self._fill(entry.metadata, *pictures) | self.drawings.show_entry(entry)

    def _fill(
        self, metadata: dict[str, Any], image: InputPicture | None = None, mask: InputPicture | None = None
    ) -> dict[Any, Any]:
        """The page's update with the settings of a picture.

        Args:
            metadata: its metadata, which is not trusted.
            image, mask: the pictures to start from that are at hand.
        """
        values, note = values_of(metadata, self.desk.limits, self.desk.models, image, mask)
        request = self.desk.check(values, CHANGE_PATIENCE)
        preset, options = request.model.preset, request.options
        size, width, height = _size_fields(preset, options.width, options.height)
        if note:
            gr.Warning(note)
        filled = {name: values.get(name) for name in OF_CACHE} | {
            "prompt": options.prompt,
            "negative_prompt": options.negative_prompt,
            "model": preset.name,
            "size": size,
            "width": width,
            "height": height,
            "strength": STRENGTH if options.strength is None else options.strength,
            "fit": options.fit or FITS[0],
            "seed": str(options.seed),
            "num_steps": options.num_steps,
            "guidance": options.guidance,
            "num_images": 1,
            "cache": values.get("cache", "best"),
        }
        for name in ("quality", "target", "basis", "schedule"):
            filled[name] = filled[name] or ""
        update = {self.parts.fields[name]: value for name, value in filled.items()}
        start = self._start_from(options.image, options.mask_image)
        return update | start | {self.parts.settings.expected: self._expectation(request)}

    def _expectation(self, request: Request) -> str:
        def seconds(num_full: int) -> float | None:
            return self.studio.seconds(request, num_full)

        return figures.expectation(request, self.loader.cache_bytes(request), seconds)


def _size_fields(preset: ModelPreset, width: int, height: int) -> list[Any]:
    """Updates of size, width and height, as the model draws a picture of that shape."""
    if not is_fitted(width, height, preset.area, preset.multiple):
        width, height = fit_size(width, height, preset.area, preset.multiple)
    sizes, size = sizes_for(preset), f"{width}x{height}"
    is_official = size in [value for _, value in sizes]
    return [gr.update(choices=sizes, value=size if is_official else FREE_SIZE), width, height]


def _check_present(*paths: str) -> None:
    """Raise ValueError if a file was removed from the server."""
    if not all(Path(path).is_file() for path in paths):
        raise ValueError("that picture is no longer on the server")
