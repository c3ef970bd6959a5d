"""Small examples written by hand in the layouts that the datasets are published in."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

OWN = [
    {
        "id": f"q{i}",
        "question": f"Who keeps key {'x' * (i + 1)}?",
        "answers": [f"Person{i}"],
        "docs": [
            {"title": "Doors", "text": "Nobody keeps the doors.", "gold": False},
            {"title": "Keys", "text": f"Person{i} keeps key {i}.", "gold": True},
        ],
    }
    for i in range(8)
]

HOTPOT = {
    "_id": "h1",
    "question": "Who is older, Ann or Bob?",
    "answer": "Ann",
    "type": "comparison",
    "level": "easy",
    "supporting_facts": [["Ann", 0], ["Bob", 0]],
    "context": [
        ["Cid", ["Cid is 3.", " He sings."]],
        ["Ann", ["Ann is 9."]],
        ["Bob", ["Bob is 7.", " He swims."]],
        ["Blank", []],
    ],
}
HOTPOT_HUB = {
    "id": "h1",
    "question": "Who is older, Ann or Bob?",
    "answer": "Ann",
    "type": "comparison",
    "level": "easy",
    "supporting_facts": {"title": ["Ann", "Bob"], "sent_id": [0, 0]},
    "context": {"title": ["Cid", "Ann", "Bob"], "sentences": [["Cid is 3."], ["Ann is 9."], ["Bob is 7."]]},
}
TWO_WIKI_HUB = {
    "_id": "w1",
    "question": "Where was the director of Film A born?",
    "answer": "Oslo",
    "type": "compositional",
    "supporting_facts": json.dumps([["Film A", 0], ["Dora", 0]]),
    "context": json.dumps(
        [["Film A", ["Film A is by Dora."]], ["Dora", ["Dora was born in Oslo."]], ["Eve", ["Eve."]]]
    ),
}
MUSIQUE = {
    "id": "3hop1__1_2_3",
    "question": "Who founded it?",
    "answer": "Gil",
    "answer_aliases": ["Gilbert", "Gil"],
    "answerable": True,
    "paragraphs": [
        {"idx": 0, "title": "A", "paragraph_text": "A was founded by Gil.", "is_supporting": True},
        {"idx": 1, "title": "B", "paragraph_text": "B is far.", "is_supporting": False},
    ],
}
NQ = {
    "question": "who painted it",
    "answers": ["Hal"],
    "ctxs": [{"title": "Gold", "text": "Hal painted it.", "isgold": True, "hasanswer": True}]
    + [{"title": f"D{i}", "text": f"Distractor {i}.", "isgold": False, "hasanswer": False} for i in range(9)],
}
TRIVIA = {
    "question": "Which river?",
    "target": "Rhine",
    "answers": ["The Rhine", "Rhine"],
    "ctxs": [{"id": str(i), "title": f"T{i}", "text": f"River {i}.", "score": 1.0} for i in range(12)],
}
NEWS = [
    {"document": f"First article {i}.\n It is long. ||||| Second article {i}. |||||", "summary": f"– Summary {i}."}
    for i in range(4)
]
CHATS = [
    {"id": str(i), "dialogue": f"Ann: Hi {i}\r\nBob: Bye", "summary": f"Ann greets Bob, time {i}."} for i in range(23)
]

BABI = """1 Mary moved to the hall.
2 John went to the garden.
3 Where is Mary? \thall\t1
4 Mary took the milk.
5 Mary took the apple.
6 What is Mary carrying? \tmilk,apple\t4 5
1 Sandra went home.
2 Where is Sandra?\thome\t1
"""


def jsonl(path: Path, rows: list[dict]) -> Path:
    text = "".join(json.dumps(row) + "\n" for row in rows)
    if path.suffix == ".gz":
        path.write_bytes(gzip.compress(text.encode()))
    else:
        path.write_text(text)
    return path
