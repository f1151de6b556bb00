"""The components of the page."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import gradio as gr

from hi_diffusers.demo import kept
from hi_diffusers.demo.controls import Settings, lay_out_settings
from hi_diffusers.demo.starts import painter
from hi_diffusers.families.table import PRESETS
from hi_diffusers.pictures.enlarging import FACTORS
from hi_diffusers.pictures.inputs import FITS
from hi_diffusers.preset import ModelPreset, sizes_of
from hi_diffusers.request.options import STRENGTH
from hi_diffusers.service.offered import OfferedModel
from hi_diffusers.service.requests import OF_CACHE, OF_START, Limits

TITLE = "HiDream-I1 with forecast steps"
OF_LORA = ("lora", "lora_scale")
FIELDS = (
    "prompt",
    "negative_prompt",
    "model",
    *OF_LORA,
    "size",
    "width",
    "height",
    "seed",
    "num_steps",
    "guidance",
    "num_images",
    *OF_START,
    "cache",
    *OF_CACHE,
)
SMALL_AREA = 256 * 256


@dataclass(frozen=True)
class Start:
    """The components of a picture to start from.

    Attributes:
        accordion: holds them all.
        file: where the picture is dropped.
        image: the checked picture, an `InputPicture`.
        painting: group of what is only shown with a picture.
        paint: the painter of the mask.
        strength, fit: as in `SamplingOptions`.
    """

    accordion: Any
    file: Any
    image: Any
    painting: Any
    paint: Any
    strength: Any
    fit: Any


@dataclass(frozen=True)
class Ask:
    """The components that ask for a picture; `earlier` are prompts that were drawn before.

    All of these dataclasses hold gradio's components.
    """

    prompt: Any
    tokens: Any
    negative_prompt: Any
    draw: Any
    compare: Any
    stop: Any
    start: Start
    earlier: Any
    examples: Any


@dataclass(frozen=True)
class Outcome:
    """The components that show the result.

    Attributes:
        grid: the pictures of one drawing, if it has several.
        slider: lays two pictures over each other.
        before: whether it shows the picture that the drawing started from.
        pixels: whether pictures are enlarged without smoothing.
        enlarge: how many times larger the picture is made.
        use: takes the picture that is shown as the one to start from.
        mask: downloads the mask that was painted.
        gallery: the visit's pictures.
        beside: lays the next picture that is chosen beside the one that is shown.
        pack, archive: make an archive of the visit's pictures, and download it.
    """

    stage: Any
    picture: Any
    grid: Any
    slider: Any
    before: Any
    pixels: Any
    report: Any
    command: Any
    enlarge: Any
    download: Any
    use: Any
    mask: Any
    gallery: Any
    beside: Any
    pack: Any
    archive: Any


@dataclass(frozen=True)
class Parts:
    """The whole page.

    Attributes:
        ticket: ticket of the running drawing; "" is none.
        last_seed: seed of the last picture.
        shown: the picture that is shown, an `Entry`.
        begun: the picture to start from when Draw or Compare was pressed: an `InputPicture`, None, or LOST.
        drawn: the pictures of the grid.
        pinned: the picture that the next one is laid beside; None: the next one is shown alone.
        history: the visit's pictures.
        browser: what the visitor's browser keeps.
    """

    ask: Ask
    outcome: Outcome
    settings: Settings
    ticket: Any
    last_seed: Any
    shown: Any
    begun: Any
    drawn: Any
    pinned: Any
    history: Any
    browser: kept.Kept

    @property
    def fields(self) -> dict[str, Any]:
        """The fields by name, in FIELDS' order."""
        asked = {"prompt": self.ask.prompt, "negative_prompt": self.ask.negative_prompt}
        start = {name: getattr(self.ask.start, name) for name in OF_START}
        found = asked | start | dict(self.settings.fields)
        return {name: found[name] for name in FIELDS}

    @property
    def inputs(self) -> list[Any]:
        """All fields, in FIELDS' order."""
        return list(self.fields.values())


def lay_out(
    models: Mapping[str, OfferedModel],
    chosen: str,
    limits: Limits,
    kept_seconds: int,
    loras: Sequence[str] = (),
    allows_download: bool = False,
    enlarged_by: str = "Lanczos",
) -> Parts:
    """Make all components, inside gradio's Blocks.

    Args:
        models: the offered models, by name.
        chosen: the model that is selected at first.
        limits: limits of one request.
        kept_seconds: how long a visit's pictures stay on the server.
        loras: names of the LoRAs that can be chosen.
        allows_download: whether models can be downloaded to the server.
        enlarged_by: what enlarges pictures.
    """
    preset = models[chosen].preset
    gr.HTML(f"<div class='hd-head'><h1>{TITLE}</h1><p>Most steps are forecast from a few computed ones.</p></div>")
    with gr.Row(equal_height=False, elem_id="layout"):
        with gr.Column(min_width=300, elem_id="ask"):
            asked = _ask(preset, limits)
        with gr.Column(min_width=300, elem_id="result", elem_classes=["hd-pixels"] if is_small(preset) else []):
            outcome = _outcome(preset, enlarged_by)
        with gr.Column(min_width=300, elem_id="more"):
            earlier = _samples([], "Earlier prompts", "earlier", visible=False)
            ask = Ask(
                **asked, earlier=earlier, start=_start(), examples=_samples(examples_of(preset), "Examples", "examples")
            )
        with gr.Column(min_width=300, elem_id="settings"):
            settings = lay_out_settings(models, preset, limits, loras, allows_download)
    return Parts(
        ask=ask,
        outcome=outcome,
        settings=settings,
        ticket=gr.State(""),
        last_seed=gr.State(""),
        shown=gr.State(None, time_to_live=kept_seconds),
        begun=gr.State(None),
        drawn=gr.State([], time_to_live=kept_seconds),
        pinned=gr.State(None, time_to_live=kept_seconds),
        history=gr.State([], time_to_live=kept_seconds),
        browser=kept.lay_out(),
    )


def _ask(preset: ModelPreset, limits: Limits) -> dict[str, Any]:
    """What stands above the picture on a narrow screen."""
    text = {"lines": 1, "max_length": limits.prompt_chars}
    prompt = gr.Textbox(preset.example, label="Prompt", max_lines=6, elem_id="prompt", **text)
    tokens = gr.HTML(padding=False, elem_id="tokens")
    guided = preset.guidance > 1
    negative = gr.Textbox(label="Negative prompt", max_lines=4, visible=guided, elem_id="negative_prompt", **text)
    with gr.Row():
        draw = gr.Button("Draw", variant="primary", scale=3, min_width=80, elem_id="draw")
        compare = gr.Button("Compare", scale=2, min_width=80, elem_id="compare")
        stop = gr.Button("Stop", variant="stop", scale=1, min_width=60, interactive=False, elem_id="stop")
    return {
        "prompt": prompt,
        "tokens": tokens,
        "negative_prompt": negative,
        "draw": draw,
        "compare": compare,
        "stop": stop,
    }


def _samples(samples: list[list[str]], label: str, name: str, visible: bool = True) -> Any:
    return gr.Dataset(
        components=[gr.Textbox(visible=False)],
        samples=samples,
        label=label,
        type="values",
        visible=visible,
        elem_id=name,
    )


def _start() -> Start:
    with gr.Accordion("Start from a picture", open=False, elem_id="start") as accordion:
        file = gr.File(
            label="A picture of yours",
            file_types=[f".{name}" for name in ("png", "jpg", "jpeg", "webp")],
            type="filepath",
            height=110,
            elem_id="start_file",
        )
        with gr.Group(visible=False, elem_id="painting") as painting:
            paint = painter(label="Paint over what is to be drawn anew", height=380, elem_id="paint")
            note = "Without paint the whole picture is drawn anew, from as far as the strength says."
            gr.HTML(f"<p class='hd-note'>{note}</p>", padding=True)
            strength = gr.Slider(
                0.01,
                1,
                value=STRENGTH,
                step=0.01,
                label="Strength",
                info="Share of the steps that is drawn; at 1 nothing is left of what is drawn anew",
                elem_id="strength",
            )
            names = {"cover": "Cut off what is outside", "pad": "Add black bars"}
            choices = [(names[name], name) for name in FITS]
            fit = gr.Radio(choices, value=FITS[0], label="Where the shape differs", elem_id="fit")
    return Start(accordion, file, gr.State(None), painting, paint, strength, fit)


def _outcome(preset: ModelPreset, enlarged_by: str) -> Outcome:
    shown = {"interactive": False, "format": "png"}
    picture = shown | {"show_label": False, "type": "filepath", "buttons": ["fullscreen"]}
    gallery = shown | {"visible": False, "buttons": [], "object_fit": "contain", "allow_preview": False}
    return Outcome(
        stage=gr.HTML(visible=False, padding=False, elem_id="stage"),
        picture=gr.Image(label="Picture", elem_id="picture", **picture),
        grid=gr.Gallery(label="Pictures: choose one to see it larger", columns=2, elem_id="grid", **gallery),
        slider=gr.ImageSlider(label="Two pictures", visible=False, elem_id="slider", **picture),
        before=gr.Checkbox(label="Before and after", visible=False, container=False, elem_id="before"),
        pixels=gr.Checkbox(
            value=is_small(preset),
            label=said_small(preset),
            visible=is_small(preset),
            container=False,
            elem_id="pixels",
        ),
        report=gr.HTML(padding=False, elem_id="report"),
        command=gr.Textbox(
            label="The same from the command line",
            interactive=False,
            visible=False,
            buttons=["copy"],
            elem_id="command",
        ),
        enlarge=gr.Radio(
            [("as drawn", 1), *((f"{factor} times", factor) for factor in FACTORS)],
            value=1,
            label="Size of the file",
            info=f"Enlarged by {enlarged_by}",
            visible=False,
            elem_id="enlarge",
        ),
        download=gr.DownloadButton("Download PNG with its settings", visible=False, elem_id="download"),
        use=gr.Button("Use as input", size="sm", visible=False, elem_id="use"),
        mask=gr.DownloadButton("Download the mask", size="sm", visible=False, elem_id="mask"),
        gallery=gr.Gallery(
            label="This visit: choose one to load its settings",
            elem_id="history",
            **gallery,
        ),
        beside=gr.Button("Compare with another one", size="sm", visible=False, elem_id="beside"),
        pack=gr.Button("Download all as a zip", size="sm", visible=False, elem_id="pack"),
        archive=gr.DownloadButton("The archive", elem_id="archive", elem_classes=["hd-hidden"]),
    )


def examples_of(preset: ModelPreset) -> list[list[str]]:
    """Prompts that the model draws well, as gradio's samples."""
    return [[one] for one in preset.examples]


def is_example(prompt: str) -> bool:
    """Whether the prompt is an example of any model."""
    return any(prompt in preset.examples for preset in PRESETS.values())


def is_small(preset: ModelPreset) -> bool:
    """Whether a model's pictures are so small that they are shown enlarged."""
    return preset.area < SMALL_AREA


def said_small(preset: ModelPreset) -> str:
    """The label of the choice between sharp pixels and smooth ones."""
    width, height = sizes_of(preset)[0]
    return f"Sharp pixels (the picture has {width} × {height}; without, it is smoothed)"
