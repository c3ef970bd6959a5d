"""Workers as actors of Ray Data: on this machine, or wherever a Ray cluster has room.

Ray moves descriptions of parts there and ids, keys and sizes back. An actor that dies is started again by Ray, and gets its
part once more. On a cluster Kvilt is installed on every node, and the model, the store and the corpus lead to the same things
from all of them."""

from __future__ import annotations

import contextlib
import functools
import importlib
import json
import logging
import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from typing import Any

from kvilt.corpora.sources import Part
from kvilt.corpora.worker import Clerk, Job, Outcome, Runner, outcome_of
from kvilt.errors import MissingExtra, UserError

LOCAL = "local"
OBJECTS = 200_000_000  # bytes of a local Ray's own store: descriptions and counts are small
BLOCKS = 1000  # that Ray keeps an eye on; each holds a like number of parts


class Actor:
    """What Ray starts; the model is loaded once."""

    def __init__(self, job: dict[str, Any]) -> None:
        self.clerk = Clerk(Job(**job))

    def __call__(self, batch: dict[str, Any]) -> dict[str, list[str]]:
        """Outcomes of parts, both as JSON."""
        return {"outcome": [self.clerk(str(part)) for part in batch["part"]]}


def on_ray(address: str = LOCAL, gpus: float = 0.0) -> Runner:
    """What runs `encode_corpus` on Ray. `address` is a cluster's, "auto", or "local" for a Ray that ends with the run; one
    that this process uses already is taken as it is. Each actor has `gpus` GPUs. Raises UserError."""
    return functools.partial(_run, address, gpus)


def _run(address: str, gpus: float, job: Job, parts: Sequence[Part], actors: int) -> Iterator[Outcome]:
    try:
        ray, data = importlib.import_module("ray"), importlib.import_module("ray.data")
    except ImportError as error:
        raise MissingExtra("ray", "ray") from error
    own, log = not ray.is_initialized(), logging.getLogger("ray.data")
    if own:
        _begin(ray, address, actors)
    level = log.level
    try:
        log.setLevel(logging.ERROR)
        data.DataContext.get_current().enable_progress_bars = False
        rows = [{"part": json.dumps(asdict(part))} for part in parts]
        outcomes = data.from_items(rows, override_num_blocks=min(len(parts), BLOCKS)).map_batches(
            Actor,
            batch_size=1,
            compute=data.ActorPoolStrategy(size=min(actors, len(parts))),
            fn_constructor_args=(asdict(job),),
            num_cpus=1,
            **({"num_gpus": gpus} if gpus else {}),
        )
        with contextlib.redirect_stdout(sys.stderr):  # what Ray prints is no data of ours
            for row in outcomes.iter_rows():
                yield outcome_of(row["outcome"])
    finally:
        log.setLevel(level)
        if own:
            ray.shutdown()


def _begin(ray: Any, address: str, actors: int) -> None:
    local = {"num_cpus": actors, "object_store_memory": OBJECTS, "include_dashboard": False}
    options = local if address == LOCAL else {"address": address}
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")  # or it writes to this terminal what its files say, too
    try:
        ray.init(**options, log_to_driver=False, logging_level=logging.ERROR)
    except (ConnectionError, ValueError, RuntimeError) as error:
        raise UserError(f"no Ray at {address}: {error}") from error
