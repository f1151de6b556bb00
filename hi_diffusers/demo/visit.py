"""The visit's pictures on the page: chosen, laid over each other, enlarged, packed, and back after a reload."""

import contextlib
from collections.abc import Callable
from typing import Any

import gradio as gr

from hi_diffusers.demo import figures
from hi_diffusers.demo.drawings import GONE, beside, failures_as_sentences, gallery_of, hidden, show_entry
from hi_diffusers.demo.history import (
    MAX_HISTORY,
    Entry,
    check_present,
    restored,
    write_archive,
    write_enlarged,
)
from hi_diffusers.demo.layout import Parts
from hi_diffusers.demo.logs import sentence
from hi_diffusers.pictures.enlarging import Enlarger
from hi_diffusers.pictures.inputs import InputPicture

TOLD_OF: dict[str, Any] = {"queue": True, "show_progress": "hidden", "api_visibility": "private"}
"""Of an event whose errors the visitor sees: gradio shows one only with a queue."""
PRESS_ARCHIVE = "() => document.querySelector('#archive').click()"
NO_START = "What this picture was drawn from is no longer at hand: its settings were not loaded."


class Visit:
    """Shows the pictures of the visit.

    Args:
        parts: the page's components.
        fill: the page's update with a picture's settings, from its metadata, picture to start from and mask.
        enlarger: enlarges pictures.
        max_pixels: maximum number of a picture's pixels.
    """

    def __init__(
        self,
        parts: Parts,
        fill: Callable[[dict[str, Any], InputPicture | None, InputPicture | None], dict[Any, Any]],
        enlarger: Enlarger,
        max_pixels: int,
    ):
        self.parts, self.fill, self.enlarger, self.max_pixels = parts, fill, enlarger, max_pixels

    def connect(self, filled: list[Any]) -> None:
        """Connect the pictures and their buttons; `filled` are the components that `fill` updates."""
        parts, outcome = self.parts, self.parts.outcome
        shown = [parts.shown, parts.pinned, *(getattr(outcome, name) for name in (*GONE, "stage", "report", "beside"))]
        chosen = [parts.history, parts.pinned]
        outcome.gallery.select(self.on_chosen, chosen, [*filled, *shown], **TOLD_OF)
        outcome.grid.select(self.on_one_of_grid, [parts.drawn, parts.pinned], shown, **TOLD_OF)
        outcome.beside.click(self.on_beside, [parts.shown, parts.pinned], [parts.pinned, outcome.beside], **TOLD_OF)
        before = [outcome.before, parts.shown]
        outcome.before.input(self.on_before, before, [outcome.picture, outcome.slider], **TOLD_OF)
        enlarge = [outcome.enlarge, parts.shown]
        outcome.enlarge.input(self.on_enlarge, enlarge, [outcome.enlarge, outcome.picture, outcome.download], **TOLD_OF)
        packed = outcome.pack.click(self.on_pack, parts.history, outcome.archive, **TOLD_OF)
        packed.success(None, js=PRESS_ARCHIVE)
        sharp = "on => { document.querySelector('#result').classList.toggle('hd-pixels', on) }"
        outcome.pixels.change(None, outcome.pixels, None, js=sharp)

    def on_chosen(self, history: list[Entry], pinned: Entry | None, chosen: gr.SelectData) -> dict[Any, Any]:
        """Show a picture of the visit and load its settings, or lay it beside the pinned one."""
        with failures_as_sentences():
            entry = _chosen(history, chosen)
            if pinned is not None:
                return self._lay_beside(pinned, entry)
            return self._filled(entry) | show_entry(self.parts, entry)

    def on_one_of_grid(self, drawn: list[Entry], pinned: Entry | None, chosen: gr.SelectData) -> dict[Any, Any]:
        """Show one of the pictures that were drawn together above all of them, or lay it beside the pinned one."""
        with failures_as_sentences():
            entry = _chosen(drawn, chosen)
            check_present(entry.path)
            update = show_entry(self.parts, entry) if pinned is None else self._lay_beside(pinned, entry)
        del update[self.parts.outcome.grid]  # it stays, for the next choice
        return update

    def on_beside(self, shown: Entry | None, pinned: Entry | None) -> list[Any]:
        """Pin the picture that is shown, or let it go."""
        if pinned is not None or shown is None:
            return [None, beside(False)]
        return [shown, beside(True)]

    def on_before(self, wanted: bool, shown: Entry | None) -> list[Any]:
        """Show what the picture started from beside it, or the picture alone."""
        if shown is None or shown.start is None:
            return [gr.skip(), gr.skip()]
        with failures_as_sentences():
            check_present(shown.path, shown.start.fitted)
        both = (shown.start.fitted, shown.path)
        return [gr.update(value=shown.path, visible=not wanted), gr.update(value=both, visible=wanted)]

    def on_enlarge(self, factor: int, shown: Entry | None) -> list[Any]:
        """Show, and give for downloading, the picture at another size."""
        try:
            if shown is None:
                raise ValueError("no picture is shown")
            check_present(shown.path)
            path = shown.path if factor == 1 else write_enlarged(shown, self.enlarger, factor, self.max_pixels)
        except Exception as error:
            gr.Warning(sentence(error))
            return [1, gr.skip(), gr.skip()]
        return [gr.skip(), gr.update(value=path), gr.update(value=path)]

    def on_pack(self, history: list[Entry]) -> Any:
        """Make the archive of all pictures."""
        with failures_as_sentences():
            return gr.update(value=write_archive(history))

    def on_return(self, kept: Any) -> dict[Any, Any]:
        """Show the pictures again that the browser kept; those that are gone are left out."""
        history: dict[str, Entry] = {}
        for one in kept[:MAX_HISTORY] if isinstance(kept, list) else []:
            with contextlib.suppress(ValueError):
                entry = restored(one, self.max_pixels)
                history.setdefault(entry.path, entry)
        return gallery_of(self.parts, list(history.values()))

    def _filled(self, entry: Entry) -> dict[Any, Any]:
        """The page's update with the settings of a picture, if what it was drawn from is at hand."""
        start = entry.start
        pictures = (None, None) if start is None else (start.image, start.mask)
        check_present(entry.path, *(str(one.file) for one in pictures if one is not None))
        if start is None and entry.metadata["options"].get("image") is not None:
            gr.Warning(NO_START)
            return {}
        try:
            return self.fill(entry.metadata, *pictures)
        except ValueError as error:  # e.g. a model that is no longer offered
            gr.Warning(f"Its settings were not loaded: {sentence(error)}")
            return {}

    def _lay_beside(self, left: Entry, right: Entry) -> dict[Any, Any]:
        outcome = self.parts.outcome
        told = figures.side_by_side(left, right)
        return hidden(outcome) | {
            self.parts.pinned: None,
            self.parts.shown: right,
            outcome.beside: beside(False),
            outcome.stage: gr.update(visible=False),
            outcome.slider: gr.update(value=(left.path, right.path), visible=True),
            outcome.report: told,
        }


def _chosen(entries: list[Entry], chosen: gr.SelectData) -> Entry:
    if not isinstance(chosen.index, int) or not 0 <= chosen.index < len(entries):
        raise ValueError("that picture is no longer on the server")
    return entries[chosen.index]
