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

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import accumulate, chain
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .kernels.packing import pack_rows
from .kernels.tree import cut_tree, prefix_tree, split_over_ranks
from .ranks import ALONE, Ranks
from .rows import Row, rows_of, without_idle_end
from .types import Batch, Credit, Group


@dataclass(frozen=True, slots=True, kw_only=True)
class Packed:
    """All micro-batches of one optimizer step, and how much is in them.

    Attributes:
        num_tokens: tokens that the model computes.
        num_tokens_total: tokens of all rows, each row counted whole.
        num_targets: sampled tokens among them, the N of all batches.
        num_idle_tokens: tokens of rows, or ends of rows, left out for want of an advantage.
        zero_signal_groups: groups left out whole.
    """

    batches: tuple[Batch, ...]
    num_tokens: int
    num_tokens_total: int
    num_targets: int
    num_idle_tokens: int
    zero_signal_groups: int

    @property
    def shared_prefix(self) -> float:
        """Share of the rows' tokens that need not be computed, because another row has them."""
        total = self.num_tokens_total
        return 1.0 - self.num_tokens / total if total else 0.0


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
        ranks: all call this at the same time, each with its own groups. Their rows are put together
            and dealt out again, balanced by tokens and attention. The weights are those of the
            whole step, so the gradients of all ranks add up to that of one; counts are the rank's
            own, but for `num_idle_tokens`.
    Groups in which no turn has an advantage carry no gradient: they are left out, of the
    denominator too. Failed and masked trajectories are left out of everything.

    Raises:
        ValueError: a row does not fit the budget, or the normaliser is unknown.
    """
    with ranks.together():
        rows, lengths, silent = _rows_of_all(groups, credits)
    if ranks.size > 1:
        rows, lengths = _put_together(ranks.gather(([asdict(row) for row in rows], lengths)))
    weights = _weights(lengths, normalizer, constant)
    num_whole = sum(len(row.tokens) for row in rows)
    if drop_idle:
        rows = [cut for cut in map(without_idle_end, rows) if cut.targets]
    num_idle = num_whole - sum(len(row.tokens) for row in rows)
    num_value_targets = sum(not math.isnan(t) for row in rows for t in row.value_targets)
    _refuse_long_rows(rows, budget)
    if ranks.size > 1:
        rows = _share_of(rows, ranks)
    with ranks.together():
        batches = tuple(
            batch_of(
                [rows[i] for i in chosen],
                weights,
                device,
                share_prefixes=share_prefixes,
                num_value_targets=num_value_targets,
            )
            for chosen in _deal(rows, budget, share_prefixes)
        )
    return Packed(
        batches=batches,
        num_tokens=sum(len(batch.tokens_T) for batch in batches),
        num_tokens_total=sum(len(row.tokens) for row in rows),
        num_targets=sum(len(row.targets) for row in rows),
        num_idle_tokens=num_idle,
        zero_signal_groups=silent,
    )


def _rows_of_all(
    groups: Sequence[Group], credits: Sequence[Credit]
) -> tuple[list[Row], list[int], int]:
    """All rows that carry a gradient, the targets of each trajectory, and the groups left out."""
    rows: list[Row] = []
    lengths: list[int] = []
    silent = 0
    for group, credit in zip(groups, credits, strict=True):
        if not credit.has_signal:
            silent += 1
            continue
        for i, (trajectory, advantages) in enumerate(
            zip(group.trajectories, credit.advantages, strict=True)
        ):
            if trajectory.left_out or not trajectory.num_sampled:
                continue
            tokens = credit.tokens[i] if credit.tokens is not None else None
            rows += rows_of(trajectory.turns, advantages, len(lengths), tokens)
            lengths.append(trajectory.num_sampled)
    return rows, lengths, silent


def _put_together(
    parts: Sequence[tuple[Sequence[Mapping[str, Any]], Sequence[int]]],
) -> tuple[list[Row], list[int]]:
    """The rows of several ranks, their trajectories numbered through."""
    rows: list[Row] = []
    lengths: list[int] = []
    for plain_rows, their_lengths in parts:
        for plain in plain_rows:
            row = Row(**plain)
            rows.append(replace(row, trajectory=len(lengths) + row.trajectory))
        lengths += their_lengths
    return rows, lengths


def _deal(rows: Sequence[Row], budget: int, share_prefixes: bool) -> list[list[int]]:
    """The rows of each micro-batch."""
    if not share_prefixes or not rows:
        return pack_rows([len(row.tokens) for row in rows], budget)
    return cut_tree(*_tree_order(rows), budget)


def _share_of(rows: Sequence[Row], ranks: Ranks) -> list[Row]:
    if len(rows) < ranks.size:
        return list(ranks.share(rows))  # nothing, for some
    return [rows[i] for i in split_over_ranks(*_tree_order(rows), ranks.size)[ranks.rank]]


def _tree_order(rows: Sequence[Row]) -> tuple[list[int], list[int], list[int]]:
    """Lengths of the rows, their order in the prefix tree, and what each shares with the last."""
    lengths = [len(row.tokens) for row in rows]
    tree = prefix_tree(_flat_tokens(rows), lengths)
    return lengths, tree.order_S.tolist(), tree.shared_S.tolist()


def _refuse_long_rows(rows: Sequence[Row], budget: int) -> None:
    longest = max(rows, key=lambda row: len(row.tokens), default=None)
    if longest is not None and len(longest.tokens) > budget:
        raise ValueError(
            f"trajectory {longest.trajectory} has a row of {len(longest.tokens)} tokens, more than "
            f"train.tokens_per_microbatch = {budget}: raise it, or lower rollout.max_context"
        )


def _weights(lengths: Sequence[int], normalizer: str, constant: float) -> list[float]:
    """Weight of each target, per trajectory."""
    if normalizer == "token":
        return [1.0 / sum(lengths)] * len(lengths) if lengths else []
    if normalizer == "sequence":
        return [1.0 / (len(lengths) * n) for n in lengths]
    if normalizer == "constant":
        return [1.0 / (len(lengths) * constant)] * len(lengths)
    raise ValueError(f"normalizer: {normalizer!r} is none of 'token', 'sequence', 'constant'")


def batch_of(
    rows: Sequence[Row],
    weights: Sequence[float],
    device: torch.device | str,
    *,
    share_prefixes: bool = False,
    num_value_targets: int = 0,
) -> Batch:
    """One micro-batch; `weights[row.trajectory]` is the weight of each target of a row, and the
    reciprocal of `num_value_targets` that of each target for the critic."""
    tokens = _flat_tokens(rows)
    lengths = [len(row.tokens) for row in rows]
    first_token = [0, *accumulate(lengths)]
    first_turn = [0, *accumulate(len(row.advantages) for row in rows)]
    rows_N = _each(row.rows for row in rows) + _repeat(first_token, [len(row.rows) for row in rows])
    if share_prefixes:
        tree = prefix_tree(tokens, lengths)
        tokens, positions, ends_T = tokens[tree.sources_T], tree.positions_T, tree.ends_T
        rows_N = tree.places[rows_N]
        edges = torch.cat([(positions == 0).nonzero().squeeze(1), torch.tensor([len(tokens)])])
    else:
        positions, ends_T = _each(map(range, lengths)), None
        edges = torch.tensor(first_token)
    num_targets = [len(row.targets) for row in rows]
    on_host = {
        "tokens_T": tokens,
        "positions_T": positions,
        "ends_T": ends_T,
        "cu_seqlens": edges.int(),
        "rows_N": rows_N,
        "targets_N": _each(row.targets for row in rows),
        "turns_N": (_each(row.turns for row in rows) + _repeat(first_turn, num_targets)).int(),
        "advantages_K": torch.tensor([a for row in rows for a in row.advantages]),
        "places_K": _each(row.places or range(len(row.advantages)) for row in rows),
        "sequences_K": torch.tensor([row.trajectory for row in rows for _ in row.advantages]),
        "weights_N": _repeat([weights[row.trajectory] for row in rows], num_targets),
        "sampler_logprobs_N": torch.tensor([x for row in rows for x in row.logprobs]),
    }
    if any(row.values for row in rows):
        targets = torch.tensor([t for row in rows for t in row.value_targets])
        on_host |= {
            "values_N": torch.tensor([v for row in rows for v in row.values]),
            "value_targets_N": targets.nan_to_num(),
            "value_weights_N": (~targets.isnan()).float() / max(1, num_value_targets),
        }
    on_device = {name: x if x is None else x.to(device) for name, x in on_host.items()}
    return Batch(max_seqlen=max(lengths), **on_device)  # type: ignore[arg-type]


def _flat_tokens(rows: Sequence[Row]) -> Tensor:
    return _each(row.tokens for row in rows)


def _each(lists: Iterable[Sequence[int]]) -> Tensor:
    """All numbers of all lists, int64."""
    return torch.from_numpy(np.fromiter(chain.from_iterable(lists), np.int64))


def _repeat(values: Sequence[float], counts: Sequence[int]) -> Tensor:
    """`values[i]` repeated `counts[i]` times."""
    return torch.tensor(values[: len(counts)]).repeat_interleave(torch.tensor(counts))
