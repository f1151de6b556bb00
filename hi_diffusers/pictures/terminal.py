"""A picture in a terminal: by the graphics protocols of kitty, iTerm2 and sixel, or by coloured half blocks."""

import base64
import io
import os
import shutil
from collections.abc import Iterator, Mapping

import numpy as np
from PIL import Image

PROTOCOLS = ("kitty", "iterm2", "sixel", "blocks")
SHOWN_SIDE = 512  # pixels of the longer side; larger pictures are shrunk, much smaller ones enlarged
KITTY_CHUNK = 4096  # bytes of base64 in one of kitty's commands
SIXEL_COLORS = 256
OF_PROGRAM = {"iTerm.app": "iterm2", "WezTerm": "iterm2", "mintty": "iterm2", "ghostty": "kitty"}
OF_TERM = {"xterm-kitty": "kitty", "xterm-ghostty": "kitty", "foot": "sixel", "mlterm": "sixel", "contour": "sixel"}
"""What TERM_PROGRAM and TERM say about a terminal's protocol, by the terminals' own documentation."""


def protocol_of(environment: Mapping[str, str] = os.environ) -> str:
    """The protocol that the terminal understands by its environment; "blocks" if nothing tells."""
    if environment.get("TMUX") or environment.get("STY"):
        return "blocks"  # multiplexers swallow the others
    term = environment.get("TERM", "")
    found = OF_PROGRAM.get(environment.get("TERM_PROGRAM", "")) or OF_TERM.get(term.removesuffix("-direct"))
    if found is None and environment.get("KITTY_WINDOW_ID"):
        found = "kitty"
    return found or ("sixel" if "sixel" in term else "blocks")


def as_text(picture: Image.Image, protocol: str) -> str:
    """The text that shows a picture when it is printed.

    Args:
        protocol: one of PROTOCOLS.

    Raises:
        ValueError: for another protocol.
    """
    if protocol not in PROTOCOLS:
        raise ValueError(f"show must be one of {', '.join(PROTOCOLS)}, got {protocol!r}")
    picture = picture.convert("RGB")
    if protocol == "blocks":
        return "".join(_blocks(picture))
    scale = SHOWN_SIDE / max(picture.size)
    if scale < 1:
        picture = picture.resize((max(1, round(picture.width * scale)), max(1, round(picture.height * scale))))
    elif scale >= 2:
        picture = picture.resize((picture.width * int(scale), picture.height * int(scale)), Image.Resampling.NEAREST)
    if protocol == "sixel":
        return "".join(_sixel(picture))
    encoded = io.BytesIO()
    picture.save(encoded, "PNG")
    data = base64.b64encode(encoded.getvalue()).decode()
    if protocol == "iterm2":
        return f"\x1b]1337;File=inline=1;size={len(encoded.getvalue())}:{data}\a\n"
    return "".join(_kitty(data)) + "\n"


def _kitty(data: str) -> Iterator[str]:
    """https://sw.kovidgoyal.net/kitty/graphics-protocol/: a PNG, shown at once, in chunks."""
    chunks = [data[at : at + KITTY_CHUNK] for at in range(0, len(data), KITTY_CHUNK)]
    for number, chunk in enumerate(chunks):
        keys = "a=T,f=100," if number == 0 else ""
        yield f"\x1b_G{keys}m={int(number + 1 < len(chunks))};{chunk}\x1b\\"


def _sixel(picture: Image.Image) -> Iterator[str]:
    """DEC's sixel: a palette, then bands of six rows; in each, every colour that is in it as runs of columns."""
    paletted = picture.quantize(SIXEL_COLORS)
    colors = np.asarray(paletted.getpalette(), np.float64).reshape(-1, 3)
    indices = np.asarray(paletted)
    yield f'\x1bPq"1;1;{picture.width};{picture.height}'
    for number in np.unique(indices):
        red, green, blue = np.round(colors[number] / 255 * 100).astype(int)
        yield f"#{number};2;{red};{green};{blue}"
    for top in range(0, picture.height, 6):
        band = indices[top : top + 6]
        weights = 1 << np.arange(len(band))[:, None]
        for number in np.unique(band):
            columns = ((band == number) * weights).sum(0)
            edges = np.flatnonzero(np.diff(columns, prepend=-1, append=-1))
            runs = zip(edges[:-1], np.diff(edges), strict=True)
            yield f"#{number}" + "".join(f"!{length}{chr(63 + columns[at])}" for at, length in runs) + "$"
        yield "-"
    yield "\x1b\\\n"


def _blocks(picture: Image.Image) -> Iterator[str]:
    """Two pixels in each character: the upper half in the foreground's colour, the lower in the background's."""
    columns, lines = shutil.get_terminal_size()
    scale = min(columns / picture.width, 2 * (lines - 2) / picture.height, 1.0)
    width, height = max(1, int(picture.width * scale)), max(2, int(picture.height * scale) // 2 * 2)
    pixels = np.asarray(picture.resize((width, height), Image.Resampling.BOX))
    for above, below in zip(pixels[::2], pixels[1::2], strict=True):
        for (r, g, b), (red, green, blue) in zip(above, below, strict=True):
            yield f"\x1b[38;2;{r};{g};{b};48;2;{red};{green};{blue}m▀"
        yield "\x1b[0m\n"
