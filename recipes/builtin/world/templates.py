"""Sentences and questions in varied English; some combinations of phrase and frame are kept for the test."""

from __future__ import annotations

import random

# A statement is a frame around "subject + phrase"; the first phrase is also the wording of every answer.
PHRASES: dict[str, list[str]] = {
    "born": ["was born in {v}", "comes from {v}", "is a native of {v}", "spent a happy childhood in {v}"],
    "lives": ["lives in {v}", "has a house in {v}", "settled in {v}", "has moved to {v}"],
    "college": ["studied at {v}", "went to {v}", "holds a degree from {v}", "is a graduate of {v}"],
    "field": ["studied {v}", "has a degree in {v}", "took courses in {v}", "was trained in {v}"],
    "employer": ["works for {v}", "is employed by {v}", "has a post at {v}", "is on the staff of {v}"],
    "job": ["is a {v}", "earns a living as a {v}", "is known as a {v}", "is paid as a {v}"],
    "hobby": ["enjoys {v}", "spends the evenings {v}", "is fond of {v}", "relaxes by {v}"],
    "based": ["is based in {v}", "has its seat in {v}", "has its main office in {v}", "is run from {v}"],
    "makes": ["makes {v}", "sells {v}", "is a maker of {v}", "is known for {v}"],
    "founder": ["was founded by {v}", "was set up by {v}", "was started by {v}", "owes its existence to {v}"],
    "stands": ["is in {v}", "stands in the middle of {v}", "has its buildings in {v}", "opened in {v}"],
}

FRAMES = [
    "{s} {p}.",
    "By all accounts, {s} {p}.",
    "As far as anyone knows, {s} {p}.",
    "It is well known that {s} {p}.",
    "The papers say that {s} {p}.",
    "According to the records, {s} {p}.",
]

QUESTIONS: dict[str, list[str]] = {
    "born": ["Where was {s} born?", "In which city was {s} born?", "What is the birthplace of {s}?"],
    "lives": ["Where does {s} live?", "In which city does {s} live?", "What is the home town of {s}?"],
    "college": ["Where did {s} study?", "Which college did {s} go to?", "What is the college of {s}?"],
    "field": ["What did {s} study?", "Which subject did {s} study?", "What is the subject of {s}?"],
    "employer": ["Who does {s} work for?", "Which company does {s} work for?", "What is the employer of {s}?"],
    "job": ["What does {s} do for a living?", "Which job does {s} have?", "What is the job of {s}?"],
    "hobby": ["What does {s} enjoy?", "Which hobby does {s} have?", "What is the hobby of {s}?"],
    "based": ["Where is {s} based?", "In which city is {s} based?", "What is the seat of {s}?"],
    "makes": ["What does {s} make?", "Which goods does {s} make?", "What is the product of {s}?"],
    "founder": ["Who founded {s}?", "Which person founded {s}?", "What is the name of the founder of {s}?"],
    "stands": ["Where is {s}?", "In which city is {s}?", "What is the location of {s}?"],
}

# Two steps, named by both relations.
HOPS: dict[tuple[str, str], list[str]] = {
    ("employer", "based"): [
        "In which city is the employer of {s} based?",
        "Where is the company that {s} works for based?",
        "What is the seat of the employer of {s}?",
    ],
    ("employer", "makes"): [
        "Which goods does the employer of {s} make?",
        "What does the company that {s} works for make?",
        "What is the product of the employer of {s}?",
    ],
    ("college", "stands"): [
        "In which city is the college of {s}?",
        "Where is the college that {s} went to?",
        "What is the location of the college of {s}?",
    ],
    ("founder", "born"): [
        "In which city was the founder of {s} born?",
        "Where was the person who founded {s} born?",
        "What is the birthplace of the founder of {s}?",
    ],
}

ASKS = ["{q}", "Please tell me: {q}", "Here is a question: {q}", "{q} Answer from the documents.", "One thing: {q}"]

# A later document that points back at the one before it: same value, not named again.
SAME: dict[str, list[str]] = {
    "born": ["was born in the same city", "comes from the same city"],
    "college": ["studied at the same college", "went to the same college"],
    "employer": ["works for the same company", "is employed by the same company"],
    "hobby": ["enjoys the same hobby", "is fond of the same hobby"],
}


def _pick(rng: random.Random, first: list[str], second: list[str], test: bool) -> tuple[str, str]:
    """A pair of patterns; every fourth pair with a second pattern of its own is seen in the test only."""
    while True:
        # Half of what is said stays bare, or most tokens of a context would be filler.
        bare = not test and rng.random() < 0.5
        i, j = rng.randrange(len(first)), 0 if bare else rng.randrange(len(second))
        kept = j > 0 and (i + j) % 4 == 0
        if kept == test:
            return first[i], second[j]


def lower_first(subject: str) -> str:
    """A pronoun as it looks inside a sentence."""
    known = ("She", "He", "The company", "The college")
    return subject[0].lower() + subject[1:] if subject in known else subject


def statement(rng: random.Random, relation: str, subject: str, value: str, test: bool = False) -> str:
    """One sentence that states a fact; in the test, in a combination never trained on."""
    phrase, frame = _pick(rng, PHRASES[relation], FRAMES, test and rng.random() < 0.5)
    name = subject if frame.startswith("{s}") else lower_first(subject)
    return frame.format(s=name, p=phrase.format(v=value))


def question(rng: random.Random, relations: tuple[str, ...], subject: str, test: bool = False) -> str:
    """One question about one fact, or about two that hang together."""
    cores = QUESTIONS[relations[0]] if len(relations) == 1 else HOPS[(relations[0], relations[1])]
    core, ask = _pick(rng, cores, ASKS, test and rng.random() < 0.5)
    return ask.format(q=core.format(s=subject))


def answer(relation: str, subject: str, value: str) -> str:
    """The sentence that answers a question about one fact."""
    return f"{subject} {PHRASES[relation][0].format(v=value)}."
