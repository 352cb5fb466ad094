"""A sampler as something that coroutines wait for, and how well it was used."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Iterator
from dataclasses import dataclass

from .base import Completion, Request, Sampler

TAIL_SHARE = 0.25
IDLE_WAIT_S = 0.1


@dataclass(frozen=True, slots=True, kw_only=True)
class Usage:
    """What became of the time of a rollout.

    Attributes:
        time_s: from the start of the first rollout to the end of the last.
        utilisation: slots in use, summed over the engine's steps, over steps × slots. The slots
            are those of the engine, or as many as there were rollouts at the same time where those
            are fewer: 1.0 if no step left one of them empty.
        tail: share of the time in which fewer than a quarter of the rollouts that had been running
            at the same time were left.
        tool_wait: share of the time in which there was nothing to generate, because every rollout
            waited for its environment.
    """

    time_s: float
    utilisation: float
    tail: float
    tool_wait: float


class AwaitedSampler:
    """Hands requests of many coroutines to one sampler; whoever owns it calls `advance`."""

    def __init__(self, sampler: Sampler) -> None:
        self._sampler = sampler
        self._waiting: dict[int, asyncio.Future[Completion]] = {}
        self._next_id = 0
        self._news = asyncio.Event()

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
        future = asyncio.get_running_loop().create_future()
        self._waiting[request.id] = future
        self._sampler.submit(request)
        self._news.set()
        try:
            return await future
        finally:
            if self._waiting.pop(request.id, None) and future.cancelled():
                self._sampler.abort([request.id])

    @property
    def num_playing(self) -> int:
        return self._num_playing

    @contextlib.contextmanager
    def playing(self) -> Iterator[None]:
        """Around one rollout, from its first message to its end."""
        self._count(+1)
        try:
            yield
        finally:
            self._count(-1)

    def wake(self) -> None:
        """End a wait of `advance`: something has happened."""
        self._news.set()

    async def advance(self) -> None:
        """One step of the engine; without requests, wait a moment for one or for `wake`."""
        if not self._sampler.num_pending:
            begin = time.perf_counter()
            self._news.clear()
            # the limit is for the caller, who may have reasons to stop
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._news.wait(), timeout=IDLE_WAIT_S)
            # before the first step nobody waits for a tool
            self._idle_s += (time.perf_counter() - begin) * (self._num_steps > 0)
            return
        self._num_steps += 1
        self._slots_used += min(self._sampler.num_pending, self._sampler.capacity)
        done = self._sampler.step()
        for completion in done:
            future = self._waiting.get(completion.id)
            if future is not None and not future.done():
                future.set_result(completion)
        await asyncio.sleep(0)
        if done:
            # once more: a woken trajectory parses its text in one turn of the loop and submits its
            # next request in the following one, in time for the next engine step
            await asyncio.sleep(0)

    def abandon(self) -> None:
        """Take every request back."""
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
            utilisation=self._slots_used / max(1, self._num_steps * slots),
            tail=tail_s / time_s if time_s else 0.0,
            tool_wait=self._idle_s / time_s if time_s else 0.0,
        )

    def _count(self, change: int) -> None:
        now = time.perf_counter()
        spent = self._time_with.get(self._num_playing, 0.0)
        self._time_with[self._num_playing] = spent + now - self._since
        self._since = now
        self._num_playing += change
        self._most_playing = max(self._most_playing, self._num_playing)
