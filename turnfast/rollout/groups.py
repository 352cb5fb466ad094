"""Groups of trajectories from prompts; every trajectory advances on its own.

Each trajectory is one asyncio task, and all share one sampler. While a trajectory waits for its
tool, the engine keeps stepping for the others. Every wait has a deadline, and an error in one
trajectory becomes that trajectory's end.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

from ..errors import Interrupted, RolloutError
from ..metrics.reduce import Metric, Sum
from ..sampler.awaited import AwaitedSampler, Usage
from ..types import Group, Task
from .episode import play_episode
from .event_loop import run_bounded
from .schedule import CANCEL_GRACE_S, Prompt, Quota, RolloutScheduler
from .setup import RolloutSetup


@dataclass(frozen=True, slots=True, kw_only=True)
class CollectedGroups:
    """The rollouts of one step.

    Attributes:
        groups: all finished groups in the order of the data, also those that did not count.
        dropped: prompts whose rollouts were cancelled; none of their samples is kept.
        num_refilled: prompts that were started to replace groups that did not count.
    """

    groups: tuple[Group, ...]
    dropped: tuple[Prompt, ...]
    num_refilled: int
    usage: Usage

    def metrics(self) -> dict[str, Metric]:
        """The metrics of the collection, under the names of metrics.jsonl."""
        return {
            **self.usage.metrics(),
            "groups_dropped": Sum(len(self.dropped)),
            "groups_refilled": Sum(self.num_refilled),
        }


def rollout_tasks(
    setup: RolloutSetup,
    tasks: Sequence[Task],
    *,
    should_stop: Callable[[], bool] = lambda: False,
) -> list[Group]:
    """Roll out every task `group_size` times and drop none: see `collect_groups`."""
    collected = collect_groups(
        setup,
        (Prompt(place=place, task=task) for place, task in enumerate(tasks)),
        Quota(wanted=len(tasks), most=len(tasks)),
        should_stop=should_stop,
    )
    return list(collected.groups)


def collect_groups(
    setup: RolloutSetup,
    prompts: Iterator[Prompt],
    quota: Quota,
    *,
    counts: Callable[[Group], bool] = lambda group: True,
    should_stop: Callable[[], bool] = lambda: False,
) -> CollectedGroups:
    """Roll out prompts, each `group_size` times, until enough groups are finished.

    A group that does not count is replaced by the next prompt, as long as the quota allows. Once
    the quota is reached, the rollouts still running are cancelled and their prompts are dropped;
    prompts that must finish are waited for.

    Args:
        prompts: read as needed, at most `quota.most`; if there are fewer, the rollout ends early.
        counts: whether a finished group counts towards `quota.wanted`.
        should_stop: asked between engine steps.
    Raises:
        RolloutError: more than `max_error_share` of the rollouts failed, or they took longer than
            `step_timeout_s`.
        Interrupted: `should_stop` returned True.
    """
    config = setup.config

    async def run() -> CollectedGroups:
        engine = AwaitedSampler(setup.sampler)
        scheduler = RolloutScheduler(
            prompts,
            quota,
            engine,
            partial(play_episode, setup, engine),
            size=config.group_size,
            counts=counts,
            timeout_s=config.trajectory_timeout_s,
        )
        end = time.perf_counter() + config.step_timeout_s
        try:
            while await scheduler.update():
                if should_stop():
                    raise Interrupted
                if time.perf_counter() > end:
                    raise RolloutError(
                        f"rollout.step_timeout_s: {scheduler.num_unfinished} of "
                        f"{scheduler.num_started * config.group_size} rollouts were still running "
                        f"after {config.step_timeout_s} s"
                    )
                await engine.advance()
        finally:
            engine.close()
        return CollectedGroups(
            groups=scheduler.groups,
            dropped=tuple(scheduler.dropped),
            num_refilled=max(0, scheduler.num_started - quota.wanted - quota.ahead),
            usage=engine.usage(),
        )

    collected = run_bounded(run(), grace_s=CANCEL_GRACE_S)
    _check_failures(collected.groups, config.max_error_share)
    return collected


def _check_failures(groups: Sequence[Group], max_error_share: float) -> None:
    trajectories = [trajectory for group in groups for trajectory in group.trajectories]
    failed = [trajectory for trajectory in trajectories if trajectory.failed]
    if len(failed) > max_error_share * len(trajectories):
        raise RolloutError(
            f"{len(failed)} of {len(trajectories)} rollouts failed, more than "
            f"rollout.max_error_share = {max_error_share} allows; the first, on task "
            f"{failed[0].task_id!r}: {failed[0].error}"
        )
