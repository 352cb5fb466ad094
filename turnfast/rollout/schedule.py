"""The rollouts of a step in play: which groups are whole, which are running, and which come next.

A rollout starts when the sampler has a slot for it, so its clock does not run while it queues, and
a slot is not left empty while others wait for their tools.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable, Coroutine, Iterator
from dataclasses import dataclass, field

from ..sampler.awaited import AwaitedSampler
from ..types import Group, Task, Trajectory

STUBBORN_S = 10.0
"""How long a trajectory that is called off may take to clean up before nobody waits for it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Prompt:
    """A task at its place in the data.

    Attributes:
        place: with the task's id and the rollout's index it seeds the samples, so a prompt that is
            rolled out again draws with the same random numbers.
        settled: it was dropped before and must be finished this time.
    """

    place: int
    task: Task
    settled: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Quota:
    """How many groups a step is made of.

    Attributes:
        wanted: groups after which the rest is dropped; only those that `counts` are counted.
        ahead: prompts in flight beyond those.
        most: prompts that may be started in all.
    """

    wanted: int
    ahead: int = 0
    most: int


@dataclass(slots=True, kw_only=True, eq=False)
class Deadline:
    """When a trajectory must have ended; whoever plays it watches the clock and calls it off.

    Attributes:
        expired: it was called off because its time was up, not because nobody wants it any more.
    """

    timeout_s: float
    end: float
    expired: bool = False


Play = Callable[[Prompt, int, Deadline], Coroutine[None, None, Trajectory]]


@dataclass(slots=True, kw_only=True, eq=False)
class _Playing:
    """A group that is not whole yet; `played` by index, as its rollouts end."""

    prompt: Prompt
    played: dict[int, Trajectory] = field(default_factory=dict)
    tasks: list[asyncio.Task[None]] = field(default_factory=list)


@dataclass(slots=True, kw_only=True, eq=False)
class _Started:
    """A rollout that has begun, perhaps ended."""

    group: _Playing
    index: int
    deadline: Deadline
    task: asyncio.Task[None]


class InPlay:
    """Starts rollouts of prompts and gathers them into groups, in the running event loop.

    Args:
        size: rollouts per prompt.
        play: one rollout of a prompt by its index in the group; it never fails, and raises only
            what it is cancelled with.
        timeout_s: for one rollout, from its start.
    """

    def __init__(
        self,
        prompts: Iterator[Prompt],
        quota: Quota,
        engine: AwaitedSampler,
        play: Play,
        *,
        size: int,
        counts: Callable[[Group], bool],
        timeout_s: float,
    ) -> None:
        self._prompts = prompts
        self._quota = quota
        self._engine = engine
        self._play = play
        self._size = size
        self._counts = counts
        self._timeout_s = timeout_s
        self._running: dict[int, _Playing] = {}
        self._queued: deque[tuple[_Playing, int]] = deque()
        self._started: deque[_Started] = deque()
        self._late: list[_Started] = []
        self._broken: BaseException | None = None
        self._num_counted = self._num_settled = 0
        self.num_started = 0
        self.whole: dict[int, Group] = {}
        self.called_off: list[Prompt] = []

    @property
    def num_unfinished(self) -> int:
        return sum(self._size - len(group.played) for group in self._running.values())

    async def tend(self) -> bool:
        """Call off what is late or no longer needed, start what is; False when nothing is left."""
        if self._broken is not None:
            raise self._broken
        self._call_off_late()
        if self._num_counted + self._num_settled >= self._quota.wanted:
            for place in [p for p, group in self._running.items() if not group.prompt.settled]:
                group = self._running.pop(place)
                self.called_off.append(group.prompt)
                for task in group.tasks:
                    task.cancel()
        else:
            self._take_prompts()
        if self._start():
            # their first requests are there for the engine's next step
            await asyncio.sleep(0)
        return bool(self._running)

    def _take_prompts(self) -> None:
        quota = self._quota
        while self._num_counted + len(self._running) < quota.wanted + quota.ahead:
            prompt = next(self._prompts, None) if self.num_started < quota.most else None
            if prompt is None:
                return
            group = _Playing(prompt=prompt)
            self._running[prompt.place] = group
            self._num_settled += prompt.settled
            self._queued.extend((group, index) for index in range(self._size))
            self.num_started += 1

    def _start(self) -> bool:
        room = most = self._engine.num_free
        while room > 0 and self._queued:
            group, index = self._queued.popleft()
            if self._running.get(group.prompt.place) is not group:
                continue
            deadline = Deadline(
                timeout_s=self._timeout_s, end=time.perf_counter() + self._timeout_s
            )
            task = asyncio.create_task(self._run(group, index, deadline))
            group.tasks.append(task)
            started = _Started(group=group, index=index, deadline=deadline, task=task)
            self._started.append(started)
            room -= 1
        return room < most

    async def _run(self, group: _Playing, index: int, deadline: Deadline) -> None:
        self._engine.enter()
        try:
            self._take(group, index, await self._play(group.prompt, index, deadline))
        except Exception as error:  # a fault of ours: it ends the step, not this rollout alone
            self._broken = error
        finally:
            self._engine.leave()

    def _take(self, group: _Playing, index: int, trajectory: Trajectory) -> None:
        # an abandoned one may come to an end after all
        group.played.setdefault(index, trajectory)
        place = group.prompt.place
        if len(group.played) < self._size or self._running.get(place) is not group:
            return
        del self._running[place]
        self._num_settled -= group.prompt.settled
        played = tuple(group.played[i] for i in range(self._size))
        self.whole[place] = whole = Group(task=group.prompt.task, trajectories=played)
        self._num_counted += self._counts(whole)

    def _call_off_late(self) -> None:
        now, started = time.perf_counter(), self._started
        # all have the same time, so the first that began is the first to be late
        while started and (started[0].task.done() or started[0].deadline.end <= now):
            first = started.popleft()
            if not first.task.done():
                first.deadline.expired = True
                first.task.cancel()
                self._late.append(first)
        for late in [late for late in self._late if late.deadline.end + STUBBORN_S <= now]:
            self._late.remove(late)
            if not late.task.done():
                self._take(late.group, late.index, self._abandoned(late.group, late.index))

    def _abandoned(self, group: _Playing, index: int) -> Trajectory:
        return Trajectory(
            task_id=group.prompt.task.id,
            index=index,
            turns=(),
            status="timeout",
            error=f"no end after {self._timeout_s} s, and its environment would not be called off",
            time_s=self._timeout_s + STUBBORN_S,
        )
