"""Branch means: how much each branch of the tree of rollouts changed the mean return."""

import math
from collections import defaultdict

from turnfast.credit.baseline import NORM, Norm, Rows, episode_returns
from turnfast.types import Group

ROUNDING = 1e-12


def advantages(group: Group, *, norm: Norm = NORM) -> Rows:
    """A_{i,k} = V(node of turn k) - V(parent branch), V = mean of norm(R) over a node's rollouts.

    Rollouts share a node while the sampled ids of all their turns so far are identical; V(root) =
    0. This is the local advantage of TreeRL (arXiv 2506.11902). A turn without a fork belongs to
    the branch of the turn before it and has the same advantage. So a group without common turns
    gets plain GRPO on R (`grpo_mr`), and a turn that all rollouts share gets 0. Along a path, with
    each branch counted once, the advantages add up to norm(R)_i.

    Replies of the environment are not compared: their randomness is part of the next turn.

    Example (std "none", mean R = 3): a and b share turn 0, c does not. R = 4, 2, 3:
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
                # means of equal values over different numbers of rollouts differ by rounding
                advantage = value - parent if abs(value - parent) > ROUNDING else 0.0
            row.append(advantage)
        rows.append(row)
    return rows
