"""Stories of our own in which people and things change place, cut into several documents."""

from __future__ import annotations

import random
from dataclasses import dataclass, field

from builtin.world import words
from builtin.world.samples import Page, Question, Sample
from builtin.world.world import held_out

MOVES = ["went to", "walked to", "hurried to", "moved to", "returned to"]
TAKES = ["picked up", "took", "grabbed", "got"]
DROPS = ["put down", "dropped", "left"]
ASKS = ["{q}", "Please tell me: {q}", "One thing: {q}"]


@dataclass
class Story:
    """The state of a small world while its story is told."""

    rng: random.Random
    people: list[str]
    places: list[str]
    objects: list[str]
    at: dict[str, str] = field(default_factory=dict)  # person -> place
    before: dict[str, str] = field(default_factory=dict)  # person -> place before
    holder: dict[str, str] = field(default_factory=dict)  # object -> person
    lies: dict[str, str] = field(default_factory=dict)  # object -> place
    last: str = ""

    def event(self) -> str:
        """One more sentence; the same person is often meant by a pronoun."""
        again = self.last and self.rng.random() < 0.45
        person = self.last if again else self.rng.choice(self.people)
        action = self._action(person)
        if person == self.last and self.rng.random() < 0.7:
            pronoun = "she" if person in words.SHE_NAMES else "he"
            return self.rng.choice([f"Then {pronoun} {action}.", f"{pronoun.title()} {action}."])
        self.last = person
        return f"{person} {action}."

    def _action(self, person: str) -> str:
        held = [thing for thing, who in self.holder.items() if who == person]
        free = [thing for thing in self.objects if thing not in self.holder]
        chance = self.rng.random()
        if person in self.at and held and chance < 0.2:
            return self._drop(person, self.rng.choice(held))
        if free and chance < 0.45:
            return self._take(person, free)
        return self._move(person)

    def _drop(self, person: str, thing: str) -> str:
        del self.holder[thing]
        self.lies[thing] = self.at[person]
        return f"{self.rng.choice(DROPS)} the {thing} there"

    def _take(self, person: str, free: list[str]) -> str:
        # A thing that lies somewhere can only be taken there.
        near = [thing for thing in free if self.lies.get(thing, self.at.get(person)) == self.at.get(person)]
        if not near:
            return self._move(person)
        thing = self.rng.choice(near)
        self.lies.pop(thing, None)
        self.holder[thing] = person
        return f"{self.rng.choice(TAKES)} the {thing}"

    def _move(self, person: str) -> str:
        place = self.rng.choice([place for place in self.places if place != self.at.get(person)])
        if person in self.at:
            self.before[person] = self.at[person]
        self.at[person] = place
        return f"{self.rng.choice(MOVES)} the {place}"

    def questions(self, after: int) -> list[Question]:
        """Everything that can be asked about the state now."""
        found = []
        for person, place in self.at.items():
            found.append(self._ask(f"Where is {person}?", f"{person} is in the {place}.", place, after))
        for person, place in self.before.items():
            now = self.at[person]
            text = f"{person} is in the {now}. Before that {person} was in the {place}."
            found.append(self._ask(f"Where was {person} before?", text, place, after))
        for thing, person in self.holder.items():
            found.append(self._ask(f"Who has the {thing}?", f"{person} has the {thing}.", person, after))
            if person in self.at:
                place = self.at[person]
                text = f"{person} has the {thing}. {person} is in the {place}."
                found.append(self._ask(f"Where is the {thing}?", text, place, after))
        for thing, place in self.lies.items():
            found.append(self._ask(f"Where is the {thing}?", f"The {thing} is in the {place}.", place, after))
        return found

    def _ask(self, text: str, answer: str, value: str, after: int) -> Question:
        return Question(self.rng.choice(ASKS).format(q=text), answer, value, "state", after)


def build(rng: random.Random, split: str, size: int) -> Sample:
    """A story of `size` pages of one to three sentences, with questions after every page from the third on."""
    names = [name for name in words.SHE_NAMES + words.HE_NAMES if held_out(name) == (split == "test")]
    story = Story(
        rng,
        rng.sample(names, rng.choice([2, 3, 4])),
        rng.sample(words.PLACES, rng.choice([4, 5, 6])),
        rng.sample(words.OBJECTS, rng.choice([1, 2, 3])),
    )
    sample = Sample()
    for number in range(1, size + 1):
        text = " ".join(story.event() for _ in range(rng.choice([1, 2, 2, 3])))
        sample.pages.append(Page("", text))
        if number >= min(3, size):
            sample.questions += story.questions(number)
    rng.shuffle(sample.questions)
    return sample
