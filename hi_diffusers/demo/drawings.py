"""The page's drawings: Draw, Compare, Stop, and the API."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import gradio as gr
from PIL import Image

from cache_functions import StepRecord
from hi_diffusers.demo import figures
from hi_diffusers.demo.desk import Desk
from hi_diffusers.demo.history import Entry, StartedFrom, add_entry, write_file
from hi_diffusers.demo.layout import FIELDS, Outcome, Parts
from hi_diffusers.demo.logs import sentence
from hi_diffusers.demo.serving import DRAWING
from hi_diffusers.demo.settings import command_line
from hi_diffusers.demo.starts import begun_with, received
from hi_diffusers.demo.studio import Finished, Progress, Studio, Waiting, thin_out
from hi_diffusers.denoising.steps import Interrupted
from hi_diffusers.pictures.inputs import InputPicture
from hi_diffusers.service.offered import TokenCounter
from hi_diffusers.service.requests import Request

WITHHELD = "The picture is withheld: the server's filter flagged it."
GONE = ("picture", "grid", "slider", "before", "command", "enlarge", "download", "use", "mask")
"""What of the result is not shown during the next drawing."""
QUIET: dict[str, Any] = {"queue": False, "show_progress": "hidden", "api_visibility": "private"}


class Drawings:
    """Draws for the page and for programs, and shows what happens.

    Args:
        parts: the page's components.
        desk: checks the requests.
        studio: draws them.
        counter: counts the words that a model does not read.
    """

    def __init__(self, parts: Parts, desk: Desk, studio: Studio, counter: TokenCounter):
        self.parts, self.desk, self.studio, self.counter = parts, desk, studio, counter

    def connect(self) -> list[Any]:
        """Connect the buttons Draw, Compare and Stop; a visitor has one drawing at a time.

        Returns:
            The events of drawings that begin.
        """
        beginnings = []
        parts, ask, outcome = self.parts, self.parts.ask, self.parts.outcome
        buttons = [ask.draw, ask.compare, ask.stop]
        # a state is read when the drawing's turn comes: what was chosen meanwhile is for the next one
        fields = [parts.begun if one is ask.start.image else one for one in parts.inputs]
        shown = [getattr(outcome, name) for name in (*GONE, "stage", "report", "gallery", "beside", "pack")]
        states = [parts.last_seed, parts.shown, parts.pinned, parts.drawn, parts.history, parts.browser.pictures]
        for triggers, work in (
            ([ask.draw.click, ask.prompt.submit], self.draw),
            ([ask.compare.click], self.compare),
        ):
            asked = [parts.ticket, ask.start.file, ask.start.image]
            begun = gr.on(triggers, self.begin, asked, [parts.ticket, parts.begun, *buttons, outcome.stage], **QUIET)
            beginnings.append(begun)
            worked = begun.success(
                work,
                [parts.ticket, parts.history, parts.last_seed, ask.start.paint, *fields],
                [*shown, *states],
                concurrency_limit=1,
                concurrency_id=DRAWING,
                show_progress="minimal",
                show_progress_on=outcome.stage,
                api_visibility="private",
            )
            for ended in (worked.success, worked.failure):
                ended(self.end, parts.ticket, [parts.ticket, *buttons], **QUIET)
        ask.stop.click(self.studio.stop, parts.ticket, None, **QUIET)
        return beginnings

    def begin(self, ticket: str, file: str | None, image: InputPicture | None) -> list[Any]:
        """Open the ticket by which Stop finds the drawing (visitors do not see it), and keep what it starts from."""
        if self.studio.holds(ticket):
            raise gr.Error("your previous drawing is still running", print_exception=False)
        stage = _visible(figures.waiting(0.0))
        begun = begun_with(file, image)
        return [self.studio.open_ticket(), begun, *(gr.update(interactive=on) for on in (False, False, True)), stage]

    def end(self, ticket: str) -> list[Any]:
        """Close the ticket and enable the buttons again, however the drawing ended."""
        self.studio.close_ticket(ticket)
        return ["", *(gr.update(interactive=on) for on in (True, True, False))]

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
        request = self.desk.of_fields(values)
        yield self._begin_drawing()
        start = StartedFrom.of(request.options)
        drawn: list[Entry] = []
        for event in self._show_drawing(request, ticket):
            if not isinstance(event, Finished):
                yield event
                continue
            update, entry = self._show_finished(request, event, write_file(event), start, history)
            if entry is not None:
                drawn, history = [*drawn, entry], add_entry(history, entry)
            yield update | (_grid(self.parts, drawn) if len(drawn) > 1 else {})

    def _compare(self, ticket: str, history: list[Entry], values: dict[str, Any]) -> Iterator[dict[Any, Any]]:
        request, outcome = self.desk.of_fields(values).first(), self.parts.outcome
        if request.cache.is_off:
            why = "" if request.asked.is_off else "; ".join(request.notices)
            raise ValueError(why or "the cache is off: choose one to compare with")
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
        shown, entry = self._show_finished(request, cached, path, StartedFrom.of(request.options), history)
        if entry is not None:
            shown |= {getattr(outcome, name): gr.update(visible=False) for name in ("picture", "before", "enlarge")} | {
                outcome.slider: gr.update(value=paths, visible=True),
                outcome.report: figures.comparison(uncached.picture, cached.picture),
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
        values: dict[str, Any] = {
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
        with failures_as_sentences():
            for role, given in (("image", image), ("mask_image", mask_image)):
                if given is not None:
                    values[role] = received(_path_of(role, given), role, self.desk.limits.upload_pixels)
            request = self.desk.check(values)
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
        shown = {self.parts.drawn: [], outcome.report: "", outcome.stage: _visible(figures.waiting(0.0))}
        return hidden(outcome) | shown | {self.parts.pinned: None, outcome.beside: beside(False)}

    def _show_finished(
        self, request: Request, event: Finished, path: str | None, start: StartedFrom | None, history: list[Entry]
    ) -> tuple[dict[Any, Any], Entry | None]:
        """The page's update for a finished picture, and its entry; both without it if `path` is None: withheld."""
        parts, picture = self.parts, event.picture
        seed = str(picture.metadata["options"]["seed"])
        if path is None:
            return {parts.outcome.stage: _visible(figures.refusal(WITHHELD)), parts.last_seed: seed}, None
        command = command_line(request, self.desk.loras, event.number)
        entry = Entry(path, picture.metadata, picture.trace, picture.seconds, command, start)
        shown = show_entry(parts, entry) | gallery_of(parts, add_entry(history, entry))
        return shown | {parts.last_seed: seed}, entry


def show_entry(parts: Parts, entry: Entry) -> dict[Any, Any]:
    """The page's update that shows a picture of the visit."""
    outcome, start = parts.outcome, entry.start
    mask = None if start is None or start.mask is None else str(start.mask.file)
    return {
        parts.shown: entry,
        outcome.stage: gr.update(visible=False),
        outcome.use: gr.update(visible=True),
        outcome.picture: gr.update(value=entry.path, visible=True),
        outcome.grid: gr.update(visible=False),
        outcome.slider: gr.update(visible=False),
        outcome.before: gr.update(value=False, visible=start is not None),
        outcome.enlarge: gr.update(value=1, visible=True),
        outcome.download: gr.update(value=entry.path, visible=True),
        outcome.mask: gr.update(value=mask, visible=mask is not None),
        outcome.report: figures.report(entry),
        outcome.command: gr.update(value=entry.command, visible=True),
    }


def hidden(outcome: Outcome) -> dict[Any, Any]:
    """The page's update that hides what is shown of a picture."""
    return {getattr(outcome, name): gr.update(visible=False) for name in GONE}


def beside(pinned: bool) -> Any:
    """The update of the button that compares two pictures of the visit: it says what the next choice does."""
    return gr.update(value="Now choose the other one (or stop comparing)" if pinned else "Compare with another one")


def gallery_of(parts: Parts, history: list[Entry]) -> dict[Any, Any]:
    """The page's update that shows the pictures of the visit."""
    outcome, some = parts.outcome, bool(history)
    return {
        parts.history: history,
        parts.browser.pictures: [one.kept() for one in history],
        outcome.gallery: gr.update(value=[(one.path, one.caption) for one in history], visible=some),
        outcome.beside: gr.update(visible=len(history) > 1),
        outcome.pack: gr.update(visible=some),
    }


def _grid(parts: Parts, drawn: list[Entry]) -> dict[Any, Any]:
    """The page's update that shows several pictures of one drawing in place of the last one."""
    outcome = parts.outcome
    return {
        parts.drawn: drawn,
        outcome.picture: gr.update(visible=False),
        outcome.grid: gr.update(value=[(one.path, one.caption) for one in drawn], visible=True, selected_index=None),
    }


@contextmanager
def failures_as_sentences() -> Iterator[None]:
    """Turn any error inside into one sentence for the visitor."""
    try:
        yield
    except Exception as error:
        raise gr.Error(sentence(error), print_exception=False) from error


def _visible(html: str) -> Any:
    return gr.update(value=html, visible=True)


def _path_of(role: str, given: Any) -> str:
    """The path of a file that a program gives; raises ValueError if it is none."""
    path = given.get("path") if isinstance(given, dict) else None
    if not isinstance(path, str):
        raise ValueError(f"{role} must be a file: gradio_client.handle_file makes one")
    return path
