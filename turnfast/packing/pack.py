"""Groups and their credit to packed rows: no padding, nothing twice, and no cut that changes a sum.

The weight of every target is set for the whole optimizer step here, before rows are dealt out to
micro-batches, so the step's gradient is the same whatever the token budget.

Rows that begin alike (rollouts of one prompt, turns that went the same way, the system prompt of a
whole step) share those tokens: a micro-batch is a prefix tree, and a token that several rows go on
from is computed once and predicts a target for each of them::

    row 0   p p p p a a b b      layout   p p p p a a b b d c c      11 tokens for 20
    row 1   p p p p a a d        rows_N   3 4 . .   3 4 . .   3 ...  row 3 predicts a, a and c
    row 2   p p p p c c
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

import numpy as np
import torch
from torch import Tensor

from ..kernels.packing.tree import PrefixTree
from ..metrics.reduce import Mean, Metric, Sum
from ..parallel.ranks import ALONE, Ranks
from ..types import Batch, Credit, Group, TokenCredit, Turn
from .dealing import Dealer, tree_of
from .rows import Rows, join, ranges, rows_of, without_idle_ends


@dataclass(frozen=True, slots=True, kw_only=True)
class Packed:
    """All micro-batches of one optimizer step, and how much is in them.

    Attributes:
        num_tokens: tokens that the model computes.
        num_distinct: tokens of the rows as one prefix tree, the fewest that could be computed.
        num_tokens_total: tokens of all rows, each row counted whole.
        num_targets: sampled tokens among them, the N of all batches.
        num_idle_tokens: tokens of rows, or ends of rows, left out for want of an advantage.
        zero_signal_groups: groups left out whole.
    """

    batches: tuple[Batch, ...]
    num_tokens: int
    num_distinct: int
    num_tokens_total: int
    num_targets: int
    num_idle_tokens: int
    zero_signal_groups: int

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
    normalizer: str = "token",
    constant: float = 1.0,
    device: torch.device | str = "cpu",
    share_prefixes: bool = True,
    drop_idle: bool = False,
    whole_trajectories: bool = False,
    attention_span: int = 4096,
    ranks: Ranks = ALONE,
) -> Packed:
    """Pack a step's trajectories.

    Args:
        budget: tokens per micro-batch.
        normalizer: `token` gives every target of the step the weight 1/N; `sequence` 1/(S·n_s), the
            mean over the S trajectories of their token means; `constant` 1/(S·constant), which does
            not favour short answers (arXiv 2503.20783).
        constant: tokens a trajectory may sample at most.
        share_prefixes: lay out once what several rows begin with.
        drop_idle: leave out the rows, and the ends of rows, behind the last turn that has an
            advantage. The gradient is the same if the loss has neither an entropy nor a KL term and
            its ratio is not that of whole sequences; log-probs of those tokens are then not seen.
        whole_trajectories: the rows of a trajectory whose turns were rewritten stay together, in
            one micro-batch of one rank, for a loss that looks at whole sequences.
        attention_span: see `attention_span_of`; it decides where rows are cut, and no sum.
        ranks: all call this at the same time, each with its own groups. Their rows are put together
            and dealt out again, balanced by tokens and attention. The weights are those of the
            whole step, so the gradients of all ranks add up to that of one; counts are the rank's
            own, but for `num_idle_tokens`.
    Groups in which no turn has an advantage carry no gradient: they are left out, of the
    denominator too. Failed and masked trajectories are left out of everything.

    Raises:
        OutOfMemory: a row, or a trajectory that stays together, does not fit the budget.
        ValueError: the normaliser is unknown.
    """
    with ranks.share_errors():
        rows, silent = _rows_of_all(groups, credits)
    if ranks.size > 1:
        rows = _put_together(rows, ranks)
    weights = _weights(rows, normalizer, constant)
    num_whole = len(rows.tokens_T)
    if drop_idle:
        rows = without_idle_ends(rows)
    num_idle = num_whole - len(rows.tokens_T)
    num_value_targets = int(np.isfinite(rows.value_targets_N).sum())
    dealer = Dealer(
        share_prefixes=share_prefixes,
        whole_trajectories=whole_trajectories,
        attention_span=attention_span,
    )
    dealer.refuse_long(rows, budget)
    if ranks.size > 1:
        rows = dealer.share_of_rank(rows, ranks)
    with ranks.share_errors():
        tree = tree_of(rows)
        batches = tuple(
            batch_of(
                part,
                weights,
                device,
                share_prefixes=share_prefixes,
                num_value_targets=num_value_targets,
                tree=whole,
            )
            for part, whole in dealer.micro_batches(rows, tree, budget)
        )
    return Packed(
        batches=batches,
        num_tokens=sum(len(batch.tokens_T) for batch in batches),
        num_distinct=len(rows.tokens_T) - int(tree.shared_S.sum()),
        num_tokens_total=len(rows.tokens_T),
        num_targets=len(rows.targets_N),
        num_idle_tokens=num_idle,
        zero_signal_groups=silent,
    )


def _rows_of_all(groups: Sequence[Group], credits: Sequence[Credit]) -> tuple[Rows, int]:
    """All rows that carry a gradient, and the number of groups left out."""
    played: list[Sequence[Turn]] = []
    advantages: list[float] = []
    tokens: list[TokenCredit] = []
    silent = 0
    for group, credit in zip(groups, credits, strict=True):
        if not credit.has_signal:
            silent += 1
            continue
        for i, trajectory in enumerate(group.trajectories):
            if not trajectory.left_out:
                played.append(trajectory.turns)
                advantages += credit.advantages[i]
                if credit.tokens is not None:
                    tokens.append(credit.tokens[i])
    return rows_of(played, advantages, tokens), silent


def _put_together(rows: Rows, ranks: Ranks) -> Rows:
    """The rows of all ranks."""
    names = [f.name for f in fields(Rows)]
    everyone = ranks.all_gather_arrays([getattr(rows, name) for name in names])
    return join([Rows(**dict(zip(names, arrays, strict=True))) for arrays in everyone])


def _weights(rows: Rows, normalizer: str, constant: float) -> np.ndarray:
    """Weight of each target, per trajectory."""
    lengths = np.bincount(rows.trajectories_S, rows.num_targets_S)
    if normalizer == "token":
        return np.full(len(lengths), 1.0 / max(1.0, lengths.sum()))
    if normalizer == "sequence":
        return 1.0 / (len(lengths) * lengths)
    if normalizer == "constant":
        return np.full(len(lengths), 1.0 / (max(1, len(lengths)) * constant))
    raise ValueError(f"normalizer: {normalizer!r} is none of 'token', 'sequence', 'constant'")


def batch_of(
    rows: Rows,
    weights: Sequence[float] | np.ndarray,
    device: torch.device | str,
    *,
    share_prefixes: bool = False,
    num_value_targets: int = 0,
    tree: PrefixTree | None = None,
) -> Batch:
    """One micro-batch.

    Args:
        weights: of each target, per trajectory.
        num_value_targets: the reciprocal is the weight of each target for the critic.
        tree: that of the rows, made here where it is not given.
    """
    starts_S = rows.lengths_S.cumsum() - rows.lengths_S
    first_turn_S = rows.num_turns_S.cumsum() - rows.num_turns_S
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
    turns_N = rows.turns_N + np.repeat(first_turn_S, rows.num_targets_S)
    weights_S = np.asarray(weights, np.float32)[rows.trajectories_S]
    on_host = {
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
        on_host |= {
            "values_N": rows.values_N,
            "value_targets_N": np.where(known_N, rows.value_targets_N, np.float32(0)),
            "value_weights_N": known_N / np.float32(max(1, num_value_targets)),
        }
    on_device = {name: _on(device, x) for name, x in on_host.items()}
    return Batch(max_seqlen=int(rows.lengths_S.max()), **on_device)  # type: ignore[arg-type]


def _on(device: torch.device | str, x: Tensor | np.ndarray | None) -> Tensor | None:
    return x if x is None else torch.as_tensor(x, device=device)
