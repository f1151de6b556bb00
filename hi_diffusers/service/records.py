"""A server's log: one JSON object a line."""

import json
import logging
import sys
import threading
import time
import traceback
from typing import Any


class Records:
    """Writes the log to standard error.

    Args:
        prompts: whether prompts are logged.
    """

    def __init__(self, prompts: bool = False):
        self._prompts = prompts
        self._lock = threading.Lock()

    def write(self, event: str, **values: Any) -> None:
        """Write one line."""
        line = json.dumps({"time": round(time.time(), 3), "event": event, **values}, ensure_ascii=False)
        with self._lock:
            print(line, file=sys.stderr, flush=True)

    def say(self, sentence: str) -> None:
        """Write a sentence."""
        self.write("said", message=sentence)

    def note_request(self, scope: Any, status: int, seconds: float) -> None:
        """Write that a request was answered."""
        state, path = scope.get("state", {}), str(scope["path"])[:200]
        self.write(
            "request",
            id=state.get("request_id"),
            client=state.get("client"),
            method=scope["method"],
            path=path,
            status=status,
            seconds=round(seconds, 3),
        )

    def note_prompt(self, scope: Any, prompt: str) -> None:
        """Write a request's prompt, if prompts are logged."""
        if self._prompts:
            self.write("prompt", id=scope.get("state", {}).get("request_id"), prompt=prompt)

    def note_failure(self, error: BaseException) -> None:
        """Write an unexpected error with its traceback."""
        self.write("failure", error=type(error).__name__, traceback="".join(traceback.format_exception(error)))


class JsonHandler(logging.Handler):
    """Sends the records of Python's logging to the log, each as one line."""

    def __init__(self, records: Records):
        super().__init__()
        self._records = records

    def emit(self, record: logging.LogRecord) -> None:
        """Write a record."""
        text = record.getMessage()
        if record.exc_info and record.exc_info[1] is not None:
            text += "".join(traceback.format_exception(record.exc_info[1]))
        self._records.write("log", logger=record.name, level=record.levelname, message=text)
