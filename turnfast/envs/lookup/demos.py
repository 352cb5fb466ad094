"""Demonstrations for the warm start of the built-in world: a base model's habits, good and bad.

They are not a lesson in searching. They leave a small model where a base model stands before it is
trained on a tool: it knows the popular answers, calls the tool now and then, often malforms the
call, seldom uses the result, and is able to copy from a text and, if it is asked to in words, to
take a question apart. What is then learned, reward has taught.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING

from ...errors import ConfigError
from ...tools import ToolError, ToolResult, check_call, parse_calls
from ...types import Message, Task
from ..base import Demonstration
from ..tool_env import CallResult
from .world import Fact, NameMaker, Question, made_up_facts

if TYPE_CHECKING:
    from .env import LookupEnv


@dataclass(frozen=True, slots=True, kw_only=True)
class Mixture:
    """What the demonstrations are made of.

    count = reading, walk and echo exercises + question demonstrations; the latter are

        calls * questions               call the tool; of them a share `popular` is on popular ones
          malformed                     … cannot be read: error shown, answer from memory
          (1 - malformed) * copied      … are carried out, and the answer is copied from the result
          (1 - malformed) * (1-copied)  … are carried out, and the answer comes from memory
        popular_passes * popular set    answer a popular question at once, rightly
        the rest                        answer a rare question at once, with a wrong name

    Raises:
        ConfigError: the passes and the calls need more demonstrations than there are.
    """

    count: int
    calls: float
    malformed: float
    copied: float
    popular: float
    popular_passes: int
    reading: float
    walks: float
    echo: float
    recall_after_call: float
    spaced: bool


def write_demonstrations(env: LookupEnv, mixture: Mixture, seed: int) -> list[Demonstration]:
    rng = random.Random(f"turnfast demonstrations {seed}")
    num_reading = round(mixture.reading * mixture.count)
    num_walks = round(mixture.walks * mixture.count)
    num_echo = round(mixture.echo * mixture.count)
    num_exercises = num_reading + num_walks + num_echo
    num_calls = round(mixture.calls * (mixture.count - num_exercises))
    num_known = mixture.popular_passes * len(env.popular)
    num_guessed = mixture.count - num_exercises - num_calls - num_known
    if num_guessed < 0:
        needed = mixture.count - num_guessed
        raise ConfigError(
            f"env.options.demos: {mixture.count} are too few, {needed} are needed for "
            f"{num_known} passes over popular questions, {num_calls} calls and "
            f"{num_exercises} exercises; raise demos or lower demo_popular_passes"
        )
    writer = _Writer(env, rng, spaced=mixture.spaced)
    exercises = made_up_facts(rng, NameMaker(rng, env.names))
    written = [
        writer.reading(Question(text=_ask(fact), facts=(fact,)))
        for _, fact in zip(range(num_reading), exercises, strict=False)
    ]
    written += [writer.walk(writer.draw(0.0)[0]) for _ in range(num_walks)]
    written += [writer.echo(list(islice(exercises, 3))) for _ in range(num_echo)]
    # by count and not by chance, so that a mixture has exactly the shares it names
    num_malformed = round(mixture.malformed * num_calls)
    num_copied = round(mixture.copied * (num_calls - num_malformed))
    for i in range(num_calls):
        question, known = writer.draw(mixture.popular)
        known = known and rng.random() < mixture.recall_after_call
        if i < num_malformed:
            written.append(writer.malformed(question, known))
        else:
            copied = i < num_malformed + num_copied
            written.append(writer.called(question, known, copied=copied))
    written += [
        writer.at_once(question, known=True)
        for question in env.popular
        for _ in range(mixture.popular_passes)
    ]
    written += [writer.at_once(writer.draw(0.0)[0], known=False) for _ in range(num_guessed)]
    rng.shuffle(written)
    return written


class _Writer:
    """Writes one conversation at a time, with the replies that the environment would give."""

    def __init__(self, env: LookupEnv, rng: random.Random, *, spaced: bool) -> None:
        self._env = env
        self._space = " " if spaced else ""
        self._rng = rng
        self._famous = {question.text for question in env.popular}
        self._by_kind = {
            kind: [name for entity in env.region.of_kind(kind) for name in entity.names]
            for kind in ("person", "place", "work", "trade")
        }
        self._malformations = malformations("tool_call" if env.native_calls else "tool")

    def draw(self, popular: float) -> tuple[Question, bool]:
        """A question, and whether its answer is known from memory."""
        if self._rng.random() < popular:
            return self._rng.choice(self._env.popular), True
        while True:
            question = self._env.region.ask(self._rng, self._rng.choice(self._env.hops))
            if question.text not in self._famous:
                return question, False

    def at_once(self, question: Question, known: bool) -> Demonstration:
        return self._finish(self._open(question), self._remember(question, known))

    def malformed(self, question: Question, known: bool) -> Demonstration:
        messages = self._open(question)
        text = self._rng.choice(self._malformations)(question.facts[0].query)
        self._exchange(messages, text)
        return self._finish(messages, self._remember(question, known))

    def called(self, question: Question, known: bool, *, copied: bool) -> Demonstration:
        """Searches hop by hop; who does not use results searches once and goes by memory."""
        messages = self._open(question)
        for fact in question.facts if copied else question.facts[:1]:
            self._exchange(messages, self._call_text(fact.query))
        answer = question.facts[-1].said if copied else self._remember(question, known)
        return self._finish(messages, answer)

    def reading(self, question: Question) -> Demonstration:
        # in the order of a conversation with a call: question, result, answer
        text = f"{question.text}\n<result>{question.facts[0].sentence}</result>"
        return self._finish([{"role": "user", "content": text}], question.facts[0].said)

    def walk(self, question: Question) -> Demonstration:
        """A question taken apart hop by hop in plain words, the facts told one at a time."""
        messages: list[Message] = [{"role": "user", "content": f"Step by step. {question.text}"}]
        for fact in question.facts:
            messages.append({"role": "assistant", "content": fact.query})
            messages.append({"role": "user", "content": fact.sentence})
        return self._finish(messages, question.facts[-1].said)

    def echo(self, facts: Sequence[Fact]) -> Demonstration:
        """Names to be said again: copying at its plainest, nearly every token is a copy."""
        names = ", ".join(name for fact in facts for name in (fact.subject.name, fact.object.name))
        asked: Message = {"role": "user", "content": f"Repeat: {names}"}
        return Demonstration(messages=(asked, {"role": "assistant", "content": f"Repeat: {names}"}))

    def _open(self, question: Question) -> list[Message]:
        return self._env.first_messages(Task(id="", question=question.text))

    def _finish(self, messages: list[Message], answer: str) -> Demonstration:
        said = self._thought("I answer.") + f"<answer>{self._space}{answer}</answer>"
        return Demonstration(messages=(*messages, {"role": "assistant", "content": said}))

    def _exchange(self, messages: list[Message], text: str) -> None:
        """One turn with a call, and the reply to it."""
        (call,) = parse_calls(text)
        checked = check_call(self._env.tools, call)
        if isinstance(checked, ToolError):
            result: ToolResult | ToolError = checked
        else:
            tool, arguments = checked
            result = ToolResult(text=tool(**arguments))
        messages.append({"role": "assistant", "content": self._thought("I search.") + text})
        messages.extend(self._env.reply([CallResult(call=call, result=result)]))

    def _call_text(self, query: str) -> str:
        key, tag = ("arguments", "tool_call") if self._env.native_calls else ("args", "tool")
        call = json.dumps({"name": "search", key: {"query": query}})
        return f"<{tag}>{call}</{tag}>"

    def _remember(self, question: Question, known: bool) -> str:
        if known:
            return question.facts[-1].object.name
        right = question.answers
        kind = question.facts[-1].object.kind
        while (guess := self._rng.choice(self._by_kind[kind])) in right:
            pass
        return guess

    def _thought(self, text: str) -> str:
        asked = self._env.reasoning and not self._env.native_calls
        return f"<reasoning>{text}</reasoning>" if asked else ""


def malformations(tag: str) -> Sequence[Callable[[str], str]]:
    """Ways to get a call wrong, as models do; each takes the query."""
    key = "arguments" if tag == "tool_call" else "args"
    start, end = f'<{tag}>{{"name": "search", "{key}": {{"query": ', f"</{tag}>"
    return (
        lambda query: f'{start}"{query}"}}{end}',  # a brace is missing
        lambda query: f'{start}"{query}"}}}}',  # the closing tag is missing
        lambda query: f"{start}{query}}}}}{end}",  # no quotes around the query
        lambda query: f'<{tag}>search("{query}"){end}',  # code instead of JSON
        lambda query: f'<{tag}>{{"name": "search", "{key}": "{query}"}}{end}',  # not an object
        lambda query: f'<{tag}>{{"name": "find", "{key}": {{"query": "{query}"}}}}{end}',
        lambda query: f'<{tag}>{{"name": "search", "{key}": {{"q": "{query}"}}}}{end}',
    )


def _ask(fact: Fact) -> str:
    return f"{fact.relation.word} is the {fact.relation.noun} of {fact.subject.name}?"
