"""Paired, repeated timings: contestants take turns, medians and ratios come from one run."""

from __future__ import annotations

import platform
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
import transformers


def seconds(work: Callable[[], Any]) -> float:
    """Wall time of one call; CUDA work is waited for."""
    _wait()
    began = time.perf_counter()
    work()
    _wait()
    return time.perf_counter() - began


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def take_turns(
    contestants: dict[str, Callable[[], float]], repeats: int, once: Sequence[str] = ()
) -> dict[str, list[float]]:
    """Each contestant `repeats` times, one after the other, so that a noisy minute hits all of them alike.

    Those named in `once` take part in the first round only."""
    times: dict[str, list[float]] = {name: [] for name in contestants}
    for turn in range(repeats):
        for name, measure in contestants.items():
            if turn == 0 or name not in once:
                times[name].append(measure())
    return times


def summary(values: list[float]) -> dict[str, float]:
    """Minimum, median, maximum and count."""
    return {"median": statistics.median(values), "min": min(values), "max": max(values), "n": len(values)}


def machine() -> dict[str, str]:
    """What the figures were measured on."""
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "none"
    parts = {"cpu": _cpu_name(), "threads": str(torch.get_num_threads()), "gpu": gpu}
    versions = {"torch": torch.__version__, "transformers": transformers.__version__}
    return {**parts, **versions, "python": platform.python_version()}


def _cpu_name() -> str:
    try:
        with open("/proc/cpuinfo") as file:
            return next(line.split(":", 1)[1].strip() for line in file if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or "unknown"
