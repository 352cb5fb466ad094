"""What all rollouts of a run share."""

from __future__ import annotations

from dataclasses import dataclass

from ..chat.base import ChatInterface
from ..config.schema import RolloutConfig
from ..envs import Env
from ..sampler import Sampler


@dataclass(frozen=True, slots=True, kw_only=True)
class RolloutSetup:
    """Environment, chat interface, sampler and limits of a run's rollouts.

    Attributes:
        max_turns: a trajectory that has not ended after this many turns is scored as it is.
        seed: seeds every request, together with the prompt's place, the task id, the rollout's
            index and the turn. The same seed gives the same groups in any order of completion.
    """

    env: Env
    chat: ChatInterface
    sampler: Sampler
    config: RolloutConfig
    max_turns: int
    seed: int
