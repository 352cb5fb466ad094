"""Environments: tasks, episodes that reply to the agent's text, and rewards.

The rollout uses nothing else of an environment, so any class that fits these protocols can be
trained on. `ToolEnv` (tool_env.py) implements them for agents that call tools.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol, runtime_checkable

from ..tools import MalformedCall, Tool, ToolCall, ToolError, ToolResult
from ..types import Message, Task

Split = Literal["train", "eval"]


@dataclass(frozen=True, slots=True, kw_only=True)
class CallResult:
    """One call of a turn and its result."""

    call: ToolCall | MalformedCall
    result: ToolResult | ToolError


@dataclass(frozen=True, slots=True, kw_only=True)
class PlayedTurn:
    """A turn as reward functions see it: the agent's text, its calls, and the reply."""

    text: str
    calls: tuple[CallResult, ...] = ()
    messages: tuple[Message, ...] = ()


RewardFunction = Callable[[Task, Sequence[PlayedTurn]], float | Awaitable[float]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Reward:
    """A reward function, when it is called, and its weight.

    Attributes:
        name: of the weighted value in `reward_parts`.
        on: what it scores: "turn", every turn after its reply; "call", turns with a tool call,
            malformed ones included; "outcome", the trajectory; "answer", the trajectory if its last
            turn is an answer.
        deadline_s: per call, in seconds.
        inline: call the function in the event loop, without a thread and without a deadline. Only
            for plain functions that take less than a millisecond, as the built-in ones do. A thread
            costs about 0.3 ms per call, or 6 s per training step for the 20,000 calls of 2,048
            rollouts with three tool calls and an answer.
    """

    name: str
    function: RewardFunction
    on: Literal["turn", "call", "outcome", "answer"] = "outcome"
    weight: float = 1.0
    deadline_s: float = 10.0
    inline: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """The environment's reply to one turn.

    Attributes:
        messages: appended to the conversation before the next turn; empty when `done`.
        reward: weighted reward of the turn, the sum of `reward_parts`; None for no reward.
        tool_calls, tool_successes: attempted and successful calls; a malformed call is an attempt,
            and neither an error nor an empty result is a success.
        calls: the calls and their results, for reward functions.
    """

    messages: tuple[Message, ...] = ()
    reward: float | None = None
    reward_parts: Mapping[str, float] = field(default_factory=dict)
    tool_calls: int = 0
    tool_successes: int = 0
    calls: tuple[CallResult, ...] = ()
    done: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """The score of a trajectory; `metrics` are unweighted values such as `exact_match`."""

    reward: float = 0.0
    reward_parts: Mapping[str, float] = field(default_factory=dict)
    metrics: Mapping[str, float] = field(default_factory=dict)


class Episode(Protocol):
    """One attempt at a task: `start` once, `step` per turn, `finish` once.

    `finish` is also called if a limit ends the episode. An `async` method runs in the event loop
    of all rollouts and must not block for more than about a millisecond. A plain method may block:
    it runs in a thread, not always the same one.
    """

    def start(self) -> Sequence[Message] | Awaitable[Sequence[Message]]: ...

    def step(self, text: str) -> Step | Awaitable[Step]: ...

    def finish(self) -> Outcome | Awaitable[Outcome]: ...


class Env(Protocol):
    """Tasks and their episodes. Constructed once per run with `env.options` as arguments.

    Attributes:
        tools: offered through the chat template if `native_calls`; otherwise the environment
            describes them in its first message.
        rewards: added to the rewards in `Step` and `Outcome`. A class may omit it; `load_env` then
            sets it to the functions of `[[env.rewards]]`.
    """

    tools: Sequence[Tool]
    native_calls: bool
    rewards: Sequence[Reward]

    def tasks(self, split: Split) -> Sequence[Task]: ...

    def episode(self, task: Task) -> Episode: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Demonstration:
    """A scripted conversation; supervised tuning trains on the assistant messages."""

    messages: tuple[Message, ...]


@runtime_checkable
class Demonstrator(Protocol):
    """An environment with demonstrations for the warm start."""

    def demonstrations(self, seed: int) -> Sequence[Demonstration]: ...

    def corpus(self) -> Sequence[str]:
        """Training text for the tokenizer of the built-in model.

        An optional attribute `token_cut` is a regular expression; no token crosses the boundary of
        a match.
        """
        ...


def tool_schemas(env: Env) -> list[dict[str, Any]]:
    """The JSON schemas of the tools that the chat template offers to the model."""
    return [tool.schema for tool in env.tools] if env.native_calls else []
