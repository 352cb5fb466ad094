"""A made-up world to ask about: entities with invented names, and facts that relate them.

Facts are drawn from a seed, so nobody can know them without looking them up; names are
pronounceable and made of few syllables, so that a small byte-level tokenizer spells one in a few
tokens. The world has two parts that share no entity: one for training, one held out. Each question
is a walk along facts, and every hop of the walk is one sentence of the corpus::

    work Sorime --author--> person Bela Koru --teacher--> person Mino Tase
    "Who is the teacher of the author of Sorime?"                   2 hops, answer Mino Tase
    corpus: "The author of Sorime is Bela Koru."  "The teacher of Bela Koru is Mino Tase."
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from ...tools import STOP_WORDS, Passage

Kind = Literal["person", "place", "work", "trade"]

# each consonant with two vowels, all vowels equally often: letters within a syllable then go
# together far more often than letters across syllables, and a byte-level tokenizer trained on such
# names has the syllables as its tokens
_SYLLABLE_TEXT = """
ba be di do fu fa ge gi ho hu ja je ki ko lu la me mi no nu pa pe ri ro su sa te ti vo vu wa we yo
yu za zi
"""
SYLLABLES = tuple(_SYLLABLE_TEXT.split())

_ONE = "[B-DF-HJ-NP-TV-Zb-df-hj-np-tv-z][aeiou]"
SYLLABLE = rf" ?\b{_ONE}(?=(?:{_ONE})*\b)|(?<=\b{_ONE}|\b{_ONE}{_ONE}){_ONE}(?=(?:{_ONE})*\b)"
"""A syllable of a word of up to three, which is all of a name and hardly any other word."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Relation:
    """What a fact says: "the {noun} of {subject} is {object}", asked for with `word`."""

    noun: str
    subject: Kind
    object: Kind
    word: str


RELATIONS = (
    Relation(noun="birthplace", subject="person", object="place", word="Where"),
    Relation(noun="trade", subject="person", object="trade", word="What"),
    Relation(noun="teacher", subject="person", object="person", word="Who"),
    Relation(noun="mayor", subject="place", object="person", word="Who"),
    Relation(noun="founder", subject="place", object="person", word="Who"),
    Relation(noun="author", subject="work", object="person", word="Who"),
    Relation(noun="setting", subject="work", object="place", word="Where"),
    Relation(noun="patron", subject="trade", object="person", word="Who"),
    Relation(noun="seat", subject="trade", object="place", word="Where"),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Entity:
    name: str
    kind: Kind
    alias: str | None = None

    @property
    def names(self) -> tuple[str, ...]:
        return (self.name, self.alias) if self.alias else (self.name,)


@dataclass(frozen=True, slots=True, kw_only=True)
class Fact:
    """`sentence` is what the corpus says; it may call the object by its alias."""

    subject: Entity
    relation: Relation
    object: Entity
    sentence: str

    @property
    def query(self) -> str:
        """What to search for: the words of the question that stand for this hop."""
        return f"{self.relation.noun} of {self.subject.name}"

    @property
    def said(self) -> str:
        """The name by which the sentence calls the object."""
        alias = self.object.alias
        return alias if alias and alias in self.sentence else self.object.name


@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    """A walk along facts, the first hop first."""

    text: str
    facts: tuple[Fact, ...]

    @property
    def answers(self) -> tuple[str, ...]:
        return self.facts[-1].object.names

    @property
    def entities(self) -> tuple[Entity, ...]:
        return (self.facts[0].subject, *(fact.object for fact in self.facts))


@dataclass(frozen=True, slots=True, kw_only=True)
class Region:
    """One part of the world, closed in itself: every fact leads to an entity of the same part."""

    entities: tuple[Entity, ...]
    facts: tuple[Fact, ...]
    facts_of: Mapping[str, tuple[Fact, ...]]
    distractors: tuple[str, ...]

    def passages(self) -> list[Passage]:
        """The corpus. Titles carry all names of the subject, so that an alias finds it too."""
        told = [Passage(title=" ".join(f.subject.names), text=f.sentence) for f in self.facts]
        return told + [Passage(title="", text=sentence) for sentence in self.distractors]

    def of_kind(self, kind: Kind) -> list[Entity]:
        return [entity for entity in self.entities if entity.kind == kind]

    def ask(self, rng: random.Random, hops: int) -> Question:
        """A random question of so many hops; it never comes back to an entity it has passed."""
        while True:
            walk = [rng.choice(self.facts)]
            passed = {walk[0].subject.name, walk[0].object.name}
            while len(walk) < hops:
                ahead = [
                    fact
                    for fact in self.facts_of[walk[-1].object.name]
                    if fact.object.name not in passed
                ]
                if not ahead:
                    break
                walk.append(rng.choice(ahead))
                passed.add(walk[-1].object.name)
            if len(passed) == hops + 1:
                return Question(text=_question(walk, rng), facts=tuple(walk))


class NameMaker:
    """Invented words, each given out once, and none that `others` have given out."""

    def __init__(self, rng: random.Random, others: NameMaker | None = None) -> None:
        self._rng = rng
        self._taken: set[str] = set(others._taken) if others else set()

    def word(self, syllables: int) -> str:
        # a search drops stop words, so "Same" is no name
        while (word := "".join(self._rng.choices(SYLLABLES, k=syllables))) in STOP_WORDS:
            pass
        return word.capitalize()

    def fresh(self, kind: Kind) -> str:
        """A new name: two words of two syllables for people, one word of three for the rest."""
        for _ in range(10_000):
            name = f"{self.word(2)} {self.word(2)}" if kind == "person" else self.word(3)
            name = name.lower() if kind == "trade" else name
            if name.lower() not in self._taken:
                self._taken.add(name.lower())
                return name
        raise ValueError("the world is too large: the syllables make no further names")


def make_region(
    rng: random.Random,
    names: NameMaker,
    *,
    people: int,
    aliased: float,
    inverted: float,
    distractors: float,
) -> Region:
    """Draw entities and one fact for every entity and relation of its kind.

    Args:
        people: number of people; half as many works, a quarter as many places, an eighth trades.
        aliased: share of the people who are also known by another name.
        inverted: share of the sentences that say "{object} is the {noun} of {subject}".
        distractors: false friends per fact, sentences with the words of the fact and another
            name in the place of the answer.
    """
    entities: list[Entity] = []
    sizes: tuple[tuple[Kind, int], ...] = (
        ("person", people),
        ("work", max(4, people // 2)),
        ("place", max(4, people // 4)),
        ("trade", max(4, people // 8)),
    )
    for kind, count in sizes:
        for _ in range(count):
            alias = names.fresh("place") if kind == "person" and rng.random() < aliased else None
            entities.append(Entity(name=names.fresh(kind), kind=kind, alias=alias))
    facts: list[Fact] = []
    decoys: list[str] = []
    for relation in RELATIONS:
        subjects = [entity for entity in entities if entity.kind == relation.subject]
        objects = [entity for entity in entities if entity.kind == relation.object]
        for subject in subjects:
            target = _other(rng, objects, subject)
            said = rng.choice(target.names)
            template = (
                "{o} is the {r} of {s}." if rng.random() < inverted else "The {r} of {s} is {o}."
            )
            sentence = template.format(r=relation.noun, s=subject.name, o=said)
            facts.append(Fact(subject=subject, relation=relation, object=target, sentence=sentence))
            if rng.random() < distractors:
                false = _other(rng, objects, target).name
                decoys.append(f"The {relation.noun} of a rival of {subject.name} is {false}.")
    facts_of: dict[str, tuple[Fact, ...]] = {}
    for fact in facts:
        facts_of[fact.subject.name] = (*facts_of.get(fact.subject.name, ()), fact)
    return Region(
        entities=tuple(entities),
        facts=tuple(facts),
        facts_of=facts_of,
        distractors=tuple(decoys),
    )


def made_up_facts(rng: random.Random, names: NameMaker) -> Iterator[Fact]:
    """Endless facts about nobody, with names that no part of the world has: reading exercises."""
    while True:
        relation = rng.choice(RELATIONS)
        subject = Entity(name=names.fresh(relation.subject), kind=relation.subject)
        target = Entity(name=names.fresh(relation.object), kind=relation.object)
        sentence = f"The {relation.noun} of {subject.name} is {target.name}."
        yield Fact(subject=subject, relation=relation, object=target, sentence=sentence)


def _question(walk: Sequence[Fact], rng: random.Random) -> str:
    phrase = rng.choice(walk[0].subject.names)
    for fact in walk:
        phrase = f"the {fact.relation.noun} of {phrase}"
    return f"{walk[-1].relation.word} is {phrase}?"


def _other(rng: random.Random, entities: Sequence[Entity], than: Entity) -> Entity:
    while (chosen := rng.choice(entities)) == than:
        pass
    return chosen
