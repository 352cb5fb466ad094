"""Pack groups and their credit into micro-batches.

Rows are not padded. Every target gets its weight for the whole optimizer step before the rows are
cut into micro-batches, so the gradient of the step does not depend on the token budget.

Rows with a common beginning (rollouts of one prompt, equal first turns, the system prompt of a
step) share these tokens: a micro-batch is a prefix tree, and a token with several successors is
computed once and predicts one target for each of them::

    row 0   p p p p a a b b      layout   p p p p a a b b d c c      11 tokens instead of 20
    row 1   p p p p a a d        rows_N   3 4 . .   3 4 . .   3 ...  row 3 predicts a, a and c
    row 2   p p p p c c
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from ..kernels.packing.tree import PrefixTree
from ..metrics.reduce import Mean, Metric, Sum
from ..types import Batch, Credit, Group, TokenCredit, Turn
from .dealing import check_sizes, micro_batches, rows_of_rank, tree_of
from .options import DEFAULT_OPTIONS, PackOptions
from .rows import Rows, drop_idle_ends, ranges, rows_of


@dataclass(frozen=True, slots=True, kw_only=True)
class Packed:
    """The micro-batches of one rank in one optimizer step, with token counts.

    Attributes:
        num_tokens: tokens that the model computes.
        num_distinct: tokens of the prefix tree of all rows, the lower bound of `num_tokens`.
        num_tokens_total: sum of the row lengths.
        num_targets: sampled tokens among them, the N of all batches.
        num_idle_tokens: tokens of all ranks that were dropped because they have no advantage.
    """

    batches: tuple[Batch, ...]
    num_tokens: int
    num_distinct: int
    num_tokens_total: int
    num_targets: int
    num_idle_tokens: int

    @property
    def shared_prefix(self) -> Mean:
        """Share of the rows' tokens that are not computed, because another row has them."""
        shared = self.num_tokens_total - self.num_tokens
        return Mean(shared, self.num_tokens_total, if_empty=0.0)

    @property
    def padding(self) -> Mean:
        """Share of the computed tokens that are not distinct: prefixes that are repeated between
        micro-batches, and common prefixes if they are not shared."""
        return Mean(self.num_tokens - self.num_distinct, self.num_tokens, if_empty=0.0)

    def metrics(self) -> dict[str, Metric]:
        """The metrics of the packing, under the names of metrics.jsonl."""
        return {
            "tokens": Sum(self.num_tokens),
            "tokens_trained": Sum(self.num_targets),
            "padding": self.padding,
            "shared_prefix": self.shared_prefix,
        }


def pack(
    groups: Sequence[Group],
    credits: Sequence[Credit],
    *,
    budget: int,
    options: PackOptions = DEFAULT_OPTIONS,
    device: torch.device | str = "cpu",
) -> Packed:
    """Pack the trajectories of a step on one rank; see `trainable_rows` and `pack_step`."""
    rows = trainable_rows(groups, credits)
    return pack_step(rows, budget=budget, options=options, device=device)


def trainable_rows(groups: Sequence[Group], credits: Sequence[Credit]) -> Rows:
    """Build the rows that are trained on.

    Groups without any advantage and failed or masked trajectories are left out, so they do not
    count in the normalizer either.
    """
    turns: list[Sequence[Turn]] = []
    advantages: list[float] = []
    token_credits: list[TokenCredit] = []
    for group, credit in zip(groups, credits, strict=True):
        if not credit.has_signal:
            continue
        for i, trajectory in enumerate(group.trajectories):
            if not trajectory.left_out:
                turns.append(trajectory.turns)
                advantages += credit.advantages[i]
                if credit.tokens is not None:
                    token_credits.append(credit.tokens[i])
    return rows_of(turns, advantages, token_credits)


def pack_step(
    rows: Rows,
    *,
    budget: int,
    options: PackOptions = DEFAULT_OPTIONS,
    device: torch.device | str = "cpu",
    rank: int = 0,
    num_ranks: int = 1,
) -> Packed:
    """Pack one rank's share of the rows of a step.

    Args:
        rows: the rows of all ranks, in the same order on every rank. Weights are those of the whole
            step, so the gradients of all ranks add up to the gradient of one.
        budget: tokens per micro-batch.

    Raises:
        OutOfMemory: a row, or a trajectory that stays together, exceeds the budget.
        ValueError: unknown normalizer.
    """
    weights = _weights(rows, options)
    num_tokens_before = len(rows.tokens_T)
    if options.drop_idle:
        rows = drop_idle_ends(rows)
    num_idle_tokens = num_tokens_before - len(rows.tokens_T)
    num_value_targets = int(np.isfinite(rows.value_targets_N).sum())
    check_sizes(rows, budget, options)
    if num_ranks > 1:
        rows = rows_of_rank(rows, options, rank, num_ranks)
    tree = tree_of(rows)
    batches = tuple(
        batch_of(
            part,
            weights,
            device,
            share_prefixes=options.share_prefixes,
            num_value_targets=num_value_targets,
            tree=part_tree,
        )
        for part, part_tree in micro_batches(rows, tree, budget, options)
    )
    return Packed(
        batches=batches,
        num_tokens=sum(len(batch.tokens_T) for batch in batches),
        num_distinct=len(rows.tokens_T) - int(tree.shared_S.sum()),
        num_tokens_total=len(rows.tokens_T),
        num_targets=len(rows.targets_N),
        num_idle_tokens=num_idle_tokens,
    )


def _weights(rows: Rows, options: PackOptions) -> np.ndarray:
    """Weight of the targets of each trajectory."""
    lengths = np.bincount(rows.trajectories_S, rows.num_targets_S)
    if options.normalizer == "token":
        return np.full(len(lengths), 1.0 / max(1.0, lengths.sum()))
    if options.normalizer == "sequence":
        return 1.0 / (len(lengths) * lengths)
    if options.normalizer == "constant":
        return np.full(len(lengths), 1.0 / (max(1, len(lengths)) * options.constant))
    raise ValueError(
        f"normalizer: expected 'token', 'sequence' or 'constant', got {options.normalizer!r}"
    )


def batch_of(
    rows: Rows,
    weights: Sequence[float] | np.ndarray,
    device: torch.device | str,
    *,
    share_prefixes: bool = False,
    num_value_targets: int = 0,
    tree: PrefixTree | None = None,
) -> Batch:
    """Build one micro-batch.

    Args:
        weights: weight of the targets of each trajectory.
        num_value_targets: the weight of a value target is the reciprocal of this number.
        tree: the prefix tree of the rows; built here if it is missing.
    """
    starts_S = rows.lengths_S.cumsum() - rows.lengths_S
    first_turns_S = rows.num_turns_S.cumsum() - rows.num_turns_S
    rows_N = torch.from_numpy(rows.states_N + np.repeat(starts_S, rows.num_targets_S))
    tokens, ends_T = torch.from_numpy(rows.tokens_T), None
    if share_prefixes:
        tree = tree or tree_of(rows)
        tokens, positions, ends_T = tokens[tree.sources_T], tree.positions_T, tree.ends_T
        rows_N = tree.places[rows_N]
        starts = (positions == 0).nonzero().squeeze(1)
    else:
        positions = torch.from_numpy(ranges(np.zeros_like(starts_S), rows.lengths_S))
        starts = torch.from_numpy(starts_S)
    turns_N = rows.turns_N + np.repeat(first_turns_S, rows.num_targets_S)
    weights_S = np.asarray(weights, np.float32)[rows.trajectories_S]
    arrays = {
        "tokens_T": tokens,
        "positions_T": positions,
        "ends_T": ends_T,
        "cu_seqlens": torch.cat([starts, starts.new_tensor([len(tokens)])]).int(),
        "rows_N": rows_N,
        "targets_N": rows.targets_N,
        "turns_N": turns_N.astype(np.int32),
        "advantages_K": rows.advantages_K,
        "places_K": rows.places_K,
        "sequences_K": np.repeat(rows.trajectories_S, rows.num_turns_S),
        "weights_N": np.repeat(weights_S, rows.num_targets_S),
        "sampler_logprobs_N": rows.logprobs_N,
    }
    if len(rows.values_N):
        known_N = ~np.isnan(rows.value_targets_N)
        arrays |= {
            "values_N": rows.values_N,
            "value_targets_N": np.where(known_N, rows.value_targets_N, np.float32(0)),
            "value_weights_N": known_N / np.float32(max(1, num_value_targets)),
        }
    tensors: dict[str, Any] = {
        name: None if x is None else torch.as_tensor(x, device=device) for name, x in arrays.items()
    }
    return Batch(max_seqlen=int(rows.lengths_S.max()), **tensors)
