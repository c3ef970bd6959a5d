"""Layers placed by a second thread, ahead of the forward pass."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from kvilt.types import Rows


class Staging:
    """Host buffers used in turn for uploads that do not wait; one is reused only when its last upload is through.

    Memory is pinned and events are recorded on CUDA; on a CPU the same code runs with ordinary memory, for the tests."""

    def __init__(self, size: int, device: torch.device, count: int = 4) -> None:
        cuda = device.type == "cuda"
        self._buffers = [torch.empty(size, dtype=torch.uint8, pin_memory=cuda) for _ in range(count)]
        self._uploads: list[Any] = [torch.cuda.Event() if cuda else None for _ in range(count)]
        self._at = 0

    def takes(self, rows: Rows) -> bool:
        """Whether rows are uploaded as they are stored; quantised ones are uploaded by themselves, in fewer bytes."""
        layers, heads, count, dim = rows.shape
        return rows.nbytes == 2 * layers * heads * count * dim * rows.dtype.itemsize

    def upload(self, rows: Rows, layers: slice, target: Tensor) -> None:
        """Read some layers and queue their upload into `target` (layers, 2, heads, rows, head_dim)."""
        self._at = (self._at + 1) % len(self._buffers)
        sent = self._uploads[self._at]
        if sent is not None:
            sent.synchronize()
        size = len(target) * 2 * rows.shape[1] * rows.shape[2] * rows.shape[3] * rows.dtype.itemsize
        stored = self._buffers[self._at][:size].view(rows.dtype).view(target.shape)
        rows.read(layers, stored)
        target.copy_(stored, non_blocking=True)
        if sent is not None:
            sent.record()


Place = Callable[[slice, Staging | None], None]  # some layers' rows, through staging buffers if there are any


class Loader:
    """Places layers from a thread; on CUDA through pinned memory and a stream of its own.

    The forward pass waits for a layer only when it reaches it, so loading the next layers overlaps computing this one.
    `group` layers are placed at a time; `size` is the most bytes that one document has in a layer."""

    def __init__(self, place: Place, layers: int, group: int, size: int, device: torch.device, staged: bool) -> None:
        self._place, self._group, self._size, self._device = place, group, size, device
        self.ready = [threading.Event() for _ in range(layers)]
        self.marks: list[Any] = [None for _ in range(layers)]
        self.error: BaseException | None = None
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        if self.stream is not None:  # the buffer may still be in use by the work queued before
            self.stream.wait_stream(torch.cuda.current_stream(device))
        self._staged = staged
        self._stopped = False
        self._thread = threading.Thread(target=self._run, name="kvilt-loader", daemon=True)
        self._thread.start()

    def wait(self, layer: int) -> None:
        """Return once a layer is placed, as far as work queued after this call can tell; re-raises what went wrong."""
        self.ready[layer].wait()
        if self.error is not None:
            raise self.error
        if self.marks[layer] is not None:
            torch.cuda.current_stream(self._device).wait_event(self.marks[layer])

    def stop(self) -> None:
        """Return when the thread has written its last byte: the buffer may then serve another prompt."""
        self._stopped = True
        self._thread.join()
        if self.stream is not None:
            self.stream.synchronize()

    def _run(self) -> None:
        try:
            with torch.no_grad(), torch.cuda.stream(self.stream):
                self._place_all()
        except BaseException as error:  # handed to the waiting thread, whatever it is
            self.error = error
        finally:
            for event in self.ready:
                event.set()

    def _place_all(self) -> None:
        count = len(self.ready)
        staging = Staging(self._size * self._group, self._device) if self._staged and self._size else None
        for first in range(0, count, self._group):
            if self._stopped:
                return
            layers = slice(first, min(first + self._group, count))
            self._place(layers, staging)
            for layer in range(count)[layers]:
                self.marks[layer] = None if self.stream is None else self.stream.record_event()
                self.ready[layer].set()
