"""The demo's Wikipedia paragraphs and questions, taken by rule from SQuAD 1.1's development articles (never trained on).

Run: python recipes/smollm2/collection.py QA_FOLDER [PACKAGE]. Of each article its first six paragraphs; of paragraphs 1, 2, 4
and 6 the first question."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import data

ARTICLES = (
    *("Nikola Tesla", "Black Death", "Oxygen", "Harvard University", "Genghis Khan", "Warsaw", "Immune system"),
    *("Doctor Who", "1973 oil crisis", "Southern California"),
)
PARAGRAPHS, ASKED = 6, (0, 1, 3, 5)


def made(rows: list[dict[str, Any]]) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Paragraphs and questions as the package ships them."""
    papers, asked = [], []
    for article in ARTICLES:
        paragraphs: dict[str, list[dict[str, Any]]] = {}
        for row in rows:
            if row["docs"][0]["title"] == article:
                paragraphs.setdefault(row["passage_id"], []).append(row)
        first = list(paragraphs.items())[:PARAGRAPHS]
        papers += [{"id": name, "title": article, "text": of[0]["docs"][0]["text"]} for name, of in first]
        for number in ASKED:
            q = first[number][1][0]
            documents = [name for name, _ in first]
            asked.append({"id": q["id"], "question": q["question"], "answers": q["answers"], "documents": documents})
    return papers, asked


def main() -> None:
    """Write both files."""
    package = Path(sys.argv[2] if len(sys.argv) > 2 else Path(__file__).parents[2] / "src/kvilt/builtin")
    parts = made(data.read(Path(sys.argv[1]) / "squad_dev.jsonl.gz"))
    for name, lines in zip(("wikipedia", "wikipedia-questions"), parts, strict=True):
        text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
        (package / f"{name}.jsonl").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
