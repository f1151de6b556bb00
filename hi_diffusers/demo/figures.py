"""The texts and figures of the page, as HTML. Whatever a visitor wrote is escaped."""

import base64
import io
from collections.abc import Callable, Sequence
from html import escape

from PIL import Image

from cache_functions import StepRecord, count_steps, planned_full_steps
from cache_functions.schedules import decides_on_the_way
from cache_functions.solver import SOLVER
from hi_diffusers.demo.fetching import Fetching
from hi_diffusers.demo.history import Entry
from hi_diffusers.engine.generation import Generation
from hi_diffusers.families.family import TokenCount
from hi_diffusers.pictures.metrics import psnr, ssim
from hi_diffusers.service.offered import OfferedModel
from hi_diffusers.service.requests import Request
from taylor_utils.plugins import rule_name

PREVIEW_SIDE = 768  # pixels; larger previews are shrunk
PREVIEW_QUALITY = 85  # JPEG quality
MEANING = {
    "full": "The network was computed at this step.",
    "forecast": "This step was forecast from the full steps before it, which costs next to nothing.",
}
MAX_SETTING_CHARS = 200
GB = 1e9
UNITS = ("B", "KiB", "MiB", "GiB")


def expectation(request: Request, cache_bytes: int, seconds: Callable[[int], float | None]) -> str:
    """One line about what the cache will do.

    Args:
        cache_bytes: bytes that it keeps per picture.
        seconds: the seconds of a picture with that many full steps, None if they are not known yet.
    """
    num_steps, cache = request.options.drawn_steps, request.cache
    notices = "".join(f"<br>{escape(notice)}" for notice in request.notices)
    if cache.is_off:
        return f"<p class='hd-note'>All <b>{num_steps}</b> steps are computed; nothing is kept.{notices}</p>"
    parts = [f"<b>{_bytes(cache_bytes)}</b> kept per picture" if cache_bytes else "kept in the host's memory"]
    rule = f"{cache.target} by {rule_name(cache.basis)}, {rule_name(cache.schedule)}"
    if cache.target == SOLVER:
        rule = "calibrated solver"
    if decides_on_the_way(cache.schedule):
        steps = f"<b>{num_steps}</b> steps; full ones are decided during the drawing"
    else:
        full = len(planned_full_steps(cache, num_steps))
        steps = f"<b>{full}</b> of {num_steps} steps full, at most <b>{num_steps / full:.2f}×</b> the speed"
        expected = request.expected(full)
        if expected is not None:
            parts.insert(
                0, f"<b>{expected.median_db:.0f} dB</b> to the uncached picture, one in ten below {expected.p10_db:.0f}"
            )
        known = seconds(full)
        if known is not None:
            parts.insert(0, f"about <b>{known:.2g} s</b>")
    return (
        f"<p class='hd-note'>{' · '.join((steps, *parts))} · <span class='hd-faint'>{escape(rule)}</span>{notices}</p>"
    )


def grade(request: Request, seconds: Callable[[int], float | None]) -> str:
    """What a quality will take and bring, e.g. "17 of 50 steps, 52 dB, 0.8 s"; `seconds` as in `expectation`."""
    num_steps, cache = request.options.drawn_steps, request.cache
    if cache.is_off or decides_on_the_way(cache.schedule):
        return f"{num_steps} steps" if cache.is_off else "as it comes"
    full = len(planned_full_steps(cache, num_steps))
    expected, known = request.expected(full), seconds(full)
    parts = [f"{full} of {num_steps} steps"]
    parts += [] if expected is None else [f"{expected.median_db:.0f} dB"]
    parts += [] if known is None else [f"{known:.2g} s"]
    return ", ".join(parts)


def token_note(count: TokenCount) -> str:
    """The number of the prompt's tokens, and warnings about words that are cut off or unknown."""
    told = f"<b>{count.tokens}</b> of {count.limit} tokens"
    if count.lost:
        told += f" · <span class='hd-warn'>cut off: {escape(count.lost)}</span>"
    if count.unknown:
        told += f" · <span class='hd-warn'>not in its vocabulary: {escape(', '.join(count.unknown))}</span>"
    return f"<p class='hd-note'>{told}</p>"


def cut_words(count: TokenCount) -> list[str]:
    """Sentences about words of the prompt that the model does not read."""
    cut = [f"the prompt is cut at {count.limit} tokens: {count.lost}"] if count.lost else []
    return cut + ([f"the model does not know {', '.join(count.unknown)}"] if count.unknown else [])


def note(sentence: str) -> str:
    """A sentence that needs no attention."""
    return f"<p class='hd-note'>{escape(sentence)}</p>"


def fetching(name: str, step: Fetching | None = None) -> str:
    """How far the download of a model is."""
    if step is None:
        return note(f"{name}: asking the hub")
    said = f"{step.repo}: {step.done / GB:.2f} of {step.whole / GB:.2f} GB"
    bar = f"<progress max='{step.whole}' value='{step.done}' aria-label='{escape(name)}'></progress>"
    return note(said) + bar


def refusal(sentence: str) -> str:
    """A warning that says why something cannot be done."""
    return f"<p class='hd-note hd-warn'>{escape(sentence)}</p>"


def absent_models(models: Sequence[OfferedModel]) -> str:
    """The models that cannot be chosen, and what they lack."""
    rows = "".join(f"<li><b>{escape(one.preset.name)}</b>: {escape(one.missing)}</li>" for one in models)
    hint = "On the server, <code>hidream draw --model_type NAME --download_only</code> fetches one."
    return f"<ul class='hd-note'>{rows}</ul><p class='hd-note'>{hint}</p>"


def waiting(seconds: float) -> str:
    """The stage before the first step and after the last one."""
    return _stage(None, f"<p class='hd-status'>preparing · {seconds:.0f} s</p>")


def stage(request: Request, number: int, records: Sequence[StepRecord], preview: Image.Image | None, word: str) -> str:
    """The stage while a picture is drawn.

    Args:
        number: number of the picture, from 0.
        records: records of its steps so far.
        preview: the latest preview.
        word: what is happening, e.g. "drawing".
    """
    num_steps = request.options.drawn_steps
    seconds = sum(record.seconds for record in records)
    which = f"picture {number + 1} of {len(request.drawings)} · " if len(request.drawings) > 1 else ""
    counts = f"{count_steps(records, 'full')} full, {count_steps(records, 'forecast')} forecast"
    status = f"{which}{word} · step {len(records)} of {num_steps} · {counts} · {seconds:.1f} s"
    return _stage(preview, _bars(records, num_steps) + f"<p class='hd-status'>{status}</p>")


def report(entry: Entry) -> str:
    """A picture's figures and its strip chart."""
    seconds = {"denoising": f"{_denoising(entry):.2f} s", "whole picture": f"{_whole(entry):.2f} s"}
    return _figures(_drawn(entry) | seconds) + _strip(entry)


def comparison(uncached: Generation, cached: Generation) -> str:
    """Both pictures' figures: seconds of the same loop, and how much the pictures differ."""
    ceiling = len(cached.trace) / count_steps(cached.trace, "full")
    figures = {
        "uncached": f"{_denoising(uncached):.2f} s",
        "cached": f"{_denoising(cached):.2f} s",
        "denoising": f"{_denoising(uncached) / _denoising(cached):.2f}× of {ceiling:.2f}×",
        "whole picture": f"{_whole(uncached) / _whole(cached):.2f}×",
        **_distance(uncached.image, cached.image),
    }
    said = "Left uncached, right cached. Measured on the saved 8-bit pictures; one run each, on this server."
    return _figures(figures) + note(said) + _figures(_drawn(cached)) + _strip(cached)


def side_by_side(left: Entry, right: Entry) -> str:
    """What two pictures of a visit differ in; raises ValueError if one is no longer on the server."""
    images = left.image(), right.image()
    told = {"left": left.caption, "right": right.caption}
    if images[0].size == images[1].size:
        told |= _distance(*images)
    columns = [_settings_of(one) for one in (left, right)]
    rows = ""
    for name in dict.fromkeys((*columns[0], *columns[1])):
        cells = [one.get(name, "") for one in columns]
        if cells[0] != cells[1]:
            rows += f"<tr><th scope='row'>{escape(name)}</th>{''.join(f'<td>{escape(one)}</td>' for one in cells)}</tr>"
    head = "<tr><th scope='col'>setting</th><th scope='col'>left</th><th scope='col'>right</th></tr>"
    table = f"<table class='hd-table'><thead>{head}</thead><tbody>{rows}</tbody></table>" if rows else ""
    said = "The distance is of the saved 8-bit pictures." if "PSNR" in told else "The pictures differ in size."
    return _figures(told) + note(said) + table


def _settings_of(entry: Entry) -> dict[str, str]:
    """The settings of a picture by name, as short texts."""
    cache = {f"cache {name}": value for name, value in entry.metadata.get("cache", {}).items()}
    settings = {"model": entry.metadata["model"].get("model_type")} | entry.metadata["options"] | cache
    return {name: str(value)[:MAX_SETTING_CHARS] for name, value in settings.items() if value is not None}


def _distance(left: Image.Image, right: Image.Image) -> dict[str, str]:
    return {"PSNR": f"{psnr(left, right):.2f} dB", "SSIM": f"{ssim(left, right):.4f}"}


def _drawn(picture: Generation | Entry) -> dict[str, str]:
    """Seed, size and steps of a picture."""
    options, records = picture.metadata["options"], picture.trace
    return {
        "seed": str(options["seed"]),
        "size": f"{options['width']}×{options['height']}",
        "steps": f"{count_steps(records, 'full')} full, {count_steps(records, 'forecast')} forecast",
    }


def _strip(picture: Generation | Entry) -> str:
    """A bar chart of the seconds per step, and its legend."""
    records = picture.trace
    mean = {kind: _mean(records, kind) for kind in ("full", "forecast")}
    legend = " ".join(
        f"<span title='{MEANING[kind]}'><i class='hd-{kind}'></i>{kind}, {value:.3g} s each</span>"
        for kind, value in mean.items()
        if value
    )
    return f"{_bars(records, len(records))}<p class='hd-note hd-legend'>{legend}</p>"


def _whole(picture: Generation | Entry) -> float:
    """Seconds of the picture without its previews."""
    return picture.seconds.encode + _denoising(picture) + picture.seconds.decode


def _figures(figures: dict[str, str]) -> str:
    cells = "".join(f"<div><dt>{name}</dt><dd>{escape(value)}</dd></div>" for name, value in figures.items())
    return f"<dl class='hd-figures'>{cells}</dl>"


def _bars(records: Sequence[StepRecord], num_steps: int) -> str:
    """One bar per step, whose height is the step's duration; steps to come are faint."""
    longest = max((record.seconds for record in records), default=1.0) or 1.0
    bars = [
        f"<i class='hd-{one.kind}' style='height:{max(6.0, 100 * one.seconds / longest):.0f}%'"
        f" title='step {one.index + 1}: {one.kind}, {one.seconds:.3g} s'></i>"
        for one in records
    ]
    bars += ["<i class='hd-to-come'></i>"] * (num_steps - len(records))
    label = f"{count_steps(records, 'full')} full and {count_steps(records, 'forecast')} forecast of {num_steps} steps"
    return f"<div class='hd-bars' role='img' aria-label='{label}'>{''.join(bars)}</div>"


def _stage(preview: Image.Image | None, below: str) -> str:
    shown = "<div class='hd-empty'></div>" if preview is None else f"<img alt='preview' src='{_data_url(preview)}'>"
    return f"<div class='hd-stage'>{shown}{below}</div>"


def _data_url(image: Image.Image) -> str:
    """The preview as a data URL, so that no file is left behind."""
    image = image.copy()
    image.thumbnail((PREVIEW_SIDE, PREVIEW_SIDE))
    encoded = io.BytesIO()
    image.save(encoded, "JPEG", quality=PREVIEW_QUALITY, subsampling=0)
    return f"data:image/jpeg;base64,{base64.b64encode(encoded.getvalue()).decode()}"


def _denoising(picture: Generation | Entry) -> float:
    """Seconds of the steps alone, without previews."""
    return sum(record.seconds for record in picture.trace)


def _mean(records: Sequence[StepRecord], kind: str) -> float:
    seconds = [record.seconds for record in records if record.kind == kind]
    return sum(seconds) / len(seconds) if seconds else 0.0


def _bytes(size: float) -> str:
    for unit in UNITS:
        if size < 1024 or unit == UNITS[-1]:
            return f"{size:.3g} {unit}"
        size /= 1024
    raise AssertionError("the last unit takes all")
