"""Which rows go to which rank, and into which micro-batch.

Rows of one owner stay together: an owner is a row, or a trajectory whose loss looks at all its rows
at once. Where prefixes are shared the rows are dealt in the order of their tree, so that neighbours
stay together; otherwise by what each owner's rows cost alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from ..errors import OutOfMemory
from ..kernels.packing.first_fit import pack_rows, spread_rows
from ..kernels.packing.tree import PrefixTree, cut_tree, path_cost, prefix_tree, split_over_ranks
from ..parallel.ranks import Ranks
from .rows import Rows


@dataclass(frozen=True, slots=True, kw_only=True)
class Dealer:
    """Deals rows out; the arguments of the same names are explained at `pack`."""

    share_prefixes: bool
    whole_trajectories: bool
    attention_span: int

    def refuse_long(self, rows: Rows, budget: int) -> None:
        """Raises OutOfMemory where one owner's rows do not fit the budget."""
        owners_S = self._owners(rows)
        sizes = _per_owner(rows.lengths_S, owners_S)
        for owner in (owner for owner, size in enumerate(sizes) if size > budget):
            theirs = rows.take(_owned(owners_S, [owner]))
            size = len(tree_of(theirs).sources_T) if self.share_prefixes else sizes[owner]
            if size <= budget:
                continue
            what = "a row of" if len(theirs) == 1 else f"{len(theirs)} rows of together"
            way = "lower rollout.max_context"
            if len(theirs) > 1:
                way = "set loss.ratio to 'turn' or 'token', which need not see a trajectory whole"
            raise OutOfMemory(
                f"trajectory {theirs.trajectories_S[0]} has {what} {size} tokens, more than "
                f"train.tokens_per_microbatch = {budget}: raise it, or {way}"
            )

    def share_of_rank(self, rows: Rows, ranks: Ranks) -> Rows:
        """The rows of this rank, balanced by tokens and attention."""
        owners_S = self._owners(rows)
        if self.share_prefixes:
            dealt = split_over_ranks(
                *_order(rows, tree_of(rows)),
                ranks.size,
                owners=owners_S.tolist(),
                attention_span=self.attention_span,
            )
            return rows.take(dealt[ranks.rank])
        costs = _per_owner(path_cost(rows.lengths_S, self.attention_span), owners_S)
        return rows.take(_owned(owners_S, spread_rows(costs, ranks.size)[ranks.rank]))

    def micro_batches(
        self, rows: Rows, tree: PrefixTree, budget: int
    ) -> Iterator[tuple[Rows, PrefixTree | None]]:
        """The rows of each micro-batch, and their prefix tree if it is there already.

        Args:
            tree: that of all rows.
        """
        if not len(rows):
            return
        if self.share_prefixes and len(tree.sources_T) <= budget:
            yield rows, tree
            return
        owners_S = self._owners(rows)
        if self.share_prefixes:
            dealt = cut_tree(
                *_order(rows, tree),
                budget,
                owners=owners_S.tolist(),
                attention_span=self.attention_span,
            )
        else:
            # what a row costs does not depend on those beside it: the fewest micro-batches are best
            sizes = _per_owner(rows.lengths_S, owners_S)
            dealt = [_owned(owners_S, chosen) for chosen in pack_rows(sizes, budget)]
        for chosen in dealt:
            yield rows.take(chosen), None

    def _owners(self, rows: Rows) -> np.ndarray:
        """The owner of each row, from 0 on."""
        if not self.whole_trajectories:
            return np.arange(len(rows))
        return np.unique(rows.trajectories_S, return_inverse=True)[1]


def tree_of(rows: Rows) -> PrefixTree:
    return prefix_tree(torch.from_numpy(rows.tokens_T), rows.lengths_S.tolist())


def _per_owner(costs_S: np.ndarray, owners_S: np.ndarray) -> list[int]:
    """What the rows of each owner cost together."""
    return np.bincount(owners_S, costs_S).astype(np.int64).tolist()


def _owned(owners_S: np.ndarray, chosen: Sequence[int]) -> np.ndarray:
    """The rows of some owners."""
    return np.isin(owners_S, chosen).nonzero()[0]


def _order(rows: Rows, tree: PrefixTree) -> tuple[list[int], list[int], list[int]]:
    """Lengths of the rows, their order in the prefix tree, and what each shares with the last."""
    return rows.lengths_S.tolist(), tree.order_S.tolist(), tree.shared_S.tolist()
