"""A model that one thread has loaded and another one runs is as fast there; single tokens are multiplied in the faster way."""

from __future__ import annotations

import contextlib
import subprocess
import sys

import pytest
import torch
from torch.backends import mkldnn

from kvilt.model import decoding

HELPERS = """
import os, threading, time, torch
torch.set_num_threads(2)
def compute(): torch.ones(1 << 20).exp_()
def helpers(): return len(os.listdir("/proc/self/task")) - threading.active_count()
def helpers_end(to):
    until = time.monotonic() + 10  # threads that have ended are there for a moment
    while helpers() > to and time.monotonic() < until: time.sleep(0.01)
none = helpers()
compute()
assert helpers() == none + 1, "one helper"
{work}
helpers_end(none)
assert helpers() == none, f"{{helpers() - none}} helpers live on"
compute()
assert helpers() == none + 1, "they come back"
"""
RELEASE = "from kvilt.model.cores import release_cores; release_cores()"
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


def test_a_single_token_is_multiplied_without_onednn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Danger: the switch stays off after an error, or is turned while another pass needs it; prefill is many times slower then."""
    monkeypatch.setattr(decoding, "_is_plain_faster", lambda: True)
    cpu, half = torch.device("cpu"), torch.bfloat16
    with decoding.passing(1, half, cpu):
        assert not mkldnn.enabled
        with decoding.passing(5, half, cpu):  # of another thread
            assert not mkldnn.enabled
        assert not mkldnn.enabled
    with contextlib.suppress(ZeroDivisionError), decoding.passing(1, half, cpu):
        raise ZeroDivisionError
    assert mkldnn.enabled
    with decoding.passing(5, half, cpu), decoding.passing(1, half, cpu):
        assert mkldnn.enabled
    for tokens, dtype, device in ((2, half, cpu), (1, torch.float32, cpu), (1, half, torch.device("meta"))):
        with decoding.passing(tokens, dtype, device):
            assert mkldnn.enabled


def test_which_way_is_faster_is_measured() -> None:
    """Danger: measuring leaves the switch off."""
    assert isinstance(decoding._is_plain_faster(), bool)
    assert mkldnn.enabled
