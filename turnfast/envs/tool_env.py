"""The ready-made tool loop: the agent calls tools until it answers, and is rewarded per turn.

A user's environment is one file. Save this as `capitals.py` and train with `env.name =
"capitals:Capitals"`; the constructor's arguments, if any, are `env.options`::

    from turnfast.envs import Task, ToolEnv, tool

    CAPITALS = {"Peru": "Lima", "Ghana": "Accra", "Laos": "Vientiane", "Malta": "Valletta"}

    class Capitals(ToolEnv):
        '''Questions on capitals, and an atlas to look them up in.'''

        def tasks(self, split):
            countries = sorted(CAPITALS)[::2] if split == "train" else sorted(CAPITALS)[1::2]
            return [
                Task(id=c, question=f"What is the capital of {c}?", answers=(CAPITALS[c],))
                for c in countries
            ]

        @tool
        def atlas(self, country: str) -> str:
            '''Look up the capital of a country.'''
            return CAPITALS.get(country, "")

One episode of it, in the format of arXiv 2505.11821 (`call_format="xml"`)::

    user       What is the capital of Peru?
    assistant  <reasoning>I look it up.</reasoning><tool>{"name": "atlas", "args": {"country":
               "Peru"}}</tool>                                              turn reward 0.2 + 0.5
    user       <result>Lima</result>
    assistant  <reasoning>So.</reasoning><answer>Lima</answer>                        outcome 1.9

The rules of a turn, in this order:

- A turn that tries to call a tool is answered with a result per call, errors included, and the
  episode goes on. An answer in the same turn does not count: it was given before the result.
- A turn with an answer ends the episode.
- A turn with neither ends it too, unanswered; with `missing_answer="remind"` the agent is told what
  is expected instead.

Turn rewards: a turn with calls gets its own, `answer_in_result` only for the first result of the
episode that holds the answer (searching twice does not pay twice). A turn without calls gets None,
but 0.0 if it is the episode's first: a rollout that never searched has earned 0 and belongs in the
baseline of those that did. Outcome: 0.0 without an answer.
"""

from __future__ import annotations

import asyncio
import json
import math
from collections.abc import Mapping, Sequence
from typing import Literal

from ..config.schema import PositiveInt
from ..config.signature import suggest
from ..errors import ConfigError
from ..tools import (
    MAX_RESULT_CHARS,
    MalformedCall,
    Tool,
    ToolCall,
    ToolError,
    parse_calls,
    run_tool,
)
from ..types import Message, Task
from .base import CallResult, Outcome, PlayedTurn, Split, Step
from .rewards.answers import (
    DEFAULT_WEIGHTS,
    contains_answer,
    exact_match,
    f1,
    format_score,
    mean,
    read_answer,
    tags_score,
    weigh,
)

CallFormat = Literal["xml", "native"]
TOO_MANY_CALLS = "too many calls in one turn"


class ToolEnv:
    """Base of environments whose agents call tools; subclasses give `tasks` and methods with @tool.

    Args:
        call_format: "xml", the paper's tags with results as user messages, or "native", the
            model's own tool-call form with schemas in the chat template and results as tool
            messages. Both forms are understood in both; this is what is offered and rewarded.
        reasoning: ask for <reasoning> before each action ("native" leaves thinking to the model).
        missing_answer: what a turn with neither call nor answer does, "end" or "remind".
        weights: replaces some of `DEFAULT_WEIGHTS`.
        max_calls: calls carried out per turn; further ones are errors.
        max_result_chars: a longer tool result is an error.
        instructions: replaces the system message; "" leaves it out.
    Raises:
        ConfigError: a weight that does not exist.
    """

    name: str = ""
    weights: Mapping[str, float] = DEFAULT_WEIGHTS
    max_turns: int = 4
    tool_timeout_s: float = 10.0

    def __init__(
        self,
        *,
        call_format: CallFormat = "xml",
        reasoning: bool = True,
        missing_answer: Literal["end", "remind"] = "end",
        weights: dict[str, float] | None = None,
        max_calls: PositiveInt = 4,
        max_result_chars: int = MAX_RESULT_CHARS,
        instructions: str | None = None,
    ) -> None:
        known = type(self).weights
        for part in weights or {}:
            if part not in known:
                raise ConfigError(f"env.options.weights.{part}: no such part{suggest(part, known)}")
        self.weights = {**known, **(weights or {})}
        self.tools: Sequence[Tool] = _tools_of(self)
        self.native_calls = call_format == "native"
        self.reasoning = reasoning
        self.missing_answer = missing_answer
        self.max_calls = max_calls
        self.max_result_chars = max_result_chars
        self._instructions = instructions

    def tasks(self, split: Split) -> Sequence[Task]:
        raise NotImplementedError(f"{type(self).__name__} must define tasks(self, split)")

    def set_limits(self, *, max_turns: int, tool_timeout_s: float) -> None:
        """Take over `env.max_turns` and `env.tool_timeout_s`; called once, before any episode."""
        self.max_turns = max_turns
        self.tool_timeout_s = tool_timeout_s

    def episode(self, task: Task) -> ToolEpisode:
        return ToolEpisode(self, task)

    def first_messages(self, task: Task) -> list[Message]:
        """The conversation before the agent's first turn."""
        text = self.describe() if self._instructions is None else self._instructions
        system: list[Message] = [{"role": "system", "content": text}] if text else []
        return [*system, {"role": "user", "content": task.question}]

    def describe(self) -> str:
        """The instructions: how to call, the tools where the chat template does not list them, and
        how to answer."""
        think = "<reasoning>your thoughts</reasoning>" if self.reasoning else ""
        if self.native_calls:
            return (
                "Answer the question. Call the tools as often as you need, then give nothing but a "
                "short final answer as <answer>the answer</answer>."
            )
        lines = [json.dumps(tool.schema["function"], ensure_ascii=False) for tool in self.tools]
        return "\n".join(
            [
                "Answer the question with the help of these tools:",
                *lines,
                "In each turn write either a call:",
                think + '<tool>{"name": "the tool", "args": {"argument": "value"}}</tool>',
                "whose result you are given as <result>…</result>, or your short final answer:",
                think + "<answer>the answer</answer>",
            ]
        )

    def score_turn(
        self, task: Task, turn: PlayedTurn, earlier: Sequence[PlayedTurn]
    ) -> Mapping[str, float]:
        """The unweighted parts of the reward of one turn with calls."""
        successes = sum(call.result.success for call in turn.calls)
        found = _holds_answer(task, turn) and not any(_holds_answer(task, t) for t in earlier)
        return {
            "tool_executed": successes / len(turn.calls),
            "answer_in_result": float(found),
        }

    def score_answer(
        self, task: Task, answer: str, turns: Sequence[PlayedTurn]
    ) -> Mapping[str, float]:
        """The unweighted parts of the outcome reward of an answered episode."""
        style = {"native": self.native_calls, "reasoning": self.reasoning}
        return {
            "answer_contained": contains_answer(answer, task.answers),
            "exact_match": exact_match(answer, task.answers),
            "format": mean([format_score(turn.text, **style) for turn in turns]),
            "tags_once": mean([tags_score(turn.text, **style) for turn in turns]),
        }

    def metrics(
        self, task: Task, answer: str | None, turns: Sequence[PlayedTurn]
    ) -> Mapping[str, float]:
        """Unweighted figures for people, of every episode."""
        return {
            "exact_match": exact_match(answer, task.answers) if answer is not None else 0.0,
            "f1": f1(answer, task.answers) if answer is not None else 0.0,
            "answered": float(answer is not None),
            "called": float(any(turn.calls for turn in turns)),
        }

    def reply(self, calls: Sequence[CallResult]) -> tuple[Message, ...]:
        """The messages that tell the agent what came of its calls."""
        if self.native_calls:
            return tuple(
                {"role": "tool", "name": _name_of(call.call), "content": call.result.shown}
                for call in calls
            )
        text = "\n".join(f"<result>{call.result.shown}</result>" for call in calls)
        return ({"role": "user", "content": text},)


class ToolEpisode:
    """One run through one task of a `ToolEnv`."""

    def __init__(self, env: ToolEnv, task: Task) -> None:
        self._env = env
        self._task = task
        self._turns: list[PlayedTurn] = []
        self._answer: str | None = None

    async def start(self) -> Sequence[Message]:
        return self._env.first_messages(self._task)

    async def step(self, text: str) -> Step:
        attempts = parse_calls(text)
        if attempts:
            return await self._call(text, attempts)
        self._turns.append(PlayedTurn(text=text))
        self._answer = read_answer(text)
        reward = 0.0 if len(self._turns) == 1 else None
        if self._answer is None and self._env.missing_answer == "remind":
            form = "a tool call" if self._env.native_calls else "<tool>…</tool>"
            reminder = f"Write {form} or <answer>…</answer>."
            return Step(messages=({"role": "user", "content": reminder},), reward=reward)
        return Step(reward=reward, done=True)

    async def finish(self) -> Outcome:
        env, turns = self._env, tuple(self._turns)
        parts: dict[str, float] = {}
        if self._answer is not None:
            scored = env.score_answer(self._task, self._answer, turns)
            parts = weigh(scored, env.weights)
        return Outcome(
            reward=math.fsum(parts.values()),
            reward_parts=parts,
            metrics=env.metrics(self._task, self._answer, turns),
        )

    async def _call(self, text: str, attempts: Sequence[ToolCall | MalformedCall]) -> Step:
        env = self._env
        running = [
            run_tool(env.tools, call, timeout_s=env.tool_timeout_s, max_chars=env.max_result_chars)
            for call in attempts[: env.max_calls]
        ]
        # one alone needs no task of its own, and is done before the engine's next step if it can be
        results = await asyncio.gather(*running) if len(running) > 1 else [await running[0]]
        refused = MalformedCall(reason=f"{TOO_MANY_CALLS}, the limit is {env.max_calls}")
        error = ToolError(kind="malformed", text=refused.reason)
        calls = [CallResult(call=c, result=r) for c, r in zip(attempts, results, strict=False)]
        calls += [CallResult(call=refused, result=error)] * bool(attempts[env.max_calls :])
        replies = env.reply(calls)
        turn = PlayedTurn(text=text, calls=tuple(calls), messages=replies)
        parts = weigh(env.score_turn(self._task, turn, self._turns), env.weights)
        self._turns.append(turn)
        return Step(
            messages=replies,
            reward=math.fsum(parts.values()),
            reward_parts=parts,
            tool_calls=len(calls),
            tool_successes=sum(call.result.success for call in calls),
            calls=turn.calls,
        )


def _tools_of(env: ToolEnv) -> tuple[Tool, ...]:
    """The tools among the attributes of a class, those of its bases first, in order of writing."""
    found: dict[str, Tool] = {}
    for cls in reversed(type(env).__mro__):
        for attribute, value in vars(cls).items():
            if isinstance(value, Tool):
                found[attribute] = getattr(env, attribute)
    return tuple(found.values())


def _holds_answer(task: Task, turn: PlayedTurn) -> bool:
    return any(
        call.result.success and contains_answer(call.result.shown, task.answers)
        for call in turn.calls
    )


def _name_of(call: ToolCall | MalformedCall) -> str:
    return call.name if isinstance(call, ToolCall) else "unknown"
