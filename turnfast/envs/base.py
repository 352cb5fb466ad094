"""What an environment is: tasks, and episodes that take the agent's text and answer with messages.

The rollout asks an environment for nothing else, so anything that fits these two protocols can be
trained on; `ToolEnv` (tool_env.py) is the ready-made one for agents that call tools.
"""

from __future__ import annotations

from collections.abc import Awaitable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol, runtime_checkable

from ..tools import MalformedCall, Tool, ToolCall, ToolError, ToolResult
from ..types import Message, Task

Split = Literal["train", "eval"]


@dataclass(frozen=True, slots=True, kw_only=True)
class CallResult:
    """One call of a turn and what came of it."""

    call: ToolCall | MalformedCall
    result: ToolResult | ToolError


@dataclass(frozen=True, slots=True, kw_only=True)
class PlayedTurn:
    """One turn as the scoring sees it: the agent's text, its calls, and the environment's reply."""

    text: str
    calls: tuple[CallResult, ...] = ()
    messages: tuple[Message, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """The environment's answer to one turn.

    Attributes:
        messages: appended to the conversation before the next turn; empty when `done`.
        reward: weighted reward of the turn, the sum of `reward_parts`; None when it has none.
        tool_calls, tool_successes: attempted and successful calls; a malformed call is an attempt,
            and neither an error nor an empty result is a success.
        calls: the calls themselves and their results, for reward functions.
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
    """The score of a whole trajectory; `metrics` are unweighted figures such as `exact_match`."""

    reward: float = 0.0
    reward_parts: Mapping[str, float] = field(default_factory=dict)
    metrics: Mapping[str, float] = field(default_factory=dict)


class Episode(Protocol):
    """One run through one task. `start` once, `step` per turn, `finish` once, however it ended.

    An `async` method runs in the loop of all rollouts, so it must not block: it awaits, or computes
    for less than about a millisecond. A plain one may: it runs in a thread, not always the same.
    """

    def start(self) -> Sequence[Message] | Awaitable[Sequence[Message]]: ...

    def step(self, text: str) -> Step | Awaitable[Step]: ...

    def finish(self) -> Outcome | Awaitable[Outcome]: ...


class Env(Protocol):
    """A task collection and its rules. Made once per run with `env.options` as arguments.

    `tools` are offered through the chat template when `native_calls` is true; otherwise the
    environment describes them in its own first message.
    """

    tools: Sequence[Tool]
    native_calls: bool

    def tasks(self, split: Split) -> Sequence[Task]: ...

    def episode(self, task: Task) -> Episode: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Demonstration:
    """A scripted conversation; the assistant's messages are the targets of supervised tuning."""

    messages: tuple[Message, ...]


@runtime_checkable
class Demonstrator(Protocol):
    """An environment that can also show how it is done, for the warm start."""

    def demonstrations(self, seed: int) -> Sequence[Demonstration]: ...

    def corpus(self) -> Sequence[str]:
        """Text on which the tokenizer of the built-in model is trained.

        An attribute `token_cut`, a regular expression, names pieces that its tokens keep within.
        """
        ...
