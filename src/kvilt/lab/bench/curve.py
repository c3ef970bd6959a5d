"""TTFT over context length: the runs, the table and the plot."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from kvilt.errors import MissingExtra
from kvilt.lab.bench import models, ttft
from kvilt.model.loading import DTYPES

LONG_CONTEXT = 6000  # tokens; full prefill of longer prompts takes minutes and is measured once


def run(
    shape: str, counts: Sequence[int], strategies: Sequence[str], repeats: int, dtype: str, device: str,
    note: Callable[[str], None], keep: Path | None = None, compress: str = "",
) -> dict[str, Any]:  # fmt: skip
    """TTFT rows per number of documents; caches are kept in `keep` for the next run, or in a temporary folder."""
    model = models.random_model(shape, DTYPES[dtype], device)
    points = []
    with tempfile.TemporaryDirectory() as temporary:
        for count in counts:
            context = count * ttft.DOCUMENT_TOKENS
            note(f"{count} documents of {ttft.DOCUMENT_TOKENS} tokens: encoding")
            made = ttft.setting(model, strategies, keep or Path(temporary), count, compress)
            note(f"{count} documents of {ttft.DOCUMENT_TOKENS} tokens: measuring")
            rows = ttft.measure(made, repeats, full_once=context > LONG_CONTEXT)
            points.append({"documents": count, "context": context, "rows": rows})
    return {
        "shape": shape,
        "dtype": dtype,
        "device": device,
        "repeats": repeats,
        "compress": compress,
        "points": points,
    }


def table(result: dict[str, Any]) -> str:
    """Markdown: one row per context and strategy."""
    lines = [
        "| context | strategy | runs | TTFT s | of full | floor s | TTFT / floor | computed | MB loaded |",
        "|" + "---|" * 9,
    ]
    for point in result["points"]:
        lines += [_line(point["context"], name, row) for name, row in point["rows"].items()]
    return "\n".join(lines)


def _line(context: int, name: str, row: dict[str, Any]) -> str:
    share = f"{100 * row['of_full']:.2f} %" if "of_full" in row else ""
    taken = row["ttft_s"]
    head = f"| {context} | {name.split(':wrapper')[0]} | {taken['n']} | {taken['median']:.3f} | {share} |"
    if "floor_s" not in row:
        return f"{head} | | | |"
    return (
        f"{head} {row['floor_s']:.3f} | {row['of_floor']:.2f} | {row['computed_tokens']} | {row['bytes'] / 1e6:.0f} |"
    )


def plot(result: dict[str, Any], path: Path) -> None:
    """TTFT over context length, logarithmic, beside full prefill and the floor."""
    try:
        import matplotlib as mpl
    except ImportError as error:
        raise MissingExtra("matplotlib", "plot") from error
    mpl.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4.5))
    names = {name: None for p in result["points"] for name in p["rows"]}
    for name in names:
        here = [p for p in result["points"] if name in p["rows"]]
        contexts = [p["context"] for p in here]
        drawn = axes.plot(
            contexts, [p["rows"][name]["ttft_s"]["median"] for p in here], "o-", label=name.split(":wrapper")[0]
        )
        if all("floor_s" in p["rows"][name] for p in here):
            axes.plot(contexts, [p["rows"][name]["floor_s"] for p in here], ":", color=drawn[0].get_color())
    axes.set(xscale="log", yscale="log", xlabel="context tokens", ylabel="time to first token, s")
    axes.set_title(f"{result['shape']}, {result['dtype']}, {result['device']} (dotted: floor)")
    axes.grid(alpha=0.3, which="both")
    axes.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
