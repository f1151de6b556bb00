"""Prompts of another world than nano was taught, for its calibration: whatever a user types is such a prompt.

python -m training.outside 80 >> prompts.txt
"""

import argparse
import sys
from collections.abc import Sequence
from itertools import cycle, islice

import numpy as np

from hi_diffusers.console import Parser, run_script
from hi_diffusers.families.table import PRESETS

SEED = 3
STRANGE = (
    *("house", "dog", "river", "old", "photo", "of", "two", "people", "running", "under", "stormy", "sky", "portrait"),
    *("neon", "city", "robot", "apple", "tiny", "castle", "dragon", "ocean", "watercolor", "sunset", "face", "glass"),
    *("book", "train"),
)
MOST_WORDS = 13


def outside_prompts(count: int) -> list[str]:
    """Words of nano's vocabulary in random order, words that it does not know, and both mixed, in turn."""
    rng = np.random.default_rng(SEED)
    known = sorted(word for word in PRESETS["nano"].vocabulary if word.isalpha())
    pools = cycle((known, STRANGE, (*known, *STRANGE)))
    return [
        " ".join(str(rng.choice(pool)) for _ in range(int(rng.integers(1, MOST_WORDS + 1))))
        for pool in islice(pools, count)
    ]


def run(args: argparse.Namespace) -> None:
    """Print the prompts."""
    print("\n".join(outside_prompts(args.count)))


def main(argv: Sequence[str] | None = None) -> int:
    """The command line."""
    parser = Parser(prog="python -m training.outside", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("count", type=int, help="number of prompts")
    return run_script(run, parser, argv)


if __name__ == "__main__":
    sys.exit(main())
