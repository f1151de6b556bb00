"""A drawing with a progress bar, and a summary of its figures."""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from PIL import Image
from tqdm import tqdm

from cache_functions import StepRecord, count_steps
from hi_diffusers.families.family import Model
from hi_diffusers.pictures.terminal import as_text, protocol_of
from hi_diffusers.request.drawing import Drawing

if TYPE_CHECKING:
    from hi_diffusers import Generation


def draw_with_progress(model: Model, drawing: Drawing, embeds: Any = None) -> "Generation":
    """Draw with a bar that counts full and forecast steps."""
    from hi_diffusers.engine.generation import draw_batch

    with step_bar(drawing.options.drawn_steps) as on_step:
        return draw_batch(model, [drawing], embeds=embeds, on_step=on_step)[0]


@contextlib.contextmanager
def step_bar(num_steps: int | None) -> Iterator[Callable[..., bool]]:
    """A progress bar; gives the function to pass to `generate` as `on_step`, which may also say how many are drawn."""
    counts = {"full": 0, "forecast": 0}
    with tqdm(total=num_steps, unit="step", dynamic_ncols=True) as bar:

        def on_step(record: StepRecord, preview: object, drawn: int | None = None) -> bool:
            counts[record.kind] += 1
            bar.total = drawn or bar.total
            bar.set_postfix(counts, refresh=False)
            bar.update()
            return True

        yield on_step


def show(picture: Image.Image, protocol: str | None) -> None:
    """Print a picture to the terminal, by a protocol or the one that "auto" finds; None prints nothing."""
    if protocol is not None:
        print(as_text(picture, protocol_of() if protocol == "auto" else protocol), end="", flush=True)


def summary(picture: "Generation") -> str:
    """One line with the picture's size, seed, steps and seconds."""
    seconds, options = picture.seconds, picture.metadata["options"]
    return (
        f"{options['width']}x{options['height']}, seed {options['seed']}, {step_counts(picture.trace)},"
        f" {seconds.whole:.2f} s (encode {seconds.encode:.2f}, denoise {seconds.denoise:.2f},"
        f" decode {seconds.decode:.2f})"
    )


def saving(trace: Sequence[StepRecord]) -> str:
    """A phrase with the seconds that forecasts saved, by the measure of this drawing's own full steps."""
    full, forecast = ([one.seconds for one in trace if one.kind == kind] for kind in ("full", "forecast"))
    saved = len(forecast) * sum(full) / len(full) - sum(forecast) if full else 0.0
    return f", about {saved:.2g} s saved" if saved > 0 else ""


def step_counts(trace: Sequence[StepRecord]) -> str:
    """One phrase with the numbers of full and forecast steps."""
    full, forecast = (count_steps(trace, kind) for kind in ("full", "forecast"))
    return f"{len(trace)} steps: {full} full, {forecast} forecast"
