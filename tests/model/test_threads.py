"""A model that one thread has loaded and another one runs is as fast there."""

from __future__ import annotations

import subprocess
import sys

import pytest

HELPERS = """
import os, threading, torch
torch.set_num_threads(2)
def compute(): torch.ones(1 << 20).exp_()
def helpers(): return len(os.listdir("/proc/self/task")) - threading.active_count()
none = helpers()
compute()
assert helpers() == none + 1, "one helper"
{work}
assert helpers() == none, f"{{helpers() - none}} helpers live on"
compute()
assert helpers() == none + 1, "they come back"
"""
RELEASE = "from kvilt.model.threads import release_cores; release_cores()"
WORKER = "from kvilt.serve.worker import Worker; Worker()"
STREAM = """
from kvilt.engine.streaming import stream
gate, iterator = threading.Event(), None
iterator = stream(lambda _: gate.wait() and 1 / 0, None)
try: gate.set(), next(iterator)
except ZeroDivisionError: pass
"""


@pytest.mark.skipif(sys.platform != "linux", reason="helpers are counted in /proc")
@pytest.mark.parametrize("work", [RELEASE, WORKER, STREAM], ids=["alone", "server", "stream"])
def test_helpers_end_where_another_thread_takes_over(work: str) -> None:
    """Danger: OpenMP's helpers of the thread that loaded the model live on, and slow down those of the thread that runs it."""
    subprocess.run([sys.executable, "-c", HELPERS.format(work=work)], check=True)
