"""`kvilt serve`."""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated

from typer import Argument

from kvilt.cli import talk
from kvilt.cli.options import Run
from kvilt.serve.settings import Settings

Model = Annotated[str | None, Argument(metavar="[MODEL]", help="As --model.")]


def serve(serving: Settings, options: Run, served: Model = None) -> None:
    """Serve documents in any order over HTTP, as OpenAI does, with a playground."""
    from kvilt.serve import launch

    options = replace(options, model=served or options.model)
    launch.run(options.named(), options.engine, serving, talk.say)
