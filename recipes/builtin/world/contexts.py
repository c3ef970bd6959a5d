"""Contexts of five to ten documents about made-up people, and every question they answer."""

from __future__ import annotations

import random
from dataclasses import dataclass, field

from builtin.world import templates
from builtin.world.samples import Page, Question, Sample
from builtin.world.world import Entity, World

PERSON_RELATIONS = ["born", "lives", "college", "field", "employer", "job", "hobby"]


@dataclass
class Fact:
    """A fact as one page of a block states it."""

    relation: str
    subject: Entity
    value: str
    page: int  # within the block
    alone: bool  # the page names subject and value, so that it answers without any other page


@dataclass
class Block:
    """Pages that must follow one another, because later ones point back."""

    pages: list[Page] = field(default_factory=list)
    facts: list[Fact] = field(default_factory=list)


@dataclass
class Builder:
    """Writes blocks about new entities until there are enough pages."""

    world: World
    blocks: list[Block] = field(default_factory=list)
    people: list[Entity] = field(default_factory=list)
    companies: list[Entity] = field(default_factory=list)
    colleges: list[Entity] = field(default_factory=list)
    similar: float = 0.35  # share of people named like another one
    relations: list[str] = field(default_factory=lambda: list(PERSON_RELATIONS))
    told: set[str] = field(default_factory=set)  # names of companies and colleges that have a page

    @property
    def rng(self) -> random.Random:
        """The world's source of chance."""
        return self.world.rng

    @property
    def test(self) -> bool:
        """True when held-out patterns may be used."""
        return self.world.split == "test"

    def size(self) -> int:
        """Pages written so far."""
        return sum(len(block.pages) for block in self.blocks)

    def say(self, relation: str, subject: str, value: str) -> str:
        """One sentence about a fact."""
        return templates.statement(self.rng, relation, subject, value, self.test)

    def person(self) -> Entity:
        """A new person with three or four facts, sometimes named like another one."""
        similar = self.people and self.rng.random() < self.similar
        person = self.world.person(self.rng.choice(self.people).name if similar else None)
        for relation in self.rng.sample(self.relations, min(self.rng.choice([3, 3, 4]), len(self.relations))):
            person.facts[relation] = self.value(relation)
        self.people.append(person)
        return person

    def value(self, relation: str) -> str:
        """The value of a person's relation: an old or new company or college, or a plain value."""
        if relation == "employer":
            return self._organisation(self.companies, self.world.company)
        if relation == "college":
            return self._organisation(self.colleges, self.world.college)
        return self.world.value(relation)

    def _organisation(self, known: list[Entity], make: object) -> str:
        if not known or self.rng.random() < 0.6:
            assert callable(make)
            known.append(make())
        return self.rng.choice(known).name

    def title(self, entity: Entity) -> str:
        """Most pages that name their subject carry its name as their title."""
        return entity.name if self.rng.random() < 0.7 else ""

    def page(self, block: Block, entity: Entity, relations: list[str], named: bool) -> None:
        """Append a page that states some facts of one entity, by name or only by pronoun."""
        sentences = []
        for number, relation in enumerate(relations):
            again = number == 0 or self.rng.random() < 0.3
            subject = entity.name if named and again else entity.pronoun
            sentences.append(self.say(relation, subject, entity.facts[relation]))
            block.facts.append(Fact(relation, entity, entity.facts[relation], len(block.pages), named))
        block.pages.append(Page(self.title(entity) if named else "", " ".join(sentences)))

    def whole(self, entity: Entity) -> Block:
        """One page that tells everything by itself."""
        block = Block()
        self.page(block, entity, list(entity.facts), named=True)
        return block

    def chunks(self, person: Entity) -> Block:
        """A biography cut into consecutive pages; only the first one names the person."""
        block = Block()
        relations = list(person.facts)
        self.rng.shuffle(relations)
        cut = self.rng.choice([1, 1, 2])
        self.page(block, person, relations[:cut], named=True)
        rest = relations[cut:]
        while rest:
            step = self.rng.choice([1, 2])
            self.page(block, person, rest[:step], named=False)
            self._organisation_chunk(block, person, rest[:step])
            rest = rest[step:]
        if "lives" in person.facts and self.rng.random() < 0.5:
            self._move(block, person)
        return block

    def _organisation_chunk(self, block: Block, person: Entity, relations: list[str]) -> None:
        """Follow a page that names an employer or college by one that only says "the company"."""
        last = relations[-1]
        if last not in ("employer", "college") or self.rng.random() < 0.4:
            return
        known = self.companies if last == "employer" else self.colleges
        entity = next(entity for entity in known if entity.name == person.facts[last])
        if entity.name not in self.told:
            self.told.add(entity.name)
            self.page(block, entity, list(entity.facts), named=False)

    def _move(self, block: Block, person: Entity) -> None:
        """A last page after which the person lives elsewhere."""
        block.facts = [fact for fact in block.facts if fact.relation != "lives"]
        person.facts["lives"] = self.world.city()
        pattern = self.rng.choice(["{s} has since moved to {v}.", "{s} now lives in {v}.", "Later {s} moved to {v}."])
        subject = person.pronoun.lower() if pattern.startswith("Later") else person.pronoun
        value = person.facts["lives"]
        block.facts.append(Fact("lives", person, value, len(block.pages), False))
        block.pages.append(Page("", pattern.format(s=subject, v=value)))

    def follower(self, block: Block) -> None:
        """Append a page about someone else that points back at the last fact of the block ("the same city")."""
        last = block.facts[-1]
        if last.relation not in templates.SAME or last.page != len(block.pages) - 1:
            return
        person = self.world.person()
        self.people.append(person)
        person.facts[last.relation] = last.value
        text = f"{person.name} {self.rng.choice(templates.SAME[last.relation])}."
        block.facts.append(Fact(last.relation, person, last.value, len(block.pages), False))
        relation = self.rng.choice([name for name in PERSON_RELATIONS if name != last.relation])
        person.facts[relation] = self.value(relation)
        text += " " + self.say(relation, person.pronoun, person.facts[relation])
        block.facts.append(Fact(relation, person, person.facts[relation], len(block.pages), True))
        block.pages.append(Page(self.title(person), text))

    def add_person(self, chunked: bool) -> None:
        """A block about a new person, maybe followed by someone who shares something."""
        person = self.person()
        block = self.chunks(person) if chunked else self.whole(person)
        if self.rng.random() < 0.5:
            self.follower(block)
        self.blocks.append(block)

    def add_organisations(self) -> None:
        """A block for every company and college that was mentioned and has no page yet."""
        for entity in self.companies + self.colleges:
            if entity.name in self.told:
                continue
            self.told.add(entity.name)
            if entity.kind == "company" and self.rng.random() < 0.5:
                entity.facts["founder"] = self.rng.choice(self.people).name
            self.blocks.append(self.organisation(entity))

    def organisation(self, entity: Entity) -> Block:
        """A company or college on one page, or a company cut into two."""
        relations = list(entity.facts)
        self.rng.shuffle(relations)
        if len(relations) < 2 or self.rng.random() < 0.6:
            entity.facts = {relation: entity.facts[relation] for relation in relations}
            return self.whole(entity)
        block = Block()
        self.page(block, entity, relations[:1], named=True)
        self.page(block, entity, relations[1:], named=False)
        return block


@dataclass(frozen=True)
class Shape:
    """How hard a context is to read."""

    chunked: float = 0.5  # share of biographies cut into pages that only say "she"
    pool: int = 3  # kinds of facts about people: the fewer, the more people share each and the less a guess is worth
    similar: float = 0.35


def build(rng: random.Random, split: str, size: int, shape: Shape = Shape()) -> Sample:
    """A context of about `size` pages with all its questions, shuffled."""
    return arrange(write(rng, split, size, shape))


def write(rng: random.Random, split: str, size: int, shape: Shape = Shape()) -> Builder:
    """Blocks of about `size` pages in all, about two people at least."""
    builder = Builder(World(rng, split), similar=shape.similar)
    builder.relations = rng.sample(PERSON_RELATIONS, shape.pool)
    while len(builder.people) < 2 or builder.size() + len(builder.companies) + len(builder.colleges) < size:
        builder.add_person(rng.random() < shape.chunked)
    builder.add_organisations()
    return builder


def arrange(builder: Builder) -> Sample:
    """The blocks in a new order, with newly worded questions about them."""
    builder.rng.shuffle(builder.blocks)
    sample = Sample()
    facts: list[tuple[Fact, int]] = []
    for block in builder.blocks:
        facts += [(fact, len(sample.pages) + fact.page) for fact in block.facts]
        sample.pages += block.pages
    sample.questions = _questions(builder, facts, len(sample.pages))
    builder.rng.shuffle(sample.questions)
    return sample


def _questions(builder: Builder, facts: list[tuple[Fact, int]], after: int) -> list[Question]:
    found = []
    by_subject = {(fact.subject.name, fact.relation): (fact, place) for fact, place in facts}
    for fact, place in facts:
        name = fact.subject.name
        text = templates.question(builder.rng, (fact.relation,), name, builder.test)
        answer = templates.answer(fact.relation, name, fact.value)
        kind = "one_hop" if fact.alone else "chunked"
        found.append(Question(text, answer, fact.value, kind, after, (place,)))
        for first, second in templates.HOPS:
            step = by_subject.get((fact.value, second))
            if first != fact.relation or step is None:
                continue
            text = templates.question(builder.rng, (first, second), name, builder.test)
            end = templates.answer(second, fact.value, step[0].value)
            kind = "two_hop" if fact.alone and step[0].alone else "chunked_hop"
            found.append(Question(text, f"{answer} {end}", step[0].value, kind, after, (place, step[1])))
    return found
