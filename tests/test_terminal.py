"""Pictures in a terminal, read back from what is printed."""

import base64
import importlib
import io
import re
import sys

import numpy as np
import pytest
from PIL import Image

import hi_diffusers
from hi_diffusers.commands.hidream import COMMANDS, main
from hi_diffusers.pictures.metrics import psnr
from hi_diffusers.pictures.terminal import PROTOCOLS, as_text, protocol_of


@pytest.fixture
def picture() -> Image.Image:
    rows, columns = np.mgrid[0:48, 0:80]
    return Image.fromarray(np.stack([rows * 5, columns * 3, 255 - rows * 2], -1).astype(np.uint8))


def read_sixel(text: str) -> Image.Image:
    """What a terminal draws for a sixel text."""
    width, height = map(int, re.findall(r'"1;1;(\d+);(\d+)', text)[0])
    colors = {int(n): rgb for n, *rgb in re.findall(r"#(\d+);2;(\d+);(\d+);(\d+)", text)}
    pixels = np.zeros((height + 6, width, 3), np.uint8)
    body = re.sub(r"^.*?\"1;1;\d+;\d+(#\d+;2;\d+;\d+;\d+)*", "", text, flags=re.DOTALL).removesuffix("\x1b\\\n")
    top = 0
    for band in body.split("-")[:-1]:
        for number, runs in re.findall(r"#(\d+)([^$#]*)\$", band):
            column = 0
            for length, char in re.findall(r"!(\d+)(.)", runs):
                for bit in range(6):
                    if (ord(char) - 63) >> bit & 1:
                        color = [round(int(part) * 2.55) for part in colors[int(number)]]
                        pixels[top + bit, column : column + int(length)] = color
                column += int(length)
            assert column == width
        top += 6
    return Image.fromarray(pixels[:height])


def test_sixel_draws_the_picture(picture):
    drawn = read_sixel(as_text(picture, "sixel"))
    wanted = picture.resize(drawn.size, Image.Resampling.NEAREST)
    assert psnr(drawn, wanted) > 30, "256 colours and steps of a hundredth are left"


def test_kitty_and_iterm_get_a_png(picture):
    kitty = as_text(picture, "kitty")
    chunks = re.findall(r"\x1b_G(.*?);(.*?)\x1b\\", kitty)
    assert chunks[0][0].startswith("a=T,f=100,") and [keys[-3:] for keys, _ in chunks] == ["m=1"] * (
        len(chunks) - 1
    ) + ["m=0"]
    iterm = re.findall(r"File=inline=1;size=\d+:(.*)\a", as_text(picture, "iterm2"))
    for data in ("".join(part for _, part in chunks), iterm[0]):
        drawn = Image.open(io.BytesIO(base64.b64decode(data)))
        assert (np.asarray(drawn)[::6, ::6] == np.asarray(picture)).all(), "small pixels are enlarged crisply"


def test_blocks_draw_two_pixels_in_a_character(picture, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setenv("LINES", "50")
    lines = as_text(picture, "blocks").splitlines()
    assert len(lines) == 24 and all(line.count("▀") == 80 for line in lines)
    colors = [
        tuple(map(int, found)) for found in re.findall(r"[34]8;2;(\d+);(\d+);(\d+)", lines[3].replace(";48", "m48"))
    ]
    assert colors[20:22] == [picture.getpixel((10, 6)), picture.getpixel((10, 7))]


def test_an_empty_choice_is_refused():
    with pytest.raises(ValueError, match="show must be one of"):
        as_text(Image.new("RGB", (2, 2)), "none")


@pytest.mark.parametrize(
    ("environment", "protocol"),
    [
        ({}, "blocks"),
        ({"TERM": "xterm-256color"}, "blocks"),
        ({"TERM": "xterm-kitty"}, "kitty"),
        ({"TERM": "xterm-256color", "KITTY_WINDOW_ID": "1"}, "kitty"),
        ({"TERM_PROGRAM": "iTerm.app"}, "iterm2"),
        ({"TERM_PROGRAM": "WezTerm"}, "iterm2"),
        ({"TERM": "foot"}, "sixel"),
        ({"TERM": "yaft-sixel"}, "sixel"),
        ({"TERM": "xterm-kitty", "TMUX": "/tmp/tmux"}, "blocks"),
    ],
)
def test_the_terminal_is_told_from_its_environment(environment, protocol):
    assert protocol_of(environment) == protocol and protocol in PROTOCOLS


def test_hidream_is_all_scripts(capsys, monkeypatch):
    for name, (module, _) in COMMANDS.items():
        assert main([name, "--version"]) == 0
        assert capsys.readouterr().out == f"{module}.py, hi-diffusers {hi_diffusers.__version__}\n"
        assert callable(importlib.import_module(f"hi_diffusers.commands.{module}").main)
    assert main(["--version"]) == 0 and main(["--help"]) == 0 and main([]) == 2
    said = capsys.readouterr().out
    assert all(f"  {name} " in said for name in COMMANDS)
    assert main(["paint"]) == 2
    assert "must be one of draw, batch" in capsys.readouterr().err
    monkeypatch.setattr(sys, "argv", ["hidream", "draw", "--num_steps", "0"])
    assert main() == 2
