"""Demonstrations for the warm start of the lookup world.

They give a small model the habits of a base model before training on a tool, good and bad: it
knows the popular answers, sometimes calls the tool, often malforms the call and seldom uses the
result. It can copy from a text and, if prompted to, split a question into hops. Everything beyond
that is learned from reward.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Sequence
from itertools import islice
from typing import Annotated

from pydantic import Field

from ...config.schema import PositiveInt, Section, Share
from ...errors import ConfigError
from ...tools import ToolError, ToolResult, check_call, parse_calls
from ...types import Message, Task
from ..base import CallResult, Demonstration
from ..tool_env import ToolEnv
from .world import Fact, NameMaker, Question, TrainingPart, made_up_facts


class DemoOptions(Section):
    """`env.options.demos`: the mixture of demonstrations.

    count = reading, walk and echo exercises + question demonstrations; the latter are

        calls * questions               call the tool; a share `popular` of them is on popular ones
          malformed                     … are malformed: the error, then an answer from memory
          (1 - malformed) * copied      … are executed, and the answer is copied from the result
          (1 - malformed) * (1-copied)  … are executed, and the answer is from memory
        popular_passes * popular set    answer a popular question without a call, correctly
        the rest                        answer a rare question without a call, with a wrong name

    An answer from memory is correct for popular questions (after a call, in a share
    `recall_after_call` of them), and otherwise a random name of the right kind.

    Attributes:
        reading: share of all demonstrations with a made-up sentence and a question about it; they
            teach copying, not searching.
        walks: share of all demonstrations that split a question into hops in plain words; they
            teach the order of the hops, not searching.
        echo: share of all demonstrations that repeat a list of made-up names.
    """

    count: PositiveInt = 12_000
    calls: Share = 0.3
    malformed: Share = 0.4
    copied: Share = 0.35
    popular_passes: Annotated[int, Field(ge=0)] = 40
    reading: Share = 0.1
    walks: Share = 0.0
    echo: Share = 0.1
    recall_after_call: Share = 0.0


DEFAULT_DEMOS = DemoOptions()


def write_demonstrations(
    env: ToolEnv, world: TrainingPart, options: DemoOptions, seed: int
) -> list[Demonstration]:
    """Write the demonstrations in random order.

    Args:
        env: formats prompts and replies.
    Raises:
        ConfigError: `count` is too small for the passes, calls and exercises.
    """
    rng = random.Random(f"turnfast demonstrations {seed}")
    num_reading = round(options.reading * options.count)
    num_walks = round(options.walks * options.count)
    num_echo = round(options.echo * options.count)
    num_exercises = num_reading + num_walks + num_echo
    num_calls = round(options.calls * (options.count - num_exercises))
    num_known = options.popular_passes * len(world.popular)
    num_guessed = options.count - num_exercises - num_calls - num_known
    if num_guessed < 0:
        needed = options.count - num_guessed
        raise ConfigError(
            f"env.options.demos.count: {options.count} is too small, {needed} are needed for "
            f"{num_known} passes over popular questions, {num_calls} calls and "
            f"{num_exercises} exercises; raise it or lower env.options.demos.popular_passes"
        )
    writer = _Writer(env, world, rng)
    made_up = made_up_facts(rng, NameMaker(rng, world.names))
    written = [writer.reading(fact) for fact in islice(made_up, num_reading)]
    written += [writer.walk(world.draw(rng, 0.0)[0]) for _ in range(num_walks)]
    written += [writer.echo(list(islice(made_up, 3))) for _ in range(num_echo)]
    # by count instead of by chance, so that the shares are exact
    num_malformed = round(options.malformed * num_calls)
    num_copied = round(options.copied * (num_calls - num_malformed))
    for i in range(num_calls):
        question, popular = world.draw(rng, world.popular_share)
        known = popular and rng.random() < options.recall_after_call
        if i < num_malformed:
            written.append(writer.malformed(question, known))
        else:
            copied = i < num_malformed + num_copied
            written.append(writer.called(question, known, copied=copied))
    written += [
        writer.at_once(question, known=True)
        for question in world.popular.values()
        for _ in range(options.popular_passes)
    ]
    written += [writer.at_once(world.draw(rng, 0.0)[0], known=False) for _ in range(num_guessed)]
    rng.shuffle(written)
    return written


class _Writer:
    """Writes one conversation at a time, with the replies that the environment would give."""

    def __init__(self, env: ToolEnv, world: TrainingPart, rng: random.Random) -> None:
        self._env = env
        self._rng = rng
        self._names_by_kind = {
            kind: [name for entity in world.region.of_kind(kind) for name in entity.names]
            for kind in ("person", "place", "work", "trade")
        }
        self._malformations = malformations("tool_call" if env.native_calls else "tool")

    def at_once(self, question: Question, known: bool) -> Demonstration:
        """An answer from memory, without a call."""
        return self._finish(self._open(question), self._remember(question, known))

    def malformed(self, question: Question, known: bool) -> Demonstration:
        """A malformed call, its error, and an answer from memory."""
        messages = self._open(question)
        text = self._rng.choice(self._malformations)(question.facts[0].query)
        (call,) = parse_calls(text)
        error = check_call(self._env.tools, call)
        assert isinstance(error, ToolError)
        self._add_call(messages, text, error)
        return self._finish(messages, self._remember(question, known))

    def called(self, question: Question, known: bool, *, copied: bool) -> Demonstration:
        """If `copied`, one search per hop; otherwise one search, then an answer from memory."""
        messages = self._open(question)
        for fact in question.facts if copied else question.facts[:1]:
            # not searched: the query of a fact finds its sentence
            self._add_call(messages, self._call_text(fact.query), ToolResult(text=fact.sentence))
        answer = question.facts[-1].stated_name if copied else self._remember(question, known)
        return self._finish(messages, answer)

    def reading(self, fact: Fact) -> Demonstration:
        """A question and its result in one message, in the order of a conversation with a call."""
        question = f"{fact.relation.word} is the {fact.relation.noun} of {fact.subject.name}?"
        text = f"{question}\n<result>{fact.sentence}</result>"
        return self._finish([{"role": "user", "content": text}], fact.stated_name)

    def walk(self, question: Question) -> Demonstration:
        """A question split into hops in plain words; the user states one fact at a time."""
        messages: list[Message] = [{"role": "user", "content": f"Step by step. {question.text}"}]
        for fact in question.facts:
            messages.append({"role": "assistant", "content": fact.query})
            messages.append({"role": "user", "content": fact.sentence})
        return self._finish(messages, question.facts[-1].stated_name)

    def echo(self, facts: Sequence[Fact]) -> Demonstration:
        """A list of names to repeat: nearly every target token is a copy."""
        names = ", ".join(name for fact in facts for name in (fact.subject.name, fact.object.name))
        prompt: Message = {"role": "user", "content": f"Repeat: {names}"}
        return Demonstration(messages=(prompt, {**prompt, "role": "assistant"}))

    def _open(self, question: Question) -> list[Message]:
        return self._env.first_messages(Task(id="", question=question.text))

    def _finish(self, messages: list[Message], answer: str) -> Demonstration:
        # with the space, a byte-level tokenizer gives the answer the same tokens as in the sentence
        # it is copied from; scoring ignores it
        text = self._reasoning("I answer.") + f"<answer> {answer}</answer>"
        return Demonstration(messages=(*messages, {"role": "assistant", "content": text}))

    def _add_call(self, messages: list[Message], text: str, result: ToolResult | ToolError) -> None:
        """Append a turn with a call, and the environment's reply."""
        (call,) = parse_calls(text)
        messages.append({"role": "assistant", "content": self._reasoning("I search.") + text})
        messages.extend(self._env.reply([CallResult(call=call, result=result)]))

    def _call_text(self, query: str) -> str:
        key, tag = ("arguments", "tool_call") if self._env.native_calls else ("args", "tool")
        call = json.dumps({"name": "search", key: {"query": query}})
        return f"<{tag}>{call}</{tag}>"

    def _remember(self, question: Question, known: bool) -> str:
        """The answer if it is known; otherwise a wrong name of the right kind."""
        target = question.facts[-1].object
        if known:
            return target.name
        while (guess := self._rng.choice(self._names_by_kind[target.kind])) in question.answers:
            pass
        return guess

    def _reasoning(self, text: str) -> str:
        expected = self._env.reasoning and not self._env.native_calls
        return f"<reasoning>{text}</reasoning>" if expected else ""


def malformations(tag: str) -> Sequence[Callable[[str], str]]:
    """Typical errors of models in a call; each function gets the query."""
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
