"""The page's event handlers, and its API."""

import io
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import gradio as gr
from PIL import Image

from cache_functions import StepRecord
from hi_diffusers.demo import figures
from hi_diffusers.demo.history import Entry, StartedFrom, add_entry, new_entry, write_file
from hi_diffusers.demo.layout import FIELDS, FREE_SIZE, TITLE, classes_of, examples_of, is_example, lay_out, sizes_for
from hi_diffusers.demo.loader import Loader
from hi_diffusers.demo.logs import sentence
from hi_diffusers.demo.models import OfferedModel, TokenCounter
from hi_diffusers.demo.requests import OF_CACHE, OF_START, Limits, Request, check
from hi_diffusers.demo.serving import DRAWING
from hi_diffusers.demo.settings import command_line, values_of
from hi_diffusers.demo.starts import mask_of, received, refreshed, to_paint_on
from hi_diffusers.demo.studio import Finished, Progress, Studio, Waiting, thin_out
from hi_diffusers.denoising.steps import Interrupted
from hi_diffusers.pictures.inputs import FITS, InputPicture
from hi_diffusers.pictures.metadata import parse_metadata
from hi_diffusers.preset import ModelPreset, fit_size, is_fitted, sizes_of
from hi_diffusers.request.options import STRENGTH

CHANGE_PATIENCE, DRAW_PATIENCE = 0.5, 60.0  # seconds that a request waits for others' schedules to be computed
KEPT_SECONDS = 3600  # how long pictures stay on the server
WITHHELD = "The picture is withheld: the server's filter flagged it."
GONE = ("picture", "slider", "before", "command", "download", "mask")
"""What of the result is not shown during the next drawing."""
QUIET: dict[str, Any] = {"queue": False, "show_progress": "hidden", "api_visibility": "private"}


class Page:
    """The page that a visitor sees.

    Args:
        models: the offered models, by name.
        chosen: the model that is selected at first.
        studio, loader: the studio that draws, and the loader that knows how much memory it keeps.
        limits: limits of one request.
    """

    def __init__(self, models: Mapping[str, OfferedModel], chosen: str, studio: Studio, loader: Loader, limits: Limits):
        self.models, self.chosen, self.studio, self.loader, self.limits = models, chosen, studio, loader, limits
        self.counter = TokenCounter()
        self._deciding = threading.Lock()
        with gr.Blocks(title=TITLE, analytics_enabled=False) as self.blocks:
            self.parts = lay_out(models, chosen, limits, KEPT_SECONDS)
            self._connect()
            gr.api(self.generate, api_name="generate", concurrency_limit=1, concurrency_id=DRAWING)

    def _connect(self) -> None:
        self._connect_fields()
        self._connect_start()
        self._connect_drawing()

    def _connect_fields(self) -> None:
        """Connect the fields that depend on other fields."""
        parts, fields, ask, settings = self.parts, self.parts.fields, self.parts.ask, self.parts.settings
        latest = QUIET | {"trigger_mode": "always_last"}
        told_of = QUIET | {"queue": True}  # gradio shows a raised error only with a queue
        of_model = [fields[name] for name in ("size", "num_steps", "guidance", "prompt")]
        looks = [ask.examples, parts.outcome.picture, parts.outcome.slider, parts.outcome.gallery]
        asked = [fields["model"], ask.prompt, ask.start.image]
        fields["model"].input(self.on_model, asked, [*of_model, fields["width"], fields["height"], *looks], **QUIET)
        told = [settings.expected, *(fields[name] for name in ("negative_prompt", "width", "height"))]
        changes = [fields[name].change for name in FIELDS if name not in ("prompt", "negative_prompt", "seed")]
        gr.on([*changes, self.blocks.load], self.on_change, parts.inputs, told, **latest)
        prompts = [ask.prompt.change, fields["model"].change, self.blocks.load]
        gr.on(prompts, self.on_prompt, [ask.prompt, fields["model"]], ask.tokens, **latest)
        ask.examples.click(lambda sample: sample[0], ask.examples, ask.prompt, **QUIET)
        settings.random_seed.click(lambda: "", None, fields["seed"], **QUIET)
        settings.same_seed.click(lambda seed: seed, parts.last_seed, fields["seed"], **QUIET)
        loaded = [*parts.inputs, settings.expected]
        settings.upload.upload(self.on_upload, [settings.upload, ask.start.image], loaded, **told_of)
        outcome = parts.outcome
        shown = [parts.shown, outcome.picture, outcome.slider, outcome.before, outcome.download, outcome.mask]
        start = [ask.start.file, ask.start.painting, ask.start.paint]
        outcome.gallery.select(self.on_chosen, parts.history, [*loaded, *shown, *start], **told_of)

    def _connect_start(self) -> None:
        """Connect what gives the page a picture to start from."""
        parts, fields, start, outcome = self.parts, self.parts.fields, self.parts.ask.start, self.parts.outcome
        told_of = QUIET | {"queue": True}
        sizes = [fields["size"], fields["width"], fields["height"]]
        given = [start.image, start.painting, start.paint, *sizes]
        start.file.upload(self.on_picture, [start.file, fields["model"]], [start.file, *given], **told_of)
        start.file.clear(lambda: [None, gr.update(visible=False), None], None, given[:3], **QUIET)
        outcome.use.click(self.on_use, [parts.shown, fields["model"]], [start.file, *given], **told_of)
        shown = [outcome.picture, outcome.slider]
        outcome.before.input(self.on_before, [outcome.before, parts.shown], shown, **told_of)

    def _connect_drawing(self) -> None:
        """Connect the buttons Draw, Compare and Stop; a visitor has one drawing at a time."""
        parts, ask, outcome = self.parts, self.parts.ask, self.parts.outcome
        buttons = [ask.draw, ask.compare, ask.stop]
        shown = [getattr(outcome, name) for name in (*GONE, "stage", "report", "use")]
        for triggers, work in (
            ([ask.draw.click, ask.prompt.submit], self.draw),
            ([ask.compare.click], self.compare),
        ):
            begun = gr.on(triggers, self.begin, parts.ticket, [parts.ticket, *buttons, outcome.stage], **QUIET)
            worked = begun.success(
                work,
                [parts.ticket, parts.history, parts.last_seed, ask.start.paint, *parts.inputs],
                [*shown, parts.last_seed, parts.shown, parts.history, outcome.gallery],
                concurrency_limit=1,
                concurrency_id=DRAWING,
                show_progress="minimal",
                show_progress_on=outcome.stage,
                api_visibility="private",
            )
            for ended in (worked.success, worked.failure):
                ended(self.end, parts.ticket, [parts.ticket, *buttons], **QUIET)
        ask.stop.click(self.studio.stop, parts.ticket, None, **QUIET)

    def begin(self, ticket: str) -> list[Any]:
        """Open the ticket by which Stop finds the drawing; visitors do not see it."""
        if self.studio.holds(ticket):
            raise gr.Error("your previous drawing is still running", print_exception=False)
        stage = _visible(figures.waiting(0.0))
        return [self.studio.open_ticket(), *(gr.update(interactive=on) for on in (False, False, True)), stage]

    def end(self, ticket: str) -> list[Any]:
        """Close the ticket and enable the buttons again, however the drawing ended."""
        self.studio.close_ticket(ticket)
        return ["", *(gr.update(interactive=on) for on in (True, True, False))]

    def on_model(self, name: str, prompt: str, image: InputPicture | None) -> list[Any]:
        """Show another model's sizes, steps, guidance and examples."""
        with _failures_as_sentences():
            preset = self._check({"model": name, "prompt": ""}, CHANGE_PATIENCE).model.preset
        size, width, height = _size_fields(preset, *(image.size if image else sizes_of(preset)[0]))
        return [
            size,
            min(preset.num_steps, self.limits.num_steps),
            preset.guidance,
            preset.example if not prompt or is_example(prompt) else prompt,
            width,
            height,
            gr.update(samples=examples_of(preset)),
            *(gr.update(elem_classes=classes_of(preset)) for _ in range(3)),
        ]

    def on_picture(self, path: str, model: str) -> list[Any]:
        """Start from a picture: show it for painting, and draw at its shape."""
        try:
            image = received(path, "image", self.limits.upload_pixels)
            sizes = _size_fields(self._check({"model": model, "prompt": ""}, CHANGE_PATIENCE).model.preset, *image.size)
        except ValueError as error:
            gr.Warning(sentence(error))
            return [None, None, gr.update(visible=False), None, gr.skip(), gr.skip(), gr.skip()]
        return [gr.skip(), image, gr.update(visible=True), to_paint_on(image), *sizes]

    def on_use(self, shown: Entry | None, model: str) -> list[Any]:
        """Start from the picture that is shown."""
        with _failures_as_sentences():
            if shown is None:
                raise ValueError("no picture is shown")
            return [shown.path, *self.on_picture(shown.path, model)[1:]]

    def on_before(self, wanted: bool, shown: Entry | None) -> list[Any]:
        """Show what the picture started from beside it, or the picture alone."""
        if shown is None or shown.start is None:
            return [gr.skip(), gr.skip()]
        both = (shown.start.fitted, shown.path)
        return [gr.update(value=shown.path, visible=not wanted), gr.update(value=both, visible=wanted)]

    def on_change(self, *inputs: Any) -> list[Any]:
        """Show what the cache will do with these settings, and the fields that they need."""
        values = dict(zip(FIELDS, inputs, strict=True))
        is_free = values["size"] == FREE_SIZE
        try:
            request = self._request(values, CHANGE_PATIENCE)
            line = self._expectation(request)
            guided = request.options.guided
        except ValueError as error:
            line, guided = figures.refusal(sentence(error)), True
        return [line, gr.update(visible=guided), gr.update(visible=is_free), gr.update(visible=is_free)]

    def on_prompt(self, prompt: str, name: str) -> str:
        """Show how much of the prompt the model reads."""
        try:
            request = self._check({"prompt": prompt, "model": name}, CHANGE_PATIENCE)
        except ValueError as error:
            return figures.refusal(str(error))
        if not request.options.prompt.strip():
            return figures.refusal("The prompt is empty: the model draws what it likes.")
        return figures.token_note(self.counter.count(request.model, request.options))

    def on_upload(self, data: bytes, image: InputPicture | None) -> list[Any]:
        """Load the settings of a picture from the visitor's disk; its pixels are never decoded."""
        with _failures_as_sentences():
            try:
                metadata = parse_metadata(io.BytesIO(data), "the file", max_pixels=self.limits.upload_pixels)
                return self._fill(metadata, image)
            except ValueError as error:
                raise ValueError(f"No settings were loaded: {error}.") from error

    def on_chosen(self, history: list[Entry], chosen: gr.SelectData) -> list[Any]:
        """Load the settings of a picture of this visit, and show the picture with its download button."""
        with _failures_as_sentences():
            if not isinstance(chosen.index, int) or not 0 <= chosen.index < len(history):
                raise ValueError("that picture is no longer on the server")
            entry = history[chosen.index]
            image, mask = (entry.start.image, entry.start.mask) if entry.start else (None, None)
            file = None if image is None else str(refreshed(image).file)
            painted = None if image is None else to_paint_on(image, mask)
            shown = self._show_entry(entry)
            return [
                *self._fill(entry.metadata, image, mask),
                *shown.values(),
                file,
                gr.update(visible=image is not None),
                painted,
            ]

    def _fill(
        self, metadata: dict[str, Any], image: InputPicture | None, mask: InputPicture | None = None
    ) -> list[Any]:
        values, note = values_of(metadata, self.limits, self.models, image, mask)
        request = self._check(values, CHANGE_PATIENCE)
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
            "image": image if options.image is None else options.image,
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
        line = self._expectation(request)
        return [*(filled[name] for name in FIELDS), line]

    def _expectation(self, request: Request) -> str:
        def seconds(num_full: int) -> float | None:
            return self.studio.seconds(request, num_full)

        return figures.expectation(request, self.loader.cache_bytes(request), seconds)

    def draw(
        self, ticket: str, history: list[Entry], last_seed: str, paint: Image.Image | None, *inputs: Any
    ) -> Iterator[dict[Any, Any]]:
        """Draw what the fields ask for, and show the progress."""
        values = dict(zip(FIELDS, inputs, strict=True)) | {"paint": paint}
        yield from self._with_failures_shown(self._draw(ticket, history, values))

    def compare(
        self, ticket: str, history: list[Entry], last_seed: str, paint: Image.Image | None, *inputs: Any
    ) -> Iterator[dict[Any, Any]]:
        """Draw the first picture uncached and cached, and show both with a slider."""
        values = dict(zip(FIELDS, inputs, strict=True)) | {"paint": paint}
        values["seed"] = values["seed"] or last_seed  # the last picture's seed, to compare that picture
        yield from self._with_failures_shown(self._compare(ticket, history, values))

    def _draw(self, ticket: str, history: list[Entry], values: dict[str, Any]) -> Iterator[dict[Any, Any]]:
        request = self._request(values)
        yield self._begin_drawing()
        start = StartedFrom.of(request.options)
        for event in self._show_drawing(request, ticket):
            if isinstance(event, Finished):
                update, history = self._show_finished(request, event, write_file(event), start, history)
                yield update
            else:
                yield event

    def _compare(self, ticket: str, history: list[Entry], values: dict[str, Any]) -> Iterator[dict[Any, Any]]:
        request, outcome = self._request(values).first(), self.parts.outcome
        if request.cache.is_off:
            raise ValueError("the cache is off: choose one to compare with")
        yield self._begin_drawing()
        found = []
        for one, word in ((request.uncached(), "uncached"), (request, "cached")):
            for event in self._show_drawing(one, ticket, word, reuse=True):
                if isinstance(event, Finished):
                    found.append(event)
                else:
                    yield event
        (uncached, cached), paths = found, tuple(write_file(one) for one in found)
        path = None if None in paths else paths[1]
        shown, _ = self._show_finished(request, cached, path, StartedFrom.of(request.options), history)
        if path is not None:
            shown |= {
                outcome.picture: gr.update(visible=False),
                outcome.before: gr.update(visible=False),
                outcome.slider: gr.update(value=paths, visible=True),
                outcome.report: figures.comparison(uncached, cached),
            }
        yield shown

    def _with_failures_shown(self, work: Iterator[dict[Any, Any]]) -> Iterator[dict[Any, Any]]:
        """Show an error in the place of the drawing."""
        try:
            yield from work
        except Interrupted:
            return  # the page says so already
        except Exception as error:
            yield {self.parts.outcome.stage: _visible(figures.refusal(sentence(error)))}

    def generate(
        self,
        prompt: str,
        negative_prompt: str = "",
        model: str | None = None,
        seed: int | None = None,
        width: int | None = None,
        height: int | None = None,
        num_steps: int | None = None,
        guidance: float | None = None,
        scheduler: str | None = None,
        shift: float | None = None,
        max_sequence_length: int | None = None,
        cache: str | None = None,
        quality: str | None = None,
        target: str | None = None,
        basis: str | None = None,
        schedule: str | None = None,
        fresh_threshold: int | None = None,
        full_steps: int | None = None,
        max_order: int | None = None,
        image: gr.FileData | None = None,
        mask_image: gr.FileData | None = None,
        strength: float | None = None,
        fit: str | None = None,
    ) -> Iterator[tuple[dict[str, Any] | None, dict[str, Any]]]:
        """Draw one picture; returns its file and all settings. A setting that is not given is the model's default."""
        values = {
            "prompt": prompt,
            "negative_prompt": negative_prompt,
            "model": model,
            "seed": seed,
            "width": width,
            "height": height,
            "num_steps": num_steps,
            "guidance": guidance,
            "scheduler": scheduler,
            "shift": shift,
            "max_sequence_length": max_sequence_length,
            "cache": cache,
            "quality": quality,
            "target": target,
            "basis": basis,
            "schedule": schedule,
            "fresh_threshold": fresh_threshold,
            "full_steps": full_steps,
            "max_order": max_order,
            "strength": strength,
            "fit": fit,
        }
        with _failures_as_sentences():
            for role, given in (("image", image), ("mask_image", mask_image)):
                if given is not None:
                    values[role] = received(_path_of(role, given), role, self.limits.upload_pixels)
            request = self._check(values)
            for event in thin_out(self.studio.draw(request)):
                if isinstance(event, Progress):
                    yield None, {"step": len(event.records), "num_steps": request.options.drawn_steps}
                elif isinstance(event, Waiting):
                    yield None, {"step": 0, "num_steps": request.options.drawn_steps}
                elif event.withheld:
                    raise ValueError(WITHHELD)
                else:
                    file = gr.FileData(path=str(write_file(event)), meta={"_type": "gradio.FileData"})
                    notices = [*request.notices, *figures.cut_words(self.counter.count(request.model, request.options))]
                    yield file.model_dump(), event.picture.metadata | ({"notices": notices} if notices else {})

    def _check(self, values: Mapping[str, Any], patience: float = DRAW_PATIENCE) -> Request:
        """Check a request; one at a time, since a schedule that is not calibrated takes a second and 100 MB.

        Args:
            patience: seconds that it waits for its turn.

        Raises:
            ValueError: if the request cannot be drawn, or its turn does not come.
        """
        if not self._deciding.acquire(timeout=patience):
            raise ValueError("the server is busy with other requests: try again in a moment")
        try:
            return check(values, self.limits, self.models)
        finally:
            self._deciding.release()

    def _request(self, values: dict[str, Any], patience: float = DRAW_PATIENCE) -> Request:
        """The request that the fields describe."""
        image, paint, size = (values.pop(name, None) for name in ("image", "paint", "size"))
        if image is None:
            values = {name: value for name, value in values.items() if name not in OF_START}
        else:
            values |= {"image": refreshed(image), "mask_image": mask_of(paint, image)}
        if size != FREE_SIZE:
            width, _, height = str(size).partition("x")
            values |= {"width": width, "height": height}
        return self._check(values, patience)

    def _show_drawing(
        self, request: Request, ticket: str, word: str = "drawing", reuse: bool = False
    ) -> Iterator[dict[Any, Any] | Finished]:
        """A drawing's events: finished pictures unchanged, all others as updates of the page."""
        stage = self.parts.outcome.stage
        number, preview = 0, None
        records: tuple[StepRecord, ...] = ()
        try:
            for event in thin_out(self.studio.draw(request, ticket, reuse=reuse)):
                if isinstance(event, Finished):
                    preview, records = None, ()
                    yield event
                elif isinstance(event, Progress):
                    number, records, preview = event.number, event.records, event.preview or preview
                    yield {stage: _visible(figures.stage(request, number, records, preview, word))}
                else:
                    yield {stage: gr.skip() if records else _visible(figures.waiting(event.seconds))}
        except Interrupted:
            yield {stage: _visible(figures.stage(request, number, records, preview, "stopped"))}
            raise

    def _begin_drawing(self) -> dict[Any, Any]:
        """The page's update when a drawing begins."""
        outcome = self.parts.outcome
        hidden = {getattr(outcome, name): gr.update(visible=False) for name in (*GONE, "use")}
        return hidden | {outcome.report: "", outcome.stage: _visible(figures.waiting(0.0))}

    def _show_finished(
        self, request: Request, event: Finished, path: str | None, start: StartedFrom | None, history: list[Entry]
    ) -> tuple[dict[Any, Any], list[Entry]]:
        """The page's update for a finished picture, and the history with it; `path` is None if it is withheld."""
        parts, outcome = self.parts, self.parts.outcome
        seed = str(event.picture.metadata["options"]["seed"])
        if path is None:
            return {outcome.stage: _visible(figures.refusal(WITHHELD)), parts.last_seed: seed}, history
        entry = new_entry(path, event, start)
        history = add_entry(history, entry)
        return self._show_entry(entry) | {
            outcome.stage: gr.update(visible=False),
            outcome.report: figures.report(event),
            outcome.command: gr.update(value=command_line(request, event.number), visible=True),
            outcome.use: gr.update(visible=True),
            parts.last_seed: seed,
            parts.history: history,
            outcome.gallery: gr.update(value=[(one.path, one.caption) for one in history], visible=True),
        }, history

    def _show_entry(self, entry: Entry) -> dict[Any, Any]:
        """The page's update that shows a picture of the visit."""
        outcome, start = self.parts.outcome, entry.start
        mask = None if start is None or start.mask is None else str(start.mask.file)
        return {
            self.parts.shown: entry,
            outcome.picture: gr.update(value=entry.path, visible=True),
            outcome.slider: gr.update(visible=False),
            outcome.before: gr.update(value=False, visible=start is not None),
            outcome.download: gr.update(value=entry.path, visible=True),
            outcome.mask: gr.update(value=mask, visible=mask is not None),
        }


@contextmanager
def _failures_as_sentences() -> Iterator[None]:
    """Turn any error inside into one sentence for the visitor."""
    try:
        yield
    except Exception as error:
        raise gr.Error(sentence(error), print_exception=False) from error


def _visible(html: str) -> Any:
    return gr.update(value=html, visible=True)


def _size_fields(preset: ModelPreset, width: int, height: int) -> list[Any]:
    """Updates of size, width and height, as the model draws a picture of that shape."""
    if not is_fitted(width, height, preset.area, preset.multiple):
        width, height = fit_size(width, height, preset.area, preset.multiple)
    sizes, size = sizes_for(preset), f"{width}x{height}"
    is_official = size in [value for _, value in sizes]
    return [gr.update(choices=sizes, value=size if is_official else FREE_SIZE), width, height]


def _path_of(role: str, given: Any) -> str:
    """The path of a file that a program gives; raises ValueError if it is none."""
    path = given.get("path") if isinstance(given, dict) else None
    if not isinstance(path, str):
        raise ValueError(f"{role} must be a file: gradio_client.handle_file makes one")
    return path
