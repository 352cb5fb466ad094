"""Rollouts with random tokens and rewards, and records of optimizer steps."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import by_hand
import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_pre_hook

from turnfast.config.schema import OptimConfig
from turnfast.model import Policy
from turnfast.types import Group
from turnfast.update.learner import Learner
from turnfast.update.optimizer import Optimizer


class RecordingOptimizer(Optimizer):
    """Record the weights and gradients of the parameters before every step."""

    def step(self) -> float:
        grads = [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in self.parameters]
        self.gradients = [*getattr(self, "gradients", []), grads]
        weights = [p.detach().clone() for p in self.parameters]
        self.weights = [*getattr(self, "weights", []), weights]
        return super().step()


def optimizer_of(policy: Policy, lr: float = 3e-3) -> RecordingOptimizer:
    config = OptimConfig(lr=lr, warmup_steps=0, grad_clip=1e9)
    return RecordingOptimizer(policy.model.parameters(), config)


def learner_of(policy: Policy, lr: float = 3e-3) -> Learner:
    return Learner(policy=policy, optimizer=optimizer_of(policy, lr))


def set_weights(model: nn.Module, values: Sequence[Tensor]) -> None:
    with torch.no_grad():
        for parameter, value in zip(model.parameters(), values, strict=True):
            parameter.copy_(value)


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


def make_groups(seed: int, *, ragged: bool = False) -> list[Group]:
    """Two tasks, three rollouts of one to three turns.

    `ragged`: one rollout has failed, second turns have no tokens, and some turns restart.
    """
    draw = random.Random(seed)

    def ids(count: int) -> tuple[int, ...]:
        return tuple(draw.randrange(3, 280) for _ in range(count))

    groups = []
    for name in "ab":
        prompt = ids(9)
        rollouts = []
        for index in range(3):
            turns = []
            for k in range(draw.randrange(1, 4)):
                sampled = ids(0 if ragged and k == 1 else draw.randrange(1, 7))
                turns.append(
                    by_hand.turn(
                        prompt_ids=prompt if k == 0 else ids(draw.randrange(1, 6)),
                        sampled_ids=sampled,
                        logprobs=tuple(-draw.uniform(3.0, 8.0) for _ in sampled),
                        reward=draw.random(),
                        restart=ragged and k > 0 and draw.random() < 0.3,
                    )
                )
            status = "error" if ragged and (name, index) == ("a", 1) else "finished"
            rollouts.append(by_hand.rollout(index, turns, status, outcome=draw.random()))
        groups.append(by_hand.group_of(*rollouts))
    return groups
