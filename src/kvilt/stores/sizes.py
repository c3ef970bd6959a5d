"""Byte sizes as people write them: "200GB", "4GiB", "512MB"."""

from __future__ import annotations

import re
from typing import TypeAlias

from kvilt.errors import SpecError

Size: TypeAlias = str | int | None
_PATTERN = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([kmgt]?)(i?)b?\s*", re.IGNORECASE)


def parse_size(value: Size, option: str = "size") -> int | None:
    """Bytes of "200GB" (decimal), "4GiB" (binary) or 512; None stays None. Raises SpecError."""
    if value is None:
        return None
    match = _PATTERN.fullmatch(str(value))
    if match is None or (match[3] and not match[2]):
        raise SpecError(f"{option}={value!r} is not a size: write it like 200GB, 4GiB, 512MB or a number of bytes.")
    size = int(float(match[1]) * (1024 if match[3] else 1000) ** " kmgt".index(match[2].lower() or " "))
    if size <= 0:
        raise SpecError(f"{option}={value!r} must be more than 0 bytes.")
    return size


def show_size(size: float) -> str:
    """A size for people, in decimal units: "1.5 GB"."""
    for unit in ("bytes", "kB", "MB", "GB"):
        if size < 1000:
            return f"{size:.0f} {unit}" if unit == "bytes" else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:.1f} TB"
