"""`kvilt calibrate ape`: the temperature and scale that bring APE closest to full recompute on the user's own documents.

Nothing needs labels: what full recompute answers is what APE is held to."""

from __future__ import annotations

import functools
import json
import random
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

import typer
from torch import Tensor
from typer import Argument, Option

from kvilt.engine.documents import read_documents
from kvilt.engine.engine import Engine
from kvilt.errors import DocumentError, PromptError, UserError
from kvilt.lab.evaluate.fidelity import divergence
from kvilt.strategies.ape import Ape, ApeProfile
from kvilt.types import Document

TEMPERATURES = (0.5, 0.6, 0.7, 0.8, 0.9, 1.0, 1.1, 1.2)
PLAIN = (1.0, 1.0)  # parallel encoding as it is; a point of the grid
SCALES = (0.6, 0.7, 0.8, 0.9, 1.0, 1.1, 1.2)
QUOTED = 8  # words of a document that a question of ours quotes
FILLED = 0.5  # share of the context that a prompt's documents may take

app = typer.Typer(
    help="Fit a method's settings to your model and documents.", add_completion=False, rich_markup_mode=None
)
Ask = tuple[str, list[Document]]  # a question and the documents it is asked about


@dataclass(frozen=True, eq=False)
class Target:
    """One prompt, full recompute's answer to it, and its logits there, (tokens, vocab)."""

    question: str
    documents: list[Document]
    tokens: tuple[int, ...]
    logits: Tensor


def calibrate(
    engine: Engine,
    prompts: Sequence[Ask],
    tokens: int = 16,
    on_progress: Callable[[str], None] = lambda line: None,
) -> ApeProfile:
    """Choose by mean KL to full recompute on every second prompt; the others must agree, and give the figures.

    The search starts at plain parallel encoding (1, 1) and stops where no neighbour in the grid is closer. Where the other
    prompts do not find its result better, (1, 1) stays.
    Raises PromptError where there are no prompts, or one cannot be answered."""
    if not prompts:
        raise PromptError("nothing to calibrate on: no questions.")
    full = engine.with_strategy("full")
    targets = [_target(full, *p, tokens) for p in prompts]
    fitted, held_out = targets[::2], targets[1::2] or targets

    @functools.cache
    def kl(temperature: float, scale: float) -> float:
        mean = _distance(engine, fitted, temperature, scale)
        on_progress(f"temperature {temperature}, scale {scale}: KL {mean:.4f}")
        return mean

    best = descend(kl, TEMPERATURES, SCALES)
    found, plain = (_distance(engine, held_out, *setting) for setting in (best, PLAIN))
    if found >= plain:  # what seemed better was chance
        best, found = PLAIN, plain
    return ApeProfile(*best, engine.info.digest, found, plain)


def descend(
    cost: Callable[[float, float], float], first: Sequence[float], second: Sequence[float]
) -> tuple[float, float]:
    """The pair of the grid that is better than its eight neighbours, found by steps to the best of them from (1, 1).

    The two act through their product, too: steps along one axis at a time would stop in the slanted valley."""
    best = PLAIN
    while True:
        i, j = first.index(best[0]), second.index(best[1])
        near = [(a, b) for a in first[max(i - 1, 0) : i + 2] for b in second[max(j - 1, 0) : j + 2]]
        found = min([best, *near], key=lambda pair: cost(*pair))
        if found == best:
            return best
        best = found


def _target(full: Engine, question: str, documents: list[Document], tokens: int) -> Target:
    answer = full.answer(question, documents, max_new_tokens=tokens).tokens
    return Target(question, documents, answer, full.score(question, documents, answer))


def _distance(engine: Engine, targets: Sequence[Target], temperature: float, scale: float) -> float:
    """Mean KL(full || APE) in nats per token, over full recompute's own answers."""
    one = engine.with_strategy(Ape(temperature, scale))
    return sum(divergence(t.logits, one.score(t.question, t.documents, t.tokens)) for t in targets) / len(targets)


def asked(engine: Engine, documents: Sequence[Document], questions: Sequence[str], group: int) -> list[Ask]:
    """Every question with the documents that share most words with it, in their own order."""
    words = [set(d.content.lower().split()) for d in documents]
    sets = []
    for question in questions:
        shared = [len(w & set(question.lower().split())) for w in words]
        ranked = sorted(range(len(documents)), key=lambda i: -shared[i])
        sets.append((question, [documents[i] for i in sorted(_fitting(engine, documents, ranked)[:group])]))
    return sets


def made_up(engine: Engine, documents: Sequence[Document], count: int, group: int, seed: int = 0) -> list[Ask]:
    """Questions about what follows some words of a document, which stands among others. Raises DocumentError."""
    dice, made = random.Random(seed), []
    long = [i for i, d in enumerate(documents) if len(d.text.split()) > QUOTED]
    if not long:
        raise DocumentError(f"no document has more than {QUOTED} words to ask about: give questions (--questions).")
    for _ in range(count):
        chosen = dice.choice(long)
        others = dice.sample(range(len(documents)), len(documents))
        used = _fitting(engine, documents, [chosen, *(i for i in others if i != chosen)])[:group]
        words = documents[chosen].text.split()
        at = dice.randrange(len(words) - QUOTED)
        quote = " ".join(words[at : at + QUOTED])
        made.append((f'Which words follow "{quote}"?', [documents[i] for i in dice.sample(used, len(used))]))
    return made


def _fitting(engine: Engine, documents: Sequence[Document], order: Sequence[int]) -> list[int]:
    """As many of the documents, in this order, as leave room for the question and the answer; one at least."""
    room, taken = FILLED * engine.model.context_length, 0
    used: list[int] = []
    for i in order:
        taken += len(engine.text.document_ids(documents[i]))
        if used and taken > room:
            break
        used.append(i)
    return used


@app.callback()
def calibration() -> None:
    """Fit a method's settings to your model and documents."""


@app.command()
def ape(
    docs: Annotated[list[str], Argument(metavar="DOCS...", help=".txt, .md or .jsonl files, or folders of them.")],
    model: Annotated[str, Option("--model", "-m", envvar="KVILT_MODEL", help="Folder or hub name of the model.")],
    out: Annotated[Path, Option("--out", "-o", help="The profile, a JSON file.")] = Path("ape.json"),
    questions: Annotated[
        Path | None, Option("--questions", help="Text file, one question a line (default: made up from the documents).")
    ] = None,
    prompts: Annotated[int, Option("--prompts", min=1, help="Make up this many.")] = 48,
    group: Annotated[int, Option("--group", min=1, help="Documents in a prompt.")] = 5,
    system: Annotated[str | None, Option("--system", help="Text in front of the documents; '' for none.")] = None,
    dtype: Annotated[str, Option("--dtype", help="auto, float32, bfloat16 or float16.")] = "auto",
    device: Annotated[str, Option("--device", help="auto, cpu or cuda.")] = "auto",
    as_json: Annotated[bool, Option("--json", help="Print JSON on stdout.")] = False,
) -> None:
    """Choose APE's temperature and scale by closeness to full recompute; prints the strategy to use from then on."""
    if not out.absolute().parent.is_dir():
        raise UserError(f"cannot write {out}: there is no such folder.")
    documents, lines = read_documents(docs), _lines(questions)
    engine = Engine.load(model, "ape", "memory", system=system, dtype=dtype, device=device)
    sets = made_up(engine, documents, prompts, group) if lines is None else asked(engine, documents, lines, group)
    profile = calibrate(engine, sets, on_progress=lambda line: print(line, file=sys.stderr))
    close = f"KL to full recompute {profile.kl:.4f} nats per token, {profile.plain:.4f} with temperature and scale 1"
    print(f"temperature {profile.temperature}, scale {profile.scale}: {close}", file=sys.stderr)
    try:
        profile.save(out)
    except OSError as error:
        raise UserError(f"cannot write {out}: {error.strerror}.") from error
    spec = f"ape:profile={out}"
    print(json.dumps({"strategy": spec, **asdict(profile), "prompts": len(sets)}) if as_json else spec)


def _lines(file: Path | None) -> list[str] | None:
    if file is None:
        return None
    try:
        found = [line.strip() for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise PromptError(f"cannot read the questions in {file}: {error}.") from error
    if not found:
        raise PromptError(f"{file} holds no question; write one a line.")
    return found
