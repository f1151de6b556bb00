"""The components of the settings, in words that need no paper."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import gradio as gr

from cache_functions import schedule_names
from cache_functions.config import QUALITIES, TARGETS
from cache_functions.named import CACHES
from hi_diffusers.demo import figures
from hi_diffusers.families.table import PRESETS
from hi_diffusers.preset import ModelPreset, sizes_of
from hi_diffusers.service.offered import LORA_SCALES, OfferedModel
from hi_diffusers.service.requests import Limits
from taylor_utils import basis_names

FREE_SIZE = "free"
AS_ABOVE = ("as the method says", "")
METHODS = {"best": "Best", "taylorseer": "TaylorSeer", "hicache": "HiCache", "off": "Off"}
FORECAST = {
    "module": "what every layer computes",
    "residual": "what every block adds",
    "velocity": "what the whole network computes",
    "x0": "the finished picture, as seen from here",
    "solver": "the whole network, with weights fitted to this model",
}
CURVES = {
    "taylor": "through the last steps",
    "hermite": "through the last steps, damped",
    "newton": "through the last steps, at their true distances",
    "reuse": "none: the last step again",
    "learned": "fitted to this model",
}
SPREAD = {
    "interval": "evenly spread",
    "power": "denser at the start",
    "cosine": "denser at both ends",
    "mask": "where the calibration put them",
    "adaptive": "where the picture changes fast",
}
WIDE = 210  # pixels below which a field goes on a line of its own
SIDE = 22  # pixels of the longer side of a size's little picture


@dataclass(frozen=True)
class Settings:
    """The components of the settings.

    Attributes:
        fields: those of `layout.FIELDS` that are not elsewhere, by name.
        expected: says what the cache will do.
        lock: keeps the seed for the next drawings.
        upload: loads the settings of a picture.
        absent: accordion of the models that are not on the server, and in it:
        missing: their list.
        wanted, fetch, fetched: the model to download, the button, and what became of it; None without --allow_download.
    """

    fields: Mapping[str, Any]
    expected: Any
    lock: Any
    upload: Any
    absent: Any
    missing: Any
    wanted: Any
    fetch: Any
    fetched: Any


def lay_out_settings(
    models: Mapping[str, OfferedModel],
    preset: ModelPreset,
    limits: Limits,
    loras: Sequence[str],
    allows_download: bool,
) -> Settings:
    """Make the components of the settings. Arguments as in `layout.lay_out`; `preset` is the chosen model's."""
    fields: dict[str, Any] = {}
    expected = _add_quality_fields(fields)
    with gr.Row():
        most = limits.num_images
        said = "One seed after the other" if most > 1 else None
        fields["num_images"] = gr.Slider(
            1, most, value=1, step=1, label="Pictures", info=said, min_width=WIDE, elem_id="num_images"
        )
        with gr.Column(min_width=WIDE):
            lock = _add_seed_fields(fields)
    _add_size_fields(fields, preset)
    fetching = _add_model_fields(fields, models, preset, loras, allows_download)
    _add_step_fields(fields, preset, limits)
    _add_cache_fields(fields)
    upload = gr.UploadButton(
        "Load settings from a picture",
        file_types=[".png", ".jpg", ".jpeg", ".webp"],
        type="binary",
        size="sm",
        elem_id="upload",
    )
    return Settings(fields, expected, lock, upload, **fetching)


def _add_quality_fields(fields: dict[str, Any]) -> Any:
    fields["quality"] = gr.Radio(
        quality_choices({}),
        value="",
        label="Quality",
        info="How near the picture comes to one with every step computed, and how long it takes",
        elem_id="quality",
    )
    return gr.HTML(padding=False, elem_id="expected")


def _add_seed_fields(fields: dict[str, Any]) -> Any:
    fields["seed"] = gr.Textbox(label="Seed", placeholder="random", max_length=19, elem_id="seed")
    return gr.Checkbox(label="Keep the seed", container=False, elem_id="lock")


def _add_size_fields(fields: dict[str, Any], preset: ModelPreset) -> None:
    sizes = sizes_for(preset)
    gr.HTML(f"<style>{_shapes()}</style>", padding=False, elem_id="shapes")
    fields["size"] = gr.Radio(sizes, value=sizes[0][1], label="Shape", elem_id="size")
    with gr.Row():
        for name, side in zip(("width", "height"), sizes_of(preset)[0], strict=True):
            fields[name] = gr.Number(
                side, label=name.capitalize(), precision=0, visible=False, min_width=80, elem_id=name
            )


def _add_model_fields(
    fields: dict[str, Any],
    models: Mapping[str, OfferedModel],
    preset: ModelPreset,
    loras: Sequence[str],
    allows_download: bool,
) -> dict[str, Any]:
    fields["model"] = gr.Radio(present(models), value=preset.name, label="Model", elem_id="model")
    with gr.Row(visible=bool(loras)):
        named = [("none", ""), *((name, name) for name in loras)]
        fields["lora"] = gr.Dropdown(
            named, value="", label="LoRA", info="Another one loads the model again", min_width=WIDE, elem_id="lora"
        )
        least, most = LORA_SCALES
        fields["lora_scale"] = gr.Slider(
            least, most, value=1, step=0.05, label="Scale of the LoRA", min_width=WIDE, elem_id="lora_scale"
        )
    missing = absent(models)
    with gr.Accordion(said_absent(models), open=False, visible=bool(missing), elem_id="absent") as accordion:
        table = gr.HTML(figures.absent_models(missing), padding=False)
        wanted = fetch = fetched = None
        if allows_download:
            names = [one.preset.name for one in missing]
            wanted = gr.Dropdown(names, label="Download its files to this machine", elem_id="wanted")
            fetch = gr.Button("Download", size="sm", elem_id="fetch")
            fetched = gr.HTML(padding=False, elem_id="fetched")
    return {"absent": accordion, "missing": table, "wanted": wanted, "fetch": fetch, "fetched": fetched}


def _add_step_fields(fields: dict[str, Any], preset: ModelPreset, limits: Limits) -> None:
    with gr.Row():
        most = limits.num_steps
        fields["num_steps"] = gr.Slider(
            1, most, value=min(preset.num_steps, most), step=1, label="Steps", min_width=WIDE, elem_id="num_steps"
        )
        fields["guidance"] = gr.Slider(
            0,
            20,
            value=preset.guidance,
            step=0.1,
            label="Guidance",
            info="How strictly the prompt is followed; up to 1 it is off, which halves the work",
            min_width=WIDE,
            elem_id="guidance",
        )


def _add_cache_fields(fields: dict[str, Any]) -> None:
    def dropdown(name: str, label: str, words: Mapping[str, str], known: Sequence[str]) -> Any:
        choices = [(f"{words[one]} ({one})" if one in words else one, one) for one in known]
        return gr.Dropdown([AS_ABOVE, *choices], value="", label=label, min_width=WIDE, elem_id=name)

    def number(name: str, label: str, info: str) -> Any:  # gradio shows a number that is not given as 0
        how = {"placeholder": "as the method says", "max_length": 6}
        return gr.Textbox(label=label, info=info, min_width=WIDE, elem_id=name, **how)

    with gr.Accordion("How steps are saved", open=False, elem_id="saving"):
        fields["cache"] = gr.Radio(
            [(METHODS.get(name, name), name) for name in sorted(CACHES, key=[*METHODS, *CACHES].index)],
            value="best",
            label="Method",
            info="Best: what measured best for this model. TaylorSeer, HiCache: as published. Off: every step is"
            " computed.",
            elem_id="cache",
        )
        with gr.Row():
            fields["full_steps"] = number("full_steps", "Steps to compute", "More come nearer, and take longer")
            fields["fresh_threshold"] = number("fresh_threshold", "Or one in", "Compute every so many-th step")
        targets = [one for one in TARGETS if one != "off"]
        fields["target"] = dropdown("target", "What is forecast", FORECAST, targets)
        fields["schedule"] = dropdown("schedule", "Which steps are computed", SPREAD, schedule_names())
        fields["basis"] = dropdown("basis", "Along which curve", CURVES, basis_names())
        fields["max_order"] = number("max_order", "Bends of the curve", "0: level, 1: a straight line, 2: a parabola")


def quality_choices(figured: Mapping[str, str]) -> list[tuple[str, str]]:
    """Labels and values of the quality field.

    Args:
        figured: value of the field -> what it will take and bring, e.g. "17 steps, 52 dB".
    """
    names = {"": "Standard"} | {name: name.capitalize() for name in QUALITIES}
    return [(f"{label}: {figured[name]}" if name in figured else label, name) for name, label in names.items()]


def sizes_for(preset: ModelPreset) -> list[tuple[str, str]]:
    """Labels and values of the size field."""
    sizes = [f"{width}x{height}" for width, height in sizes_of(preset)]
    return [*((size.replace("x", " × "), size) for size in sizes), ("Free", FREE_SIZE)]


def present(models: Mapping[str, OfferedModel]) -> list[str]:
    """The names of the models that can be chosen."""
    return [name for name, model in models.items() if not model.missing]


def absent(models: Mapping[str, OfferedModel]) -> list[OfferedModel]:
    """The models whose files are not on the server."""
    return [model for model in models.values() if model.missing]


def said_absent(models: Mapping[str, OfferedModel]) -> str:
    """The heading over the models whose files are not on the server."""
    return f"Not on this server: {', '.join(one.preset.name for one in absent(models))}"


def _shapes() -> str:
    """CSS that draws every size of every model as a little box before its label."""
    rules = []
    for width, height in sorted({size for preset in PRESETS.values() for size in sizes_of(preset)}):
        scale = SIDE / max(width, height)
        box = f"width:{width * scale:.0f}px;height:{height * scale:.0f}px"
        rules.append(f"#size label:has([value='{width}x{height}'])::before{{{box}}}")
    return "".join(rules)
