"""A training that is killed in the middle, as a process of its own: `python killed.py packet|kvlink OUT [MODEL]`."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1])]

import torch  # noqa: E402
import train_kit as kit  # noqa: E402

from kvilt.lab.train.job import Progress  # noqa: E402

KILLED_AT = 5


def deadly(progress: Progress) -> None:
    """Die between two checkpoints."""
    if progress.stage == "train" and progress.step == KILLED_AT:
        os.kill(os.getpid(), signal.SIGKILL)


if __name__ == "__main__":
    torch.set_num_threads(1)
    if sys.argv[1] == "packet":
        from kvilt.lab.train.packet import train_packet

        train_packet(kit.engine(), kit.samples(), kit.QUICK, sys.argv[2], None, deadly)
    else:
        from kvilt.lab.train.kvlink import train_kvlink

        train_kvlink(sys.argv[3], kit.samples(), kit.LINKED, sys.argv[2], None, deadly)
