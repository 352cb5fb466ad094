"""The rollouts of each training step.

With `train.overlap` the rollouts of the next step run in a thread while this step trains::

    collect(1)   rolls out step 1 with the weights W0 and starts step 2 with them
    (training)   W0 -> W1
    wait()       waits for step 2, so that no request is in flight while W1 is loaded
    collect(2)   returns step 2 (sampled with W0, one step stale) and starts step 3 with W1
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import replace
from typing import Any

import torch

from ..config.schema import CreditConfig, RolloutConfig, TrainConfig
from ..credit import assign_credit
from ..parallel.ranks import ALONE, Ranks
from ..types import Group
from .groups import CollectedGroups, collect_groups
from .overlong import apply_overlong_rule
from .prompts import PromptQueue
from .schedule import Quota
from .setup import RolloutSetup


class Collector:
    """Collects the groups that each step trains on; a context manager that joins its thread.

    Steps must be collected in order.

    Args:
        first_step: the first step that will be collected.
    """

    def __init__(
        self,
        setup: RolloutSetup,
        prompts: PromptQueue,
        train: TrainConfig,
        credit: CreditConfig,
        *,
        first_step: int,
        should_stop: Callable[[], bool] = lambda: False,
        ranks: Ranks = ALONE,
    ) -> None:
        self._setup = setup
        self._prompts = prompts
        self._train = train
        self._credit = credit
        self._should_stop = should_stop
        self._ranks = ranks
        self._closing = False
        self._thread: ThreadPoolExecutor | None = None
        if train.overlap:
            self._thread = ThreadPoolExecutor(
                1, "rollout", torch.set_num_threads, (torch.get_num_threads(),)
            )
        self._ahead: Future[CollectedGroups] | None = None
        self._states: dict[int, dict[str, Any]] = {first_step - 1: prompts.state()}

    def __enter__(self) -> Collector:
        return self

    def __exit__(self, *_: object) -> None:
        self._closing = True
        if self._thread is not None:
            self._thread.shutdown()

    def collect(self, step: int) -> CollectedGroups:
        """The groups of a step.

        Raises:
            RolloutError, Interrupted: see `collect_groups`.
        """
        ahead, self._ahead = self._ahead, None
        collected = self._collect() if ahead is None else ahead.result()
        self._states = {step - 1: self._states[step - 1], step: self._prompts.state()}
        if self._thread is None:
            self._setup.sampler.sleep()
        elif step < self._train.steps:
            self._ahead = self._thread.submit(self._collect)
        return collected

    def wait(self) -> None:
        """Wait until the sampler is idle. The next `collect` raises the errors of this wait."""
        if self._ahead is not None:
            wait([self._ahead])

    def state(self, step: int) -> Mapping[str, Any]:
        """The data position of all ranks after `step`, which must be the last step collected or
        the one before. A collective call."""
        states = self._ranks.all_gather(self._states[step])
        return {"data": states if len(states) > 1 else states[0]}

    def _collect(self) -> CollectedGroups:
        config = self._setup.config
        collected = collect_groups(
            self._setup,
            self._prompts.take(),
            _quota(config, self._ranks.size),
            counts=self._counts,
            should_stop=lambda: self._closing or self._should_stop(),
        )
        self._prompts.put_back(collected.dropped)
        return replace(collected, groups=tuple(apply_overlong_rule(collected.groups, config)))

    def _counts(self, group: Group) -> bool:
        config = self._setup.config
        if config.refill_waves == 0:
            return True
        (group,) = apply_overlong_rule([group], config)
        return assign_credit(group, self._credit.rule, **self._credit.options).has_signal


def _quota(config: RolloutConfig, num_ranks: int) -> Quota:
    wanted = config.prompts_per_step // num_ranks
    ahead = math.ceil(config.oversample * wanted)
    return Quota(wanted=wanted, ahead=ahead, most=wanted * (1 + config.refill_waves) + ahead)
