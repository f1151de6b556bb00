"""All command lines behind one name: `hidream draw "a red circle"`, `hidream serve`."""

import importlib
import sys
from collections.abc import Sequence

from hi_diffusers import __version__
from hi_diffusers.console import DONE, REFUSED

COMMANDS = {
    "draw": ("inference", "draw a picture of a prompt"),
    "batch": ("sampling", "draw a file of prompts into a folder"),
    "page": ("gradio_demo", "serve a web page that draws"),
    "serve": ("serve", "serve OpenAI's images API"),
    "calibrate": ("calibrate", "fit the cache to a model"),
    "compare": ("compare", "compare two folders of pictures"),
}
"""Command -> its module, and what it does."""


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; the first word chooses the command, whose exit codes are returned."""
    words = list(sys.argv[1:] if argv is None else argv)
    if words[:1] in (["-h"], ["--help"], []):
        rows = "\n".join(f"  {name:<10} {what} (as {module}.py)" for name, (module, what) in COMMANDS.items())
        print(f"usage: hidream COMMAND [options]\n\n{rows}\n\n`hidream COMMAND --help` lists a command's options.")
        return DONE if words else REFUSED
    if words[0] == "--version":
        print(f"hidream, hi-diffusers {__version__}")
        return DONE
    if words[0] not in COMMANDS:
        known = ", ".join(COMMANDS)
        print(f"hidream: error: the command must be one of {known}, got {words[0]!r}", file=sys.stderr)
        return REFUSED
    module = importlib.import_module(f"hi_diffusers.commands.{COMMANDS[words[0]][0]}")
    code: int = module.main(words[1:])
    return code
