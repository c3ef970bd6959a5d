"""Options that take several values, as in `--docs a.txt b.txt` and `--docs *.txt`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from typer.core import TyperCommand

OPTIONS = {"--docs", "-d", "--pick"}


def spread(arguments: Sequence[str]) -> Iterator[str]:
    """Repeat an option before each of its values: `--docs a b` becomes `--docs a --docs b`."""
    option, taken = "", False
    for position, argument in enumerate(arguments):
        if argument == "--":
            yield from arguments[position:]
            return
        if argument.startswith("-") and argument != "-":
            option, taken = (argument, False) if argument in OPTIONS else ("", False)
            yield argument
        else:
            if option and taken:
                yield option
            yield argument
            taken = True


class Several(TyperCommand):
    """A command whose OPTIONS take several values."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Parse with repeated options written out."""
        return super().parse_args(ctx, list(spread(args)))
