"""One rollout of an environment of `verifiers`, seen from where it believes its model to be.

The environment runs its own loop and asks a client for each reply. This client hands the question
out as the next prompt, and holds the environment until the turn has been sampled::

    environment   client.get_response([user: Guess.])      -> Asked([user: Guess.])
                  …the policy samples a turn; answer("[a]")
    environment   get_response([user: Guess., assistant: [a], user: No.])  -> Asked([user: No.])

A conversation can only grow: an environment that rewrites what was said fails its trajectory.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

from ...tools import Attempt, ToolCall, read_calls
from ...types import Message
from ..rewards.reward import RewardFault

FAILED_CALLS: ContextVar[list[Exception]] = ContextVar("failed_calls")
"""Errors of the tools of the rollout that this context plays."""
REWARD_FAULTS: ContextVar[list[tuple[str, Exception]]] = ContextVar("reward_faults")
"""What the reward functions of the rollout that this context scores have raised."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Answered:
    """What came of the last turn: its reward where there is one, and its calls."""

    reward: float | None = None
    tool_calls: int = 0
    tool_successes: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked(Answered):
    """The environment asks for a turn, after these messages."""

    messages: tuple[Message, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Ended(Answered):
    """The environment needs no further turn."""


class Talk:
    """Lives in one event loop, where all its coroutines run, one at a time.

    Args:
        env: the environment. row: of its dataset.
        client: makes the client of this talk. types: the package's module of message types.
        cut_off: the package's exception for a model that has no room left.
        offered: names of the tools that the policy is shown.
    """

    def __init__(
        self,
        *,
        env: Any,
        row: Mapping[str, Any],
        client: Callable[[Talk], Any],
        types: Any,
        cut_off: type[Exception],
        offered: Sequence[str],
    ) -> None:
        self._env, self._row, self._types, self._cut_off = env, row, types, cut_off
        self._client = client(self)
        self._offered = list(offered)
        self._known: list[tuple[str, str]] = []
        self._names: dict[str, str] = {}
        self._attempts: tuple[Attempt, ...] = ()
        self._failed_calls: list[Exception] = []
        self._num_turns = 0
        self._fault: Exception | None = None
        self._playing: asyncio.Task[Any] | None = None
        self._asked: asyncio.Queue[Asked] = asyncio.Queue()
        self._reply: asyncio.Future[Any] | None = None

    async def begin(self) -> Asked | Ended:
        """Start the rollout; the first prompt."""
        self._loop = asyncio.get_running_loop()
        FAILED_CALLS.set(self._failed_calls)
        self._playing = asyncio.create_task(
            self._env.rollout(dict(self._row), self._client, "policy", {})
        )
        return await self._next()

    async def answer(self, text: str) -> Asked | Ended:
        """Give the environment one turn; what it asks next."""
        attempts, rest = read_calls(text) if self._offered else ((), text)
        self._attempts = attempts
        self._failed_calls.clear()
        self._num_turns += 1
        calls = [self._call(i, attempt) for i, attempt in enumerate(attempts)]
        said = rest.strip() if calls else text
        self._known.append(("assistant", said))
        message = self._types.ResponseMessage(
            content=said,
            tool_calls=calls or None,
            finish_reason="tool_calls" if calls else "stop",
            is_truncated=False,
        )
        response = self._types.Response(
            id=f"turn-{self._num_turns}", created=0, model="policy", message=message
        )
        assert self._reply is not None, "answered before it was asked"
        self._reply.set_result(response)
        return await self._next()

    async def end(self) -> Mapping[str, Any]:
        """Cut the rollout off if it still asks, score it, and give its final state.

        Raises:
            RewardFault: a reward function raised.
        """
        assert self._playing is not None, "ended before it began"
        if self._reply is not None and not self._reply.done():
            self._reply.set_exception(self._cut_off("no turns or tokens are left"))
            await self._next()
        state = await self._playing
        faults: list[tuple[str, Exception]] = []
        REWARD_FAULTS.set(faults)
        await self._env.rubric.score_rollout(state)
        await self._env.rubric.cleanup(state)
        for name, error in faults:
            raise RewardFault("raised", f"reward {name!r} raised {type(error).__name__}: {error}")
        return state

    def abandon(self) -> None:
        """Stop a rollout that nobody goes on with; from any thread."""
        if self._playing is not None:
            self._loop.call_soon_threadsafe(self._playing.cancel)

    async def ask(self, prompt: Sequence[Any], tools: Sequence[Any] | None, state: Any) -> Any:
        """The client's side: hand the new messages out, and wait for the turn."""
        try:
            messages = self._new(prompt)
            offered = [tool.name for tool in tools or ()]
            if offered != self._offered:
                raise ValueError(f"it offers the tools {offered} here, and {self._offered} first")
            if self._reply is not None and not self._reply.done():
                raise ValueError("it asks for two turns at once")
        except ValueError as error:
            self._fault = error
            raise
        self._reply = asyncio.get_running_loop().create_future()
        self._asked.put_nowait(Asked(messages=messages, **self._outcome_of_turn(state)))
        return await self._reply

    async def _next(self) -> Asked | Ended:
        assert self._playing is not None
        asked = asyncio.ensure_future(self._asked.get())
        try:
            await asyncio.wait({asked, self._playing}, return_when=asyncio.FIRST_COMPLETED)
            if asked.done():
                return asked.result()
        finally:
            asked.cancel()
        state = self._playing.result()
        if error := self._fault or state.get("error"):
            cause = error.__cause__ or error
            raise RuntimeError(f"the environment failed: {type(cause).__name__}: {cause}")
        return Ended(**self._outcome_of_turn(state))

    def _outcome_of_turn(self, state: Any) -> dict[str, Any]:
        steps = state["trajectory"]
        malformed = sum(not isinstance(attempt, ToolCall) for attempt in self._attempts)
        failed = max(malformed, len(self._failed_calls))
        return {
            "reward": steps[-1]["reward"] if steps else None,
            "tool_calls": len(self._attempts),
            "tool_successes": max(0, len(self._attempts) - failed),
        }

    def _new(self, prompt: Sequence[Any]) -> tuple[Message, ...]:
        said = [(str(message.role), plain_text(message.content)) for message in prompt]
        if said[: len(self._known)] != self._known:
            raise ValueError("it rewrites the conversation; only one that grows can be trained on")
        added = prompt[len(self._known) :]
        self._known = said
        return tuple(self._message(message) for message in added)

    def _message(self, message: Any) -> Message:
        plain: dict[str, Any] = {"role": message.role, "content": plain_text(message.content)}
        if message.role == "tool":
            return {**plain, "name": self._names.get(message.tool_call_id, "unknown")}
        if calls := getattr(message, "tool_calls", None):  # of an example in the first prompt
            self._names |= {call.id: call.name for call in calls}
            plain["tool_calls"] = [
                {
                    "id": call.id,
                    "type": "function",
                    "function": {"name": call.name, "arguments": json.loads(call.arguments)},
                }
                for call in calls
            ]
        return plain

    def _call(self, place: int, attempt: Attempt) -> Any:
        known = isinstance(attempt, ToolCall)
        name = attempt.name if known else "unknown"
        # what cannot be read is passed on unreadable: the environment has its own answer to that
        arguments = json.dumps(dict(attempt.arguments)) if known else attempt.reason
        call_id = f"call-{self._num_turns}-{place}"
        self._names[call_id] = name
        return self._types.ToolCall(id=call_id, name=name, arguments=arguments)


def plain_text(content: Any) -> str:
    """A message's content; raises ValueError for parts that are no text."""
    if content is None or isinstance(content, str):
        return content or ""
    texts = []
    for part in content:
        kind = part["type"]
        if kind != "text":
            raise ValueError(f"a message holds {kind!r}; only text can be trained on")
        texts.append(part["text"])
    return "\n".join(texts)


def policy_client(base: Any) -> type[Any]:
    """The class of clients that ask a `Talk`; made here, for the package's base may be missing."""

    class PolicyClient(base):
        def setup_client(self, config: Any) -> Any:
            return config

        async def to_native_tool(self, tool: Any) -> Any:
            return tool

        async def to_native_prompt(self, messages: Any) -> tuple[Any, dict]:
            return messages, {}

        async def get_native_response(
            self, prompt: Any, model: str, sampling_args: Any, tools: Any = None, **kwargs: Any
        ) -> Any:
            return await self.client.ask(prompt, tools, kwargs["state"])

        async def raise_from_native_response(self, response: Any) -> None:
            """It is the package's own form already."""

        async def from_native_response(self, response: Any) -> Any:
            return response

        async def close(self) -> None:
            """Nothing is open."""

    return PolicyClient
