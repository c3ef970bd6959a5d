"""People, companies and colleges that do not exist, with names and values held out for the test."""

from __future__ import annotations

import random
import zlib
from dataclasses import dataclass, field

from builtin.world import words

SPLITS = ("train", "test")


def held_out(text: str) -> bool:
    """True when `text` is kept for the test split, whatever the seed."""
    return zlib.crc32(text.encode()) % words.HELD_OUT_SHARE == 0


@dataclass
class Entity:
    """One person, company or college with what is true of it, by relation."""

    name: str
    kind: str  # "person", "company" or "college"
    she: bool = False
    facts: dict[str, str] = field(default_factory=dict)

    @property
    def pronoun(self) -> str:
        """What a later sentence calls it when the name is not repeated."""
        if self.kind == "person":
            return "She" if self.she else "He"
        return f"The {self.kind}"


@dataclass
class World:
    """Draws entities; the test split uses only held-out names and values, the training split never does."""

    rng: random.Random
    split: str = "train"
    used: set[str] = field(default_factory=set)

    def draw(self, *parts: list[str], joint: str = "") -> str:
        """Join one word of each list into a string of this split, not used before in this world."""
        for _ in range(10_000):
            text = joint.join(self.rng.choice(part) for part in parts)
            if text not in self.used and held_out(text) == (self.split == "test"):
                self.used.add(text)
                return text
        raise ValueError(f"no more unused names of the {self.split} split; make a new World for every context")

    def city(self) -> str:
        """A city name such as "Tavik"."""
        return self.draw(words.ONSETS, words.CITY_ENDS)

    def person(self, like: str | None = None) -> Entity:
        """A person; `like` repeats the first or last name of someone else, to be mistaken for."""
        she = self.rng.random() < 0.5
        first = self.rng.choice(words.SHE_NAMES if she else words.HE_NAMES)
        last = self.draw(words.ONSETS, words.PERSON_ENDS)
        if like is not None:
            other_first, other_last = like.split()
            if self.rng.random() < 0.5:
                last = other_last
            else:
                first, she = other_first, other_first in words.SHE_NAMES
        name = f"{first} {last}"
        if name in self.used:
            return self.person(like)
        self.used.add(name)
        return Entity(name, "person", she)

    def company(self) -> Entity:
        """A company with a seat and a product."""
        stem = self.draw(words.ONSETS, words.FIRM_ENDS)
        company = Entity(f"{stem} {self.rng.choice(words.FIRM_KINDS)}", "company")
        company.facts = {"based": self.city(), "makes": self.draw(words.MATERIALS, words.THINGS, joint=" ")}
        return company

    def college(self) -> Entity:
        """A college with the city it stands in."""
        college = Entity(self.draw(words.ONSETS, words.COLLEGE_ENDS) + " College", "college")
        college.facts = {"stands": self.city()}
        return college

    def value(self, relation: str) -> str:
        """A fresh value for a relation of a person that points at no other entity."""
        lists = {
            "job": (words.DOMAINS, words.ROLES),
            "field": (words.BRANCHES, words.FIELDS),
            "hobby": (words.HOBBIES, words.HOBBY_THINGS),
        }
        if relation in lists:
            return self.draw(*lists[relation], joint=" ")
        return self.city()
