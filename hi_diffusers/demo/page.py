"""The page: what it is made of, and what happens when something on it is touched."""

import io
import logging
import secrets
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import gradio as gr
from gradio.processing_utils import save_bytes_to_cache
from gradio.utils import get_upload_folder

from cache_functions import schedule_names
from cache_functions.cache_init import TARGETS
from hi_diffusers.demo import figures
from hi_diffusers.demo.loader import Loader
from hi_diffusers.demo.models import OfferedModel, TokenCounter
from hi_diffusers.demo.requests import OF_CACHE, Limits, Request, check
from hi_diffusers.demo.settings import command_line, values_of
from hi_diffusers.demo.studio import Event, Finished, Progress, Studio, Waiting
from hi_diffusers.metadata import encode_picture, parse_metadata
from hi_diffusers.options import CACHES
from hi_diffusers.pipelines.steps import Interrupted
from hi_diffusers.presets import ModelPreset, sizes_of
from taylor_utils import basis_names

TITLE = "HiDream-I1 with forecast steps"
FIELDS = (
    "prompt",
    "negative_prompt",
    "model",
    "size",
    "width",
    "height",
    "seed",
    "num_steps",
    "guidance",
    "num_images",
    "cache",
    *OF_CACHE,
)
FREE_SIZE = "free"
MAX_HISTORY = 24
KEPT_SECONDS = 3600  # how long pictures lie on the server
SWEEP_SECONDS = 300
SHOWN_EVERY = 0.1  # seconds between two looks at a drawing
WITHHELD = "The picture is withheld: the server's filter flagged it."
DRAWING = "drawing"  # the queue of all that draws: one at a time
NANO_EXAMPLES = (
    "a large yellow circle on a blue background",
    "a small red star on a white background",
    "a green tree on a pink background",
    "a large blue square to the left of a small orange circle on a black background",
)
HIDREAM_EXAMPLES = (
    'A cat holding a sign that says "HiDream.ai".',
    "A lighthouse on a cliff at dusk, long exposure, film grain.",
    "An isometric drawing of a tiny bakery, warm light in the windows.",
    "A watercolour of a heron in morning fog.",
)
log = logging.getLogger("gradio_demo")


@dataclass(frozen=True)
class Parts:
    """What the page is made of, as its handlers name it.

    Attributes:
        fields: by FIELDS' names.
    """

    fields: dict[str, Any]
    examples: Any
    tokens: Any
    expected: Any
    stage: Any
    picture: Any
    slider: Any
    report: Any
    command: Any
    download: Any
    draw: Any
    stop: Any
    compare: Any
    random_seed: Any
    same_seed: Any
    gallery: Any
    upload: Any
    ticket: Any
    last_seed: Any
    history: Any

    @property
    def inputs(self) -> list[Any]:
        """All fields, in FIELDS' order."""
        return [self.fields[name] for name in FIELDS]


class Page:
    """What a visitor sees, over a studio that draws.

    Args:
        models: what is offered, by name.
        chosen: the model that is chosen at first.
        studio, loader: what draws, and what knows how much it keeps.
        limits: of one request.
    """

    def __init__(self, models: Mapping[str, OfferedModel], chosen: str, studio: Studio, loader: Loader, limits: Limits):
        self.models, self.chosen, self.studio, self.loader, self.limits = models, chosen, studio, loader, limits
        self.counter = TokenCounter()

    def build(self) -> gr.Blocks:
        """The whole page, with its API."""
        with gr.Blocks(
            title=TITLE, analytics_enabled=False, delete_cache=(SWEEP_SECONDS, KEPT_SECONDS), fill_width=False
        ) as blocks:
            self.parts = self._lay_out()
            self._connect(blocks, self.parts)
            gr.api(self.generate, api_name="generate", concurrency_limit=1, concurrency_id=DRAWING)
        return blocks

    # What it is made of

    def _lay_out(self) -> Parts:
        preset = self.models[self.chosen].preset
        fields: dict[str, Any] = {}
        gr.HTML(f"<div class='hd-head'><h1>{TITLE}</h1><p>Most steps are forecast from a few computed ones.</p></div>")
        with gr.Row(equal_height=False, elem_id="layout"):
            with gr.Column(min_width=300, elem_id="ask"):
                fields["prompt"] = gr.Textbox(
                    value=preset.example,
                    label="Prompt",
                    lines=1,
                    max_lines=6,
                    max_length=self.limits.prompt_chars,
                    elem_id="prompt",
                )
                tokens = gr.HTML(padding=False, elem_id="tokens")
                fields["negative_prompt"] = gr.Textbox(
                    label="Negative prompt",
                    lines=1,
                    max_lines=4,
                    max_length=self.limits.prompt_chars,
                    visible=preset.guidance > 1,
                    elem_id="negative_prompt",
                )
                with gr.Row():
                    draw = gr.Button("Draw", variant="primary", scale=3, min_width=80, elem_id="draw")
                    compare = gr.Button("Compare", scale=2, min_width=80, elem_id="compare")
                    stop = gr.Button("Stop", variant="stop", scale=1, min_width=60, interactive=False, elem_id="stop")
                examples = gr.Dataset(
                    components=[gr.Textbox(visible=False)],
                    samples=_examples(preset),
                    label="Examples",
                    type="tuple",
                    elem_id="examples",
                )
            with gr.Column(min_width=300, elem_id="result"):
                stage = gr.HTML(visible=False, padding=False, elem_id="stage")
                picture = gr.Image(
                    show_label=False,
                    format="png",
                    type="filepath",
                    interactive=False,
                    elem_id="picture",
                    elem_classes=_classes(preset),
                    buttons=["fullscreen"],
                )
                slider = gr.ImageSlider(
                    show_label=False,
                    format="png",
                    type="filepath",
                    interactive=False,
                    visible=False,
                    elem_id="slider",
                    elem_classes=_classes(preset),
                    buttons=["fullscreen"],
                )
                report = gr.HTML(padding=False, elem_id="report")
                command = gr.Textbox(
                    label="The same from the command line",
                    interactive=False,
                    visible=False,
                    buttons=["copy"],
                    elem_id="command",
                )
                download = gr.DownloadButton("Download PNG with its settings", visible=False, elem_id="download")
                gallery = gr.Gallery(
                    label="This visit: choose one to load its settings",
                    visible=False,
                    format="png",
                    interactive=False,
                    elem_id="history",
                    elem_classes=_classes(preset),
                    allow_preview=False,
                    buttons=[],
                )
            with gr.Column(min_width=300, elem_id="settings"):
                self._model_fields(fields, preset)
                random_seed, same_seed = self._sampling_fields(fields, preset)
                expected = self._cache_fields(fields)
                upload = gr.UploadButton(
                    "Load settings from a picture",
                    file_types=[".png", ".jpg", ".jpeg", ".webp"],
                    type="binary",
                    size="sm",
                    elem_id="upload",
                )
        return Parts(
            fields,
            examples,
            tokens,
            expected,
            stage,
            picture,
            slider,
            report,
            command,
            download,
            draw,
            stop,
            compare,
            random_seed,
            same_seed,
            gallery,
            upload,
            gr.State(""),
            gr.State(""),
            gr.State([], time_to_live=KEPT_SECONDS),
        )

    def _model_fields(self, fields: dict[str, Any], preset: ModelPreset) -> None:
        present = [name for name, model in self.models.items() if not model.missing]
        absent = [model for model in self.models.values() if model.missing]
        fields["model"] = gr.Radio(present, value=preset.name, label="Model", elem_id="model")
        if absent:
            with gr.Accordion(f"Not on this server: {', '.join(one.preset.name for one in absent)}", open=False):
                gr.HTML(figures.absent_models(absent), padding=False)
        with gr.Row():
            sizes = _sizes(preset)
            fields["size"] = gr.Dropdown(sizes, value=sizes[0][1], label="Size", scale=2, min_width=140, elem_id="size")
            fields["width"] = gr.Number(label="Width", precision=0, minimum=1, visible=False, min_width=80)
            fields["height"] = gr.Number(label="Height", precision=0, minimum=1, visible=False, min_width=80)
            most = self.limits.num_images
            fields["num_images"] = gr.Slider(
                1, most, value=1, step=1, label="Pictures", min_width=180, elem_id="num_images"
            )

    def _sampling_fields(self, fields: dict[str, Any], preset: ModelPreset) -> tuple[Any, Any]:
        with gr.Row(elem_id="seeds"):
            fields["seed"] = gr.Textbox(
                label="Seed", placeholder="random", max_length=19, scale=4, min_width=120, elem_id="seed"
            )
            random_seed = gr.Button("Random", size="sm", scale=1, min_width=70, elem_id="random")
            same_seed = gr.Button("Last", size="sm", scale=1, min_width=70, elem_id="last")
        with gr.Row():
            most = self.limits.num_steps
            fields["num_steps"] = gr.Slider(
                1, most, value=min(preset.num_steps, most), step=1, label="Steps", min_width=140, elem_id="num_steps"
            )
            fields["guidance"] = gr.Slider(
                0, 20, value=preset.guidance, step=0.1, label="Guidance", min_width=140, elem_id="guidance"
            )
        return random_seed, same_seed

    def _cache_fields(self, fields: dict[str, Any]) -> Any:
        names = {"off": "Off", "taylorseer": "TaylorSeer", "hicache": "HiCache", "best": "Best"}
        fields["cache"] = gr.Radio(
            [(names[name], name) for name in names if name in CACHES], value="best", label="Cache", elem_id="cache"
        )
        expected = gr.HTML(padding=False, elem_id="expected")
        own = ("as above", "")
        with gr.Accordion("Cache settings", open=False):
            with gr.Row():
                targets = [own, *((target, target) for target in TARGETS if target != "off")]
                fields["target"] = gr.Dropdown(targets, value="", label="Target", min_width=120, elem_id="target")
                bases = [own, *((name, name) for name in basis_names())]
                fields["basis"] = gr.Dropdown(bases, value="", label="Basis", min_width=120)
                schedules = [own, *((name, name) for name in schedule_names())]
                fields["schedule"] = gr.Dropdown(schedules, value="", label="Schedule", min_width=120)
            with gr.Row():
                fields["full_steps"] = gr.Number(
                    label="Full steps (budget)", precision=0, minimum=1, min_width=100, elem_id="full_steps"
                )
                fields["fresh_threshold"] = gr.Number(label="Or: one in", precision=0, minimum=1, min_width=100)
                fields["max_order"] = gr.Number(label="Order", precision=0, minimum=0, maximum=6, min_width=80)
        return expected

    # What happens

    def _connect(self, blocks: gr.Blocks, parts: Parts) -> None:
        quiet: dict[str, Any] = {"queue": False, "show_progress": "hidden", "api_visibility": "private"}
        latest = {"trigger_mode": "always_last"}
        fields = parts.fields
        of_model = [fields[name] for name in ("size", "num_steps", "guidance", "prompt")]
        looks = [parts.examples, parts.picture, parts.slider, parts.gallery]
        told = [parts.expected, fields["negative_prompt"], fields["width"], fields["height"]]
        fields["model"].input(self.on_model, [fields["model"], fields["prompt"]], [*of_model, *looks], **quiet)
        changes = [fields[name].change for name in FIELDS if name not in ("prompt", "negative_prompt", "seed")]
        gr.on([*changes], self.on_change, parts.inputs, told, **quiet, **latest)
        count = (self.on_prompt, [fields["prompt"], fields["model"]], parts.tokens)
        gr.on([fields["prompt"].change, fields["model"].change], *count, **quiet, **latest)
        parts.examples.click(lambda sample: sample[0], parts.examples, fields["prompt"], **quiet)
        parts.random_seed.click(lambda: "", None, fields["seed"], **quiet)
        parts.same_seed.click(lambda seed: seed, parts.last_seed, fields["seed"], **quiet)
        parts.stop.click(self.studio.stop, parts.ticket, None, **quiet)

        busy = [parts.ticket, parts.draw, parts.compare, parts.stop]
        shown = [parts.stage, parts.picture, parts.slider, parts.report, parts.command, parts.download]
        kept = [parts.last_seed, parts.history, parts.gallery]
        for begin, work in (
            ([parts.draw.click, fields["prompt"].submit], self.draw),
            ([parts.compare.click], self.compare),
        ):
            gr.on(begin, _begin, None, busy, **quiet).then(
                work,
                [parts.ticket, parts.history, *parts.inputs],
                [*shown, *kept],
                concurrency_limit=1,
                concurrency_id=DRAWING,
                show_progress="minimal",
                show_progress_on=parts.stage,
                api_visibility="private",
            ).then(_end, None, busy[1:], **quiet)

        settings = [*parts.inputs, parts.expected]
        told_of = quiet | {"queue": True}  # only then a raised error is shown
        parts.upload.upload(self.on_upload, parts.upload, settings, **told_of)
        parts.gallery.select(self.on_chosen, parts.history, settings, **told_of)
        blocks.load(self.on_change, parts.inputs, told, **quiet)
        blocks.load(*count, **quiet)

    def on_model(self, name: str, prompt: str) -> list[Any]:
        """Another model: its sizes, steps, guidance and examples."""
        with _raised():
            preset = check({"model": name, "prompt": ""}, self.limits, self.models).model.preset
        sizes = _sizes(preset)
        of_others = {one for each in (NANO_EXAMPLES, HIDREAM_EXAMPLES) for one in each}
        looks = [gr.update(elem_classes=_classes(preset)) for _ in range(3)]
        return [
            gr.update(choices=sizes, value=sizes[0][1]),
            min(preset.num_steps, self.limits.num_steps),
            preset.guidance,
            preset.example if not prompt or prompt in of_others else prompt,
            gr.update(samples=_examples(preset)),
            *looks,
        ]

    def on_change(self, *inputs: Any) -> list[Any]:
        """What the cache will do with these settings, and which fields they need."""
        values = dict(zip(FIELDS, inputs, strict=True))
        is_free = values["size"] == FREE_SIZE
        try:
            request = self._request(values)
            line = figures.expectation(request, self.loader.cache_bytes(request, request.cache))
            guided = request.resolved.guided
        except ValueError as error:
            line, guided = figures.refusal(str(error)), True
        return [line, gr.update(visible=guided), gr.update(visible=is_free), gr.update(visible=is_free)]

    def on_prompt(self, prompt: str, name: str) -> str:
        """How much of the prompt the model reads."""
        try:
            request = check({"prompt": prompt, "model": name}, self.limits, self.models)
        except ValueError as error:
            return figures.refusal(str(error))
        return figures.token_note(self.counter.count(request.model, request.resolved))

    def on_upload(self, data: bytes) -> list[Any]:
        """The settings of a picture from the visitor's disk; its pixels are never decoded."""
        with _raised():
            try:
                metadata = parse_metadata(io.BytesIO(data), "the file", max_pixels=self.limits.upload_pixels)
            except ValueError as error:
                raise ValueError(f"No settings were loaded: {error}.") from error
            return self._fill(metadata)

    def on_chosen(self, history: list[dict[str, Any]], chosen: gr.SelectData) -> list[Any]:
        """The settings of a picture of this visit."""
        with _raised():
            if not isinstance(chosen.index, int) or not 0 <= chosen.index < len(history):
                raise ValueError("that picture is not there any more")
            return self._fill(history[chosen.index]["metadata"])

    def _fill(self, metadata: dict[str, Any]) -> list[Any]:
        values, note = values_of(metadata, self.limits, self.models)
        request = check(values, self.limits, self.models)
        preset, options = request.model.preset, request.resolved
        sizes, size = _sizes(preset), f"{options.width}x{options.height}"
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
        for name in ("target", "basis", "schedule"):
            filled[name] = filled[name] or ""
        line = figures.expectation(request, self.loader.cache_bytes(request, request.cache))
        return [*(filled[name] for name in FIELDS), line]

    def draw(self, ticket: str, history: list[dict[str, Any]], *inputs: Any) -> Iterator[dict[Any, Any]]:
        """Draw what the fields say, and show it as it comes."""
        yield from self._told(self._draw(ticket, history, dict(zip(FIELDS, inputs, strict=True))))

    def compare(self, ticket: str, history: list[dict[str, Any]], *inputs: Any) -> Iterator[dict[Any, Any]]:
        """Draw the first picture uncached and cached, and lay one over the other."""
        yield from self._told(self._compare(ticket, history, dict(zip(FIELDS, inputs, strict=True))))

    def _draw(self, ticket: str, history: list[dict[str, Any]], values: dict[str, Any]) -> Iterator[dict[Any, Any]]:
        request = self._request(values)
        yield _begun(self.parts)
        for event in self._shown(request, ticket):
            if isinstance(event, Finished):
                path = _write(event)
                if path is not None:
                    history = [_entry(path, event), *history][:MAX_HISTORY]
                yield self._finished(request, event, path, history)
            else:
                yield event

    def _compare(self, ticket: str, history: list[dict[str, Any]], values: dict[str, Any]) -> Iterator[dict[Any, Any]]:
        parts, request = self.parts, self._request(values).first()
        if request.cache.is_off:
            raise ValueError("the cache is off: choose one to compare with")
        yield _begun(parts)
        found = []
        for one, word in ((request.uncached(), "uncached"), (request, "cached")):
            for event in self._shown(one, ticket, word, reuse=True):
                if isinstance(event, Finished):
                    found.append(event)
                else:
                    yield event
        uncached, cached = found
        paths = [_write(one) for one in found]
        if None in paths:
            yield self._finished(request, cached, None, history)
            return
        history = [_entry(paths[1], cached), *history][:MAX_HISTORY]
        yield self._finished(request, cached, paths[1], history) | {
            parts.picture: gr.update(visible=False),
            parts.slider: gr.update(value=tuple(paths), visible=True),
            parts.report: figures.comparison(uncached, cached),
        }

    def _told(self, work: Iterator[dict[Any, Any]]) -> Iterator[dict[Any, Any]]:
        """What goes wrong in a drawing, in its place: a raised error would leave the buttons as they are."""
        try:
            yield from work
        except Interrupted:
            return  # and the page says so already
        except Exception as error:
            yield {self.parts.stage: _visible(figures.refusal(_sentence(error)))}

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
        target: str | None = None,
        basis: str | None = None,
        schedule: str | None = None,
        fresh_threshold: int | None = None,
        full_steps: int | None = None,
        max_order: int | None = None,
    ) -> Iterator[tuple[dict[str, Any] | None, dict[str, Any]]]:
        """Draw one picture: its file, and all settings that made it. What is left open is the model's own."""
        values = {name: value for name, value in locals().items() if name != "self"}
        with _raised():
            request = check(values, self.limits, self.models)
            for event in _thinned(self.studio.draw(request)):
                if isinstance(event, Progress):
                    yield None, {"step": len(event.records), "num_steps": request.resolved.num_steps}
                elif isinstance(event, Waiting):
                    yield None, {"step": 0, "num_steps": request.resolved.num_steps}
                elif event.withheld:
                    raise ValueError(WITHHELD)
                else:
                    file = gr.FileData(path=str(_write(event)), meta={"_type": "gradio.FileData"})
                    yield file.model_dump(), event.picture.metadata

    def _request(self, values: dict[str, Any]) -> Request:
        """What the fields ask for."""
        size = values.pop("size")
        if size != FREE_SIZE:
            width, _, height = str(size).partition("x")
            values |= {"width": width, "height": height}
        return check(values, self.limits, self.models)

    def _shown(
        self, request: Request, ticket: str, word: str = "drawing", reuse: bool = False
    ) -> Iterator[dict[Any, Any] | Finished]:
        """A drawing's events: finished pictures as they are, all else as what the page shows of it."""
        parts = self.parts
        number, preview, records = 0, None, ()
        try:
            for event in _thinned(self.studio.draw(request, ticket, reuse=reuse)):
                if isinstance(event, Finished):
                    preview, records = None, ()
                    yield event
                elif isinstance(event, Progress):
                    number, records, preview = event.number, event.records, event.preview or preview
                    yield {parts.stage: _visible(figures.stage(request, number, records, preview, word))}
                elif not records:
                    yield {parts.stage: _visible(figures.waiting(event.seconds))}
                else:
                    yield {}
        except Interrupted:
            yield {parts.stage: _visible(figures.stage(request, number, records, preview, "stopped"))}
            raise

    def _finished(
        self, request: Request, event: Finished, path: str | None, history: list[dict[str, Any]]
    ) -> dict[Any, Any]:
        """What the page shows of a finished picture."""
        parts = self.parts
        seed = str(event.picture.metadata["options"]["seed"])
        if path is None:
            return {parts.stage: _visible(figures.refusal(WITHHELD)), parts.last_seed: seed}
        return {
            parts.stage: gr.update(visible=False),
            parts.picture: gr.update(value=path, visible=True),
            parts.report: figures.report(event),
            parts.command: gr.update(value=command_line(request, event.number), visible=True),
            parts.download: gr.update(value=path, visible=True),
            parts.last_seed: seed,
            parts.history: history,
            parts.gallery: gr.update(value=[(one["path"], one["caption"]) for one in history], visible=True),
        }


def _begin() -> list[Any]:
    """A ticket, which Stop names the drawing by; no visitor gets to see it."""
    return [
        secrets.token_hex(8),
        gr.update(interactive=False),
        gr.update(interactive=False),
        gr.update(interactive=True),
    ]


def _end() -> list[Any]:
    return [gr.update(interactive=True), gr.update(interactive=True), gr.update(interactive=False)]


@contextmanager
def _raised() -> Iterator[None]:
    """Whatever goes wrong inside reaches the visitor as one sentence."""
    try:
        yield
    except Exception as error:
        raise gr.Error(_sentence(error), print_exception=False) from error


def _sentence(error: Exception) -> str:
    """What a visitor is told of an error; the log gets the traceback of one that is not the visitor's."""
    if isinstance(error, ValueError | Interrupted):
        return str(error)
    log.error("a drawing failed", exc_info=error)
    return f"The drawing failed ({type(error).__name__}); the server goes on, and its log says more."


def _thinned(events: Iterator[Event]) -> Iterator[Event]:
    """Steps that follow each other faster than a page is drawn are left out, but not their previews."""
    last = 0.0
    try:
        for event in events:
            now = time.monotonic()
            if not isinstance(event, Progress) or event.preview is not None or now >= last + SHOWN_EVERY:
                last = now
                yield event
    finally:
        events.close()


def _write(finished: Finished) -> str | None:
    """A picture's file where the server may hand it out; None where it is withheld."""
    if finished.withheld:
        return None
    picture = finished.picture
    data = encode_picture(picture.image, picture.metadata, "PNG")
    return save_bytes_to_cache(data, f"hidream-{picture.metadata['options']['seed']}.png", get_upload_folder())


def _entry(path: str | None, event: Finished) -> dict[str, Any]:
    """A picture in the history."""
    metadata = event.picture.metadata
    caption = f"{metadata['model']['model_type']}, seed {metadata['options']['seed']}"
    return {"path": path, "metadata": metadata, "caption": caption}


def _begun(parts: Parts) -> dict[Any, Any]:
    """The page as a drawing begins."""
    gone = (parts.picture, parts.slider, parts.command, parts.download)
    hidden = {part: gr.update(visible=False) for part in gone}
    return hidden | {parts.report: "", parts.stage: _visible(figures.waiting(0.0))}


def _visible(html: str) -> Any:
    return gr.update(value=html, visible=True)


def _sizes(preset: ModelPreset) -> list[tuple[str, str]]:
    """Labels and values of the size field."""
    sizes = [f"{width}x{height}" for width, height in sizes_of(preset)]
    return [*((size.replace("x", " × "), size) for size in sizes), ("Free size", FREE_SIZE)]


def _examples(preset: ModelPreset) -> list[list[str]]:
    return [[one] for one in (NANO_EXAMPLES if preset.is_bundled else HIDREAM_EXAMPLES)]


def _classes(preset: ModelPreset) -> list[str]:
    """The bundled model's pictures are so small that they are shown pixel by pixel."""
    return ["hd-picture", "hd-pixels"] if preset.is_bundled else ["hd-picture"]
