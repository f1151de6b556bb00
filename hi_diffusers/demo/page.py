"""The page: what its fields and buttons do besides drawing."""

import contextlib
import io
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import gradio as gr

from cache_functions.config import QUALITIES
from hi_diffusers.demo import figures
from hi_diffusers.demo.controls import FREE_SIZE, absent, present, quality_choices, said_absent, sizes_for
from hi_diffusers.demo.desk import DRAW_PATIENCE, Desk
from hi_diffusers.demo.drawings import QUIET, Drawings, failures_as_sentences
from hi_diffusers.demo.fetching import Fetcher
from hi_diffusers.demo.history import Entry, check_present
from hi_diffusers.demo.kept import ADD_PROMPT, RESTORED, is_text, keep_fields, prompts_of
from hi_diffusers.demo.layout import (
    FIELDS,
    TITLE,
    examples_of,
    is_example,
    is_small,
    lay_out,
    said_small,
)
from hi_diffusers.demo.logs import sentence
from hi_diffusers.demo.scripts import ESCAPE_STOPS, NAME_PARTS
from hi_diffusers.demo.serving import DRAWING
from hi_diffusers.demo.settings import lora_of, missing_fields, values_of
from hi_diffusers.demo.starts import received, refreshed, to_paint_on
from hi_diffusers.demo.studio import Studio
from hi_diffusers.demo.visit import TOLD_OF, Visit
from hi_diffusers.pictures.enlarging import Enlarger
from hi_diffusers.pictures.inputs import FITS, InputPicture
from hi_diffusers.pictures.metadata import parse_metadata
from hi_diffusers.preset import ModelPreset, fit_size, is_fitted, sizes_of
from hi_diffusers.request.options import STRENGTH, SamplingOptions
from hi_diffusers.service.loader import Loader
from hi_diffusers.service.offered import LoraFolder, OfferedModel, TokenCounter
from hi_diffusers.service.requests import OF_CACHE, OF_START, Limits, Request

CHANGE_PATIENCE = 0.5  # seconds that a change of a field waits for others' schedules to be computed
KEPT_SECONDS = 3600  # how long pictures stay on the server
NUMBERS = ("lora_scale", "width", "height", "num_images", "num_steps", "guidance")
MAX_NUMBER = 2**31
KEPT_FIELDS = tuple(name for name in FIELDS if name not in OF_START)
Offer = Callable[[], Mapping[str, OfferedModel]]


class Page:
    """The page that a visitor sees.

    Args:
        models: the offered models, by name.
        chosen: the model that is selected at first.
        studio, loader: the studio that draws, and the loader that knows how much memory it keeps.
        limits: limits of one request.
        loras: the LoRAs that visitors may choose.
        enlarger: enlarges pictures.
        offer: offers the models anew, once one was downloaded; None: nobody may download.
    """

    def __init__(
        self,
        models: Mapping[str, OfferedModel],
        chosen: str,
        studio: Studio,
        loader: Loader,
        limits: Limits,
        loras: LoraFolder | None = None,
        enlarger: Enlarger | None = None,
        offer: Offer | None = None,
    ):
        self.desk, self.studio, self.loader, self.counter = Desk(models, limits, loras), studio, loader, TokenCounter()
        self.offer, self.fetcher, enlarger = offer, Fetcher(), enlarger or Enlarger()
        names = self.desk.loras.names()
        with gr.Blocks(title=TITLE, analytics_enabled=False) as self.blocks:
            self.parts = lay_out(models, chosen, limits, KEPT_SECONDS, names, offer is not None, enlarger.method)
            self.drawings = Drawings(self.parts, self.desk, studio, self.counter)
            self.visit = Visit(self.parts, self._fill, enlarger, limits.upload_pixels)
            self._connect_fields()
            self._connect_pictures()
            self._connect_browser(self.drawings.connect())
            if offer is not None:
                self._connect_download()
            gr.api(self.drawings.generate, api_name="generate", concurrency_limit=1, concurrency_id=DRAWING)

    def _connect_fields(self) -> None:
        """Connect the fields that depend on other fields."""
        parts, fields, ask, settings = self.parts, self.parts.fields, self.parts.ask, self.parts.settings
        latest = QUIET | {"trigger_mode": "always_last"}
        of_model = [fields[name] for name in ("size", "num_steps", "guidance", "prompt", "width", "height")]
        looks = [ask.examples, parts.outcome.pixels]
        asked = [fields["model"], ask.prompt, ask.start.image]
        fields["model"].input(self.on_model, asked, [*of_model, *looks], **QUIET)
        shown = [fields[name] for name in ("quality", "negative_prompt", "width", "height")]
        changes = [fields[name].change for name in FIELDS if name not in ("prompt", "negative_prompt")]
        gr.on(
            [*changes, parts.outcome.report.change, self.blocks.load],
            self.on_change,
            parts.inputs,
            [settings.expected, *shown],
            **latest,
        )
        prompts = [ask.prompt.change, fields["model"].change, self.blocks.load]
        gr.on(prompts, self.on_prompt, [ask.prompt, fields["model"]], ask.tokens, **latest)
        of_cache = [fields[name] for name in OF_CACHE]
        fields["quality"].input(self.on_quality, fields["quality"], [fields["cache"], *of_cache], **QUIET)
        fields["cache"].input(self.on_method, fields["cache"], of_cache, **QUIET)
        for samples in (ask.examples, ask.earlier):
            samples.click(lambda sample: sample[0], samples, ask.prompt, **QUIET)
        seed, lock, last = fields["seed"], settings.lock, parts.last_seed
        lock.input(lambda on, last: last if on else "", [lock, last], seed, **QUIET)
        seed.change(lambda seed: bool(seed.strip()), seed, lock, **QUIET)
        last.change(lambda on, seed, last: seed or (last if on else ""), [lock, seed, last], seed, **QUIET)
        for script in (ESCAPE_STOPS, NAME_PARTS):
            self.blocks.load(None, js=script)

    def _connect_pictures(self) -> None:
        """Connect what loads a picture's settings, or takes a picture to start from."""
        parts, fields, start, outcome = self.parts, self.parts.fields, self.parts.ask.start, self.parts.outcome
        started = [start.accordion, start.file, start.image, start.painting, start.paint]
        sizes = [fields["size"], fields["width"], fields["height"]]
        start.file.upload(self.on_picture, [start.file, fields["model"]], [*started, *sizes], **TOLD_OF)
        start.file.clear(lambda: self._start_from(None), None, started, **QUIET)
        outcome.use.click(self.on_use, [parts.shown, fields["model"]], [*started, *sizes], **TOLD_OF)
        settings = parts.settings
        filled = [*dict.fromkeys([*parts.inputs, *started, settings.expected, outcome.pixels])]
        settings.upload.upload(self.on_upload, [settings.upload, start.image], filled, **TOLD_OF)
        self.visit.connect(filled)

    def _connect_browser(self, beginnings: list[Any]) -> None:
        """Connect what the browser keeps over a reload; `beginnings` are the events of drawings that begin."""
        parts, fields, ask, browser = self.parts, self.parts.fields, self.parts.ask, self.parts.browser
        outcome, kept = parts.outcome, [fields[name] for name in KEPT_FIELDS]
        back = [*kept, ask.examples, outcome.pixels, ask.earlier]
        visit = [parts.history, browser.pictures, outcome.gallery, outcome.beside, outcome.pack]
        returned = self.blocks.load(
            self.on_return, [browser.settings, browser.prompts, browser.pictures], [*back, *visit], **TOLD_OF
        )
        returned.success(None, js=RESTORED)  # if it fails, e.g. in a full queue, what was kept is not replaced
        changes = [one.change for one in kept]
        gr.on(changes, None, [browser.settings, *kept], browser.settings, js=keep_fields(KEPT_FIELDS))
        for begun in beginnings:
            added = begun.success(None, [browser.prompts, ask.prompt], browser.prompts, js=ADD_PROMPT)
            added.then(self._earlier, browser.prompts, ask.earlier, **QUIET)

    def _connect_download(self) -> None:
        settings = self.parts.settings
        offered = [settings.absent, settings.missing, settings.wanted, self.parts.fields["model"]]
        settings.fetch.click(
            self.on_fetch,
            settings.wanted,
            [settings.fetched, *offered],
            concurrency_limit=None,
            show_progress="hidden",
            api_visibility="private",
        )

    def on_fetch(self, name: str | None) -> Iterator[dict[Any, Any]]:
        """Download a model's files, show how far it is, and offer the model then."""
        settings, models, fetched = self.parts.settings, self.desk.models, self.parts.settings.fetched
        if name not in models or self.offer is None:
            yield {fetched: figures.refusal("Choose a model to download.")}
            return
        yield {fetched: figures.fetching(name)}
        try:
            for step in self.fetcher.fetch(models[name]):
                yield {fetched: figures.fetching(name, step)}
        except Exception as error:
            yield {fetched: figures.refusal(sentence(error))}
            return
        models.update(self.offer())
        missing = absent(models)
        said = models[name].missing
        yield {
            fetched: figures.refusal(said) if said else figures.note(f"{name} can be chosen now."),
            settings.absent: gr.update(label=said_absent(models)),
            settings.missing: figures.absent_models(missing),
            settings.wanted: gr.update(choices=[one.preset.name for one in missing], value=None),
            self.parts.fields["model"]: gr.update(choices=present(models)),
        }

    def on_return(self, settings: Any, prompts: Any, pictures: Any) -> dict[Any, Any]:
        """Show again what the browser kept of the last visit."""
        update = {self.parts.ask.earlier: self._earlier(prompts)} | self.visit.on_return(pictures)
        names = present(self.desk.models)  # more than when the page was made, if one was downloaded
        if not isinstance(settings, dict):
            return update | {self.parts.fields["model"]: gr.update(choices=names)}
        request, values = self._usable(settings)
        lost = [name for name in KEPT_FIELDS if settings.get(name) is not None and name not in values]
        if lost:
            gr.Warning(f"Of the last visit's settings these cannot be used here: {', '.join(lost)}")
        sizes, size = sizes_for(request.model.preset), values.get("size")
        is_offered = size in [value for _, value in sizes]
        filled = values | {"size": gr.update(choices=sizes, value=size if is_offered else sizes[0][1])}
        filled["model"] = gr.update(choices=names, value=request.model.preset.name)
        fields = {self.parts.fields[name]: value for name, value in filled.items()}
        return update | fields | self._looks_of(request.model.preset)

    def _usable(self, settings: dict[str, Any]) -> tuple[Request, dict[str, Any]]:
        """What of a browser's settings can be used together, and the request that it makes."""
        usable: dict[str, Any] = {}
        whole: dict[str, Any] = {"prompt": "", "size": FREE_SIZE}
        request = self.desk.of_fields(dict(whole), DRAW_PATIENCE)
        for name in sorted(KEPT_FIELDS, key=lambda one: one != "model"):  # the others depend on the model
            value = settings.get(name)
            is_number = isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < MAX_NUMBER
            if not is_number and not is_text(value, self.desk.limits.prompt_chars):
                continue
            if name in NUMBERS and not is_number:
                continue
            with contextlib.suppress(ValueError, TypeError):
                request = self.desk.of_fields(whole | {name: value}, DRAW_PATIENCE)
                whole[name] = usable[name] = value
        return request, usable

    def _earlier(self, prompts: Any) -> Any:
        found = prompts_of(prompts, self.desk.limits.prompt_chars)
        return gr.update(samples=[[one] for one in found], visible=bool(found))

    def _looks_of(self, preset: ModelPreset) -> dict[Any, Any]:
        """The page's update with what a model shows besides its settings."""
        small = is_small(preset)
        return {
            self.parts.ask.examples: gr.update(samples=examples_of(preset)),
            self.parts.outcome.pixels: gr.update(value=small, visible=small, label=said_small(preset)),
        }

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
            *self._looks_of(preset).values(),
        ]

    def on_quality(self, grade: str) -> list[Any]:
        """Let a quality decide how steps are saved, in place of what was set below it."""
        if not grade:
            return [gr.skip() for _ in ("cache", *OF_CACHE)]
        return ["best", *(grade if name == "quality" else "" for name in OF_CACHE)]

    def on_method(self, name: str) -> list[Any]:
        """Let go of what has no effect with a method."""
        lost = OF_CACHE if name == "off" else () if name == "best" else ("quality",)
        return ["" if name in lost else gr.skip() for name in OF_CACHE]

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
            check_present(shown.path)
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

    def on_change(self, *inputs: Any) -> list[Any]:
        """Show what the cache will do with these settings, and the fields that they need."""
        values = dict(zip(FIELDS, inputs, strict=True))
        is_free = values["size"] == FREE_SIZE
        try:
            request = self.desk.of_fields(dict(values), CHANGE_PATIENCE)
            line, guided, known = self._expectation(request), request.options.guided, {values["quality"]: request}
        except ValueError as error:
            line, guided, known = figures.refusal(sentence(error)), True, {}
        grades = gr.update(choices=quality_choices(self._grades(values, known)))
        return [line, grades, gr.update(visible=guided), gr.update(visible=is_free), gr.update(visible=is_free)]

    def _grades(self, values: dict[str, Any], known: Mapping[str, Request]) -> dict[str, str]:
        """What every quality would take and bring, as far as that is known.

        Args:
            values: values of FIELDS.
            known: quality -> the request with it, where it was checked already.
        """
        found = {}
        for grade in ("", *QUALITIES):
            chosen = dict.fromkeys(OF_CACHE, "") | {"cache": "best", "quality": grade} if grade else {"quality": ""}
            with contextlib.suppress(ValueError):
                request = known.get(grade) or self.desk.of_fields(values | chosen, CHANGE_PATIENCE)
                found[grade] = figures.grade(request, partial(self.studio.seconds, request))
        return found

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
        lora, scale, unknown = lora_of(metadata, self.desk.loras, len(request.model.source.loras))
        defaults = SamplingOptions(prompt="", num_steps=options.num_steps).resolve(preset)
        for said in (note, unknown, missing_fields(options, defaults)):
            if said:
                gr.Warning(said)
        of_cache = {name: "" if values.get(name) is None else str(values[name]) for name in OF_CACHE}
        filled = of_cache | {
            "prompt": options.prompt,
            "negative_prompt": options.negative_prompt,
            "model": preset.name,
            "lora": lora,
            "lora_scale": scale,
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
        update = {self.parts.fields[name]: value for name, value in filled.items()}
        start = self._start_from(options.image, options.mask_image)
        looks = self._looks_of(preset)
        del looks[self.parts.ask.examples]  # those of the model that was chosen before do no harm
        return update | start | looks | {self.parts.settings.expected: self._expectation(request)}

    def _expectation(self, request: Request) -> str:
        return figures.expectation(request, self.loader.cache_bytes(request), partial(self.studio.seconds, request))


def _size_fields(preset: ModelPreset, width: int, height: int) -> list[Any]:
    """Updates of size, width and height, as the model draws a picture of that shape."""
    if not is_fitted(width, height, preset.area, preset.multiple):
        width, height = fit_size(width, height, preset.area, preset.multiple)
    sizes, size = sizes_for(preset), f"{width}x{height}"
    is_official = size in [value for _, value in sizes]
    return [gr.update(choices=sizes, value=size if is_official else FREE_SIZE), width, height]
