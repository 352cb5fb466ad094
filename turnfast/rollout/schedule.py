"""Which rollouts of a step are queued, running and finished.

A rollout starts when the sampler has a free slot, so its deadline does not include time in the
queue, and no slot stays empty while other rollouts wait for their tools.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable, Coroutine, Iterator
from dataclasses import dataclass, field

from ..sampler.awaited import AwaitedSampler
from ..types import Group, Status, Task, Trajectory

CANCEL_GRACE_S = 10.0
"""How long the scheduler waits for the cleanup of a cancelled trajectory."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Prompt:
    """A task at its place in the data.

    Attributes:
        place: seeds the samples, with the task's id and the rollout's index: a prompt that is
            rolled out again draws with the same random numbers.
        must_finish: it was dropped before and may not be dropped again.
    """

    place: int
    task: Task
    must_finish: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Quota:
    """How many groups a step needs.

    Attributes:
        wanted: stop after this many groups that count.
        ahead: prompts to run in addition to those still wanted.
        most: prompts that may be started in total.
    """

    wanted: int
    ahead: int = 0
    most: int


@dataclass(slots=True, kw_only=True, eq=False)
class Deadline:
    """When a trajectory must have ended. `expired` is set when it is cancelled for being late,
    and not because it is no longer needed."""

    timeout_s: float
    end: float
    expired: bool = False


Play = Callable[[Prompt, int, Deadline], Coroutine[None, None, Trajectory]]


@dataclass(slots=True, kw_only=True, eq=False)
class _OpenGroup:
    """A group with unfinished rollouts; `trajectories` holds the finished ones by index."""

    prompt: Prompt
    trajectories: dict[int, Trajectory] = field(default_factory=dict)
    tasks: list[asyncio.Task[None]] = field(default_factory=list)


@dataclass(slots=True, kw_only=True, eq=False)
class _Rollout:
    """A rollout that was started."""

    group: _OpenGroup
    index: int
    deadline: Deadline
    task: asyncio.Task[None]


class RolloutScheduler:
    """Starts the rollouts of prompts in the running event loop and collects them into groups.

    Args:
        play: runs one rollout of a prompt, by its index in the group. It returns errors of the
            environment as a failed trajectory and raises only when it is cancelled.
        size: rollouts per prompt.
        counts: whether a finished group counts towards `quota.wanted`.
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
        self._open: dict[int, _OpenGroup] = {}
        self._queued: deque[tuple[_OpenGroup, int]] = deque()
        self._started: deque[_Rollout] = deque()
        self._late: list[_Rollout] = []
        self._finished: dict[int, Group] = {}
        self._error: BaseException | None = None
        self._num_counted = self._num_must_finish = 0
        self.num_started = 0
        self.dropped: list[Prompt] = []

    @property
    def groups(self) -> tuple[Group, ...]:
        """The finished groups in the order of the data."""
        return tuple(self._finished[place] for place in sorted(self._finished))

    @property
    def num_unfinished(self) -> int:
        return sum(self._size - len(group.trajectories) for group in self._open.values())

    async def update(self) -> bool:
        """Cancel rollouts that are late or no longer needed and start queued ones; False when no
        group is left to wait for."""
        if self._error is not None:
            raise self._error
        self._cancel_late()
        if self._num_counted + self._num_must_finish >= self._quota.wanted:
            self._drop_open_groups()
        else:
            self._take_prompts()
        if self._start_queued():
            # lets new rollouts submit their first requests before the next engine step
            await asyncio.sleep(0)
        return bool(self._open)

    def _drop_open_groups(self) -> None:
        for place in [p for p, group in self._open.items() if not group.prompt.must_finish]:
            group = self._open.pop(place)
            self.dropped.append(group.prompt)
            for task in group.tasks:
                task.cancel()

    def _take_prompts(self) -> None:
        quota = self._quota
        while self._num_counted + len(self._open) < quota.wanted + quota.ahead:
            prompt = next(self._prompts, None) if self.num_started < quota.most else None
            if prompt is None:
                return
            group = _OpenGroup(prompt=prompt)
            self._open[prompt.place] = group
            self._num_must_finish += prompt.must_finish
            self._queued.extend((group, index) for index in range(self._size))
            self.num_started += 1

    def _start_queued(self) -> bool:
        num_free = before = self._engine.num_free
        while num_free > 0 and self._queued:
            group, index = self._queued.popleft()
            if not self._is_open(group):
                continue
            end = time.perf_counter() + self._timeout_s
            deadline = Deadline(timeout_s=self._timeout_s, end=end)
            task = asyncio.create_task(self._run(group, index, deadline))
            group.tasks.append(task)
            self._started.append(_Rollout(group=group, index=index, deadline=deadline, task=task))
            num_free -= 1
        return num_free < before

    async def _run(self, group: _OpenGroup, index: int, deadline: Deadline) -> None:
        self._engine.enter()
        try:
            self._add(group, index, await self._play(group.prompt, index, deadline))
        except Exception as error:  # a bug here, not in the environment: it ends the step
            self._error = error
        finally:
            self._engine.leave()

    def _add(self, group: _OpenGroup, index: int, trajectory: Trajectory) -> None:
        # a rollout that ignored its cancellation may still end; it remains a timeout
        group.trajectories.setdefault(index, trajectory)
        if len(group.trajectories) < self._size or not self._is_open(group):
            return
        prompt = group.prompt
        del self._open[prompt.place]
        self._num_must_finish -= prompt.must_finish
        trajectories = tuple(group.trajectories[i] for i in range(self._size))
        finished = Group(task=prompt.task, trajectories=trajectories)
        self._finished[prompt.place] = finished
        self._num_counted += self._counts(finished)

    def _is_open(self, group: _OpenGroup) -> bool:
        return self._open.get(group.prompt.place) is group

    def _cancel_late(self) -> None:
        now, started = time.perf_counter(), self._started
        # all rollouts have the same timeout, so they become late in the order of their start
        while started and (started[0].task.done() or started[0].deadline.end <= now):
            first = started.popleft()
            if not first.task.done():
                first.deadline.expired = True
                first.task.cancel()
                self._late.append(first)
        for late in [late for late in self._late if late.deadline.end + CANCEL_GRACE_S <= now]:
            self._late.remove(late)
            if late.task.done():
                continue
            timed_out = Trajectory(
                task_id=late.group.prompt.task.id,
                index=late.index,
                turns=(),
                status=Status.TIMEOUT,
                error=f"no end after {self._timeout_s} s, and its environment ignored cancellation",
                time_s=self._timeout_s + CANCEL_GRACE_S,
            )
            self._add(late.group, late.index, timed_out)
