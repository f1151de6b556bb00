"""The texts and figures of the page, as HTML. Whatever a visitor wrote is escaped."""

import base64
import io
from collections.abc import Callable, Sequence
from html import escape

from PIL import Image

from cache_functions import StepRecord, count_steps, planned_full_steps
from cache_functions.schedules import decides_on_the_way
from cache_functions.solver import SOLVER
from hi_diffusers.demo.studio import Finished
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


def token_note(count: TokenCount) -> str:
    """The number of the prompt's tokens, and warnings about words that are cut off or unknown."""
    note = f"<b>{count.tokens}</b> of {count.limit} tokens"
    if count.lost:
        note += f" · <span class='hd-warn'>cut off: {escape(count.lost)}</span>"
    if count.unknown:
        note += f" · <span class='hd-warn'>not in its vocabulary: {escape(', '.join(count.unknown))}</span>"
    return f"<p class='hd-note'>{note}</p>"


def cut_words(count: TokenCount) -> list[str]:
    """Sentences about words of the prompt that the model does not read."""
    cut = [f"the prompt is cut at {count.limit} tokens: {count.lost}"] if count.lost else []
    return cut + ([f"the model does not know {', '.join(count.unknown)}"] if count.unknown else [])


def refusal(sentence: str) -> str:
    """A warning that says why something cannot be done."""
    return f"<p class='hd-note hd-warn'>{escape(sentence)}</p>"


def absent_models(models: Sequence[OfferedModel]) -> str:
    """The models that cannot be chosen, and what they lack."""
    rows = "".join(f"<li><b>{escape(one.preset.name)}</b>: {escape(one.missing)}</li>" for one in models)
    hint = "<code>python inference.py --model_type NAME --download_only</code> fetches one."
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


def report(finished: Finished) -> str:
    """A finished picture's figures and its strip chart."""
    picture = finished.picture
    figures = {"denoising": f"{_denoising(picture):.2f} s", "whole picture": f"{_whole(picture):.2f} s"}
    return _figures(_drawn(picture) | figures) + _strip(picture)


def comparison(uncached: Finished, cached: Finished) -> str:
    """Both pictures' figures: seconds of the same loop, and how much the pictures differ."""
    slow, fast = uncached.picture, cached.picture
    ceiling = len(fast.trace) / count_steps(fast.trace, "full")
    figures = {
        "uncached": f"{_denoising(slow):.2f} s",
        "cached": f"{_denoising(fast):.2f} s",
        "denoising": f"{_denoising(slow) / _denoising(fast):.2f}× of {ceiling:.2f}×",
        "whole picture": f"{_whole(slow) / _whole(fast):.2f}×",
        "PSNR": f"{psnr(slow.image, fast.image):.2f} dB",
        "SSIM": f"{ssim(slow.image, fast.image):.4f}",
    }
    said = "Left uncached, right cached. Measured on the saved 8-bit pictures; one run each, on this server."
    note = f"<p class='hd-note'>{said}</p>"
    return _figures(figures) + note + _figures(_drawn(fast)) + _strip(fast)


def _drawn(picture: Generation) -> dict[str, str]:
    """Seed, size and steps of a picture."""
    options, records = picture.metadata["options"], picture.trace
    return {
        "seed": str(options["seed"]),
        "size": f"{options['width']}×{options['height']}",
        "steps": f"{count_steps(records, 'full')} full, {count_steps(records, 'forecast')} forecast",
    }


def _strip(picture: Generation) -> str:
    """A bar chart of the seconds per step, and its legend."""
    records = picture.trace
    mean = {kind: _mean(records, kind) for kind in ("full", "forecast")}
    legend = " ".join(
        f"<span title='{MEANING[kind]}'><i class='hd-{kind}'></i>{kind}, {value:.3g} s each</span>"
        for kind, value in mean.items()
        if value
    )
    return f"{_bars(records, len(records))}<p class='hd-note hd-legend'>{legend}</p>"


def _whole(picture: Generation) -> float:
    """Seconds of the picture without its previews."""
    return picture.seconds.encode + _denoising(picture) + picture.seconds.decode


def _figures(figures: dict[str, str]) -> str:
    cells = "".join(f"<div><dt>{name}</dt><dd>{value}</dd></div>" for name, value in figures.items())
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


def _denoising(picture: Generation) -> float:
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
