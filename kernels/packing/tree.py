"""Prefix trees of token rows: a prefix that several rows share occurs once in the layout.

The layout is depth first: all descendants of a token follow it. A subtree is therefore a slice, and
the end of this slice, one number per token, defines which tokens see each other::

    row 0   p p p a a b b        layout   p p p a a b b d c c
    row 1   p p p a a d          ends    10 . . 8 . 7 . 8 . .     (10 10 10 8 8 7 7 8 10 10)
    row 2   p p p c c            token k is an ancestor of q, or q itself, iff k <= q < ends[k]

The rows have 18 tokens, the layout 10: all of row 0, one more of row 1 and two more of row 2.
"""

from __future__ import annotations

from bisect import bisect
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from functools import partial
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from ..extension import load_error

Depth = TypeVar("Depth", int, np.ndarray)


@dataclass(frozen=True, slots=True, kw_only=True)
class PrefixTree:
    """The layout of S rows with T distinct tokens. All tensors are on the host.

    Attributes:
        sources_T: int64 index in the input of each token of the layout.
        positions_T: int64 depth of each token, which is its position in all of its rows.
        ends_T: int32 index in the layout after the last descendant of each token.
        places: int64 index in the layout of each input token.
        order_S: int64 indices of the rows in the order of the layout.
        shared_S: int64, row `order_S[i]` shares its first `shared_S[i]` tokens with row
            `order_S[i-1]`, and no more than that with any row before.
    """

    sources_T: Tensor
    positions_T: Tensor
    ends_T: Tensor
    places: Tensor
    order_S: Tensor
    shared_S: Tensor


def prefix_tree(tokens: Tensor, lengths: Sequence[int]) -> PrefixTree:
    """Build the prefix tree of rows, in C++ if it is built.

    Args:
        tokens: int64, the concatenated rows, on the host.
        lengths: tokens of each row, each at least 1.

    Raises:
        ValueError: an empty row, or lengths that do not match `tokens`.

    Example: rows [5, 6, 7], [5, 6, 8, 9] and [5, 6] give the layout 5 6 7 8 9 with sources
    (0, 1, 2, 5, 6), positions (0, 1, 2, 2, 3) and ends (5, 5, 3, 5, 5).
    """
    if tokens.ndim != 1 or tokens.dtype != torch.int64 or tokens.device.type != "cpu":
        raise ValueError(
            f"tokens: expected an int64 vector on the host, got {list(tokens.shape)} "
            f"{tokens.dtype} on {tokens.device}"
        )
    if min(lengths, default=1) < 1:
        raise ValueError(f"lengths: every row needs a token, got {min(lengths)}")
    if sum(lengths) != tokens.numel():
        raise ValueError(f"lengths: expected a sum of {tokens.numel()}, got {sum(lengths)}")
    build = torch.ops.turnfast.prefix_tree if load_error() is None else reference
    names = (field.name for field in fields(PrefixTree))
    return PrefixTree(**dict(zip(names, build(tokens, list(lengths)), strict=True)))


def cut_tree(
    lengths: Sequence[int],
    order: Sequence[int],
    shared: Sequence[int],
    budget: int,
    *,
    owners: Sequence[int] | None = None,
    batch_cost: int = 256,
    attention_span: int = 4096,
) -> list[list[int]]:
    """Assign the rows of a tree to micro-batches of at most `budget` distinct tokens each.

    A micro-batch is a run of neighbours in the tree's order; a prefix that two micro-batches share
    is repeated. Of all cuts into runs this one has the smallest sum of token and attention costs
    plus a constant per micro-batch. So it prefers cuts between groups to cuts between the rollouts
    of a group, and these to cuts at later turns. If an owner has several rows, they need not be
    neighbours: owners then fill one micro-batch after the other, in the order of their first rows.

    Args:
        lengths: tokens of each row. order, shared: as in `PrefixTree`.
        owners: owner of each row; all rows of an owner stay together and must fit the budget.
        batch_cost: the constant cost of a micro-batch, in tokens.
        attention_span: the number of keys whose attention costs a token as much as all else.

    Returns:
        For each micro-batch the indices of its rows, ascending.

    Raises:
        ValueError: a row is longer than the budget.

    Example: rows of 10 tokens in two pairs that share 8, budget 12: ``[[0, 1], [2, 3]]``.
    """
    if any(length > budget for length in lengths):
        raise ValueError(
            f"lengths: a row of {max(lengths)} tokens is longer than the budget of {budget}"
        )
    if owners is not None and len(set(owners)) < len(owners):
        units = _places_by_owner(order, owners)
        return _fill(units, lengths, order, shared, lambda depth: depth, budget)
    cost = partial(path_cost, attention_span=attention_span)
    # cheapest[i]: smallest cost of the first i rows of the order, first_of_last[i]: start of their
    # last run. A run costs all tokens of its first row and the new tokens of each later row, which
    # are differences of running sums; `window` has the starts that can still be the best
    cheapest, first_of_last = [0], [0]
    tokens = costs = 0
    before: list[tuple[int, int]] = []
    window: deque[int] = deque()
    for i, (row, common) in enumerate(zip(order, shared, strict=True)):
        length = lengths[row]
        tokens += length - common
        costs += cost(length) - cost(common)
        before.append((tokens - length, cheapest[i] - costs + cost(length)))
        while window and before[window[-1]][1] >= before[i][1]:
            window.pop()
        window.append(i)
        # no later run with this start has fewer tokens: drop it for good
        while tokens - before[window[0]][0] > budget:
            window.popleft()
        first_of_last.append(window[0])
        cheapest.append(before[window[0]][1] + costs + batch_cost * 2 * attention_span)
    batches: list[list[int]] = []
    stop = len(lengths)
    while stop:
        batches.append(sorted(order[first_of_last[stop] : stop]))
        stop = first_of_last[stop]
    return batches[::-1]


def path_cost(depth: Depth, attention_span: int = 4096) -> Depth:
    """Cost of the first `depth` tokens of a row with attention to all earlier ones.

    The unit is 1 / (2 · attention_span) of the cost of a token without attention.
    """
    return depth * (2 * attention_span + depth)


def split_over_ranks(
    lengths: Sequence[int],
    order: Sequence[int],
    shared: Sequence[int],
    num_ranks: int,
    *,
    owners: Sequence[int] | None = None,
    attention_span: int = 4096,
) -> list[list[int]]:
    """Distribute the rows of a tree over data-parallel ranks and minimise the largest cost.

    A rank gets a run of owners in the tree's order, so few prefixes are repeated between ranks. The
    cost includes attention.

    Args:
        lengths: tokens of each row. order, shared: as in `PrefixTree`.
        num_ranks: at least 1; with fewer rows than ranks the last ranks get none.
        owners: owner of each row; all rows of an owner stay together, in the place of its first.

    Returns:
        For each rank the indices of its rows, ascending.

    Example: rows of 10 tokens in two pairs that share 8, two ranks: ``[[0, 1], [2, 3]]``.
    """
    if num_ranks < 1:
        raise ValueError(f"num_ranks: expected 1 or more, got {num_ranks}")
    cost = partial(path_cost, attention_span=attention_span)
    units = _places_by_owner(order, range(len(order)) if owners is None else owners)
    runs = partial(_fill, units, lengths, order, shared, cost)
    low, high = 0, sum(cost(length) for length in lengths)
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if len(runs(middle)) <= num_ranks else (middle + 1, high)
    rows_by_rank = runs(low)
    return rows_by_rank + [[] for _ in range(num_ranks - len(rows_by_rank))]


def _places_by_owner(order: Sequence[int], owners: Sequence[int]) -> list[list[int]]:
    """Indices into `order` of the rows of each owner; owners are sorted by their first index."""
    units: dict[int, list[int]] = {}
    for place, row in enumerate(order):
        units.setdefault(owners[row], []).append(place)
    return list(units.values())


def _fill(
    units: Sequence[Sequence[int]],
    lengths: Sequence[int],
    order: Sequence[int],
    shared: Sequence[int],
    cost: Callable[[int], int],
    limit: int,
) -> list[list[int]]:
    """Fill one part after the other with units, up to a cost of `limit`, and return their rows.

    A unit above the limit gets its own part. `cost` maps a depth to the cost of a row's tokens up
    to it; a shared prefix counts once per part.
    """
    parts: list[list[int]] = []
    part: list[int] = []  # indices into `order`, ascending

    def add(place: int) -> int:
        """Add a row to the part and return the cost of its tokens that no neighbour has."""
        at = bisect(part, place)
        common = min(shared[part[at - 1] + 1 : place + 1]) if at else 0
        if at < len(part):
            common = max(common, min(shared[place + 1 : part[at] + 1]))
        part.insert(at, place)
        return cost(lengths[order[place]]) - cost(common)

    total = limit
    for unit in units:
        added = sum(map(add, unit))
        if total + added > limit:
            part, total = [], 0
            parts.append([])
            added = sum(map(add, unit))
        parts[-1] += [order[place] for place in unit]
        total += added
    return [sorted(rows) for rows in parts]


def reference(tokens: Tensor, lengths: list[int]) -> tuple[Tensor, ...]:
    """Reference for the C++ operator; returns the fields of `PrefixTree`."""
    ids, num_rows = tokens.numpy(), len(lengths)
    begin = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    rows = [ids[begin[r] : begin[r + 1]] for r in range(num_rows)]
    # each row keeps only the tokens that no earlier row has, from depth shared[r] on
    parent, shared = [-1] * num_rows, [0] * num_rows
    branches: dict[tuple[int, int, int], int] = {}
    children: list[list[int]] = [[] for _ in range(num_rows)]
    roots: list[int] = []
    for r, mine in enumerate(rows):
        at = (-1, 0, int(mine[0]))
        while (other := branches.get(at)) is not None:
            limit = min(len(mine), len(rows[other]))
            differ = np.flatnonzero(mine[at[1] : limit] != rows[other][at[1] : limit])
            parent[r], shared[r] = other, at[1] + int(differ[0]) if len(differ) else limit
            if shared[r] == len(mine):
                break
            at = (other, shared[r], int(mine[shared[r]]))
        if shared[r] < len(mine):
            branches[at] = r
        (roots if parent[r] < 0 else children[parent[r]]).append(r)

    num_tokens = sum(lengths) - sum(shared)
    sources, positions = np.empty(num_tokens, np.int64), np.empty(num_tokens, np.int64)
    ends, start, order = np.empty(num_tokens, np.int32), [0] * num_rows, []
    cursor = 0
    # depth first: the tokens of a row, then its branches, deepest first; the tokens of the row from
    # depth `unended` on have their end already
    stack: list[tuple[int, int, int]] = []
    waiting = roots[::-1]
    while stack or waiting:
        if not stack:
            stack.append((waiting.pop(), -1, 0))
        row, step, unended = stack.pop()
        if step < 0:
            start[row], added = cursor, lengths[row] - shared[row]
            order.append(row)
            sources[cursor : cursor + added] = np.arange(begin[row] + shared[row], begin[row + 1])
            positions[cursor : cursor + added] = np.arange(shared[row], lengths[row])
            cursor += added
            children[row].sort(key=lambda child: -shared[child])
            step, unended = 0, lengths[row]
        below = children[row]
        depth = shared[below[step]] if step < len(below) else shared[row]
        offset = start[row] - shared[row]
        ends[offset + depth : offset + unended] = cursor
        if step < len(below):
            stack += [(row, step + 1, depth), (below[step], -1, 0)]

    places = np.empty(len(ids), np.int64)
    for r in range(num_rows):
        mine = places[begin[r] : begin[r + 1]]
        if parent[r] >= 0:
            mine[: shared[r]] = places[begin[parent[r]] : begin[parent[r]] + shared[r]]
        mine[shared[r] :] = np.arange(start[r], start[r] + lengths[r] - shared[r])
    order_S, shared_S = np.array(order, np.int64), np.array([shared[r] for r in order], np.int64)
    arrays = (sources, positions, ends, places, order_S, shared_S)
    return tuple(torch.from_numpy(x) for x in arrays)
