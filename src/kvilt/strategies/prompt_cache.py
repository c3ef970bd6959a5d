"""Prompt Cache (arXiv 2311.04934, MLSys 2024): documents are modules with fixed intervals of positions."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from kvilt.errors import PromptError, SpecError
from kvilt.plan import Plan
from kvilt.strategies.base import Plain, Probe, begin
from kvilt.types import Prompt


@dataclass(frozen=True)
class PromptCache(Plain):
    """Module i takes the positions [system + i * slot, ...); positions left over are skipped.

    `consecutive` places documents without gaps instead (the stronger variant that later papers measured). `schema`
    names a JSON file of modules, in order: {"modules": [{"name": "terms", "length": 400},
    {"union": [{"name": "de", "length": 90}, {"name": "fr", "length": 80}]}, {"name": "customer", "length": 16}]}.
    A document goes to the module named like its id; alternatives of a union start at the same position; a document
    with store=False is a parameter: computed in its reserved place."""

    slot: int = 1024
    consecutive: bool = False
    schema: str = ""

    def __post_init__(self) -> None:
        if self.slot < 1:
            raise SpecError(f"option slot wants 1 or more, not {self.slot}.")

    def plan(self, prompt: Prompt, probe: Probe) -> Plan:
        """System and modules are reused at their intervals; the question is computed after the last of them."""
        layout = begin(prompt)
        intervals = self._intervals(prompt)
        for document, (start, length) in zip(prompt.documents, intervals, strict=True):
            if length is not None and document.length > length:
                raise PromptError(f"prompt_cache: {document.length} tokens do not fit a place of {length} positions.")
            layout.reuse(document, at=None if start is None else prompt.system.length + start)
        return layout.ask().plan()

    def _intervals(self, prompt: Prompt) -> list[tuple[int | None, int | None]]:
        """(start after the system part, length) of each document; None: wherever the last one ended."""
        if self.consecutive:
            return [(None, None)] * len(prompt.documents)
        if not self.schema:
            return [(i * self.slot, self.slot) for i in range(len(prompt.documents))]
        modules = read_schema(self.schema)
        unknown = [n for n in prompt.names if n not in modules]
        if unknown:
            raise PromptError(
                f"prompt_cache: {self.schema} has no module {unknown[0]!r}. Modules: {', '.join(modules)}."
            )
        twice = [n for n in dict.fromkeys(prompt.names) if prompt.names.count(n) > 1]
        if twice:
            raise PromptError(f"prompt_cache: module {twice[0]!r} stands twice in the prompt: it has one place alone.")
        chosen = {modules[n][0]: n for n in prompt.names}
        for name in prompt.names:
            if (other := chosen[modules[name][0]]) != name:
                raise PromptError(f"prompt_cache: {other!r} and {name!r} are alternatives of one union: choose one.")
        return [modules[n] for n in prompt.names]


def read_schema(path: str) -> dict[str, tuple[int, int]]:
    """Module name -> (first position, length); a union is as long as its longest member."""
    try:
        modules = json.loads(Path(path).read_text())["modules"]
        table: dict[str, tuple[int, int]] = {}
        at = 0
        for module in modules:
            members = module.get("union", [module])
            for member in members:
                if member["name"] in table or int(member["length"]) < 1:
                    raise ValueError(f"module {member['name']!r} stands twice or has no length")
                table[member["name"]] = (at, int(member["length"]))
            at += max(int(m["length"]) for m in members)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise SpecError(f"prompt_cache: schema {path} is not readable: {type(error).__name__} {error}.") from error
    return table
