"""The policy, its optimizer and, for some credit rules, a critic."""

from __future__ import annotations

from dataclasses import dataclass

from ..model import Policy
from .critic import Critic
from .optimizer import Optimizer


@dataclass(frozen=True, slots=True, kw_only=True)
class Learner:
    policy: Policy
    optimizer: Optimizer
    critic: Critic | None = None

    def zero_grad(self) -> None:
        """Free all gradients."""
        self.optimizer.zero_grad()
        if self.critic:
            self.critic.zero_grad()
