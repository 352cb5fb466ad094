"""Assign rows without shared prefixes to micro-batches and to ranks.

Micro-batches are filled first-fit decreasing, in C++ if it is built. Both implementations return
the same lists on every machine, so ranks that pack the same lengths agree without communication.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence

import torch

from ..extension import load_error


def pack_rows(lengths: Sequence[int], budget: int) -> list[list[int]]:
    """Assign rows to micro-batches of at most `budget` tokens each.

    First-fit decreasing: each row, from the longest to the shortest, is placed into the first
    micro-batch with enough space; rows of equal length keep their order. It uses at most 11/9 of
    the smallest possible number of micro-batches, plus one.

    Args:
        lengths: tokens of each row.
        budget: the largest sum of lengths in one micro-batch.

    Returns:
        For each micro-batch the indices of its rows, ascending. Every row occurs exactly once.

    Raises:
        ValueError: a row longer than the budget, a negative length, or a budget below 1.

    Example: ``pack_rows([5, 9, 3, 4], 10)`` is ``[[1], [0, 3], [2]]``. Row 1 (9 tokens) is placed
    first, and no other row fits. Rows 0 and 3 (5 + 4 tokens) share the next micro-batch, where row
    2 (3 tokens) does not fit.
    """
    if budget < 1:
        raise ValueError(f"budget is {budget}: a micro-batch needs at least 1 token")
    for row, length in enumerate(lengths):
        if length > budget:
            raise ValueError(
                f"lengths[{row}] is {length} tokens, more than the budget of {budget}: raise the "
                "budget or shorten the row"
            )
        if length < 0:
            raise ValueError(f"lengths[{row}] is {length}: a length cannot be negative")
    if load_error() is None:
        bins = torch.ops.turnfast.pack_rows(list(lengths), budget)
    else:
        bins = first_fit_decreasing(lengths, budget)
    batches: list[list[int]] = [[] for _ in range(max(bins, default=-1) + 1)]
    for row, index in enumerate(bins):
        batches[index].append(row)
    return batches


def first_fit_decreasing(lengths: Sequence[int], budget: int) -> list[int]:
    """Compute the micro-batch of each row; reference for the C++ operator."""
    bins = [0] * len(lengths)
    free: list[int] = []
    for row in sorted(range(len(lengths)), key=lambda row: -lengths[row]):
        fitting = (index for index, space in enumerate(free) if space >= lengths[row])
        bins[row] = next(fitting, len(free))
        if bins[row] == len(free):
            free.append(budget)
        free[bins[row]] -= lengths[row]
    return bins


def spread_rows(costs: Sequence[int], num_ranks: int) -> list[list[int]]:
    """Assign rows to data-parallel ranks, most expensive first, each to the least loaded rank.

    The largest cost of a rank is at most 4/3 of the optimum (Graham, 1969).

    Returns:
        For each rank the indices of its rows, ascending.

    Example: ``spread_rows([7, 5, 1, 3], 2)`` is ``[[0, 2], [1, 3]]``, a cost of 8 for each rank.
    """
    rows_by_rank: list[list[int]] = [[] for _ in range(num_ranks)]
    loads = [(0, rank) for rank in range(num_ranks)]
    for row in sorted(range(len(costs)), key=lambda row: -costs[row]):
        load, rank = loads[0]
        heapq.heapreplace(loads, (load + costs[row], rank))
        rows_by_rank[rank].append(row)
    return [sorted(rows) for rows in rows_by_rank]
