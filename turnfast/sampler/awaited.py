"""A sampler as something that coroutines wait for, and how well it was used."""

from __future__ import annotations

import asyncio
import contextlib
import time
from dataclasses import dataclass

from ..metrics.reduce import Max, Mean, Metric
from .base import Completion, Request, Sampler

TAIL_SHARE = 0.25
IDLE_WAIT_S = 0.1
LOOK_UP_S = 0.02
"""How long the engine may be stepped without a look at the loop, whose code and data it has driven
out of the processor's caches each time."""
PATIENCE = 0.02
"""Share of an engine step that rollouts at work in their environments are given after it: an
`async` tool of many small awaits must not need an engine step for each of them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Usage:
    """How the time of a rollout was used.

    Attributes:
        time_s: from the start of the first trajectory to the end of the last.
        utilisation: slots in use per engine step, over the slots that could be in use: those of
            the engine, or the largest number of trajectories at a time if that is smaller.
        tail: share of the time in which fewer than a quarter of that number were left.
        tool_wait: share of the time in which no request was pending, because every trajectory
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
    """Hands requests of many coroutines to one sampler; whoever owns it calls `advance`."""

    def __init__(self, sampler: Sampler) -> None:
        self._sampler = sampler
        self._waiting: dict[int, asyncio.Future[Completion]] = {}
        self._next_id = 0
        self._closed = False
        self._news = asyncio.Event()
        self._new_future = asyncio.get_running_loop().create_future

        self._begin = self._since = time.perf_counter()
        self._num_playing = self._most_playing = 0
        self._time_with: dict[int, float] = {}
        self._num_steps = self._slots_used = 0
        self._idle_s = 0.0

    async def generate(
        self, prompt_ids: tuple[int, ...], max_new_tokens: int, temperature: float, seed: int
    ) -> Completion:
        """The completion of one turn; cancelling the wait takes the request back."""
        self._next_id += 1
        request = Request(
            id=self._next_id,
            prompt_ids=prompt_ids,
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            seed=seed,
        )
        if self._closed:
            raise RuntimeError("the rollout that this request belongs to is over")
        future = self._waiting[request.id] = self._new_future()
        try:
            self._sampler.submit(request)
            self._news.set()
            return await future
        except BaseException:
            if self._waiting.pop(request.id, None):
                self._sampler.abort([request.id])
            raise

    @property
    def num_free(self) -> int:
        """Requests that it could take up at once."""
        return self._sampler.capacity - self._sampler.num_pending

    def enter(self) -> None:
        """A rollout begins."""
        self._count(+1)

    def leave(self) -> None:
        """A rollout has ended; also ends a wait of `advance`."""
        self._count(-1)
        self._news.set()

    async def advance(self) -> None:
        """A step of the engine, or as many as end nobody's wait; without requests, a wait for one,
        or for a rollout's end."""
        if not self._sampler.num_pending:
            begin = time.perf_counter()
            self._news.clear()
            # the limit is for the caller, who may have reasons to stop
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._news.wait(), timeout=IDLE_WAIT_S)
            # before the first step nobody waits for a tool
            self._idle_s += (time.perf_counter() - begin) * (self._num_steps > 0)
            return
        begin = time.perf_counter()
        done = self._step()
        end = time.perf_counter()
        # as long as everybody waits for the engine there is nobody to look after
        while not done and self._num_playing == len(self._waiting) and end < begin + LOOK_UP_S:
            done = self._step()
            end = time.perf_counter()
        for completion in done:
            future = self._waiting.pop(completion.id, None)
            if future is not None and not future.done():
                future.set_result(completion)
        # in one turn of the loop those that were woken submit their next request, in time for the
        # next engine step
        await asyncio.sleep(0)
        end += PATIENCE * (end - begin)
        while self._num_playing > len(self._waiting) and time.perf_counter() < end:
            await asyncio.sleep(0)

    def _step(self) -> list[Completion]:
        self._num_steps += 1
        self._slots_used += min(self._sampler.num_pending, self._sampler.capacity)
        return self._sampler.step()

    def close(self) -> None:
        """Take every request back, and no more from now on."""
        self._closed = True
        self._sampler.abort(list(self._waiting))
        self._waiting.clear()

    def usage(self) -> Usage:
        self._count(0)
        time_s = self._since - self._begin
        slots = min(self._sampler.capacity, self._most_playing)
        few = TAIL_SHARE * self._most_playing
        tail_s = sum(spent for count, spent in self._time_with.items() if 0 < count < few)
        return Usage(
            time_s=time_s,
            utilisation=Mean(self._slots_used, self._num_steps * slots, if_empty=0.0),
            tail=Mean(tail_s, time_s, if_empty=0.0),
            tool_wait=Mean(self._idle_s, time_s, if_empty=0.0),
        )

    def _count(self, change: int) -> None:
        now = time.perf_counter()
        spent = self._time_with.get(self._num_playing, 0.0)
        self._time_with[self._num_playing] = spent + now - self._since
        self._since = now
        self._num_playing += change
        self._most_playing = max(self._most_playing, self._num_playing)
