"""Groups of trajectories from tasks: every trajectory advances on its own.

One asyncio task per trajectory, one sampler for all of them. While a trajectory waits for its tool
the engine keeps stepping for the others; nothing runs in lock step. Every wait has a deadline, and
what goes wrong in one trajectory becomes that trajectory's status.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Coroutine, Iterator, Sequence
from dataclasses import dataclass

from .chat import Bridge
from .config import RolloutConfig
from .envs import Env
from .play import derive_seed, play
from .sampler import Sampler
from .sampler.awaited import AwaitedSampler, Usage
from .types import Group, Task


class RolloutError(RuntimeError):
    """Too many failed rollouts to go on; the text shows the first failure."""


class Interrupted(Exception):
    """The run was asked to stop while it was rolling out."""


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


@dataclass(frozen=True, slots=True, kw_only=True)
class Gathered:
    """What came of a step's prompts.

    Attributes:
        groups: the whole ones in the order of the data, those that did not count among them.
        dropped: prompts that were called off; nothing of them is kept.
        num_refilled: prompts that were started in the place of groups that did not count.
    """

    groups: tuple[Group, ...]
    dropped: tuple[Prompt, ...]
    num_refilled: int
    usage: Usage


def everyone_counts(group: Group) -> bool:
    return True


def rollout(
    tasks: Sequence[Task],
    env: Env,
    chat: Bridge,
    sampler: Sampler,
    config: RolloutConfig,
    *,
    max_turns: int,
    seed: int,
    group_size: int | None = None,
    temperature: float | None = None,
    should_stop: Callable[[], bool] = lambda: False,
) -> list[Group]:
    """Roll out every task `group_size` times, none of them dropped: see `gather`."""
    gathered = gather(
        (Prompt(place=place, task=task) for place, task in enumerate(tasks)),
        Quota(wanted=len(tasks), most=len(tasks)),
        env,
        chat,
        sampler,
        config,
        max_turns=max_turns,
        seed=seed,
        group_size=group_size,
        temperature=temperature,
        should_stop=should_stop,
    )
    return list(gathered.groups)


def gather(
    prompts: Iterator[Prompt],
    quota: Quota,
    env: Env,
    chat: Bridge,
    sampler: Sampler,
    config: RolloutConfig,
    *,
    max_turns: int,
    seed: int,
    counts: Callable[[Group], bool] = everyone_counts,
    group_size: int | None = None,
    temperature: float | None = None,
    should_stop: Callable[[], bool] = lambda: False,
) -> Gathered:
    """Roll out prompts, each `group_size` times, until as many groups as wanted are whole.

    A group that does not count is replaced by the next prompt at once, as long as the quota
    allows. Once the wanted number is reached, settled prompts still in flight included, the other
    rollouts in flight are called off and their prompts are dropped.

    Args:
        prompts: taken from as needed, at most `quota.most`; fewer end the rollout early.
        max_turns: a trajectory that has not ended by then is scored as it stands.
        seed: with the prompt's place and task, the rollout's index and the turn it seeds each
            request, so the same seed gives the same groups whatever finishes first.
        counts: whether a whole group is one of those wanted.
        temperature: overrides the configured one; 0 is greedy.
        should_stop: asked between engine steps.
    Raises:
        RolloutError: more than `config.max_error_share` of the rollouts failed, or they took longer
            than `config.step_timeout_s`.
        Interrupted: `should_stop` said so.
    """
    size = config.group_size if group_size is None else group_size

    async def play_group(prompt: Prompt, engine: AwaitedSampler) -> Group:
        played = await asyncio.gather(
            *(
                play(
                    prompt.task,
                    i,
                    env,
                    chat,
                    engine,
                    config,
                    max_turns=max_turns,
                    # a task that comes twice is rolled out anew, not copied
                    seed=derive_seed(seed, prompt.place, prompt.task.id, i),
                    temperature=config.temperature if temperature is None else temperature,
                )
                for i in range(size)
            )
        )
        return Group(task=prompt.task, trajectories=tuple(played))

    ended: list[Gathered] = []

    async def play_all() -> None:
        engine = AwaitedSampler(sampler)
        field = _Field(prompts, quota, counts, lambda prompt: play_group(prompt, engine))
        end = time.perf_counter() + config.step_timeout_s
        try:
            while field.tend(engine.wake):
                if should_stop():
                    raise Interrupted
                if time.perf_counter() > end:
                    raise RolloutError(
                        f"rollout.step_timeout_s: {engine.num_playing} of "
                        f"{field.num_started * size} rollouts were still running after "
                        f"{config.step_timeout_s} s"
                    )
                await engine.advance()
            ended.append(field.gathered(engine.usage()))
        finally:
            await field.clear()
            engine.abandon()

    # not the result of its task: where Ctrl-C has Python's own handler, `run` ends with a lookup
    # whose error message spells that result out, all rollouts of the step
    asyncio.run(play_all())
    (gathered,) = ended
    _check_failures(gathered.groups, config.max_error_share)
    return gathered


class _Field:
    """The groups in play: which are whole, which are running, and which come next."""

    def __init__(
        self,
        prompts: Iterator[Prompt],
        quota: Quota,
        counts: Callable[[Group], bool],
        play_group: Callable[[Prompt], Coroutine[None, None, Group]],
    ) -> None:
        self._prompts = prompts
        self._quota = quota
        self._counts = counts
        self._play_group = play_group
        self._running: dict[asyncio.Task[Group], Prompt] = {}
        self._called_off: dict[asyncio.Task[Group], Prompt] = {}
        self._whole: dict[int, Group] = {}
        self._num_counted = 0
        self.num_started = 0

    def tend(self, on_end: Callable[[], None]) -> bool:
        """Take in what is whole, call off what is no longer needed, start what is; False when
        nothing is left running."""
        for done in [task for task in self._running if task.done()]:
            place = self._running.pop(done).place
            self._whole[place] = done.result()
            self._num_counted += self._counts(self._whole[place])
        settled = sum(prompt.settled for prompt in self._running.values())
        if self._num_counted + settled >= self._quota.wanted:
            for task in [task for task, prompt in self._running.items() if not prompt.settled]:
                self._called_off[task] = self._running.pop(task)
                task.cancel()
        else:
            self._start(on_end)
        return bool(self._running)

    def _start(self, on_end: Callable[[], None]) -> None:
        quota = self._quota
        while self._num_counted + len(self._running) < quota.wanted + quota.ahead:
            prompt = next(self._prompts, None) if self.num_started < quota.most else None
            if prompt is None:
                return
            task = asyncio.ensure_future(self._play_group(prompt))
            task.add_done_callback(lambda _: on_end())
            self._running[task] = prompt
            self.num_started += 1

    def gathered(self, usage: Usage) -> Gathered:
        return Gathered(
            groups=tuple(self._whole[place] for place in sorted(self._whole)),
            dropped=tuple(self._called_off.values()),
            num_refilled=max(0, self.num_started - self._quota.wanted - self._quota.ahead),
            usage=usage,
        )

    async def clear(self) -> None:
        """Leave nobody behind."""
        tasks = [*self._running, *self._called_off]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def _check_failures(groups: Sequence[Group], limit: float) -> None:
    played = [trajectory for group in groups for trajectory in group.trajectories]
    failed = [trajectory for trajectory in played if trajectory.failed]
    if len(failed) > limit * len(played):
        raise RolloutError(
            f"{len(failed)} of {len(played)} rollouts failed, more than rollout.max_error_share = "
            f"{limit} allows; the first, on task {failed[0].task_id!r}: {failed[0].error}"
        )
