"""--compare: the same picture cached and uncached, side by side, with its figures."""

import contextlib
import io
from pathlib import Path
from typing import Any

from cache_functions import StepRecord, count_steps
from hi_diffusers.commands.outputs import comparison_paths
from hi_diffusers.commands.progress import draw_with_progress, step_counts, summary
from hi_diffusers.denoising.steps import Interrupted
from hi_diffusers.families.family import Model
from hi_diffusers.pictures.metadata import write_atomically, write_picture
from hi_diffusers.request.drawing import Drawing

WARM_UP_STEPS = 6


def compare(model: Model, drawing: Drawing, output: Path, embeds: Any = None) -> None:
    """Draw uncached and cached from one seed, write both and a labelled side-by-side, print the figures.

    Args:
        output: file of the cached picture; the others lie beside it.
        embeds: the encoded prompt; None encodes it here.
    """
    from hi_diffusers.engine.generation import draw_batch
    from hi_diffusers.pictures.metrics import psnr, ssim
    from hi_diffusers.pictures.sheet import side_by_side

    def warm_up(record: StepRecord, preview: object) -> bool:
        return record.index + 1 < WARM_UP_STEPS

    both = (drawing.uncached(), drawing)
    for one in both:
        with contextlib.suppress(Interrupted):
            draw_batch(model, [one], embeds=embeds, on_step=warm_up)
    uncached, cached = (draw_with_progress(model, one, embeds) for one in both)
    uncached_path, sheet_path = comparison_paths(output)
    write_picture(uncached.image, uncached_path, uncached.metadata)
    write_picture(cached.image, output, cached.metadata)
    speedup = uncached.seconds.denoise / cached.seconds.denoise
    ceiling = len(cached.trace) / count_steps(cached.trace, "full")
    fidelity = f"PSNR {psnr(uncached.image, cached.image):.2f} dB, SSIM {ssim(uncached.image, cached.image):.4f}"
    labels = (
        f"uncached: {step_counts(uncached.trace)}",
        f"cached: {step_counts(cached.trace)}\n{speedup:.2f}x the speed, {fidelity}",
    )
    sheet = io.BytesIO()
    side_by_side(list(zip((uncached.image, cached.image), labels, strict=True))).save(sheet, "PNG")
    write_atomically(sheet_path, sheet.getvalue())
    print(f"uncached: {summary(uncached)}")
    print(f"cached:   {summary(cached)}")
    print(
        f"speedup:  {speedup:.2f}x over the denoising loop ({speedup / ceiling:.0%} of steps / full steps ="
        f" {ceiling:.2f}x), {uncached.seconds.whole / cached.seconds.whole:.2f}x over the whole picture"
    )
    print(f"fidelity: {fidelity} (measured on the saved 8-bit pictures)")
    for path in (uncached_path, output, sheet_path):
        print(path)
