"""Draw docs/plan.svg: the plans of four strategies for one prompt."""

from __future__ import annotations

from pathlib import Path

ROWS: dict[str, list[tuple[str, int, str]]] = {
    "full": [
        ("system", 60, "c"),
        ("document 2", 150, "c"),
        ("document 1", 120, "c"),
        ("document 3", 180, "c"),
        ("question", 80, "c"),
    ],
    "block": [
        ("system", 60, "r"),
        ("document 2", 150, "r"),
        ("document 1", 120, "r"),
        ("document 3", 180, "r"),
        ("question", 80, "c"),
    ],
    "kvlink": [
        ("system", 60, "r"),
        ("document 2", 150, "r"),
        ("", 14, "l"),
        ("document 1", 120, "r"),
        ("", 14, "l"),
        ("document 3", 180, "r"),
        ("", 14, "l"),
        ("question", 80, "c"),
    ],
    "kv_packet": [
        ("system", 60, "r"),
        ("", 8, "h"),
        ("document 2", 150, "r"),
        ("", 8, "h"),
        ("", 8, "h"),
        ("document 1", 120, "r"),
        ("", 8, "h"),
        ("", 8, "h"),
        ("document 3", 180, "r"),
        ("", 8, "h"),
        ("question", 80, "c"),
    ],
}
COLOURS = {"r": "#9ec5e8", "c": "#f2a65a", "l": "#d1495b", "h": "#3d6b99"}
LEGEND = [
    ("r", "reused from its cache"),
    ("c", "computed now"),
    ("l", "link tokens, computed now"),
    ("h", "trained vectors, stored with the document"),
]


def main() -> None:
    """Write the figure."""
    parts = []
    for i, (name, segments) in enumerate(ROWS.items()):
        y, x = 18 + 44 * i, 90
        parts.append(f'<text x="80" y="{y + 19}" text-anchor="end" font-weight="bold">{name}</text>')
        for label, width, kind in segments:
            parts.append(
                f'<rect x="{x}" y="{y}" width="{width}" height="28" rx="3" fill="{COLOURS[kind]}" stroke="white"/>'
            )
            parts.append(f'<text x="{x + width / 2}" y="{y + 19}" text-anchor="middle">{label}</text>' if label else "")
            x += width
    x = 16
    for kind, label in LEGEND:
        parts.append(
            f'<rect x="{x}" y="200" width="12" height="12" fill="{COLOURS[kind]}"/><text x="{x + 17}" y="210">{label}</text>'
        )
        x += 34 + 6.4 * len(label)
    body = "\n".join(p for p in parts if p)
    style = 'font-family="sans-serif" font-size="12"'
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 800 224" {style}>'
    svg = f'{head}\n<rect width="800" height="224" fill="white"/>\n{body}\n</svg>\n'
    Path(__file__).parent.parent.joinpath("docs", "plan.svg").write_text(svg)


if __name__ == "__main__":
    main()
