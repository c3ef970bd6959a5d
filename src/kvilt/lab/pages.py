"""What reports are made of: Markdown tables, and figures drawn in memory."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from kvilt.errors import MissingExtra


def markdown(head: Sequence[str], cells: Sequence[Sequence[str]]) -> str:
    """A table whose first column is text and whose others are numbers."""
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *cells]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def figure(width: float, height: float, columns: int = 1) -> tuple[Any, Any]:
    """A matplotlib figure of that many inches and its axes (one, or an array), without window and global state.

    Raises MissingExtra without matplotlib."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        raise MissingExtra("matplotlib", "plot") from None
    made = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(made)
    axes: Any = made.subplots(1, columns, sharey=True)
    for one in [axes] if columns == 1 else axes:
        one.grid(alpha=0.3, which="both")
    return made, axes
