"""What lets a CPU compute as fast as it can."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import threading
import time
from collections.abc import Iterator
from typing import Any

import torch
from torch.nn.functional import linear

mkldnn: Any = torch.backends.mkldnn
HARD = 2  # omp_pause_hard of OpenMP 5.0: helper threads end
TRIED = 4096, 2048  # a matrix that no core's own cache holds

_lock = threading.Lock()
_running = 0  # passes of this process


def release_cores() -> None:
    """Call this in a thread that has computed and hands the model to another: its OpenMP helpers end.

    They come back when it computes again. GNU's OpenMP counts all helpers that live: where they are more than the cores,
    those at work sleep between any two operations, and a small model decodes a fifth slower."""
    with contextlib.suppress(AttributeError, OSError, TypeError):  # no OpenMP, or one without this
        ctypes.CDLL(None).omp_pause_resource_all(HARD)


@contextlib.contextmanager
def passing(tokens: int, dtype: torch.dtype, device: torch.device) -> Iterator[None]:
    """Wraps one pass of a model. On a CPU a single bfloat16 token is multiplied without oneDNN where that is faster.

    oneDNN reads weights at half the memory's speed for it. The switch is the whole process's, so it is left alone while
    another pass runs."""
    global _running
    plain = tokens == 1 and device.type == "cpu" and dtype == torch.bfloat16 and _is_plain_faster()
    with _lock:
        _running += 1
        plain = plain and _running == 1 and mkldnn.enabled
        if plain:
            mkldnn.enabled = False
    try:
        yield
    finally:
        with _lock:
            _running -= 1
            if plain:
                mkldnn.enabled = True


@functools.cache
def _is_plain_faster() -> bool:
    """Measured once: older versions of torch have no kernel of their own for it on some machines."""
    weight, token, before = (
        torch.ones(TRIED, dtype=torch.bfloat16),
        torch.ones(1, TRIED[1], dtype=torch.bfloat16),
        mkldnn.enabled,
    )
    seconds = dict[bool, float]()
    with torch.no_grad(), _lock:
        for enabled in (True, False) * 4:
            mkldnn.enabled = enabled
            began = time.perf_counter()
            linear(token, weight)
            seconds[enabled] = min(seconds.get(enabled, 1.0), time.perf_counter() - began)
        mkldnn.enabled = before
    return seconds[False] < 0.9 * seconds[True]
