"""Groups of trajectories from tasks: every trajectory advances on its own.

One asyncio task per trajectory, one sampler for all of them. While a trajectory waits for its tool
the engine keeps stepping for the others; nothing runs in lock step. Every wait has a deadline, and
what goes wrong in one trajectory becomes that trajectory's status.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Coroutine, Iterator, Sequence
from dataclasses import dataclass

from ..chat.base import Bridge
from ..config.schema import RolloutConfig
from ..envs import Env
from ..errors import Interrupted, RolloutError
from ..sampler import Sampler
from ..sampler.awaited import AwaitedSampler, Usage
from ..types import Group, Task, Trajectory
from .episode import derive_seed, play
from .event_loop import run_bounded
from .schedule import STUBBORN_S, Deadline, InPlay, Prompt, Quota


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

    async def play_all() -> Gathered:
        engine = AwaitedSampler(sampler)

        def play_one(
            prompt: Prompt, index: int, deadline: Deadline
        ) -> Coroutine[None, None, Trajectory]:
            return play(
                prompt.task,
                index,
                env,
                chat,
                engine,
                config,
                deadline,
                max_turns=max_turns,
                # a task that comes twice is rolled out anew, not copied
                seed=derive_seed(seed, prompt.place, prompt.task.id, index),
                temperature=config.temperature if temperature is None else temperature,
            )

        in_play = InPlay(
            prompts,
            quota,
            engine,
            play_one,
            size=size,
            counts=counts,
            timeout_s=config.trajectory_timeout_s,
        )
        end = time.perf_counter() + config.step_timeout_s
        try:
            while await in_play.tend():
                if should_stop():
                    raise Interrupted
                if time.perf_counter() > end:
                    raise RolloutError(
                        f"rollout.step_timeout_s: {in_play.num_unfinished} of "
                        f"{in_play.num_started * size} rollouts were still running after "
                        f"{config.step_timeout_s} s"
                    )
                await engine.advance()
        finally:
            engine.abandon()
        return Gathered(
            groups=tuple(in_play.whole[place] for place in sorted(in_play.whole)),
            dropped=tuple(in_play.called_off),
            num_refilled=max(0, in_play.num_started - quota.wanted - quota.ahead),
            usage=engine.usage(),
        )

    gathered = run_bounded(play_all(), patience_s=STUBBORN_S)
    _check_failures(gathered.groups, config.max_error_share)
    return gathered


def _check_failures(groups: Sequence[Group], limit: float) -> None:
    played = [trajectory for group in groups for trajectory in group.trajectories]
    failed = [trajectory for trajectory in played if trajectory.failed]
    if len(failed) > limit * len(played):
        raise RolloutError(
            f"{len(failed)} of {len(played)} rollouts failed, more than rollout.max_error_share = "
            f"{limit} allows; the first, on task {failed[0].task_id!r}: {failed[0].error}"
        )
