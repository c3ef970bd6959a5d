"""What lets a CPU compute as fast as it can."""

from __future__ import annotations

import contextlib
import ctypes

HARD = 2  # omp_pause_hard of OpenMP 5.0: helper threads end


def release_cores() -> None:
    """Call this in a thread that has computed and hands the model to another: its OpenMP helpers end.

    They come back when it computes again. GNU's OpenMP counts all helpers that live: where they are more than the cores,
    those at work sleep between any two operations, and a small model decodes a fifth slower."""
    with contextlib.suppress(AttributeError, OSError, TypeError):  # no OpenMP, or one without this
        ctypes.CDLL(None).omp_pause_resource_all(HARD)
