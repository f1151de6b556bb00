"""The server's log: one short line for a visitor's mistake, whatever the visitor sent."""

import logging
import os
import sys
from collections.abc import Sequence
from typing import Any

from hi_diffusers.console import one_line, say
from hi_diffusers.denoising.steps import Interrupted

MAX_CHARS = 200
log = logging.getLogger("gradio_demo")
LOGGERS = ("uvicorn.error", "uvicorn.access", "gradio", "asyncio", "httpx")


def shortened(text: str) -> str:
    """At most MAX_CHARS of a text, on one line, with control characters escaped."""
    line = one_line(text[: 2 * MAX_CHARS])
    return line if len(line) <= MAX_CHARS and len(text) <= 2 * MAX_CHARS else f"{line[: MAX_CHARS - 3]}..."


class OneLine(logging.Filter):
    """Makes every record one short line without a traceback."""

    def filter(self, record: logging.LogRecord) -> bool:
        """Change the record; all are kept."""
        text = record.getMessage()
        if record.exc_info and record.exc_info[1] is not None:
            text = f"{text.splitlines()[0] if text else ''} {_named(record.exc_info[1])}"
        record.msg, record.args, record.exc_info, record.exc_text = shortened(text), None, None, None
        return True


class _Tracebacks:
    """Stands for the module traceback in gradio, which prints one for every mistake of a visitor."""

    def __init__(self, module: Any):
        self._module = module

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)

    def print_exc(self, *_: Any, **__: Any) -> None:
        """Print the error that is being handled in one line."""
        error = sys.exc_info()[1]
        if error is not None:
            say(shortened(f"refused: {_named(error)}"))


def keep_short(modules: Sequence[Any]) -> None:
    """Keep the log short; with HIDREAM_TRACEBACK=1 it stays as it is.

    Args:
        modules: gradio's modules that print tracebacks of visitors' mistakes. (Those of drawings are logged here.)
    """
    if os.environ.get("HIDREAM_TRACEBACK"):
        return
    for module in modules:
        module.traceback = _Tracebacks(module.traceback)
    for name in LOGGERS:
        logging.getLogger(name).addFilter(OneLine())


def sentence(error: Exception) -> str:
    """The sentence for the visitor about an error; an unexpected error's traceback goes to the log."""
    if isinstance(error, ValueError | Interrupted):
        return shortened(str(error))
    log.error("a drawing failed", exc_info=error)
    return f"The drawing failed ({type(error).__name__}); the server keeps running, and its log has the details."


def _named(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}"
