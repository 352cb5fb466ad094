"""The rollouts of each training step: enough groups, in the order of the data, ahead if asked.

With `train.overlap` the rollouts of the next step run in a thread while this one trains::

    collect(1)   rolls out step 1 with the weights W0, and starts step 2 with them
    (training)   W0 -> W1
    settle()     waits for step 2, so that nothing is in flight while W1 is loaded
    collect(2)   hands out step 2 (by W0, one step stale), and starts step 3 with W1
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import replace
from typing import Any

import torch

from ..config.schema import RolloutConfig
from ..credit import assign_credit
from ..run import Run
from ..types import Group
from .groups import Gathered, Quota, gather
from .overlong import settle_overlong


class Collector:
    """Gathers what each step trains on; a context manager that leaves no thread behind.

    The steps are asked for one after the other, from `run.first_step` on.
    """

    def __init__(self, run: Run, should_stop: Callable[[], bool]) -> None:
        self._run = run
        self._should_stop = should_stop
        self._closing = False
        self._thread: ThreadPoolExecutor | None = None
        if run.config.train.overlap:
            self._thread = ThreadPoolExecutor(
                1, "rollout", torch.set_num_threads, (torch.get_num_threads(),)
            )
        self._ahead: Future[Gathered] | None = None
        self._states: dict[int, dict[str, Any]] = {run.first_step - 1: run.prompts.state()}

    def __enter__(self) -> Collector:
        return self

    def __exit__(self, *_: object) -> None:
        self._closing = True
        if self._thread is not None:
            self._thread.shutdown()

    def collect(self, step: int) -> Gathered:
        """The groups of a step.

        Raises:
            RolloutError, Interrupted: see `gather`.
        """
        run, ahead, self._ahead = self._run, self._ahead, None
        gathered = self._gather() if ahead is None else ahead.result()
        self._states = {step - 1: self._states[step - 1], step: run.prompts.state()}
        if self._thread is None:
            run.sampler.sleep()
        elif step < run.config.train.steps:
            self._ahead = self._thread.submit(self._gather)
        return gathered

    def settle(self) -> None:
        """Wait until the sampler is idle; what went wrong ahead is raised by the next `collect`."""
        if self._ahead is not None:
            wait([self._ahead])

    def state(self, step: int) -> Mapping[str, Any]:
        """Where the data of each rank stands after this step, the last one collected or the one
        before; asked for by all of them."""
        everyone = self._run.ranks.gather(self._states[step])
        return {"data": everyone if len(everyone) > 1 else everyone[0]}

    def _gather(self) -> Gathered:
        run, config = self._run, self._run.config
        gathered = gather(
            run.prompts.take(),
            _quota(config.rollout, run.ranks.size),
            run.env,
            run.chat,
            run.sampler,
            config.rollout,
            max_turns=config.env.max_turns,
            seed=config.train.seed,
            counts=self._counts,
            should_stop=lambda: self._closing or self._should_stop(),
        )
        run.prompts.give_back(gathered.dropped)
        return replace(gathered, groups=tuple(settle_overlong(gathered.groups, config.rollout)))

    def _counts(self, group: Group) -> bool:
        credit, config = self._run.config.credit, self._run.config.rollout
        if config.refill_waves == 0:
            return True
        (settled,) = settle_overlong([group], config)
        return assign_credit(settled, credit.rule, **credit.options).has_signal


def _quota(config: RolloutConfig, num_ranks: int) -> Quota:
    wanted = config.prompts_per_step // num_ranks
    ahead = math.ceil(config.oversample * wanted)
    return Quota(wanted=wanted, ahead=ahead, most=wanted * (1 + config.refill_waves) + ahead)
