"""The records of a training step, one per stage.

Each record is complete when it is made and is never changed; the next stage makes a new one::

    Task -> Turn -> Trajectory -> Group -> Credit -> Batch

`Turn.sampled_ids` are the ids that the sampler drew, and exactly these ids are trained. Text is
only for display and for parsing tool calls; it is never encoded again.

Example, one rollout with a tool call::

    prompt   <user>Who wrote Ulm?</user><assistant>           7 ids, given by the environment
    turn 0   <tool>{"q": "Ulm"}</tool><end>                   9 ids, sampled  -> advantage A[0][0]
    prompt   <user>Ulm was written by Ida.</user><assistant>  12 ids, given
    turn 1   <answer>Ida</answer><end>                        5 ids, sampled  -> advantage A[0][1]

trains 9 + 5 targets: the loss mask selects the sampled tokens.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    import torch

Finish = Literal["stop", "length"]
LARGEST_REWARD = 1e100
"""Bound on |reward|, so that squares summed over a group stay finite."""
Message = Mapping[str, Any]
"""One chat message with `role` and `content`, as in Hugging Face chat templates."""


class Status(StrEnum):
    """How a trajectory ended."""

    FINISHED = "finished"
    """The environment ended it."""
    MAX_TURNS = "max_turns"
    """It had `env.max_turns` turns."""
    LENGTH = "length"
    """Its last turn reached `rollout.max_new_tokens`."""
    CONTEXT_FULL = "context_full"
    """It reached `rollout.max_context`."""
    TIMEOUT = "timeout"
    """It reached `rollout.trajectory_timeout_s`."""
    ENVIRONMENT_ERROR = "error"
    REWARD_RAISED = "reward_raised"
    REWARD_TIMEOUT = "reward_timeout"
    REWARD_MISSING = "reward_missing"
    REWARD_NOT_A_NUMBER = "reward_not_a_number"
    REWARD_NOT_FINITE = "reward_not_finite"
    JUDGE_ERROR = "judge"

    @property
    def is_cut(self) -> bool:
        """A token limit ended it."""
        return self in (Status.LENGTH, Status.CONTEXT_FULL)

    @property
    def is_fault(self) -> bool:
        """The environment, a reward function or the clock failed, not the policy."""
        return self is Status.TIMEOUT or self is Status.ENVIRONMENT_ERROR or self.is_reward_fault

    @property
    def is_reward_fault(self) -> bool:
        """A reward function raised, took too long or returned no finite number."""
        return self is Status.JUDGE_ERROR or self.value.startswith("reward_")


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """One question for the agent. `data` is for the environment, for instance to score it."""

    id: str
    question: str
    answers: tuple[str, ...] = ()
    data: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Turn:
    """One turn: ids appended by the environment, then ids sampled by the policy.

    Attributes:
        prompt_ids: ids appended by the environment since the previous turn ended (for the first
            turn, or after a `restart`, the whole context).
        sampled_ids: ids drawn by the policy, including the end-of-turn token when it was drawn.
        logprobs: natural log-probability of each sampled id under the sampling distribution.
        text: the sampled ids as text, without the end-of-turn token.
        reply: the environment's answer to this turn, which the agent sees in the next one.
        reward: weighted turn reward; None when the environment gave none for this turn.
        reward_parts: the weighted parts of `reward` by name.
        tool_calls, tool_successes: attempted and successful calls; a malformed call is an attempt.
        tool_errors: number of failed calls by kind (`tools.ToolError.kind`).
        restart: True when the chat template rewrote earlier turns, so this turn starts a new row.
    """

    prompt_ids: tuple[int, ...]
    sampled_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    text: str
    finish: Finish
    reply: str = ""
    reward: float | None = None
    reward_parts: Mapping[str, float] = field(default_factory=dict)
    tool_calls: int = 0
    tool_successes: int = 0
    tool_errors: Mapping[str, int] = field(default_factory=dict)
    restart: bool = False

    def __post_init__(self) -> None:
        if len(self.sampled_ids) != len(self.logprobs):
            raise ValueError(
                f"Turn.logprobs has {len(self.logprobs)} entries for {len(self.sampled_ids)} "
                "sampled_ids: one log-probability per sampled token is needed"
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class Trajectory:
    """One rollout of one task.

    Attributes:
        outcome: weighted outcome reward of the whole trajectory (0.0 when it never answered).
        metrics: unweighted values for the metrics (`exact_match`, …), averaged in metrics.jsonl.
        status: how it ended. A trajectory that failed is counted, but neither trained on nor part
            of a baseline.
        masked: set by `rollout.overlong = "mask"`; treated like a failed one.
        error: the message of the fault, "" without one.
        time_s: from the start of the rollout to its end.
    """

    task_id: str
    index: int
    turns: tuple[Turn, ...]
    status: Status
    masked: bool = False
    outcome: float = 0.0
    outcome_parts: Mapping[str, float] = field(default_factory=dict)
    metrics: Mapping[str, float] = field(default_factory=dict)
    error: str = ""
    time_s: float = 0.0

    @property
    def failed(self) -> bool:
        return self.status.is_fault

    @property
    def left_out(self) -> bool:
        """Neither trained on nor part of a baseline."""
        return self.failed or self.masked

    @property
    def num_sampled(self) -> int:
        return sum(len(turn.sampled_ids) for turn in self.turns)

    @property
    def tool_success(self) -> float:
        """Successful calls over attempted calls; 0.0 when no call was attempted."""
        attempts = sum(turn.tool_calls for turn in self.turns)
        return sum(turn.tool_successes for turn in self.turns) / attempts if attempts else 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Group:
    """All rollouts of one task in one step; baselines are computed within a group."""

    task: Task
    trajectories: tuple[Trajectory, ...]

    def __post_init__(self) -> None:
        others = {t.task_id for t in self.trajectories} - {self.task.id}
        if others:
            raise ValueError(f"Group of task {self.task.id!r} holds rollouts of {sorted(others)}")


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenCredit:
    """Values and advantages per token; every tuple has one entry per sampled token.

    Attributes:
        values: the critic's estimate before the token, at the time of credit assignment.
        targets: the value targets; None where the critic is not trained.
        advantages: None where all tokens of a turn have the turn's advantage.
    """

    values: tuple[float, ...]
    targets: tuple[float | None, ...]
    advantages: tuple[float, ...] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Credit:
    """One advantage per turn: `advantages[i][k]` is for turn k of trajectory i of the group.

    `tokens`, one per trajectory, is set by rules with a critic. If these give every token its own
    advantage, the turn's is the mean over its tokens.
    """

    rule: str
    advantages: tuple[tuple[float, ...], ...]
    tokens: tuple[TokenCredit, ...] | None = None

    @property
    def has_signal(self) -> bool:
        """Whether the group trains the policy or a critic."""
        return self.tokens is not None or any(a != 0.0 for row in self.advantages for a in row)


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """Packed rows of one micro-batch. T tokens, S rows or trees, N loss-bearing tokens, K turns.

    Attributes:
        tokens_T, positions_T: int64; rows lie one after the other without padding.
        cu_seqlens: [S + 1] int32, row boundaries: row s is tokens_T[cu_seqlens[s]:cu_seqlens[s+1]].
        max_seqlen: the longest row.
        rows_N: int64, index into T of the hidden state that predicts target n.
        targets_N: int64 token ids. turns_N: int32 index into the K-tables.
        advantages_K: float32, one advantage per turn.
        sequences_K: int64, the trajectory each turn belongs to.
        places_K: int64, the place of the turn in its trajectory, from 0.
        weights_N: float32, the normaliser as data, fixed for the whole optimizer step before the
            step is cut into micro-batches: the gradient does not depend on the cut.
        sampler_logprobs_N: float32, what the sampler reported when it drew the token.
        old_logprobs_N: float32 log-probs of the policy before the step's first update, or None
            while the policy is still the one that sampled (ratio 1).
        values_N, value_targets_N, value_weights_N: float32, for rules with a critic: its old
            values, what they should be, and the weight of that error (0 where there is no target).
        ends_T: None for plain rows. int32 for prefix trees: tokens that several rows begin with
            are there once, every token is followed by all its descendants, and `ends_T[t]` is the
            place after the last of those of t. Then positions_T are depths, cu_seqlens are the
            boundaries of whole trees, max_seqlen is the deepest path, and one row may predict
            several targets.
    """

    tokens_T: torch.Tensor
    positions_T: torch.Tensor
    cu_seqlens: torch.Tensor
    max_seqlen: int
    rows_N: torch.Tensor
    targets_N: torch.Tensor
    turns_N: torch.Tensor
    advantages_K: torch.Tensor
    sequences_K: torch.Tensor
    places_K: torch.Tensor
    weights_N: torch.Tensor
    sampler_logprobs_N: torch.Tensor
    old_logprobs_N: torch.Tensor | None = None
    ref_logprobs_N: torch.Tensor | None = None
    ends_T: torch.Tensor | None = None
    values_N: torch.Tensor | None = None
    value_targets_N: torch.Tensor | None = None
    value_weights_N: torch.Tensor | None = None
