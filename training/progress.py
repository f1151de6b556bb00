"""How far a run is: lines of JSON in its log, and the same on stderr with the time that is left."""

import json
import math
import time
from pathlib import Path

from hi_diffusers.console import say
from training.process import written_whole


class Progress:
    """The log of one run, which may be read while the run goes on.

    What a killed run wrote after the checkpoint that this one goes on from is dropped, since these steps come again.
    """

    def __init__(self, log: Path, step: int, num_steps: int) -> None:
        """`step` of `num_steps` is where the run begins or goes on."""
        self.log, self.num_steps = log, num_steps
        self._first, self._started = step, time.perf_counter()
        if log.exists():
            whole = [line for line in log.read_text().splitlines(keepends=True) if line.endswith("\n")]
            with written_whole(log) as partial:
                partial.write_text("".join(line for line in whole if json.loads(line)["step"] <= step))
        if step:
            say(f"going on at step {step} of {num_steps}")

    def seconds_per_step(self, step: int) -> float:
        """Since this process began, all that happened between the steps included."""
        return (time.perf_counter() - self._started) / max(1, step - self._first)

    def record(self, step: int, **entry: object) -> None:
        """Append a line to the log, unless it is there: a finished run that is started again repeats nothing."""
        line = json.dumps({"step": step} | entry) + "\n"
        if not self.log.exists() or line not in self.log.read_text().splitlines(keepends=True):
            with self.log.open("a") as file:
                file.write(line)

    def report(self, step: int, **entry: float) -> None:
        """Record figures, and say them with the time that is left."""
        self.record(step, **entry)
        figures = ", ".join(f"{name} {value:g}" for name, value in entry.items())
        left = math.ceil((self.num_steps - step) * self.seconds_per_step(step) / 60)
        say(f"step {step} of {self.num_steps}: {figures}; {left} min left")
