"""The bAbI tasks (Weston et al. 2015) read from a folder, each story cut into several documents."""

from __future__ import annotations

import gzip
import random
from collections.abc import Iterator
from pathlib import Path

from builtin.world.samples import Page, Question, Sample

TASKS = (1, 2, 6, 9, 12, 15)


def find(folder: Path, task: int, split: str) -> Path:
    """The file of one task, plain or gzipped."""
    for path in sorted(folder.glob(f"qa{task}_*_{split}.txt*")):
        return path
    raise FileNotFoundError(f"no bAbI file qa{task}_*_{split}.txt or .txt.gz in {folder}")


def read(path: Path) -> Iterator[list[tuple[str, ...]]]:
    """The stories of a file, as lines: (sentence,) or (question, answer, supporting line numbers)."""
    opener = gzip.open if path.suffix == ".gz" else open
    story: list[tuple[str, ...]] = []
    with opener(path, "rt", encoding="utf-8") as lines:
        for line in lines:
            number, _, rest = line.strip().partition(" ")
            if number == "1" and story:
                yield story
                story = []
            story.append(tuple(part.strip() for part in rest.split("\t")))
    if story:
        yield story


def sample(story: list[tuple[str, ...]], task: int, rng: random.Random) -> Sample:
    """Cut a story into pages of one to four sentences; every question starts a new page after it."""
    result = Sample()
    waiting: list[str] = []
    size = rng.randint(1, 4)
    for line in story:
        if len(line) == 1:
            waiting.append(line[0])
        if waiting and (len(line) > 1 or len(waiting) == size):
            result.pages.append(Page("", " ".join(waiting)))
            waiting, size = [], rng.randint(1, 4)
        if len(line) > 1:
            answer = _answer(story, line)
            kind = f"babi_{task}"
            result.questions.append(Question(line[0], answer, line[1], kind, len(result.pages)))
    return result


def _answer(story: list[tuple[str, ...]], line: tuple[str, ...]) -> str:
    """The supporting sentences, then the answer itself if they do not end with it."""
    support = [story[int(number) - 1][0] for number in line[2].split()]
    text = " ".join(support)
    last = support[-1].rstrip(".").split()
    return text if last[-1] == line[1] else f"{text} The answer is {line[1]}."


def load(folder: Path, split: str, seed: int = 0, tasks: tuple[int, ...] = TASKS) -> list[Sample]:
    """All stories of the given tasks as samples."""
    rng = random.Random(seed)
    return [sample(story, task, rng) for task in tasks for story in read(find(folder, task, split))]
