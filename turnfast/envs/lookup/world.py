"""An invented world: entities, the facts that relate them, and questions about them.

Facts are drawn from a seed, so they cannot be known without a search. Names consist of few
syllables, so a small byte-level tokenizer needs few tokens for one. The world has two parts that
share no entity: one for training, one held out. A question follows a chain of facts, and each hop
of the chain is one sentence of the corpus::

    work Sorime --author--> person Bela Koru --teacher--> person Mino Tase
    "Who is the teacher of the author of Sorime?"                   2 hops, answer Mino Tase
    corpus: "The author of Sorime is Bela Koru."  "The teacher of Bela Koru is Mino Tase."
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from ...errors import ConfigError
from ...tools import STOP_WORDS, Passage

Kind = Literal["person", "place", "work", "trade"]

DISTRACTORS_PER_FACT = 0.3

# Each consonant occurs with two vowels, and all vowels equally often. Pairs of letters within a
# syllable are then far more frequent than pairs across syllables, so a byte-level tokenizer trained
# on such names learns the syllables as tokens.
_SYLLABLE_TEXT = """
ba be di do fu fa ge gi ho hu ja je ki ko lu la me mi no nu pa pe ri ro su sa te ti vo vu wa we yo
yu za zi
"""
SYLLABLES = tuple(_SYLLABLE_TEXT.split())

_ONE = "[B-DF-HJ-NP-TV-Zb-df-hj-np-tv-z][aeiou]"
SYLLABLE = rf" ?\b{_ONE}(?=(?:{_ONE})*\b)|(?<=\b{_ONE}|\b{_ONE}{_ONE}){_ONE}(?=(?:{_ONE})*\b)"
"""Matches a syllable in a word of up to three syllables: all names, and few other words."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Relation:
    """A kind of fact, "the {noun} of {subject} is {object}"; `word` is its question word."""

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
    """One fact and its `sentence` in the corpus, which may use the object's alias."""

    subject: Entity
    relation: Relation
    object: Entity
    sentence: str

    @property
    def query(self) -> str:
        """The search query for this hop, in the words of the question."""
        return f"{self.relation.noun} of {self.subject.name}"

    @property
    def stated_name(self) -> str:
        """The name of the object in the sentence."""
        alias = self.object.alias
        return alias if alias and alias in self.sentence else self.object.name


@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    """A question and its chain of facts, first hop first."""

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
    """One part of the world; its facts relate only its own entities."""

    entities: tuple[Entity, ...]
    facts: tuple[Fact, ...]
    facts_of: Mapping[str, tuple[Fact, ...]]
    distractors: tuple[str, ...]

    def passages(self) -> list[Passage]:
        """The corpus. A title lists all names of the subject, so that a search matches any."""
        stated = [Passage(title=" ".join(f.subject.names), text=f.sentence) for f in self.facts]
        return stated + [Passage(title="", text=sentence) for sentence in self.distractors]

    def of_kind(self, kind: Kind) -> list[Entity]:
        return [entity for entity in self.entities if entity.kind == kind]

    def ask(self, rng: random.Random, hops: int) -> Question:
        """Draw a question of `hops` hops that visits no entity twice."""
        while True:
            chain = [rng.choice(self.facts)]
            visited = {chain[0].subject.name, chain[0].object.name}
            while len(chain) < hops:
                options = [
                    fact
                    for fact in self.facts_of[chain[-1].object.name]
                    if fact.object.name not in visited
                ]
                if not options:
                    break
                chain.append(rng.choice(options))
                visited.add(chain[-1].object.name)
            if len(visited) == hops + 1:
                return Question(text=_question(chain, rng), facts=tuple(chain))


class NameMaker:
    """Draws invented names, each once, and none that `other` has drawn."""

    def __init__(self, rng: random.Random, other: NameMaker | None = None) -> None:
        self._rng = rng
        self._taken: set[str] = set(other._taken) if other else set()

    def word(self, syllables: int) -> str:
        # a search ignores stop words, so "Same" cannot be a name
        while (word := "".join(self._rng.choices(SYLLABLES, k=syllables))) in STOP_WORDS:
            pass
        return word.capitalize()

    def fresh(self, kind: Kind) -> str:
        """A new name: two words of two syllables for a person, otherwise one word of three."""
        for _ in range(10_000):
            name = f"{self.word(2)} {self.word(2)}" if kind == "person" else self.word(3)
            name = name.lower() if kind == "trade" else name
            if name.lower() not in self._taken:
                self._taken.add(name.lower())
                return name
        raise ConfigError(
            "env.options.people: the syllables allow no more names; lower people or held_out_people"
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingPart:
    """The source of training questions and demonstrations.

    Attributes:
        names: has drawn all names of the world, including the held-out ones.
        hops: possible numbers of hops of a question.
        popular: the popular questions, by text.
        popular_share: their share of the training questions.
    """

    region: Region
    names: NameMaker
    hops: tuple[int, ...]
    popular: Mapping[str, Question]
    popular_share: float

    def draw(self, rng: random.Random, popular_share: float) -> tuple[Question, bool]:
        """Draw a question that is popular with this probability, and whether it is."""
        if rng.random() < popular_share:
            return rng.choice(tuple(self.popular.values())), True
        while (question := self.region.ask(rng, rng.choice(self.hops))).text in self.popular:
            pass
        return question, False


def make_region(
    rng: random.Random,
    names: NameMaker,
    *,
    people: int,
    aliased: float,
    inverted: float,
) -> Region:
    """Draw entities, one fact for every entity and relation of its kind, and distractors:
    sentences with the words of a fact and a wrong name.

    Args:
        people: number of people; works are half, places a quarter, trades an eighth as many.
        aliased: share of the people with a second name.
        inverted: share of the sentences of the form "{object} is the {noun} of {subject}".
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
    distractors: list[str] = []
    for relation in RELATIONS:
        subjects = [entity for entity in entities if entity.kind == relation.subject]
        objects = [entity for entity in entities if entity.kind == relation.object]
        for subject in subjects:
            target = _other(rng, objects, subject)
            name = rng.choice(target.names)
            template = (
                "{o} is the {r} of {s}." if rng.random() < inverted else "The {r} of {s} is {o}."
            )
            sentence = template.format(r=relation.noun, s=subject.name, o=name)
            facts.append(Fact(subject=subject, relation=relation, object=target, sentence=sentence))
            if rng.random() < DISTRACTORS_PER_FACT:
                wrong = _other(rng, objects, target).name
                distractors.append(f"The {relation.noun} of a rival of {subject.name} is {wrong}.")
    facts_of: dict[str, tuple[Fact, ...]] = {}
    for fact in facts:
        facts_of[fact.subject.name] = (*facts_of.get(fact.subject.name, ()), fact)
    return Region(
        entities=tuple(entities),
        facts=tuple(facts),
        facts_of=facts_of,
        distractors=tuple(distractors),
    )


def made_up_facts(rng: random.Random, names: NameMaker) -> Iterator[Fact]:
    """Yield facts about entities outside the world, without end."""
    while True:
        relation = rng.choice(RELATIONS)
        subject = Entity(name=names.fresh(relation.subject), kind=relation.subject)
        target = Entity(name=names.fresh(relation.object), kind=relation.object)
        sentence = f"The {relation.noun} of {subject.name} is {target.name}."
        yield Fact(subject=subject, relation=relation, object=target, sentence=sentence)


def distinct_questions(
    rng: random.Random, region: Region, hops: Sequence[int], count: int
) -> dict[str, Question]:
    """Draw `count` different questions, by text.

    Raises:
        ConfigError: the region is too small.
    """
    by_text: dict[str, Question] = {}
    for _ in range(50 * count):
        question = region.ask(rng, rng.choice(hops))
        by_text.setdefault(question.text, question)
        if len(by_text) == count:
            return by_text
    raise ConfigError(
        f"env.options.people: the world is too small for {count} different questions; raise "
        "people (or held_out_people), or lower eval_tasks or popular_questions"
    )


def _question(chain: Sequence[Fact], rng: random.Random) -> str:
    phrase = rng.choice(chain[0].subject.names)
    for fact in chain:
        phrase = f"the {fact.relation.noun} of {phrase}"
    return f"{chain[-1].relation.word} is {phrase}?"


def _other(rng: random.Random, entities: Sequence[Entity], than: Entity) -> Entity:
    while (chosen := rng.choice(entities)) == than:
        pass
    return chosen
