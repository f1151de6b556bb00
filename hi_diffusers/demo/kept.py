"""What the visitor's browser keeps over a reload: settings, prompts and the visit's pictures. The server keeps nothing.

Everything that comes back from there is checked as anything else that a visitor sends.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import gradio as gr

NUM_PROMPTS = 20
KEY = "hi-diffusers"  # of the browser's storage; nothing in it is secret
RESTORED = "() => { window.hidreamRestored = true }"
ADD_PROMPT = f"""(prompts, prompt) => [prompt.trim()
    ? [prompt, ...(Array.isArray(prompts) ? prompts : []).filter(one => one !== prompt)].slice(0, {NUM_PROMPTS})
    : prompts]"""
"""JavaScript that adds a prompt that is drawn; like every handler it returns a list of its outputs."""


@dataclass(frozen=True)
class Kept:
    """The parts of the browser's storage.

    Attributes:
        settings: name of a field -> its value; None before anything was changed.
        prompts: what was drawn, the latest first.
        pictures: `history.Entry.kept` of the visit's pictures.
    """

    settings: Any
    prompts: Any
    pictures: Any


def lay_out() -> Kept:
    """Make the components, inside gradio's Blocks."""
    of = {name: gr.BrowserState(value, storage_key=f"{KEY}-{name}", secret=KEY) for name, value in EMPTY.items()}
    return Kept(**of)


EMPTY: dict[str, Any] = {"settings": None, "prompts": [], "pictures": []}


def keep_fields(names: Sequence[str]) -> str:
    """JavaScript that keeps the fields of these names, once those of the last visit are back."""
    return f"""(kept, ...fields) => [window.hidreamRestored
        ? Object.fromEntries({json.dumps(list(names))}.map((name, at) => [name, fields[at]]))
        : kept]"""


def is_text(value: Any, longest: int) -> bool:
    """Whether a value that a browser kept is text, which can be sent back."""
    try:
        return isinstance(value, str) and len(value) <= longest and value.encode() is not None
    except UnicodeEncodeError:  # half a surrogate pair
        return False


def prompts_of(stored: Any, longest: int) -> list[str]:
    """The prompts that a browser kept; what is none is left out."""
    found = stored if isinstance(stored, list) else []
    return [one for one in found if is_text(one, longest) and one][:NUM_PROMPTS]
