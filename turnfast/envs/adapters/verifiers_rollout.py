"""One rollout of a `verifiers` environment, driven turn by turn.

The environment runs its own loop and requests each turn from a client. This client passes the new
messages of the request to the policy, and the environment waits until the policy has sampled its
turn::

    environment   client.get_response([user: Guess.])       start() returns [user: Guess.]
    policy        samples "[a]"                             step("[a]")
    environment   client.get_response([user: Guess., assistant: [a], user: No.])
                                                            step returns [user: No.]

The conversation may only grow: an environment that rewrites earlier messages fails its trajectory.
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
from ..base import Step
from ..rewards.reward import RewardFault

TOOL_ERRORS: ContextVar[list[Exception]] = ContextVar("tool_errors")
"""Errors of the tools in the rollout that runs in this context."""
REWARD_ERRORS: ContextVar[list[tuple[str, Exception]]] = ContextVar("reward_errors")
"""Names and errors of the reward functions in the scoring that runs in this context."""


@dataclass(frozen=True, slots=True, kw_only=True)
class VerifiersSetup:
    """The environment and what its rollouts need of the package.

    Attributes:
        types: the package's module of message types.
        client: creates the client of a rollout.
        overlong_error: the package's exception for a prompt that exceeds the context length.
        tool_names: names of the tools in the chat template.
    """

    env: Any
    types: Any
    client: Callable[[VerifiersRollout], Any]
    overlong_error: type[Exception]
    tool_names: Sequence[str]


class VerifiersRollout:
    """A rollout on one row of the environment's dataset.

    All its coroutines run in one event loop, one at a time.
    """

    def __init__(self, setup: VerifiersSetup, row: Mapping[str, Any]) -> None:
        self._setup = setup
        self._row = row
        self._client = setup.client(self)
        self._seen: list[tuple[str, str]] = []
        self._tool_name_of: dict[str, str] = {}
        self._calls: tuple[Attempt, ...] = ()
        self._tool_errors: list[Exception] = []
        self._num_turns = 0
        self._request_error: Exception | None = None
        self._running: asyncio.Task[Any] | None = None
        self._requests: asyncio.Queue[Step] = asyncio.Queue()
        self._response: asyncio.Future[Any] | None = None

    async def start(self) -> Step:
        """Start the environment's loop and return its first messages."""
        self._loop = asyncio.get_running_loop()
        TOOL_ERRORS.set(self._tool_errors)
        self._running = asyncio.create_task(
            self._setup.env.rollout(dict(self._row), self._client, "policy", {})
        )
        return await self._next_step()

    async def step(self, text: str) -> Step:
        """Pass one turn of the policy to the environment and return the environment's reply."""
        types = self._setup.types
        self._calls, rest = read_calls(text) if self._setup.tool_names else ((), text)
        self._tool_errors.clear()
        self._num_turns += 1
        calls = [self._tool_call(i, call) for i, call in enumerate(self._calls)]
        content = rest.strip() if calls else text
        self._seen.append(("assistant", content))
        message = types.ResponseMessage(
            content=content,
            tool_calls=calls or None,
            finish_reason="tool_calls" if calls else "stop",
            is_truncated=False,
        )
        response = types.Response(
            id=f"turn-{self._num_turns}", created=0, model="policy", message=message
        )
        assert self._response is not None, "step before start"
        self._response.set_result(response)
        return await self._next_step()

    async def finish(self) -> Mapping[str, Any]:
        """End the environment's loop, score the rollout and return its final state.

        Raises:
            RewardFault: a reward function raised.
        """
        assert self._running is not None, "finish before start"
        if self._response is not None and not self._response.done():
            error = self._setup.overlong_error("the rollout has no turns or tokens left")
            self._response.set_exception(error)
            await self._next_step()
        state = await self._running
        errors: list[tuple[str, Exception]] = []
        REWARD_ERRORS.set(errors)
        await self._setup.env.rubric.score_rollout(state)
        await self._setup.env.rubric.cleanup(state)
        for name, error in errors:
            raise RewardFault("raised", f"reward {name!r} raised {type(error).__name__}: {error}")
        return state

    def cancel(self) -> None:
        """Cancel an unfinished rollout; may be called from any thread."""
        if self._running is not None:
            self._loop.call_soon_threadsafe(self._running.cancel)

    async def request_turn(
        self, prompt: Sequence[Any], tools: Sequence[Any] | None, state: Any
    ) -> Any:
        """Pass the new messages to the policy and wait for its turn; called by the client."""
        try:
            messages = self._new_messages(prompt)
            tool_names = [tool.name for tool in tools or ()]
            if tool_names != list(self._setup.tool_names):
                raise ValueError(
                    f"its tools changed from {list(self._setup.tool_names)} to {tool_names}"
                )
            if self._response is not None and not self._response.done():
                raise ValueError("it requests two turns at the same time")
        except ValueError as error:
            self._request_error = error
            raise
        self._response = asyncio.get_running_loop().create_future()
        self._requests.put_nowait(self._make_step(state, messages))
        return await self._response

    async def _next_step(self) -> Step:
        """Wait until the environment requests a turn or ends."""
        assert self._running is not None
        request = asyncio.ensure_future(self._requests.get())
        try:
            await asyncio.wait({request, self._running}, return_when=asyncio.FIRST_COMPLETED)
            if request.done():
                return request.result()
        finally:
            request.cancel()
        state = self._running.result()
        if error := self._request_error or state.get("error"):
            cause = error.__cause__ or error
            raise RuntimeError(f"the environment failed: {type(cause).__name__}: {cause}")
        return self._make_step(state, done=True)

    def _make_step(
        self, state: Any, messages: tuple[Message, ...] = (), *, done: bool = False
    ) -> Step:
        steps = state["trajectory"]
        reward = steps[-1]["reward"] if steps else None
        num_malformed = sum(not isinstance(call, ToolCall) for call in self._calls)
        num_failed = max(num_malformed, len(self._tool_errors))
        return Step(
            messages=messages,
            reward=reward,
            reward_parts={} if reward is None else {"step": reward},
            tool_calls=len(self._calls),
            tool_successes=max(0, len(self._calls) - num_failed),
            done=done,
        )

    def _new_messages(self, prompt: Sequence[Any]) -> tuple[Message, ...]:
        contents = [(str(message.role), plain_text(message.content)) for message in prompt]
        num_seen = len(self._seen)
        if contents[:num_seen] != self._seen:
            raise ValueError("it rewrites earlier messages; the conversation may only grow")
        self._seen = contents
        return tuple(self._convert(message) for message in prompt[num_seen:])

    def _convert(self, message: Any) -> Message:
        converted: dict[str, Any] = {"role": message.role, "content": plain_text(message.content)}
        if message.role == "tool":
            return {**converted, "name": self._tool_name_of.get(message.tool_call_id, "unknown")}
        if calls := getattr(message, "tool_calls", None):  # in an example of the first messages
            self._tool_name_of |= {call.id: call.name for call in calls}
            converted["tool_calls"] = [
                {
                    "id": call.id,
                    "type": "function",
                    "function": {"name": call.name, "arguments": json.loads(call.arguments)},
                }
                for call in calls
            ]
        return converted

    def _tool_call(self, index: int, call: Attempt) -> Any:
        well_formed = isinstance(call, ToolCall)
        name = call.name if well_formed else "unknown"
        # Malformed calls are passed on, because the environment has its own replies to them.
        arguments = json.dumps(dict(call.arguments)) if well_formed else call.reason
        call_id = f"call-{self._num_turns}-{index}"
        self._tool_name_of[call_id] = name
        return self._setup.types.ToolCall(id=call_id, name=name, arguments=arguments)


def plain_text(content: Any) -> str:
    """Return the content of a message; raise ValueError if it has parts that are not text."""
    if content is None or isinstance(content, str):
        return content or ""
    texts = []
    for part in content:
        if part["type"] != "text":
            raise ValueError(f"a message contains {part['type']!r}; only text is supported")
        texts.append(part["text"])
    return "\n".join(texts)


def make_policy_client(base: type[Any]) -> type[Any]:
    """Return a subclass of the package's client base class that requests turns from a rollout."""

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
            return await self.client.request_turn(prompt, tools, kwargs["state"])

        async def raise_from_native_response(self, response: Any) -> None:
            pass

        async def from_native_response(self, response: Any) -> Any:
            return response

        async def close(self) -> None:
            pass

    return PolicyClient
