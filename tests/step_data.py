"""Rollouts with random tokens and rewards, and the gradients of optimizer steps."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager

import by_hand
import torch
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_pre_hook

from turnfast.config.schema import OptimConfig
from turnfast.model import Policy
from turnfast.types import Group
from turnfast.update.optimizer import Optimizer


class RecordingOptimizer(Optimizer):
    """Records the weights and gradients of its parameters before every step."""

    def step(self) -> float:
        grads = [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in self.parameters]
        self.gradients = [*getattr(self, "gradients", []), grads]
        weights = [p.detach().clone() for p in self.parameters]
        self.weights = [*getattr(self, "weights", []), weights]
        return super().step()


def optimizer_of(policy: Policy, lr: float = 3e-3) -> RecordingOptimizer:
    config = OptimConfig(lr=lr, warmup_steps=0, grad_clip=1e9)
    return RecordingOptimizer(policy.model.parameters(), config)


@contextmanager
def adamw_gradients() -> Iterator[list[list[Tensor]]]:
    """The gradients that AdamW receives, one list per step."""
    steps: list[list[Tensor]] = []

    def record(optimizer, args, kwargs) -> None:
        params = [p for group in optimizer.param_groups for p in group["params"]]
        steps.append([p.grad.clone() for p in params])

    handle = register_optimizer_step_pre_hook(record)
    try:
        yield steps
    finally:
        handle.remove()


def make_groups(seed: int, *, flat: bool = False) -> list[Group]:
    """Two tasks, three rollouts of one to three turns; `flat`: all rollouts earn the same."""
    draw = random.Random(seed)

    def ids(count: int) -> tuple[int, ...]:
        return tuple(draw.randrange(3, 280) for _ in range(count))

    groups = []
    for _ in range(2):
        prompt = ids(9)
        rollouts = []
        for index in range(3):
            turns = []
            for k in range(draw.randrange(1, 4)):
                sampled = ids(draw.randrange(1, 7))
                turns.append(
                    by_hand.turn(
                        prompt_ids=prompt if k == 0 else ids(draw.randrange(1, 6)),
                        sampled_ids=sampled,
                        logprobs=tuple(-draw.uniform(3.0, 8.0) for _ in sampled),
                        reward=0.5 if flat else draw.random(),
                    )
                )
            outcome = 1.0 if flat else draw.random()
            rollouts.append(by_hand.rollout(index, turns, outcome=outcome))
        groups.append(by_hand.group_of(*rollouts))
    return groups
