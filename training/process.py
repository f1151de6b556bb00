"""What a training process needs from its surroundings: a C library allocator that keeps its memory."""

from __future__ import annotations

import os
import sys

ALLOCATOR = {
    "MALLOC_MMAP_THRESHOLD_": "4294967296",
    "MALLOC_TRIM_THRESHOLD_": "8589934592",
    "MALLOC_TOP_PAD_": "268435456",
    "MALLOC_MMAP_MAX_": "0",
}
"""glibc's settings; else a CPU training step maps and unmaps every large tensor and takes 4 to 7 times as long."""


def ensure_allocator() -> None:
    """Start this program anew with ALLOCATOR in its environment, unless it is there already; Linux only.

    Elsewhere nothing is done. The C library reads these variables once, before `main`: setting them from inside
    would have no effect.
    Call it first thing in `main`, before tensors are made.
    """
    if not sys.platform.startswith("linux") or "MALLOC_TRIM_THRESHOLD_" in os.environ:
        return
    sys.stdout.flush()
    sys.stderr.flush()
    os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], {**os.environ, **ALLOCATOR})
