"""The tool loop: the agent calls tools until it answers, and is rewarded per turn.

The README has a complete environment in one file, `capitals.py`. One of its episodes, in the format
of arXiv 2505.11821 (`call_format="xml"`)::

    user       What is the capital of Peru?
    assistant  <reasoning>I look it up.</reasoning><tool>{"name": "atlas", "args": {"country":
               "Peru"}}</tool>                                              turn reward 0.2 + 0.5
    user       <result>Lima</result>
    assistant  <reasoning>So.</reasoning><answer>Lima</answer>                        outcome 1.9

The first rule that applies to a turn:

- A turn with tool calls gets a reply with one result per call, errors included, and the episode
  continues. An answer in the same turn does not count, because the agent wrote it before it saw the
  result.
- A turn with an answer ends the episode.
- Any other turn also ends it, without an answer; with `missing_answer="remind"` the agent gets a
  reminder of the expected format instead, and the episode continues.

Turn rewards: a turn with calls gets the rewards on "call". `answer_in_result` is paid only for the
first result with the answer (a repeated search is not paid again). A turn without calls gets None,
or 0.0 if it is the first: a rollout that never searches has earned 0 and counts in the baseline of
the rollouts that searched. Outcome: the rewards on "answer", 0.0 without an answer.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
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
from .base import CallResult, Outcome, PlayedTurn, Reward, Split, Step
from .rewards import functions
from .rewards.answers import exact_match, f1, format_score, read_answer, tags_score

CallFormat = Literal["xml", "native"]


class ToolEnv:
    """Base class for agents that call tools; a subclass defines `tasks` and methods with @tool.

    Args:
        call_format: "xml", the paper's tags with results as user messages, or "native", the
            model's own tool-call format with schemas in the chat template and results as tool
            messages. Both formats are parsed; this one is described to the agent and rewarded.
        reasoning: ask for <reasoning> before each action; no effect with "native".
        missing_answer: "end" the episode at a turn with neither call nor answer, or "remind".
        weights: replace the weights of some `rewards`, by name.
        max_calls: calls executed per turn; all further calls together are one error.
        max_result_chars: a longer tool result is an error.
        instructions: replaces the system message; "" omits it.
    Raises:
        ConfigError: a weight for a reward that does not exist.
    """

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
        self.tools: Sequence[Tool] = _tools_of(self)
        self.native_calls = call_format == "native"
        self.reasoning = reasoning
        self.missing_answer = missing_answer
        self.max_calls = max_calls
        self.max_result_chars = max_result_chars
        self._instructions = instructions
        self.rewards: Sequence[Reward] = _reweighted(self.default_rewards(), weights or {})

    def default_rewards(self) -> tuple[Reward, ...]:
        """The rewards of arXiv 2505.11821, at most 0.7 per turn and 1.9 for the outcome.

        Override it to change or extend them::

            def default_rewards(self):
                short = Reward(name="short", function=is_short, on="answer", weight=0.1)
                return (*super().default_rewards(), short)
        """
        style = {"native": self.native_calls, "reasoning": self.reasoning}
        mean_format = partial(functions.mean_over_turns, format_score, **style)
        mean_tags = partial(functions.mean_over_turns, tags_score, **style)
        on_call = partial(Reward, on="call", inline=True)
        on_answer = partial(Reward, on="answer", inline=True)
        return (
            on_call(name="tool_executed", function=functions.tool_executed, weight=0.2),
            on_call(name="answer_in_result", function=functions.answer_in_result, weight=0.5),
            on_answer(name="answer_contained", function=functions.answer_contained, weight=0.5),
            on_answer(name="exact_match", function=functions.exact_match, weight=1.0),
            on_answer(name="format", function=mean_format, weight=0.2),
            on_answer(name="tags_once", function=mean_tags, weight=0.2),
        )

    def tasks(self, split: Split) -> Sequence[Task]:
        raise NotImplementedError(f"{type(self).__name__} must define tasks(self, split)")

    def set_limits(self, *, max_turns: int, tool_timeout_s: float) -> None:
        """Set `env.max_turns` and `env.tool_timeout_s`; called once, before the first episode.

        Raises:
            ConfigError: the environment needs other limits.
        """
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
        """The instructions: how to call tools and how to answer, with the tools unless the chat
        template lists them."""
        if self.native_calls:
            return (
                "Answer the question. Call the tools as often as you need, then give nothing but a "
                "short final answer as <answer>the answer</answer>."
            )
        think = "<reasoning>your thoughts</reasoning>" if self.reasoning else ""
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

    def metrics(
        self, task: Task, answer: str | None, turns: Sequence[PlayedTurn]
    ) -> Mapping[str, float]:
        """Unweighted values of every episode, for the metrics."""
        return {
            "exact_match": exact_match(answer, task.answers) if answer is not None else 0.0,
            "f1": f1(answer, task.answers) if answer is not None else 0.0,
            "answered": float(answer is not None),
            "called": float(any(turn.calls for turn in turns)),
        }

    def reply(self, calls: Sequence[CallResult]) -> tuple[Message, ...]:
        """The messages with the results of the calls."""
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

    async def start(self) -> Sequence[Message]:
        return self._env.first_messages(self._task)

    async def step(self, text: str) -> Step:
        attempts = parse_calls(text)
        if attempts:
            return await self._call(text, attempts)
        self._turns.append(PlayedTurn(text=text))
        reward = 0.0 if len(self._turns) == 1 else None
        if self._env.missing_answer == "remind" and read_answer(text) is None:
            form = "a tool call" if self._env.native_calls else "<tool>…</tool>"
            reminder = f"Write {form} or <answer>…</answer>."
            return Step(messages=({"role": "user", "content": reminder},), reward=reward)
        return Step(reward=reward, done=True)

    async def finish(self) -> Outcome:
        answer = functions.final_answer(self._turns)
        return Outcome(metrics=self._env.metrics(self._task, answer, tuple(self._turns)))

    async def _call(self, text: str, attempts: Sequence[ToolCall | MalformedCall]) -> Step:
        env = self._env
        running = [
            run_tool(env.tools, call, timeout_s=env.tool_timeout_s, max_chars=env.max_result_chars)
            for call in attempts[: env.max_calls]
        ]
        # a single call needs no asyncio task, and can finish before the engine's next step
        results = await asyncio.gather(*running) if len(running) > 1 else [await running[0]]
        calls = [CallResult(call=c, result=r) for c, r in zip(attempts, results, strict=False)]
        if len(attempts) > env.max_calls:
            reason = f"too many calls in one turn, the limit is {env.max_calls}"
            error = ToolError(kind="malformed", text=reason)
            calls.append(CallResult(call=MalformedCall(reason=reason), result=error))
        turn = PlayedTurn(text=text, calls=tuple(calls), messages=env.reply(calls))
        self._turns.append(turn)
        return Step(
            messages=turn.messages,
            reward=0.0,
            tool_calls=len(calls),
            tool_successes=sum(call.result.success for call in calls),
            calls=turn.calls,
        )


def _reweighted(rewards: Sequence[Reward], weights: Mapping[str, float]) -> tuple[Reward, ...]:
    known = [reward.name for reward in rewards]
    for name in weights:
        if name not in known:
            raise ConfigError(f"env.options.weights.{name}: no such reward{suggest(name, known)}")
    return tuple(replace(r, weight=weights.get(r.name, r.weight)) for r in rewards)


def _tools_of(env: ToolEnv) -> tuple[Tool, ...]:
    """The tools among the attributes of a class: base classes first, in order of definition."""
    names = {
        name: None
        for cls in reversed(type(env).__mro__)
        for name, value in vars(cls).items()
        if isinstance(value, Tool)
    }
    return tuple(getattr(env, name) for name in names)


def _name_of(call: ToolCall | MalformedCall) -> str:
    return call.name if isinstance(call, ToolCall) else "unknown"
