"""The page of a pipeline of diffusers: a form for the options that it takes, Draw and Stop, progress, the result."""

import html
import json
import queue
import secrets
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import gradio as gr
from gradio.processing_utils import save_bytes_to_cache
from gradio.utils import get_upload_folder
from PIL import Image

from cache_functions import StepRecord
from hi_diffusers.console import say
from hi_diffusers.demo.logs import sentence
from hi_diffusers.demo.serving import DRAWING
from hi_diffusers.demo.stock_requests import NUMBERS, OF_THE_PAGE, PICTURES, TEXTS, StockOffer
from hi_diffusers.denoising.steps import Interrupted
from hi_diffusers.stock.drawing import StockModel, StockResult
from hi_diffusers.stock.files import encode_result, frames_sha256
from hi_diffusers.stock.formats import default_suffix
from hi_diffusers.stock.request import StockRequest

LABELS = {
    "prompt": "Prompt",
    "negative_prompt": "Negative prompt",
    "image": "Picture to start from",
    "mask_image": "Mask: white is drawn anew",
    "num_steps": "Steps",
    "full_steps": "Computed steps (0: the default)",
    "guidance": "Guidance",
    "true_cfg": "Classifier-free guidance",
    "guidance_2": "Guidance of the second expert",
    "num_frames": "Frames",
    "fps": "Frames per second",
    "seed": "Seed (empty: random)",
    "cache": "Cache",
}
MAX_TICKETS = 1000
QUIET: dict[str, Any] = {"queue": False, "show_progress": "hidden", "api_visibility": "private"}


class StockPage:
    """The page that a visitor sees.

    Args:
        offer: the pipeline, and what a request may take.
        judges: judges a finished picture; a picture that it flags is withheld. None shows all.
    """

    def __init__(self, offer: StockOffer, judges: Callable[[Image.Image], bool] | None = None):
        self.offer, self.judges = offer, judges
        self.worker = ThreadPoolExecutor(1, thread_name_prefix="drawing")
        self.model: StockModel | None = None
        self.tickets: OrderedDict[str, threading.Event] = OrderedDict()
        self.lock = threading.Lock()
        pipeline = offer.source.pipeline_class
        with gr.Blocks(title=pipeline.class_name, analytics_enabled=False) as self.blocks:
            text = "Most steps are forecast from a few computed ones."
            gr.HTML(f"<div class='hd-head'><h1>{html.escape(pipeline.class_name)}</h1><p>{text}</p></div>")
            with gr.Row(equal_height=False, elem_id="layout"):
                with gr.Column(min_width=300, elem_id="ask"):
                    self.fields = {name: self._field(name) for name in offer.fields()}
                    with gr.Row():
                        self.go = gr.Button("Draw", variant="primary", scale=3, elem_id="draw")
                        self.stop = gr.Button("Stop", variant="stop", interactive=False, elem_id="stop")
                with gr.Column(min_width=300, elem_id="result"):
                    self.stage = gr.HTML(visible=False, padding=False, elem_id="stage")
                    shown = {"show_label": False, "interactive": False, "type": "filepath"}
                    self.picture = gr.Image(elem_id="picture", buttons=["fullscreen"], **shown)
                    self.report = gr.HTML(padding=False, elem_id="report")
                    self.download = gr.DownloadButton("Download", visible=False, elem_id="download")
                    self.settings = gr.Code(label="Settings", language="json", visible=False, elem_id="settings")
            self.ticket = gr.State("")
            self._connect()

    def warm_up(self) -> None:
        """Load the pipeline before anybody asks for a picture."""

        def load() -> None:
            try:
                self._loaded()
            except Exception as error:  # the next request meets the error again
                say(f"{self.offer.source.where} cannot be loaded: {error}")

        self.worker.submit(load)

    def close(self) -> None:
        """Stop the drawing, and end the thread."""
        with self.lock:
            for stopped in self.tickets.values():
                stopped.set()
        self.worker.shutdown(cancel_futures=True)

    def draw(self, ticket: str, *values: Any) -> Iterator[dict[Any, Any]]:
        """Draw what the form says; yields updates of the page."""
        events: queue.SimpleQueue[Any] = queue.SimpleQueue()
        stopped = self.tickets.get(ticket, threading.Event())
        try:
            request = self.offer.check(dict(zip(self.fields, values, strict=True)))
            self.worker.submit(self._work, request, stopped, events)
            yield {self.stage: _shown("waiting"), self.report: "", self.download: gr.update(visible=False)}
            while True:
                event = events.get()
                if isinstance(event, BaseException):
                    raise event
                if isinstance(event, StockResult):
                    yield self._finished(request, event)
                    return
                yield {self.stage: _shown(event)}
        except Interrupted:
            yield {self.stage: _shown("stopped")}
        except Exception as error:
            yield {self.stage: _shown(sentence(error), "hd-warn")}
        finally:
            stopped.set()  # the visitor left: the drawing ends within a step

    def begin(self, ticket: str) -> list[Any]:
        """Open the ticket by which Stop finds the drawing."""
        if ticket in self.tickets and not self.tickets[ticket].is_set():
            raise gr.Error("your previous drawing is still running", print_exception=False)
        fresh = secrets.token_hex(8)
        with self.lock:
            self.tickets[fresh] = threading.Event()
            while len(self.tickets) > MAX_TICKETS:
                self.tickets.popitem(last=False)
        return [fresh, gr.update(interactive=False), gr.update(interactive=True)]

    def end(self, ticket: str) -> list[Any]:
        """Close the ticket and enable the buttons again, however the drawing ended."""
        with self.lock:
            self.tickets.pop(ticket, None)
        return ["", gr.update(interactive=True), gr.update(interactive=False)]

    def halt(self, ticket: str) -> None:
        """Stop a ticket's drawing within a step."""
        with self.lock:
            if ticket in self.tickets:
                self.tickets[ticket].set()

    def _connect(self) -> None:
        triggers = [self.go.click]
        if not self.offer.source.pipeline_class.draws_classes:
            triggers.append(self.fields["prompt"].submit)
        begun = gr.on(triggers, self.begin, self.ticket, [self.ticket, self.go, self.stop], **QUIET)
        worked = begun.success(
            self.draw,
            [self.ticket, *self.fields.values()],
            [self.stage, self.picture, self.report, self.download, self.settings],
            concurrency_limit=1,
            concurrency_id=DRAWING,
            show_progress="hidden",
            api_visibility="private",
        )
        for ended in (worked.success, worked.failure):
            ended(self.end, self.ticket, [self.ticket, self.go, self.stop], **QUIET)
        self.stop.click(self.halt, self.ticket, None, **QUIET)

    def _field(self, name: str) -> Any:
        pipeline = self.offer.source.pipeline_class
        default = self.offer.default(name) if name not in OF_THE_PAGE else None
        where = {"label": LABELS.get(name, name.capitalize()), "elem_id": name}
        if name == "prompt" and pipeline.draws_classes and pipeline.labels:
            names = [text.split(",")[0].strip() for text in pipeline.labels.values()]
            return gr.Dropdown(names, value=names[0], **where)
        if name in TEXTS:
            return gr.Textbox(default or "", lines=1, max_lines=6, max_length=self.offer.limits.prompt_chars, **where)
        if name in PICTURES:
            return gr.Image(type="filepath", image_mode=None, sources=["upload"], **where)  # the file as it is
        if name == "cache":
            return gr.Radio(["on", "off"], value="on", **where)
        if name == "seed":
            return gr.Textbox("", max_length=20, **where)
        value = 0 if name == "full_steps" else default
        return gr.Number(value, precision=None if name in NUMBERS else 0, **where)

    def _loaded(self) -> StockModel:
        if self.model is None:
            say(f"loading {self.offer.source.where}")
            self.model = StockModel.open(self.offer.source)
            for notice in self.model.notices:
                say(notice)
            say(f"{self.offer.source.where} is loaded")
        return self.model

    def _work(self, request: StockRequest, stopped: threading.Event, events: "queue.SimpleQueue[Any]") -> None:
        """Run in the drawing thread: put what happens into `events`, at last the result or the error."""

        def on_step(record: StepRecord, drawn: int) -> bool:
            events.put(f"step {record.index + 1} of {drawn} ({record.kind})")
            return not stopped.is_set()

        try:
            if stopped.is_set():
                raise Interrupted("stopped before it began")
            result = self._loaded().draw([request], on_step)[0]
            if self.judges is not None and any(self.judges(frame) for frame in result.frames):
                raise ValueError("The picture is withheld: the server's filter flagged it.")
            events.put(result)
        except BaseException as error:
            events.put(error)

    def _finished(self, request: StockRequest, result: StockResult) -> dict[Any, Any]:
        """The page's update for a result: a video is shown as an animation, and downloaded as it is written best."""
        seed = result.metadata["options"]["seed"]
        suffix = default_suffix(result.is_video)
        shown = _saved(result, ".webp" if result.is_video else suffix)
        file = _saved(result, suffix) if result.is_video else shown
        kinds = [record.kind for record in result.trace]
        settings = result.metadata | ({"frames_sha256": frames_sha256(result)} if result.is_video else {})
        notices = "".join(f"<br>{html.escape(one)}" for one in dict.fromkeys((*request.notices, *result.notices)))
        report = (
            f"<p class='hd-note'><b>{kinds.count('full')}</b> full, <b>{kinds.count('forecast')}</b> forecast ·"
            f" {result.denoise_seconds:.2f} s of steps, {result.seconds:.2f} s in all · seed {seed}{notices}</p>"
        )
        return {
            self.stage: gr.update(visible=False),
            self.picture: gr.update(value=shown),
            self.report: report,
            self.download: gr.update(value=file, visible=True),
            self.settings: gr.update(value=json.dumps(settings, indent=1, ensure_ascii=False), visible=True),
        }


def _saved(result: StockResult, suffix: str) -> str:
    """Write a result to a file that the server may serve."""
    name = f"drawing-{result.metadata['options']['seed']}{suffix}"
    path: str = save_bytes_to_cache(encode_result(result, suffix), name, get_upload_folder())
    return path


def _shown(text: str, kind: str = "hd-status") -> Any:
    return gr.update(value=f"<p class='hd-note {kind}'>{html.escape(text)}</p>", visible=True)
