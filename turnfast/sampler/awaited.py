"""A sampler that coroutines can await, with statistics of its use."""

from __future__ import annotations

import asyncio
import contextlib
import time
from dataclasses import dataclass

from ..metrics.reduce import Max, Mean, Metric
from .base import Completion, Request, Sampler

TAIL_SHARE = 0.25
IDLE_WAIT_S = 0.1
"""Longest wait of `advance` without requests, so that its caller can check for a stop."""
POLL_SHARE = 0.02
"""Share of an engine step for which the event loop is polled after it, while environments work: an
`async` tool with many short awaits must not need an engine step for each."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Usage:
    """How a rollout used its time.

    Attributes:
        time_s: from the start of the first trajectory to the end of the last.
        utilisation: used slots over available slots per engine step. Available are the engine's
            slots, or the largest number of trajectories at a time if that is smaller.
        tail: share of the time in which fewer than a quarter of that number were running.
        tool_wait: share of the time in which no request was in flight, because every trajectory
            waited for its environment.
    """

    time_s: float
    utilisation: Mean
    tail: Mean
    tool_wait: Mean

    def metrics(self) -> dict[str, Metric]:
        """The metrics of the rollout's time, under the names of metrics.jsonl."""
        return {
            "rollout/time_s": Max(self.time_s),
            "rollout/utilisation": self.utilisation,
            "rollout/tail": self.tail,
            "rollout/tool_wait": self.tool_wait,
        }


class AwaitedSampler:
    """Passes the requests of many coroutines to one sampler, which `advance` steps."""

    def __init__(self, sampler: Sampler) -> None:
        self._sampler = sampler
        self._waiting: dict[int, asyncio.Future[Completion]] = {}
        self._next_id = 0
        self._closed = False
        self._changed = asyncio.Event()

        self._begin = self._since = time.perf_counter()
        self._num_running = self._max_running = 0
        self._time_with: dict[int, float] = {}
        self._num_steps = self._slots_used = 0
        self._idle_s = 0.0

    async def generate(
        self, prompt_ids: tuple[int, ...], max_new_tokens: int, temperature: float, seed: int
    ) -> Completion:
        """Sample one turn; cancelling the await aborts the request."""
        if self._closed:
            raise RuntimeError("the rollout of this request is over")
        self._next_id += 1
        request = Request(
            id=self._next_id,
            prompt_ids=prompt_ids,
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            seed=seed,
        )
        future = asyncio.get_running_loop().create_future()
        self._waiting[request.id] = future
        try:
            self._sampler.submit(request)
            self._changed.set()
            return await future
        except BaseException:
            if self._waiting.pop(request.id, None):
                self._sampler.abort([request.id])
            raise

    @property
    def num_free(self) -> int:
        """Requests that could start now."""
        return self._sampler.capacity - self._sampler.num_pending

    def enter(self) -> None:
        """Count a trajectory that starts."""
        self._count(+1)

    def leave(self) -> None:
        """Count a trajectory that ends; also ends a wait of `advance`."""
        self._count(-1)
        self._changed.set()

    async def advance(self) -> None:
        """Step the engine once; without requests, wait for a request or for a trajectory's end."""
        if not self._sampler.num_pending:
            begin = time.perf_counter()
            self._changed.clear()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._changed.wait(), timeout=IDLE_WAIT_S)
            # before the first step no trajectory waits for a tool
            self._idle_s += (time.perf_counter() - begin) * (self._num_steps > 0)
            return
        begin = time.perf_counter()
        self._num_steps += 1
        self._slots_used += min(self._sampler.num_pending, self._sampler.capacity)
        for completion in self._sampler.step():
            future = self._waiting.pop(completion.id, None)
            if future is not None and not future.done():
                future.set_result(completion)
        end = time.perf_counter()
        # woken trajectories submit their next request in time for the next engine step
        await asyncio.sleep(0)
        end += POLL_SHARE * (end - begin)
        while self._num_running > len(self._waiting) and time.perf_counter() < end:
            await asyncio.sleep(0)

    def close(self) -> None:
        """Abort all requests and accept no more."""
        self._closed = True
        self._sampler.abort(list(self._waiting))
        self._waiting.clear()

    def usage(self) -> Usage:
        self._count(0)
        time_s = self._since - self._begin
        num_slots = min(self._sampler.capacity, self._max_running)
        few = TAIL_SHARE * self._max_running
        tail_s = sum(spent_s for count, spent_s in self._time_with.items() if 0 < count < few)
        return Usage(
            time_s=time_s,
            utilisation=Mean(self._slots_used, self._num_steps * num_slots, if_empty=0.0),
            tail=Mean(tail_s, time_s, if_empty=0.0),
            tool_wait=Mean(self._idle_s, time_s, if_empty=0.0),
        )

    def _count(self, change: int) -> None:
        now = time.perf_counter()
        spent_s = self._time_with.get(self._num_running, 0.0)
        self._time_with[self._num_running] = spent_s + now - self._since
        self._since = now
        self._num_running += change
        self._max_running = max(self._max_running, self._num_running)
