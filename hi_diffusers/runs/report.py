"""The comparison of two runs as one self-contained HTML page."""

import base64
import html
import io
from collections.abc import Sequence

from PIL import Image

from hi_diffusers.runs.comparison import Pair, Run, Unpaired

SIDE = 384
MAX_TEXT = 500  # characters shown of a prompt
STYLE = """
:root { color-scheme: light dark; --line: #8884; --soft: #8881; }
body { font: 16px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 72rem;
       padding: 0 1rem; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.15rem; margin-top: 2rem; }
table { border-collapse: collapse; }
.wide { overflow-x: auto; }
th, td { padding: .3rem .8rem; text-align: right; border-bottom: 1px solid var(--line); }
th:first-child, td:first-child { text-align: left; }
.pairs { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(20rem, 100%), 1fr)); gap: 1.25rem; }
figure { margin: 0; padding: .75rem; border: 1px solid var(--line); border-radius: .6rem; background: var(--soft); }
.two { display: grid; grid-template-columns: 1fr 1fr; gap: .4rem; }
.two img { width: 100%; image-rendering: pixelated; border-radius: .3rem; display: block; }
.two span { font-size: .8rem; opacity: .7; }
figcaption { margin-top: .5rem; font-size: .9rem; overflow-wrap: anywhere; }
li { overflow-wrap: anywhere; }
"""


def to_html(
    a: Run,
    b: Run,
    table: Sequence[Sequence[str]],
    worst: Sequence[Pair],
    unpaired: Sequence[Unpaired],
    notes: Sequence[str],
) -> str:
    """The report as an HTML page.

    Args:
        a, b: the runs; a is the reference.
        table: rows of figures; the first row is the head.
        worst: the pairs to show.
        unpaired: pictures that are not compared.
        notes: sentences below the table.
    """
    heads, *rows = ([html.escape(cell) for cell in row] for row in table)
    parts = [
        "<!doctype html><html lang=en><meta charset=utf-8><meta name=viewport content='width=device-width'>",
        f"<title>{html.escape(f'{a.folder.name} and {b.folder.name}')}</title><style>{STYLE}</style>",
        f"<h1>A: {html.escape(a.folder.name)} &nbsp; B: {html.escape(b.folder.name)}</h1>",
        f"<div class=wide><table><tr><th>{'<th>'.join(heads)}</tr>",
        *(f"<tr><td>{'<td>'.join(row)}</tr>" for row in rows),
        "</table></div>",
        *(f"<p>{html.escape(note)}</p>" for note in notes),
        f"<h2>The {len(worst)} pairs that differ most</h2><div class=pairs>",
        *(_figure(a, b, pair) for pair in worst),
        "</div>",
    ]
    if unpaired:
        listed = "".join(f"<li>prompt {one.key[0]}, image {one.key[1]}: {html.escape(one.reason)}" for one in unpaired)
        parts.append(f"<h2>{len(unpaired)} pictures are not compared</h2><ul>{listed}</ul>")
    return "\n".join(parts) + "\n"


def _figure(a: Run, b: Run, pair: Pair) -> str:
    shown = "".join(
        f"<div><img alt='{name}' src='{_data_url(run.picture(pair.key))}'><span>{name}</span></div>"
        for name, run in (("A", a), ("B", b))
    )
    facts = f"{pair.psnr:.2f} dB, SSIM {pair.ssim:.4f}, prompt {pair.key[0]}, image {pair.key[1]}, seed {pair.seed}"
    caption = f"{html.escape(_shortened(pair.prompt))}<br>{facts}"
    return f"<figure><div class=two>{shown}</div><figcaption>{caption}</figcaption></figure>"


def _shortened(text: str) -> str:
    """The beginning of a text; invalid Unicode is escaped."""
    whole = text.encode("utf-8", "backslashreplace").decode()
    return whole if len(whole) <= MAX_TEXT else f"{whole[: MAX_TEXT - 3]}..."


def _data_url(image: Image.Image) -> str:
    image.thumbnail((SIDE, SIDE))
    encoded = io.BytesIO()
    image.save(encoded, "PNG")
    return f"data:image/png;base64,{base64.b64encode(encoded.getvalue()).decode()}"
