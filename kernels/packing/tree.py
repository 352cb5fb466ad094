"""Prefix trees of token rows: tokens that several rows begin with are laid out once.

The layout is depth first: a token is followed by all its descendants. So a subtree is a slice, and
one number per token, the end of that slice, defines which tokens see each other::

    row 0   p p p a a b b        layout   p p p a a b b d c c
    row 1   p p p a a d          ends    10 . . 8 . 7 . 8 . .     (10 10 10 8 8 7 7 8 10 10)
    row 2   p p p c c            token k is an ancestor of q, or q itself, iff k <= q < ends[k]

Row 1 adds one token to the ten of the layout, row 2 two, where the three rows hold 18.
"""

from __future__ import annotations

from bisect import bisect
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
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
        sources_T: int64, which of the given tokens stands at each place of the layout.
        positions_T: int64, the depth of each token, which is its position in every row it is in.
        ends_T: int32, the place after the last descendant of each token.
        places: int64, for each of the given tokens its place in the layout.
        order_S: int64, the rows as the layout comes to them.
        shared_S: int64, `shared_S[i]` tokens of row `order_S[i]` are also those of `order_S[i-1]`;
            all earlier rows of the order share at most that many with it.
    """

    sources_T: Tensor
    positions_T: Tensor
    ends_T: Tensor
    places: Tensor
    order_S: Tensor
    shared_S: Tensor


def prefix_tree(tokens: Tensor, lengths: Sequence[int], *, impl: str = "auto") -> PrefixTree:
    """The prefix tree of rows, by exact token ids.

    Args:
        tokens: int64, the rows one after the other, on the host.
        lengths: tokens of each row, each at least 1.
        impl: "auto" (C++ where it is built), "cpp" or "python"; the results are the same.

    Raises:
        ValueError: an empty row, or lengths that are not those of `tokens`.

    Example: rows [5, 6, 7], [5, 6, 8, 9] and [5, 6] give sources (0, 1, 2, 5, 6), that is the
    layout 5 6 7 8 9 with positions (0, 1, 2, 2, 3) and ends (5, 5, 3, 5, 5).
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
    if impl not in ("auto", "cpp", "python"):
        raise ValueError(f"impl: expected 'auto', 'cpp' or 'python', got {impl!r}")
    if impl == "cpp" and load_error() is not None:
        raise ValueError(f"impl: 'cpp' is not available here: {load_error()}")
    if impl != "python" and load_error() is None:
        made = torch.ops.turnfast.prefix_tree(tokens, list(lengths))
    else:
        made = _prefix_tree(tokens.numpy(), list(lengths))
    names = ("sources_T", "positions_T", "ends_T", "places", "order_S", "shared_S")
    return PrefixTree(**dict(zip(names, made, strict=True)))


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
    """Deal the rows of a tree out to micro-batches; what two of them share is in both.

    Micro-batches are runs of the tree's order. Among all ways to cut it into runs of at most
    `budget` distinct tokens this is the cheapest: it costs the repeated prefixes, with their
    attention, and a constant per micro-batch, so cuts fall between groups before they fall between
    the rollouts of a group, and there before they fall inside a later turn. Where rows of one owner
    are to stay together, they are not neighbours in the tree: owners then fill one micro-batch
    after the other, in the order of their first rows.

    Args:
        lengths: tokens of each row. order, shared: as in `PrefixTree`.
        budget: most distinct tokens in a micro-batch.
        owners: of each row; rows of one owner stay together, whose distinct tokens fit the budget.
        batch_cost: what a micro-batch costs besides its tokens, in tokens.
        attention_span: the number of keys whose attention costs as much as all else on a token.

    Returns:
        For each micro-batch the indices of its rows, ascending.

    Raises:
        ValueError: a row longer than the budget.

    Example: rows of 10 tokens in two pairs that share 8, budget 12: ``[[0, 1], [2, 3]]``.
    """
    if any(length > budget for length in lengths):
        raise ValueError(
            f"lengths: a row of {max(lengths)} tokens is longer than the budget of {budget}"
        )
    if owners is not None and len(set(owners)) < len(owners):
        return _filled(_owned(order, owners), lengths, order, shared, lambda n: n, budget)
    cost = partial(path_cost, attention_span=attention_span)
    # cheapest[i]: cost of the first i rows of the order; a run that starts at i pays for the whole
    # of its first row, and for what each later one adds
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
        # a run never shrinks when a row is put before it: what is too large stays too large
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
    """What the first `depth` tokens of a row cost, attention included, in 1 / (2 spans) of a token:
    token k looks at k keys, and `attention_span` keys cost as much as all else on a token."""
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

    Ranks get runs of the tree's order, so what rows share stays on one rank but for one prefix at
    each border. Of all such runs these have the smallest largest cost, tokens and attention.

    Args:
        lengths: tokens of each row. order, shared: as in `PrefixTree`.
        num_ranks: at least 1; with fewer rows than ranks the last ranks get none.
        owners: of each row; rows of one owner stay together. They count as one, at its first row.

    Returns:
        For each rank the indices of its rows, ascending; every row occurs exactly once.

    Example: rows of 10 tokens in two pairs that share 8, two ranks: ``[[0, 1], [2, 3]]``.
    """
    if num_ranks < 1:
        raise ValueError(f"num_ranks: expected 1 or more, got {num_ranks}")
    cost = partial(path_cost, attention_span=attention_span)
    units = _owned(order, range(len(order)) if owners is None else owners)
    runs = partial(_filled, units, lengths, order, shared, cost)
    low, high = 0, sum(cost(length) for length in lengths)
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if len(runs(middle)) <= num_ranks else (middle + 1, high)
    dealt = runs(low)
    return dealt + [[] for _ in range(num_ranks - len(dealt))]


def _owned(order: Sequence[int], owners: Sequence[int]) -> list[list[int]]:
    """Each owner's places in the order, the owners by the first of them."""
    units: dict[int, list[int]] = {}
    for place, row in enumerate(order):
        units.setdefault(owners[row], []).append(place)
    return list(units.values())


def _filled(
    units: Sequence[Sequence[int]],
    lengths: Sequence[int],
    order: Sequence[int],
    shared: Sequence[int],
    cost: Callable[[int], int],
    most: int,
) -> list[list[int]]:
    """The rows of runs of units that cost at most `most`, but for a unit that alone costs more.

    `cost` is of the first tokens of a row; what rows share counts once.
    """
    runs: list[list[int]] = []
    run: list[int] = []  # places, ascending

    def join(place: int) -> int:
        """Put a row to the run; what it costs beyond what the nearest on either side has."""
        at = bisect(run, place)
        common = min(shared[run[at - 1] + 1 : place + 1]) if at else 0
        if at < len(run):
            common = max(common, min(shared[place + 1 : run[at] + 1]))
        run.insert(at, place)
        return cost(lengths[order[place]]) - cost(common)

    spent = most
    for unit in units:
        added = sum(map(join, unit))
        if spent + added > most:
            run, spent = [], 0
            runs.append([])
            added = sum(map(join, unit))
        runs[-1] += [order[place] for place in unit]
        spent += added
    return [sorted(each) for each in runs]


def _prefix_tree(ids: np.ndarray, lengths: list[int]) -> tuple[Tensor, ...]:
    """Reference for the C++ operator."""
    num_rows = len(lengths)
    begin = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    rows = [ids[begin[r] : begin[r + 1]] for r in range(num_rows)]
    # each row keeps only the tokens that no earlier row has: those from depth shared[r] on
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
    # depth first: a row's tokens, then what branches off it, deepest first; `unended` is the depth
    # from which on the row's tokens have their end
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
    found = (sources, positions, ends, places, np.array(order, np.int64))
    overlap = np.array([shared[r] for r in order], np.int64)
    return tuple(torch.from_numpy(x) for x in (*found, overlap))
