"""Tables and plots from record files. For the command line:

    report(out_dir, by=None) -> str        # Markdown; also written to out_dir/report.md
    plot(out_dir) -> list[Path]            # one PNG a task; needs the extra `plot`

`by` is a key of the samples' metadata ("position", "hops", "kind") that adds one column a value."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kvilt.errors import UserError
from kvilt.lab.evaluate.bootstrap import Interval, difference, interval
from kvilt.lab.evaluate.metrics import Pair
from kvilt.lab.evaluate.records import read, slug
from kvilt.lab.pages import figure, markdown

_ORDER = {"full": 0, "strategy": 1, "floor": 2}
_COLUMNS = "strategy|{metric} [95 %]|− full [95 %]|kept %|agreement %|first token %|KL|charged|TTFT ms|kB read|n"


@dataclass(frozen=True, eq=False)
class Rows:
    """The records of one strategy on one task."""

    header: dict[str, Any]
    records: list[dict[str, Any]]

    @property
    def headline(self) -> str:
        """The metric that the task leads with."""
        return str(self.header["metrics"][0])

    def pairs(self, metric: str) -> list[Pair]:
        """(numerator, denominator) of every record."""
        return [(r["metrics"][metric][0], r["metrics"][metric][1]) for r in self.records]

    def score(self, metric: str | None = None) -> Interval:
        """A metric over all samples, in per cent, with its interval."""
        return _percent(interval(self.pairs(metric or self.headline), [r["group"] for r in self.records]))

    def mean(self, *path: str) -> float | None:
        """The mean of a field over the records that have it."""
        return statistics.fmean(values) if (values := self._values(*path)) else None

    def median(self, *path: str) -> float | None:
        """The median of a field over the records that have it."""
        return statistics.median(values) if (values := self._values(*path)) else None

    def where(self, key: str, value: object) -> Rows:
        """The records whose metadata says so."""
        return Rows(self.header, [r for r in self.records if r["metadata"].get(key) == value])

    def _values(self, *path: str) -> list[float]:
        values: list[Any] = list(self.records)
        for name in path:
            values = [value[name] for value in values]
        return [float(value) for value in values if value is not None]


def load(out_dir: str | Path) -> dict[str, list[Rows]]:
    """All record files of a folder by task: full recompute first, the no-document floor last."""
    place = Path(out_dir)
    if not place.is_dir():
        raise UserError(f"{place} is no folder: give the one that `kvilt evaluate` wrote to.")
    tasks: dict[str, list[Rows]] = {}
    for file in sorted(place.glob("*.jsonl")):
        header, records = read(file)
        if records:
            tasks.setdefault(f"{header['label']} (v{header['version']})", []).append(Rows(header, records))
    if not tasks:
        raise UserError(f"{place} holds no records (*.jsonl with at least one sample): run `kvilt evaluate` first.")
    order = lambda r: (_ORDER[r.header["role"]], r.mean("usage", "charged") or 0.0, str(r.header["name"]))  # noqa: E731
    return {task: sorted(rows, key=order) for task, rows in tasks.items()}


def report(out_dir: str | Path, by: str | None = None) -> str:
    """The Markdown report: a table for every task, with how it was made."""
    tasks = load(out_dir)
    if by is not None:
        _check_key(by, [r for rows in tasks.values() for row in rows for r in row.records])
    text = "\n\n".join(_section(task, rows, by) for task, rows in tasks.items()) + "\n"
    (Path(out_dir) / "report.md").write_text(text, encoding="utf-8")
    return text


def _check_key(by: str, records: Sequence[dict[str, Any]]) -> None:
    known = {key for record in records for key in record["metadata"]}
    if by not in known:
        raise UserError(f"no sample tells its {by!r}. Known: {', '.join(sorted(known)) or 'nothing'}.")


def _section(task: str, rows: Sequence[Rows], by: str | None) -> str:
    full = next((r for r in rows if r.header["role"] == "full"), None)
    head = _COLUMNS.format(metric=rows[0].headline).split("|")
    parts = [f"## {task}", markdown(head, [_cells(r, full) for r in rows])]
    others = rows[0].header["metrics"][1:]
    if others:
        cells = [[r.header["name"], *(_scored(r.score(m)) for m in others)] for r in rows]
        parts.append(markdown(["strategy", *(f"{m} [95 %]" for m in others)], cells))
    parts += [_split_table(rows, by)] if by and any(by in r["metadata"] for r in rows[0].records) else []
    return "\n\n".join([*parts, _making(rows)])


def _cells(rows: Rows, full: Rows | None) -> list[str]:
    pair = None if full is None or rows is full else common(rows, full)
    compared = [_against(*pair), _number(retention(*pair), 1)] if pair else ["", ""]
    fidelity = [rows.mean("agreement"), rows.mean("first_token"), rows.mean("kl")]
    costs = [rows.mean("usage", "charged"), rows.median("usage", "ttft_s"), rows.median("usage", "bytes_loaded")]
    scales = ((100, 1), (100, 1), (1, 4), (1, 3), (1000, 1), (1e-3, 0))
    figures = [_number(v, digits, factor) for v, (factor, digits) in zip((*fidelity, *costs), scales, strict=True)]
    return [rows.header["name"], _scored(rows.score()), *compared, *figures, str(len(rows.records))]


def common(rows: Rows, full: Rows) -> tuple[Rows, Rows] | None:
    """The records of both on the samples that both have, in one order; None where there are none."""
    theirs = {r["id"]: r for r in full.records}
    both = [r for r in rows.records if r["id"] in theirs and theirs[r["id"]]["prompt"] == r["prompt"]]
    return (Rows(rows.header, both), Rows(full.header, [theirs[r["id"]] for r in both])) if both else None


def _against(mine: Rows, theirs: Rows) -> str:
    """The paired difference to full recompute."""
    groups = [r["group"] for r in mine.records]
    gap = _percent(difference(mine.pairs(mine.headline), theirs.pairs(mine.headline), groups))
    return f"{gap.value:+.1f} [{gap.low:+.1f}, {gap.high:+.1f}]"


def retention(mine: Rows, theirs: Rows) -> float | None:
    """Of the samples that full recompute has right (half of the headline's points, or more), the per cent kept right."""
    pairs = zip(mine.pairs(mine.headline), theirs.pairs(mine.headline), strict=True)
    kept = [2 * a >= b for (a, b), (c, d) in pairs if d and 2 * c >= d]
    return 100 * statistics.fmean(kept) if kept else None


def _split_table(rows: Sequence[Rows], by: str) -> str:
    told = {str(r["metadata"][by]): r["metadata"][by] for row in rows for r in row.records if by in r["metadata"]}
    values = sorted(told.values(), key=lambda v: (isinstance(v, str), 0 if isinstance(v, str) else v, str(v)))
    cells = []
    for row in rows:
        parts = [row.where(by, value) for value in values]
        cells.append([row.header["name"], *(_scored(part.score()) if part.records else "" for part in parts)])
    return markdown([f"{rows[0].headline} by {by}", *map(str, values)], cells)


def _making(rows: Sequence[Rows]) -> str:
    header = rows[0].header
    kept = {key: value for key, value in header["options"].items() if value is not None}
    options = ", ".join(f"{key}={value}" for key, value in kept.items())
    shuffled = "documents shuffled" if header["shuffle"] else "documents in the order of the data"
    strategies = "\n".join(f"- {r.header['name']}: `{r.header['strategy']}`" for r in rows)
    budget = f"greedy, at most {header['max_new_tokens']} tokens"
    made = f"Model {header['model'][:16]}, kvilt {header['kvilt']}, seed {header['seed']}, {shuffled}, {budget}"
    return f"{made}; {options}. Differences are paired; intervals are bootstrap.\n\n{strategies}"


def _percent(share: Interval) -> Interval:
    return Interval(*(100 * value for value in share))


def _scored(score: Interval) -> str:
    return f"{score.value:.1f} [{score.low:.1f}, {score.high:.1f}]"


def _number(value: float | None, digits: int, factor: float = 1.0) -> str:
    return "" if value is None else f"{factor * value:.{digits}f}"


def plot(out_dir: str | Path) -> list[Path]:
    """Quality over charged compute and over TTFT, one PNG a task. Raises MissingExtra without matplotlib."""
    paths = []
    for task, rows in load(out_dir).items():
        drawn, (left, right) = figure(11, 4.5, columns=2)
        drawn.suptitle(task)
        _draw(left, rows, [r.mean("usage", "charged") or 0.0 for r in rows], "charged compute (full recompute = 1)")
        _draw(right, rows, [1000 * (r.median("usage", "ttft_s") or 0.0) for r in rows], "TTFT, median (ms)")
        left.set_ylabel(f"{rows[0].headline} (%)")
        right.legend(loc="upper left", bbox_to_anchor=(1.02, 1.0), frameon=False)
        paths.append(Path(out_dir) / f"{slug(task)}.png")
        drawn.savefig(paths[-1], dpi=120)
    return paths


def _draw(axes: Any, rows: Sequence[Rows], places: Sequence[float], label: str) -> None:
    for row, x in zip(rows, places, strict=True):
        value, low, high = row.score()
        errors = [[max(0.0, value - low)], [max(0.0, high - value)]]
        axes.errorbar([x], [value], yerr=errors, fmt="o", capsize=3, label=row.header["name"])
    axes.set_xlabel(label)
    axes.set_xlim(left=0)
