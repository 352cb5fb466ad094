"""Branch means: what a turn changed, seen from the rollouts that share the history before it."""

import math
from collections import defaultdict

from turnfast.credit.baseline import NORM, Norm, Rows, episode_returns
from turnfast.types import Group

ROUNDING = 1e-12


def advantages(group: Group, *, norm: Norm = NORM) -> Rows:
    """A_{i,k} = V(through turn k) - V(before the branch), V = mean of norm(R) over the sharers.

    Rollouts share a node while their sampled ids are identical turn by turn; V(root) = 0. This is
    the local advantage of TreeRL (arXiv 2506.11902). A turn after which nobody parted from the
    others belongs to the same branch as the turn before it and carries its advantage, so that a
    group that shares nothing is plain GRPO on R (`grpo_mr`); a turn that all rollouts took alike
    has 0. Along a path, each branch counted once, the advantages add up to norm(R)_i.

    What the environment replied is not compared: its chance falls to the turn that follows.

    Example (std "none", mean R = 3): a and b share turn 0, c took another. R = 4, 2, 3:
    V(a, b) = 0, V(c) = 0; a has (0, 1), b (0, -1), c (0, 0).
    """
    scores = norm(episode_returns(group))
    paths, members = [], defaultdict(list)
    for trajectory, score in zip(group.trajectories, scores, strict=True):
        path: tuple[tuple[int, ...], ...] = ()
        paths.append(nodes := [])
        for turn in trajectory.turns:
            path = (*path, turn.sampled_ids)
            nodes.append(path)
            members[path].append(score)
    rows: Rows = []
    for nodes in paths:
        row, advantage, value, sharers = [], 0.0, 0.0, len(scores)
        for node in nodes:
            if len(members[node]) < sharers:
                sharers = len(members[node])
                parent, value = value, math.fsum(members[node]) / sharers
                # equal means of unlike many rollouts differ in the last bit
                advantage = value - parent if abs(value - parent) > ROUNDING else 0.0
            row.append(advantage)
        rows.append(row)
    return rows
