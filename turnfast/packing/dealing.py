"""Distribute rows over ranks and micro-batches.

All rows of an owner stay together. An owner is a single row, or a trajectory if the loss needs all
of its rows at once. With shared prefixes rows are taken in the order of their tree, which keeps
neighbours together; otherwise by the cost of each owner alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch

from ..errors import OutOfMemory
from ..kernels.packing.first_fit import pack_rows, spread_rows
from ..kernels.packing.tree import PrefixTree, cut_tree, path_cost, prefix_tree, split_over_ranks
from .options import PackOptions
from .rows import Rows


def check_sizes(rows: Rows, budget: int, options: PackOptions) -> None:
    """Raise OutOfMemory if the rows of an owner exceed `budget` tokens."""
    owners_S = _owners(rows, options)
    sizes = _sum_per_owner(rows.lengths_S, owners_S)
    for owner in (owner for owner, size in enumerate(sizes) if size > budget):
        owned = rows.take(_rows_of_owners(owners_S, [owner]))
        size = len(tree_of(owned).sources_T) if options.share_prefixes else sizes[owner]
        if size <= budget:
            continue
        what, fix = f"a row of {size} tokens", "lower rollout.max_context"
        if len(owned) > 1:
            what = f"{len(owned)} rows with {size} tokens in total"
            fix = "set loss.ratio to 'turn' or 'token', which can split a trajectory"
        raise OutOfMemory(
            f"trajectory {owned.trajectories_S[0]} has {what}, more than "
            f"train.tokens_per_microbatch = {budget}: raise it, or {fix}"
        )


def rows_of_rank(rows: Rows, options: PackOptions, rank: int, num_ranks: int) -> Rows:
    """Select the rows of one rank; ranks are balanced by tokens and attention."""
    owners_S = _owners(rows, options)
    if options.share_prefixes:
        chosen = split_over_ranks(
            *_tree_order(rows, tree_of(rows)),
            num_ranks,
            owners=owners_S.tolist(),
            attention_span=options.attention_span,
        )[rank]
    else:
        costs = _sum_per_owner(path_cost(rows.lengths_S, options.attention_span), owners_S)
        chosen = _rows_of_owners(owners_S, spread_rows(costs, num_ranks)[rank])
    return rows.take(chosen)


def micro_batches(
    rows: Rows, tree: PrefixTree, budget: int, options: PackOptions
) -> Iterator[tuple[Rows, PrefixTree | None]]:
    """Yield the rows of each micro-batch, and their prefix tree if it is known already.

    Args:
        tree: the prefix tree of all rows.
        budget: tokens per micro-batch.
    """
    if not len(rows):
        return
    if options.share_prefixes and len(tree.sources_T) <= budget:
        yield rows, tree
        return
    owners_S = _owners(rows, options)
    if options.share_prefixes:
        parts = cut_tree(
            *_tree_order(rows, tree),
            budget,
            owners=owners_S.tolist(),
            attention_span=options.attention_span,
        )
    else:
        # the cost of a row does not depend on its neighbours: use the fewest micro-batches
        sizes = _sum_per_owner(rows.lengths_S, owners_S)
        parts = [_rows_of_owners(owners_S, owners) for owners in pack_rows(sizes, budget)]
    for chosen in parts:
        yield rows.take(chosen), None


def tree_of(rows: Rows) -> PrefixTree:
    """Build the prefix tree of rows."""
    return prefix_tree(torch.from_numpy(rows.tokens_T), rows.lengths_S.tolist())


def _owners(rows: Rows, options: PackOptions) -> np.ndarray:
    """[S] number of each row's owner, from 0."""
    if not options.whole_trajectories:
        return np.arange(len(rows))
    return np.unique(rows.trajectories_S, return_inverse=True)[1]


def _sum_per_owner(costs_S: np.ndarray, owners_S: np.ndarray) -> list[int]:
    return np.bincount(owners_S, costs_S).astype(np.int64).tolist()


def _rows_of_owners(owners_S: np.ndarray, owners: Sequence[int]) -> np.ndarray:
    return np.isin(owners_S, owners).nonzero()[0]


def _tree_order(rows: Rows, tree: PrefixTree) -> tuple[list[int], list[int], list[int]]:
    """Row lengths, row order in the tree, and tokens that each row shares with the previous one."""
    return rows.lengths_S.tolist(), tree.order_S.tolist(), tree.shared_S.tolist()
