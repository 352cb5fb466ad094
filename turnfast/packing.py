"""Groups and their credit to packed rows: no padding, and a normaliser that no cut can change.

Worked example, one trajectory of two turns, ids as in `turnfast.types`::

    row        p p p p a a a E r r r b b       the last sampled id predicts nothing and is left out
    rows_N           3 4 5 6       10 11 12    hidden state that predicts ...
    targets_N        a a a E        b  b  E    ... this sampled id
    turns_N          0 0 0 0        1  1  1    -> advantages_K

The weight of every target is set for the whole optimizer step here, before rows are dealt out to
micro-batches, so the step's gradient is the same whatever the token budget.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch

from .kernels.packing import pack_rows
from .types import Batch, Credit, Group, Turn


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One context with its targets: lists over the N targets of this row, K its turns."""

    tokens: list[int]
    rows: list[int]
    targets: list[int]
    turns: list[int]
    logprobs: list[float]
    advantages: list[float]
    trajectory: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Packed:
    """All micro-batches of one optimizer step, and how much is in them."""

    batches: tuple[Batch, ...]
    num_tokens: int
    num_targets: int
    zero_signal_groups: int


def rows_of(turns: Sequence[Turn], advantages: Sequence[float], trajectory: int) -> list[Row]:
    """The rows of one trajectory: one, or more where a template rewrote earlier turns."""
    rows: list[Row] = []
    tokens: list[int] = []
    for k, turn in enumerate(turns):
        if k == 0 or turn.restart:
            tokens = []
            rows.append(
                Row(
                    tokens=tokens,
                    rows=[],
                    targets=[],
                    turns=[],
                    logprobs=[],
                    advantages=[],
                    trajectory=trajectory,
                )
            )
        row = rows[-1]
        tokens.extend(turn.prompt_ids)
        if not tokens:
            raise ValueError(f"turn {k} of trajectory {trajectory} has no prompt to predict from")
        first = len(tokens) - 1
        row.rows.extend(range(first, first + len(turn.sampled_ids)))
        row.targets.extend(turn.sampled_ids)
        row.logprobs.extend(turn.logprobs)
        row.turns.extend([len(row.advantages)] * len(turn.sampled_ids))
        row.advantages.append(advantages[k])
        tokens.extend(turn.sampled_ids)
    for row in rows:
        # what follows the last hidden state that predicts anything is never computed
        del row.tokens[row.rows[-1] + 1 if row.rows else 0 :]
    return [row for row in rows if row.targets]


def pack(
    groups: Sequence[Group],
    credits: Sequence[Credit],
    *,
    budget: int,
    normalizer: str = "token",
    constant: float = 1.0,
    device: torch.device | str = "cpu",
) -> Packed:
    """Pack a step's trajectories.

    Args:
        budget: tokens per micro-batch.
        normalizer: `token` gives every target of the step the weight 1/N; `sequence` 1/(S·n_s), the
            mean over the S trajectories of their token means; `constant` 1/(S·constant), which does
            not favour short answers (arXiv 2503.20783).
        constant: tokens a trajectory may sample at most.
    Groups in which no turn has an advantage carry no gradient: they are left out, of the
    denominator too. Failed trajectories are left out of everything.

    Raises:
        ValueError: a row does not fit the budget, or the normaliser is unknown.
    """
    rows: list[Row] = []
    lengths: list[int] = []
    silent = 0
    for group, credit in zip(groups, credits, strict=True):
        if not credit.has_signal:
            silent += 1
            continue
        for trajectory, advantages in zip(group.trajectories, credit.advantages, strict=True):
            if trajectory.failed or not trajectory.num_sampled:
                continue
            rows += rows_of(trajectory.turns, advantages, len(lengths))
            lengths.append(trajectory.num_sampled)
    weights = _weights(lengths, normalizer, constant)
    _refuse_long_rows(rows, budget)
    bins = pack_rows([len(row.tokens) for row in rows], budget) if rows else []
    batches = tuple(batch_of([rows[i] for i in chosen], weights, device) for chosen in bins)
    return Packed(
        batches=batches,
        num_tokens=sum(len(row.tokens) for row in rows),
        num_targets=sum(len(row.targets) for row in rows),
        zero_signal_groups=silent,
    )


def _refuse_long_rows(rows: Sequence[Row], budget: int) -> None:
    longest = max(rows, key=lambda row: len(row.tokens), default=None)
    if longest is not None and len(longest.tokens) > budget:
        raise ValueError(
            f"trajectory {longest.trajectory} of the step has a row of {len(longest.tokens)} tokens, "
            f"more than train.tokens_per_microbatch = {budget}: raise it, or lower "
            "rollout.max_context"
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


def batch_of(rows: Sequence[Row], weights: Sequence[float], device: torch.device | str) -> Batch:
    """Rows one after the other; `weights[row.trajectory]` is the weight of each of its targets."""
    edges = [0, *accumulate(len(row.tokens) for row in rows)]
    first_turn = [0, *accumulate(len(row.advantages) for row in rows)]
    on_host = {
        "tokens_T": torch.tensor([t for row in rows for t in row.tokens]),
        "positions_T": torch.cat([torch.arange(len(row.tokens)) for row in rows]),
        "cu_seqlens": torch.tensor(edges, dtype=torch.int32),
        "rows_N": torch.tensor(
            [e + r for e, row in zip(edges, rows, strict=False) for r in row.rows]
        ),
        "targets_N": torch.tensor([t for row in rows for t in row.targets]),
        "turns_N": torch.tensor(
            [k + t for k, row in zip(first_turn, rows, strict=False) for t in row.turns],
            dtype=torch.int32,
        ),
        "advantages_K": torch.tensor([a for row in rows for a in row.advantages]),
        "sequences_K": torch.tensor([row.trajectory for row in rows for _ in row.advantages]),
        "weights_N": torch.tensor([weights[row.trajectory] for row in rows for _ in row.targets]),
        "sampler_logprobs_N": torch.tensor([x for row in rows for x in row.logprobs]),
    }
    longest = max(len(row.tokens) for row in rows)
    on_device = {name: tensor.to(device) for name, tensor in on_host.items()}
    return Batch(max_seqlen=longest, **on_device)
