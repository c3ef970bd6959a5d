"""Draw benchmarks/methods.png from methods.json: accuracy and fidelity of every method over what it is charged."""

from __future__ import annotations

from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from quality_tables import METHODS, Cell, label, listed, load, rows

FOLDER = Path(__file__).parent.parent / "benchmarks"
TITLES = dict(zip(METHODS, ("one document", "two documents", "earlier chunk needed", "bAbI"), strict=True))


def family(strategy: str) -> str:
    """A method's name without its budget."""
    name = strategy.partition(":")[0]
    return name if "score" not in strategy and "stages" not in strategy else strategy.replace("ratio=0.2,", "")


def main() -> None:
    """One column per kind of question: accuracy above, agreement with full recompute below; a line joins budgets."""
    every = rows(load("methods")).items()
    found = {label(*key).strip("`"): row for key, row in every if listed(*key) and key[1] != "no documents"}
    families = list(dict.fromkeys(map(family, found)))

    looks = {name: ("osD^vPX*"[i // 10], f"C{i % 10}") for i, name in enumerate(families)}
    figure = Figure(figsize=(17, 8), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(2, len(METHODS), sharex=True)
    for column, kind in enumerate(METHODS):
        for line, (figures, axis) in enumerate(((accuracy, "right, %"), (agreement, "same answer as full, %"))):
            plot = axes[line, column]
            for name in families:
                points = sorted((r[kind]["charged"], figures(r[kind])) for s, r in found.items() if family(s) == name)
                mark, colour = looks[name]
                plot.plot(*zip(*points, strict=True), marker=mark, color=colour, lw=0.8, ms=5, label=name)
            plot.set_title(TITLES[kind] if line == 0 else "")
            plot.set_ylabel(axis if column == 0 else "")
            plot.set_xlabel("charged compute (full recompute = 1)" if line else "")
            plot.grid(alpha=0.3)
    handles, labels = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right center", frameon=False)
    figure.savefig(FOLDER / "methods.png", dpi=110)


def accuracy(cell: Cell) -> float:
    """Per cent right."""
    return float(cell["accuracy"][0])


def agreement(cell: Cell) -> float:
    """Per cent of answers equal to full recompute's."""
    return float(cell["agreement"])


if __name__ == "__main__":
    main()
