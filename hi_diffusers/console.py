"""The scripts' common terminal behaviour: one-line errors and what helps with them, exit codes, quiet libraries."""

import argparse
import io
import logging
import os
import re
import sys
import warnings
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from typing import Any, NoReturn

MAX_CHARS = 1200  # of a message
DONE, FAILED, REFUSED, INTERRUPTED = 0, 1, 2, 130

SCRIPTS = ("inference.py", "sampling.py", "compare.py", "calibrate.py", "gradio_demo.py", "serve.py")
METHOD = "docs/method.md#one-theory-a-run-with-k-evaluations-is-a-solver"
BY_SETTING = {
    "host share auth no_auth allow_download allowed_host allow_origin root_path ssl_certfile ssl_keyfile": "{serving}",
    "api_key max_batch batch_wait_ms": "docs/serving.md#batches-and-turns",
    "lora lora_folder": "docs/models.md#lora",
    "image mask mask_image strength fit": "docs/pictures.md#what-is-refused",
    "pipeline true_cfg guidance_2 num_frames fps": "docs/families.md#what-is-refused-and-why",
    "quantization save_quantized": "docs/models.md#nf4",
    "model_path revision": "docs/models.md#what-is-refused-and-how",
    "fp8 compile attention_backend dtype device": "docs/models.md#speed-flags",
    "scheduler shift": "docs/models.md#schedulers",
    "quality": METHOD,
    "ulysses guidance_parallel replicas engine ray_address": "docs/scaling.md",
    "cache target basis schedule full_steps fresh_threshold max_order speedup": "README.md#the-cache",
    "prompt_file encode_only shard batch_size output_dir": "docs/sampling.md",
}
"""Settings, of which one begins the sentence -> where they are explained."""
BY_WORDS = (
    (r"not installed: pip install", "README.md#install-without-make"),
    (r"out of memory|\d GiB", "docs/models.md#memory"),
    (r"is gated|cannot be downloaded|has no revision|has no repository|not on this disk", "docs/models.md#which-files"),
    (r"Git LFS|the model's folder", "docs/models.md#what-is-refused-and-how"),
    (r"calibration", METHOD),
)
"""What a sentence says anywhere -> where that is explained; asked first."""
SERVING = {"serve.py": "docs/serving.md", "gradio_demo.py": "docs/demo.md#serving-others"}


class Refusal(ValueError):
    """A wrong request, or files that cannot be used: exit code 2."""


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are one line.

    Args:
        version: what --version prints; None: there is no --version.
    """

    def __init__(self, *args: Any, version: str | None = None, **kwargs: Any):
        super().__init__(*args, **kwargs)
        if version is not None:
            said = f"%(prog)s, hi-diffusers {version}"
            self.add_argument("--version", action="version", version=said, help="print the version and exit")

    def error(self, message: str) -> NoReturn:
        self.exit(REFUSED, f"{self.prog}: error: {one_line(message)}{_see(message, self.prog)}\n")


def run_script(work: Callable[[argparse.Namespace], None], parser: Parser, argv: Sequence[str] | None) -> int:
    """Parse the flags, do the work, and turn any error into one line and an exit code.

    Returns:
        0 done, 2 refused (ValueError or Refusal before weights are read), 1 failed while running, 130 interrupted.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a name that the terminal cannot show must not fail
            stream.reconfigure(errors="backslashreplace")
    try:
        args = parser.parse_args(argv)
    except SystemExit as stopped:
        return int(stopped.code or DONE)
    try:
        work(args)
    except KeyboardInterrupt:
        say(f"{parser.prog}: interrupted")
        return INTERRUPTED
    except Refusal as refusal:
        return _say(parser, "error", str(refusal), REFUSED)
    except Exception as error:
        if os.environ.get("HIDREAM_TRACEBACK"):
            raise
        said = f"{type(error).__name__}: {error} (HIDREAM_TRACEBACK=1 shows where)"
        return _say(parser, "failed", said, FAILED)
    return DONE


OTHER_FLAGS = {"mask": "step_mask", "mask_image": "mask"}
"""Setting -> its flag, where that has another name."""


def name_flag(message: str, args: argparse.Namespace) -> str:
    """Write the flag's name for the setting's name that a message begins with."""
    name = message.split(" ", 1)[0]
    if getattr(args, "resolution", None) is not None and name in ("width", "height"):
        return f"--resolution {args.resolution}: {message}"
    if not hasattr(args, name):
        return message
    return f"--{OTHER_FLAGS.get(name, name)}{message.removeprefix(name)}"


def refuse_errors(step: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Call a step that checks what the user gave; its ValueError or OSError becomes a Refusal."""
    try:
        return step(*args, **kwargs)
    except (ValueError, OSError) as error:
        raise Refusal(str(error)) from error


def place_for(message: str, script: str) -> str | None:
    """Where the documentation helps with a message.

    Args:
        message: the error's sentence.
        script: name of the script that prints it, e.g. "inference.py".

    Returns:
        A file and its heading, from the repository's root; None for a script that the documentation does not list.
    """
    if script not in SCRIPTS:
        return None
    setting = re.split(r"[^a-z0-9_]", message.removeprefix("--"), maxsplit=1)[0]
    by_setting = next((place for names, place in BY_SETTING.items() if setting in names.split()), None)
    by_words = next((place for words, place in BY_WORDS if re.search(words, message)), None)
    options = f"docs/options.md#{script.replace('.', '')}"
    return (by_words or by_setting or options).format(serving=SERVING.get(script, options))


def require(module: str, extra: str, what: str) -> None:
    """Raise ValueError if an optional dependency is absent.

    Args:
        module: the module that is needed.
        extra: the package's extra that installs it.
        what: what needs it, for the message.
    """
    if find_spec(module) is None:
        raise ValueError(f"{what} needs {module}, which is not installed: pip install 'hi-diffusers[{extra}]'")


_is_mute = False


def mute() -> None:
    """Say nothing any more but why the work failed: another process speaks for this one, also where it is refused."""
    global _is_mute
    _is_mute = True


def say(message: str) -> None:
    """Print one line for the user to stderr."""
    if not _is_mute:
        print(one_line(message), file=sys.stderr, flush=True)


def one_line(message: str) -> str:
    """The message on one line of at most MAX_CHARS, control characters escaped: it may quote what is not trusted."""
    joined = " ".join(message.split())
    if len(joined) > MAX_CHARS:
        joined = f"{joined[: MAX_CHARS // 2]} ... {joined[-MAX_CHARS // 4 :]}"
    return "".join(char if char.isprintable() else ascii(char)[1:-1] for char in joined)


def say_loading(name: str) -> None:
    """Say which model is being loaded, and import the libraries for it, which takes seconds."""
    say(f"loading {name}")
    quiet_libraries()


def quiet_libraries() -> None:
    """Silence the progress bars and notes of the libraries that load and run models."""
    warnings.filterwarnings("ignore", module=r"(torch|diffusers|transformers|peft|bitsandbytes|PIL)(\.|$)")
    for name in ("bitsandbytes", "kernels", "torchao", "accelerate"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    import diffusers
    import transformers

    for library in (diffusers, transformers):
        library.utils.logging.set_verbosity(logging.CRITICAL)  # errors are raised as well, and reported once
        library.utils.logging.disable_progress_bar()


def _say(parser: Parser, kind: str, message: str, code: int) -> int:
    said = one_line(f"{parser.prog}: {kind}: {message}")
    if _is_mute and code == REFUSED:
        return code
    print(f"{said}{_see(message, parser.prog)}", file=sys.stderr, flush=True)
    return code


def _see(message: str, script: str) -> str:
    """What helps with an error, to be put behind it."""
    place = place_for(message, script)
    return "" if place is None else f" (see {place})"
