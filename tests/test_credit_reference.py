"""Every rule against a dense implementation, on 10,000 random groups.

The rules walk ragged rows and sort values into cells. Here a batch is one padded array: turn
n = i * L + k of a group, and a Boolean matrix says who is whose peer. All that a rule normalises
is then one masked mean and one masked sum of squares over the peers.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import by_hand
import numpy as np
import pytest

from turnfast.credit import assign_credits
from turnfast.types import Group, Trajectory, Turn

G, L = 6, 4  # rollouts of a group and turns of a rollout, at most
REPLIES = ("left", "right")


@dataclass(frozen=True, kw_only=True)
class Dense:
    """B groups. `rewards` is NaN where missing, `lives` marks the turns that exist and count."""

    rewards: np.ndarray  # [B, G, L]
    outcomes: np.ndarray  # [B, G]
    lives: np.ndarray  # [B, G, L] bool
    present: np.ndarray  # [B, G] bool: not failed, and not alone in the group
    lengths: np.ndarray  # [B, G]
    ids: np.ndarray  # [B, G, L]
    replies: np.ndarray  # [B, G, L]


def make(seed: int, count: int) -> tuple[list[Group], Dense]:
    rng = np.random.default_rng(seed)
    exists = np.arange(G) < rng.integers(1, G + 1, (count, 1))
    failed = exists & (rng.random((count, G)) < 0.1)
    lengths = np.where(exists, rng.integers(0, L + 1, (count, G)), 0)
    rewards = rng.choice([np.nan, -0.1, 0.0, 0.2, 0.5, 0.7], (count, G, L))
    outcomes = rng.choice([0.0, 0.0, 0.5, 1.0, 1.9], (count, G))
    flat = rng.random(count) < 0.1
    rewards[flat], outcomes[flat] = 0.5, 1.0
    ids, replies = rng.integers(0, 2, (count, G, L)), rng.integers(0, 2, (count, G, L))

    def turn_of(b: int, i: int, k: int) -> Turn:
        reward = None if np.isnan(rewards[b, i, k]) else float(rewards[b, i, k])
        reply = REPLIES[replies[b, i, k]]
        return by_hand.turn(sampled_ids=(int(ids[b, i, k]),), reply=reply, reward=reward)

    def rollout_of(b: int, i: int) -> Trajectory:
        turns = [turn_of(b, i, k) for k in range(lengths[b, i])]
        status = "error" if failed[b, i] else "finished"
        return by_hand.rollout(i, turns, status, outcome=float(outcomes[b, i]))

    groups = [
        by_hand.group_of(*(rollout_of(b, i) for i in range(int(exists[b].sum()))))
        for b in range(count)
    ]
    present = exists & ~failed
    present &= present.sum(1, keepdims=True) > 1
    lives = present[..., None] & (np.arange(L) < lengths[..., None])
    return groups, Dense(
        rewards=np.where(np.arange(L) < lengths[..., None], rewards, np.nan),
        outcomes=outcomes,
        lives=lives,
        present=present,
        lengths=lengths,
        ids=ids,
        replies=replies,
    )


def peer_norm(
    x: np.ndarray,
    peers: np.ndarray,
    *,
    epsilon: float = 1e-4,
    std: str = "unbiased",
    baseline: str = "mean",
) -> np.ndarray:
    """x [..., n], peers [..., n, n] including the diagonal; 0 where all peers are equal."""
    n = peers.sum(-1)
    total = (peers * x[..., None, :]).sum(-1)
    mean = total / np.maximum(n, 1)
    others = (total - x) / np.maximum(n - 1, 1) if baseline == "leave_one_out" else mean
    squares = (peers * (x[..., None, :] - mean[..., None]) ** 2).sum(-1)
    freedom = {"unbiased": n - 1, "biased": n, "none": n}[std]
    spread = np.sqrt(squares / np.maximum(freedom, 1)) + epsilon if std != "none" else 1.0
    varies = (n > 1) & (squares > 1e-20)
    return np.where(varies, (x - others) / np.where(varies, spread, 1.0), 0.0)


def same(mask: np.ndarray) -> np.ndarray:
    """Peers are all entries of the mask [..., n]."""
    return mask[..., :, None] & mask[..., None, :]


def over_rollouts(x: np.ndarray, d: Dense, **norm: Any) -> np.ndarray:
    return peer_norm(x, same(d.present), **norm)[..., None]


def over_turn_index(x: np.ndarray, mask: np.ndarray, **norm: Any) -> np.ndarray:
    x, mask = np.swapaxes(np.where(mask, x, 0.0), 1, 2), np.swapaxes(mask, 1, 2)
    return np.swapaxes(peer_norm(x, same(mask), **norm), 1, 2)


def zeroed(d: Dense) -> np.ndarray:
    return np.nan_to_num(d.rewards)


def merged(d: Dense) -> np.ndarray:
    return zeroed(d).sum(-1) + d.outcomes


def is_last(d: Dense) -> np.ndarray:
    return np.arange(L) == d.lengths[..., None] - 1


def to_go(d: Dense, gamma: float) -> np.ndarray:
    """As a matrix product: weight gamma^(m-k) for m >= k."""
    gap = np.arange(L)[None, :] - np.arange(L)[:, None]
    weights = np.where(gap >= 0, float(gamma) ** np.maximum(gap, 0), 0.0)
    return (zeroed(d) + is_last(d) * d.outcomes[..., None]) @ weights.T


def grpo_or(d: Dense, **norm: Any) -> np.ndarray:
    return over_rollouts(d.outcomes, d, **norm)


def grpo_mr(d: Dense, **norm: Any) -> np.ndarray:
    return over_rollouts(merged(d), d, **norm)


def mt_grpo(
    d: Dense,
    outcome_weight: float = 1.0,
    missing: str = "skip",
    one_turn: str = "outcome",
    **norm: Any,
) -> np.ndarray:
    given = d.lives & (~np.isnan(d.rewards) | (missing == "zero"))
    turn = over_turn_index(zeroed(d), given, **norm) * ~is_last(d)
    outcome = over_rollouts(d.outcomes, d, **norm)
    ahead = turn.sum(-1, keepdims=True) - np.cumsum(turn, -1) + turn
    weighted = ahead + np.where(is_last(d), 1.0, outcome_weight) * outcome
    lone = (d.lengths == 1)[..., None] & (one_turn == "merged")
    return np.where(lone, over_rollouts(merged(d), d, **norm), weighted)


def mt_grpo_unbiased(d: Dense, outcome_weight: float = 1.0, **norm: Any) -> np.ndarray:
    everyone = np.broadcast_to(d.present[..., None], d.lives.shape)
    turn = over_turn_index(zeroed(d), everyone, **norm)
    return turn[..., ::-1].cumsum(-1)[..., ::-1] + outcome_weight * grpo_or(d, **norm)


def return_to_go(d: Dense, gamma: float = 1.0, over: str = "turn", **norm: Any) -> np.ndarray:
    x = to_go(d, gamma)
    if over == "turn":
        return over_turn_index(x, d.lives, **norm)
    mask = d.lives.reshape(-1, G * L)
    x = np.where(mask, x.reshape(-1, G * L), 0.0)
    return peer_norm(x, same(mask), **norm).reshape(d.lives.shape)


def hybrid(d: Dense, gamma: float = 0.9, outcome_weight: float = 0.3, **norm: Any) -> np.ndarray:
    turn = over_turn_index(to_go(d, gamma), d.lives, **norm)
    return turn + outcome_weight * grpo_or(d, **norm)


def gigpo(
    d: Dense,
    step_weight: float = 1.0,
    gamma: float = 0.95,
    anchor: str = "observation",
    **norm: Any,
) -> np.ndarray:
    # a state as a number: 0 before any reply, then digits 1 and 2 for the replies
    said = d.replies + 1
    state = np.zeros_like(said)
    for k in range(1, L):
        before = 3 * state[..., k - 1] if anchor == "history" else 0
        state[..., k] = before + said[..., k - 1]
    flat, mask = state.reshape(-1, G * L), d.lives.reshape(-1, G * L)
    peers = same(mask) & (flat[:, :, None] == flat[:, None, :])
    x = np.where(mask, to_go(d, gamma).reshape(-1, G * L), 0.0)
    step = peer_norm(x, peers, **norm).reshape(d.lives.shape)
    return grpo_mr(d, **norm) + step_weight * step


def rloo(d: Dense) -> np.ndarray:
    return grpo_mr(d, std="none", baseline="leave_one_out")


def dr(d: Dense) -> np.ndarray:
    return grpo_mr(d, std="none")


def turn_grpo(
    d: Dense, outcome_weight: float = 1.0, scale: str = "group", floor: float = 0.3
) -> np.ndarray:
    if scale == "turn":
        return mt_grpo_unbiased(d, outcome_weight)
    everyone = np.broadcast_to(d.present[..., None], d.lives.shape)
    x = np.where(d.present[..., None], zeroed(d)[..., ::-1].cumsum(-1)[..., ::-1], 0.0)
    x = x + d.present[..., None] * outcome_weight * d.outcomes[..., None]
    centred = over_turn_index(x, everyone, std="none")
    size = d.present.sum(1)
    whole = np.where(d.present, zeroed(d).sum(-1) + outcome_weight * d.outcomes, np.nan)
    spread = np.array(
        [np.nanstd(row, ddof=1) if n else 0.0 for row, n in zip(whole, size, strict=True)]
    )
    spread = np.where(spread < 1e-12, 0.0, spread)
    batch = np.sqrt((spread**2).sum() / (size > 0).sum())
    divisor = {"group": np.maximum(spread, floor * batch), "batch": batch, "none": 1.0}[scale]
    divisor = np.broadcast_to(divisor, len(spread))[:, None, None]
    return centred / np.where(divisor == 0.0, 1.0, divisor)


def tree(d: Dense, **norm: Any) -> np.ndarray:
    score = grpo_mr(d, **norm)[..., 0]
    sharers, value, credit = same(d.present), np.zeros_like(score), np.zeros_like(score)
    columns = []
    for k in range(L):
        there = same(d.lives[..., k]) & (d.ids[:, :, None, k] == d.ids[:, None, :, k])
        fewer = sharers & there
        mean = (fewer * score[:, None, :]).sum(-1) / np.maximum(fewer.sum(-1), 1)
        branched = fewer.sum(-1) < sharers.sum(-1)
        credit = np.where(branched, mean - value, credit)
        value, sharers = np.where(branched, mean, value), fewer
        columns.append(credit)
    return np.stack(columns, -1)


REFERENCES = {f.__name__: f for f in (grpo_or, grpo_mr, mt_grpo, mt_grpo_unbiased, return_to_go)}
REFERENCES |= {f.__name__: f for f in (hybrid, gigpo, rloo, dr, tree, turn_grpo)}
NO_NORM = ("rloo", "dr", "turn_grpo")

NORMS: list[dict[str, Any]] = [
    {},
    {"std": "biased", "epsilon": 0.0},
    {"std": "none"},
    {"baseline": "leave_one_out", "epsilon": 1e-2},
    {"std": "none", "baseline": "leave_one_out"},
]
OWN: dict[str, list[dict[str, Any]]] = {
    "mt_grpo": [
        {},
        {"outcome_weight": 0.0},
        {"missing": "zero"},
        {"one_turn": "merged", "outcome_weight": 0.4},
        {"missing": "zero", "one_turn": "merged"},
    ],
    "mt_grpo_unbiased": [{}, {"outcome_weight": 0.0}, {"outcome_weight": 2.0}, {}, {}],
    "turn_grpo": [
        {},
        {"floor": 0.0, "outcome_weight": 0.5},
        {"scale": "batch"},
        {"scale": "none", "outcome_weight": 2.0},
        {"scale": "turn"},
    ],
    "return_to_go": [
        {},
        {"gamma": 0.9, "over": "group"},
        {"gamma": 0.0},
        {"over": "group"},
        {"gamma": 0.5, "over": "group"},
    ],
    "hybrid": [{}, {"gamma": 1.0}, {"outcome_weight": 0.0}, {"gamma": 0.0}, {}],
    "gigpo": [
        {},
        {"anchor": "history"},
        {"gamma": 1.0},
        {"step_weight": 0.5, "anchor": "history"},
        {"step_weight": 0.0},
    ],
}
CHUNK = 2000  # groups per set of options; five sets


@pytest.fixture(scope="module")
def world() -> list[tuple[list[Group], Dense]]:
    return [make(seed, CHUNK) for seed in range(len(NORMS))]


@pytest.mark.parametrize("rule", REFERENCES)
def test_rules_match_the_dense_implementation(
    rule: str, world: list[tuple[list[Group], Dense]]
) -> None:
    signal = 0
    for chunk, (groups, dense) in enumerate(world):
        options = {} if rule in NO_NORM else NORMS[chunk]
        options = options | OWN.get(rule, [{}] * len(NORMS))[chunk]
        want = np.where(dense.lives, REFERENCES[rule](dense, **options), 0.0)
        got = np.zeros_like(want)
        for b, credit in enumerate(assign_credits(groups, rule, **options)):
            signal += credit.has_signal
            for i, row in enumerate(credit.advantages):
                assert len(row) == dense.lengths[b, i]
                got[b, i, : len(row)] = row
        np.testing.assert_allclose(got, want, rtol=1e-9, atol=1e-9)
    assert signal > CHUNK  # most groups have a signal
