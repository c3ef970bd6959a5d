"""Synthetic biographies in the manner of KV Packet's: six sentences a person, one attribute asked for."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import ClassVar

from kvilt.lab.evaluate.tasks.base import Generated, Sample, listed, require
from kvilt.types import Document

_FIRST = listed("Alma,Bruno,Clara,Dario,Edith,Felix,Greta,Hugo,Irene,Jonas,Klara,Leon,Marta,Nils,Olga,Pavel,Rita,Simon")
_LAST = listed(
    "Abern,Bastow,Calder,Dorvin,Elmgren,Falkner,Gadsby,Harrow,Iverson,Jessop,Kestrel,Lindqvist,Marlow,Norcott,Oswin,"
    "Pelham,Quarles,Rothwell,Strand,Tolland,Umber,Vasko,Wexley,Yarrow,Zeller,Ashdown,Birkett,Corran,Dunmore,Everly"
)
_MONTHS = listed("January,February,March,April,May,June,July,August,September,October,November,December")
_CITIES = listed("Arlow,Brenhaven,Castelmar,Dunwick,Eastmere,Fairholt,Glenport,Hartsea,Ironbridge,Jorvale,Kingsmoor")
_COLLEGES = listed("Aldine,Brackley,Corwen,Drayton,Elstree,Foxhall,Grantham,Holbrook")
_FIELDS = listed("botany,civil engineering,economics,geology,history,linguistics,marine biology,music theory,physics")
_FIRMS = listed("Amberlight,Bluegate,Corvex,Deltaworks,Everstone,Fernhill,Goldleaf,Hexam,Ironwood,Juniper")
_JOBS = listed("an archivist,a bookkeeper,a cartographer,a designer,an electrician,a translator,a surveyor,a chemist")

# attribute: two ways to say it, and the question
_SENTENCES: dict[str, tuple[str, str, str]] = {
    "birthday": ("{name} was born on {v}.", "{name} came into the world on {v}.", "On which date was {name} born?"),
    "birth city": ("{name} was born in {v}.", "The birthplace of {name} is {v}.", "In which city was {name} born?"),
    "college": ("{name} studied at {v}.", "{name} is a graduate of {v}.", "Where did {name} study?"),
    "field": ("{name} took a degree in {v}.", "The subject of {name} was {v}.", "What did {name} study?"),
    "company": ("{name} works for {v}.", "The employer of {name} is {v}.", "Which company does {name} work for?"),
    "work": ("{name} earns a living as {v}.", "By trade {name} is {v}.", "What does {name} work as?"),
}


@dataclass(frozen=True)
class Biography(Generated):
    """`people` biographies, one attribute of one of them asked for; family names differ between train and test."""

    NAME: ClassVar[str] = "biography"

    answer_tokens: int = 32
    people: int = 5

    def __post_init__(self) -> None:
        super().__post_init__()
        require(1 <= self.people <= len(_LAST) // 2, f"biography: people must be 1 to {len(_LAST) // 2}.")

    @property
    def metrics(self) -> tuple[str, ...]:
        """KV Packet's corpus F1 first."""
        return "micro_f1", "accuracy", "exact", "f1"

    def _sample(self, rng: random.Random, split: str, number: int) -> Sample:
        family = _LAST[::2] if split == "train" else _LAST[1::2]
        names = [f"{rng.choice(_FIRST)} {last}" for last in rng.sample(family, self.people)]
        people = [(name, _attributes(rng)) for name in names]
        documents = tuple(Document(_biography(rng, name, told)) for name, told in people)
        place = rng.randrange(self.people)
        name, told = people[place]
        attribute = rng.choice(list(_SENTENCES))
        question = f"{_SENTENCES[attribute][2].format(name=name)} Respond with the answer only. Answer:"
        metadata = {"kind": attribute, "position": place, "gold": [place]}
        return Sample(f"{split}-{number}", question, documents, (told[attribute],), metadata)


def _attributes(rng: random.Random) -> dict[str, str]:
    return {
        "birthday": f"{rng.choice(_MONTHS)} {rng.randint(1, 28)}, {rng.randint(1900, 1999)}",
        "birth city": rng.choice(_CITIES),
        "college": f"{rng.choice(_COLLEGES)} College",
        "field": rng.choice(_FIELDS),
        "company": rng.choice(_FIRMS),
        "work": rng.choice(_JOBS),
    }


def _biography(rng: random.Random, name: str, told: dict[str, str]) -> str:
    return " ".join(rng.choice(_SENTENCES[key][:2]).format(name=name, v=value) for key, value in told.items())
