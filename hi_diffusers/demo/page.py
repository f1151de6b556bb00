"""The page's event handlers, and its API."""

import io
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import gradio as gr

from cache_functions import StepRecord
from hi_diffusers.demo import figures
from hi_diffusers.demo.history import Entry, add_entry, write_file
from hi_diffusers.demo.layout import FIELDS, FREE_SIZE, TITLE, classes_of, examples_of, is_example, lay_out, sizes_for
from hi_diffusers.demo.loader import Loader
from hi_diffusers.demo.logs import sentence
from hi_diffusers.demo.models import OfferedModel, TokenCounter
from hi_diffusers.demo.requests import OF_CACHE, Limits, Request, check
from hi_diffusers.demo.serving import DRAWING
from hi_diffusers.demo.settings import command_line, values_of
from hi_diffusers.demo.studio import Finished, Progress, Studio, Waiting, thin_out
from hi_diffusers.denoising.steps import Interrupted
from hi_diffusers.pictures.metadata import parse_metadata

CHANGE_PATIENCE, DRAW_PATIENCE = 0.5, 60.0  # seconds that a request waits for others' schedules to be computed
KEPT_SECONDS = 3600  # how long pictures stay on the server
WITHHELD = "The picture is withheld: the server's filter flagged it."
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
        self._connect_drawing()

    def _connect_fields(self) -> None:
        """Connect the fields that depend on other fields."""
        parts, fields, ask, settings = self.parts, self.parts.fields, self.parts.ask, self.parts.settings
        latest = QUIET | {"trigger_mode": "always_last"}
        told_of = QUIET | {"queue": True}  # gradio shows a raised error only with a queue
        of_model = [fields[name] for name in ("size", "num_steps", "guidance", "prompt")]
        looks = [ask.examples, parts.outcome.picture, parts.outcome.slider, parts.outcome.gallery]
        fields["model"].input(self.on_model, [fields["model"], ask.prompt], [*of_model, *looks], **QUIET)
        told = [settings.expected, *(fields[name] for name in ("negative_prompt", "width", "height"))]
        changes = [fields[name].change for name in FIELDS if name not in ("prompt", "negative_prompt", "seed")]
        gr.on([*changes, self.blocks.load], self.on_change, parts.inputs, told, **latest)
        prompts = [ask.prompt.change, fields["model"].change, self.blocks.load]
        gr.on(prompts, self.on_prompt, [ask.prompt, fields["model"]], ask.tokens, **latest)
        ask.examples.click(lambda sample: sample[0], ask.examples, ask.prompt, **QUIET)
        settings.random_seed.click(lambda: "", None, fields["seed"], **QUIET)
        settings.same_seed.click(lambda seed: seed, parts.last_seed, fields["seed"], **QUIET)
        loaded = [*parts.inputs, settings.expected]
        settings.upload.upload(self.on_upload, settings.upload, loaded, **told_of)
        shown = [parts.outcome.picture, parts.outcome.slider, parts.outcome.download]
        parts.outcome.gallery.select(self.on_chosen, parts.history, [*loaded, *shown], **told_of)

    def _connect_drawing(self) -> None:
        """Connect the buttons Draw, Compare and Stop; a visitor has one drawing at a time."""
        parts, ask, outcome = self.parts, self.parts.ask, self.parts.outcome
        buttons = [ask.draw, ask.compare, ask.stop]
        shown = [outcome.stage, outcome.picture, outcome.slider, outcome.report, outcome.command, outcome.download]
        for triggers, work in (
            ([ask.draw.click, ask.prompt.submit], self.draw),
            ([ask.compare.click], self.compare),
        ):
            begun = gr.on(triggers, self.begin, parts.ticket, [parts.ticket, *buttons, outcome.stage], **QUIET)
            worked = begun.success(
                work,
                [parts.ticket, parts.history, parts.last_seed, *parts.inputs],
                [*shown, parts.last_seed, parts.history, outcome.gallery],
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

    def on_model(self, name: str, prompt: str) -> list[Any]:
        """Show another model's sizes, steps, guidance and examples."""
        with _failures_as_sentences():
            preset = self._check({"model": name, "prompt": ""}, CHANGE_PATIENCE).model.preset
        sizes = sizes_for(preset)
        looks = [gr.update(elem_classes=classes_of(preset)) for _ in range(3)]
        return [
            gr.update(choices=sizes, value=sizes[0][1]),
            min(preset.num_steps, self.limits.num_steps),
            preset.guidance,
            preset.example if not prompt or is_example(prompt) else prompt,
            gr.update(samples=examples_of(preset)),
            *looks,
        ]

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

    def on_upload(self, data: bytes) -> list[Any]:
        """Load the settings of a picture from the visitor's disk; its pixels are never decoded."""
        with _failures_as_sentences():
            try:
                metadata = parse_metadata(io.BytesIO(data), "the file", max_pixels=self.limits.upload_pixels)
            except ValueError as error:
                raise ValueError(f"No settings were loaded: {error}.") from error
            return self._fill(metadata)

    def on_chosen(self, history: list[Entry], chosen: gr.SelectData) -> list[Any]:
        """Load the settings of a picture of this visit, and show the picture with its download button."""
        with _failures_as_sentences():
            if not isinstance(chosen.index, int) or not 0 <= chosen.index < len(history):
                raise ValueError("that picture is no longer on the server")
            entry = history[chosen.index]
            picture, download = (gr.update(value=entry.path, visible=True) for _ in range(2))
            return [*self._fill(entry.metadata), picture, gr.update(visible=False), download]

    def _fill(self, metadata: dict[str, Any]) -> list[Any]:
        values, note = values_of(metadata, self.limits, self.models)
        request = self._check(values, CHANGE_PATIENCE)
        preset, options = request.model.preset, request.options
        sizes, size = sizes_for(preset), f"{options.width}x{options.height}"
        is_official = size in [value for _, value in sizes]
        if note:
            gr.Warning(note)
        filled = {name: values.get(name) for name in OF_CACHE} | {
            "prompt": options.prompt,
            "negative_prompt": options.negative_prompt,
            "model": preset.name,
            "size": gr.update(choices=sizes, value=size if is_official else FREE_SIZE),
            "width": options.width,
            "height": options.height,
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

    def draw(self, ticket: str, history: list[Entry], last_seed: str, *inputs: Any) -> Iterator[dict[Any, Any]]:
        """Draw what the fields ask for, and show the progress."""
        yield from self._with_failures_shown(self._draw(ticket, history, dict(zip(FIELDS, inputs, strict=True))))

    def compare(self, ticket: str, history: list[Entry], last_seed: str, *inputs: Any) -> Iterator[dict[Any, Any]]:
        """Draw the first picture uncached and cached, and show both with a slider."""
        values = dict(zip(FIELDS, inputs, strict=True))
        values["seed"] = values["seed"] or last_seed  # the last picture's seed, to compare that picture
        yield from self._with_failures_shown(self._compare(ticket, history, values))

    def _draw(self, ticket: str, history: list[Entry], values: dict[str, Any]) -> Iterator[dict[Any, Any]]:
        request = self._request(values)
        yield self._begin_drawing()
        for event in self._show_drawing(request, ticket):
            if isinstance(event, Finished):
                path = write_file(event)
                history = add_entry(history, path, event)
                yield self._show_finished(request, event, path, history)
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
        history = add_entry(history, path, cached)
        shown = self._show_finished(request, cached, path, history)
        if path is not None:
            shown |= {
                outcome.picture: gr.update(visible=False),
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
        }
        with _failures_as_sentences():
            request = self._check(values)
            for event in thin_out(self.studio.draw(request)):
                if isinstance(event, Progress):
                    yield None, {"step": len(event.records), "num_steps": request.options.num_steps}
                elif isinstance(event, Waiting):
                    yield None, {"step": 0, "num_steps": request.options.num_steps}
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
        size = values.pop("size")
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
        gone = (outcome.picture, outcome.slider, outcome.command, outcome.download)
        hidden = {part: gr.update(visible=False) for part in gone}
        return hidden | {outcome.report: "", outcome.stage: _visible(figures.waiting(0.0))}

    def _show_finished(
        self, request: Request, event: Finished, path: str | None, history: list[Entry]
    ) -> dict[Any, Any]:
        """The page's update for a finished picture; `path` is None if it is withheld."""
        parts, outcome = self.parts, self.parts.outcome
        seed = str(event.picture.metadata["options"]["seed"])
        if path is None:
            return {outcome.stage: _visible(figures.refusal(WITHHELD)), parts.last_seed: seed}
        return {
            outcome.stage: gr.update(visible=False),
            outcome.picture: gr.update(value=path, visible=True),
            outcome.report: figures.report(event),
            outcome.command: gr.update(value=command_line(request, event.number), visible=True),
            outcome.download: gr.update(value=path, visible=True),
            parts.last_seed: seed,
            parts.history: history,
            outcome.gallery: gr.update(value=[(one.path, one.caption) for one in history], visible=True),
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
