"""The components of the page."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import gradio as gr

from cache_functions import schedule_names
from cache_functions.config import QUALITIES, TARGETS
from cache_functions.named import CACHES
from hi_diffusers.demo import figures
from hi_diffusers.demo.starts import painter
from hi_diffusers.families.table import PRESETS
from hi_diffusers.pictures.inputs import FITS
from hi_diffusers.preset import ModelPreset, sizes_of
from hi_diffusers.request.options import STRENGTH
from hi_diffusers.service.offered import OfferedModel
from hi_diffusers.service.requests import OF_CACHE, OF_START, Limits
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
    *OF_START,
    "cache",
    *OF_CACHE,
)
FREE_SIZE = "free"
SMALL_AREA = 256 * 256  # smaller pictures are enlarged without smoothing


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
    """The components that ask for a picture. All of these dataclasses hold gradio's components."""

    prompt: Any
    tokens: Any
    negative_prompt: Any
    draw: Any
    compare: Any
    stop: Any
    start: Start
    examples: Any


@dataclass(frozen=True)
class Outcome:
    """The components that show the result.

    Attributes:
        slider: lays two pictures over each other.
        before: whether it shows the picture that the drawing started from.
        use: takes the picture that is shown as the one to start from.
        mask: downloads the mask that was painted.
    """

    stage: Any
    picture: Any
    slider: Any
    before: Any
    report: Any
    command: Any
    download: Any
    use: Any
    mask: Any
    gallery: Any


@dataclass(frozen=True)
class Settings:
    """The components of the settings.

    Attributes:
        fields: the other FIELDS, by name.
        expected: says what the cache will do.
    """

    fields: Mapping[str, Any]
    expected: Any
    random_seed: Any
    same_seed: Any
    upload: Any


@dataclass(frozen=True)
class Parts:
    """The whole page.

    Attributes:
        ticket: ticket of the running drawing; "" is none.
        last_seed: seed of the last picture.
        shown: the picture that is shown, an `Entry`.
        begun: the picture to start from when Draw or Compare was pressed: an `InputPicture`, None, or LOST.
        history: the visit's pictures.
    """

    ask: Ask
    outcome: Outcome
    settings: Settings
    ticket: Any
    last_seed: Any
    shown: Any
    begun: Any
    history: Any

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


def lay_out(models: Mapping[str, OfferedModel], chosen: str, limits: Limits, kept_seconds: int) -> Parts:
    """Make all components, inside gradio's Blocks.

    Args:
        models: the offered models, by name.
        chosen: the model that is selected at first.
        limits: limits of one request.
        kept_seconds: how long a visit's pictures stay on the server.
    """
    preset = models[chosen].preset
    gr.HTML(f"<div class='hd-head'><h1>{TITLE}</h1><p>Most steps are forecast from a few computed ones.</p></div>")
    with gr.Row(equal_height=False, elem_id="layout"):
        with gr.Column(min_width=300, elem_id="ask"):
            asked = _ask(preset, limits)
        with gr.Column(min_width=300, elem_id="result"):
            outcome = _outcome(preset)
        with gr.Column(min_width=300, elem_id="more"):
            ask = Ask(**asked, start=_start(), examples=_examples(preset))
        with gr.Column(min_width=300, elem_id="settings"):
            settings = _settings(models, preset, limits)
    return Parts(
        ask=ask,
        outcome=outcome,
        settings=settings,
        ticket=gr.State(""),
        last_seed=gr.State(""),
        shown=gr.State(None, time_to_live=kept_seconds),
        begun=gr.State(None),
        history=gr.State([], time_to_live=kept_seconds),
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


def _examples(preset: ModelPreset) -> Any:
    return gr.Dataset(
        components=[gr.Textbox(visible=False)],
        samples=examples_of(preset),
        label="Examples",
        type="values",
        elem_id="examples",
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


def _outcome(preset: ModelPreset) -> Outcome:
    shown = {"show_label": False, "interactive": False, "format": "png", "elem_classes": classes_of(preset)}
    pictures = shown | {"type": "filepath", "buttons": ["fullscreen"]}
    return Outcome(
        stage=gr.HTML(visible=False, padding=False, elem_id="stage"),
        picture=gr.Image(elem_id="picture", **pictures),
        slider=gr.ImageSlider(visible=False, elem_id="slider", **pictures),
        before=gr.Checkbox(label="Before and after", visible=False, container=False, elem_id="before"),
        report=gr.HTML(padding=False, elem_id="report"),
        command=gr.Textbox(
            label="The same from the command line",
            interactive=False,
            visible=False,
            buttons=["copy"],
            elem_id="command",
        ),
        download=gr.DownloadButton("Download PNG with its settings", visible=False, elem_id="download"),
        use=gr.Button("Use as input", size="sm", visible=False, elem_id="use"),
        mask=gr.DownloadButton("Download the mask", size="sm", visible=False, elem_id="mask"),
        gallery=gr.Gallery(
            label="This visit: choose one to load its settings",
            visible=False,
            allow_preview=False,
            buttons=[],
            elem_id="history",
            **(shown | {"show_label": True}),
        ),
    )


def _settings(models: Mapping[str, OfferedModel], preset: ModelPreset, limits: Limits) -> Settings:
    fields: dict[str, Any] = {}
    _add_model_fields(fields, models, preset, limits)
    random_seed, same_seed = _add_sampling_fields(fields, preset, limits)
    expected = _add_cache_fields(fields)
    upload = gr.UploadButton(
        "Load settings from a picture",
        file_types=[".png", ".jpg", ".jpeg", ".webp"],
        type="binary",
        size="sm",
        elem_id="upload",
    )
    return Settings(fields=fields, expected=expected, random_seed=random_seed, same_seed=same_seed, upload=upload)


def _add_model_fields(
    fields: dict[str, Any], models: Mapping[str, OfferedModel], preset: ModelPreset, limits: Limits
) -> None:
    present = [name for name, model in models.items() if not model.missing]
    absent = [model for model in models.values() if model.missing]
    fields["model"] = gr.Radio(present, value=preset.name, label="Model", elem_id="model")
    if absent:
        with gr.Accordion(f"Not on this server: {', '.join(one.preset.name for one in absent)}", open=False):
            gr.HTML(figures.absent_models(absent), padding=False)
    with gr.Row():
        sizes = sizes_for(preset)
        fields["size"] = gr.Dropdown(sizes, value=sizes[0][1], label="Size", scale=2, min_width=140, elem_id="size")
        fields["width"] = gr.Number(label="Width", precision=0, minimum=1, visible=False, min_width=80)
        fields["height"] = gr.Number(label="Height", precision=0, minimum=1, visible=False, min_width=80)
        most = limits.num_images
        fields["num_images"] = gr.Slider(
            1, most, value=1, step=1, label="Pictures", min_width=180, elem_id="num_images"
        )


def _add_sampling_fields(fields: dict[str, Any], preset: ModelPreset, limits: Limits) -> tuple[Any, Any]:
    with gr.Row(elem_id="seeds"):
        fields["seed"] = gr.Textbox(
            label="Seed", placeholder="random", max_length=19, scale=4, min_width=120, elem_id="seed"
        )
        random_seed = gr.Button("Random", size="sm", scale=1, min_width=70, elem_id="random")
        same_seed = gr.Button("Last", size="sm", scale=1, min_width=70, elem_id="last")
    with gr.Row():
        most = limits.num_steps
        fields["num_steps"] = gr.Slider(
            1, most, value=min(preset.num_steps, most), step=1, label="Steps", min_width=140, elem_id="num_steps"
        )
        fields["guidance"] = gr.Slider(
            0, 20, value=preset.guidance, step=0.1, label="Guidance", min_width=140, elem_id="guidance"
        )
    return random_seed, same_seed


def _add_cache_fields(fields: dict[str, Any]) -> Any:
    names = {"off": "Off", "taylorseer": "TaylorSeer", "hicache": "HiCache", "best": "Best"}
    grades = [("Default", ""), *((name.capitalize(), name) for name in QUALITIES)]
    fields["quality"] = gr.Radio(grades, value="", label="Quality", elem_id="quality")
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


def sizes_for(preset: ModelPreset) -> list[tuple[str, str]]:
    """Labels and values of the size field."""
    sizes = [f"{width}x{height}" for width, height in sizes_of(preset)]
    return [*((size.replace("x", " × "), size) for size in sizes), ("Free size", FREE_SIZE)]


def examples_of(preset: ModelPreset) -> list[list[str]]:
    """Prompts that the model draws well, as gradio's samples."""
    return [[one] for one in preset.examples]


def is_example(prompt: str) -> bool:
    """Whether the prompt is an example of any model."""
    return any(prompt in preset.examples for preset in PRESETS.values())


def classes_of(preset: ModelPreset) -> Sequence[str]:
    """CSS classes of a model's pictures."""
    return ["hd-picture", "hd-pixels"] if preset.area < SMALL_AREA else ["hd-picture"]
