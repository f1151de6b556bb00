"""Changed files and requests are read, or refused in a sentence: no other exception, no gigabytes, no minutes.

`.venv/bin/python -m tests.fuzz.test_fuzz NUMBER [READER]` feeds NUMBER inputs to every reader and prints the counts.
"""

import resource
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from random import Random

import pytest

from hi_diffusers.console import Refusal, one_line, quiet_libraries
from tests.fuzz.readers import READERS, REPAIRING, SLOW, Place
from tests.tiny_folder import write_folder

FAST, MANY = 120, 950
LONGEST_SECONDS, MOST_BYTES = 10.0, 2**30


@dataclass
class Outcome:
    """What became of a reader's inputs.

    Attributes:
        counts: "read" and "refused" -> how many.
        faults: a line about each input that ended otherwise.
        seconds: of the slowest input.
    """

    counts: Counter[str] = field(default_factory=Counter)
    faults: list[str] = field(default_factory=list)
    seconds: float = 0.0


def fuzz(reader: str, number: int, folder: Path, tiny: Path) -> Outcome:
    """Feed a reader with seeded inputs, the same every time."""
    feed, outcome = READERS[reader](Place(folder, tiny)), Outcome()
    for seed in range(number):
        began = time.monotonic()
        try:
            feed(Random(f"{reader} {seed}"))
            outcome.counts["read"] += 1
        except (ValueError, Refusal, OSError) as error:
            outcome.counts["refused"] += 1
            if type(error) not in (ValueError, Refusal) and not isinstance(error, OSError):
                outcome.faults.append(f"seed {seed}: {type(error).__name__} is no sentence: {error}"[:300])
            elif len(one_line(str(error))) > 1500:
                outcome.faults.append(f"seed {seed}: {len(str(error))} characters: {str(error)[:200]}")
        except Exception as error:
            outcome.faults.append(f"seed {seed}: {type(error).__name__}: {error}"[:1000])
        seconds = time.monotonic() - began
        outcome.seconds = max(outcome.seconds, seconds)
        if seconds > LONGEST_SECONDS:
            outcome.faults.append(f"seed {seed}: {seconds:.0f} s")
    return outcome


def peak_bytes() -> int:
    """The largest memory that this process has had."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def check(reader: str, number: int, folder: Path, tiny: Path) -> None:
    quiet_libraries()
    before = peak_bytes()
    outcome = fuzz(reader, number, folder, tiny)
    print(f"{reader}: {dict(outcome.counts)}, slowest {outcome.seconds:.1f} s")
    assert not outcome.faults, "\n".join(outcome.faults[:20])
    assert outcome.counts["refused"] or reader in REPAIRING, "nothing was refused: are the inputs changed at all?"
    assert peak_bytes() < before + MOST_BYTES


@pytest.mark.parametrize("reader", READERS)
def test_a_changed_input_is_read_or_refused(reader: str, tiny_folder: Path, tmp_path: Path) -> None:
    check(reader, FAST // 4 if reader in SLOW else FAST, tmp_path, tiny_folder)


@pytest.mark.slow
@pytest.mark.parametrize("reader", READERS)
def test_many_changed_inputs_are_read_or_refused(reader: str, tiny_folder: Path, tmp_path: Path) -> None:
    check(reader, MANY // 2 if reader in SLOW else MANY, tmp_path, tiny_folder)


if __name__ == "__main__":
    quiet_libraries()
    with tempfile.TemporaryDirectory() as scratch:
        model = write_folder(Path(scratch) / "tiny")
        total = Counter[str]()
        for name in sys.argv[2:] or READERS:
            place = Path(scratch) / name.replace(" ", "_")
            place.mkdir()
            found = fuzz(name, int(sys.argv[1]), place, model)
            total += found.counts + Counter(faults=len(found.faults))
            print(
                f"{name}: {dict(found.counts)}, {len(found.faults)} faults, slowest {found.seconds:.1f} s", flush=True
            )
            print("".join(f"  {fault}\n" for fault in found.faults[:12]), end="", flush=True)
        print(dict(total), f"peak {peak_bytes() / 2**20:.0f} MiB")
