"""A trajectory as rows: contexts whole, and which hidden state predicts which sampled id.

Worked example, one trajectory of two turns, ids as in `turnfast.types`::

    row        p p p p a a a E r r r b b       the last sampled id predicts nothing and is left out
    rows_N           3 4 5 6       10 11 12    hidden state that predicts ...
    targets_N        a a a E        b  b  E    ... this sampled id
    turns_N          0 0 0 0        1  1  1    -> advantages_K
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from .types import TokenCredit, Turn


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One context with its targets: lists over the N targets of this row, K its turns.

    A "turn" is whatever has an advantage of its own, a single token for some rules; `places` says
    in which turn of the trajectory it is (empty: they are its first ones). `values` and
    `value_targets` are lists over the N targets (NaN without a target), empty without a critic.
    """

    tokens: list[int]
    rows: list[int]
    targets: list[int]
    turns: list[int]
    logprobs: list[float]
    advantages: list[float]
    trajectory: int
    places: list[int] = field(default_factory=list)
    values: list[float] = field(default_factory=list)
    value_targets: list[float] = field(default_factory=list)


def rows_of(
    turns: Sequence[Turn],
    advantages: Sequence[float],
    trajectory: int,
    credit: TokenCredit | None = None,
) -> list[Row]:
    """The rows of one trajectory: one, or more where a template rewrote earlier turns.

    All have the trajectory's number, so a ratio of whole sequences spans those that are in one
    micro-batch. Where the token budget parts them, the ratio is that of each part.
    """
    rows: list[Row] = []
    tokens: list[int] = []
    start = 0
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
                    places=[],
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
        end = start + len(turn.sampled_ids)
        if credit is not None and credit.advantages is not None:
            row.turns.extend(range(len(row.advantages), len(row.advantages) + end - start))
            row.advantages.extend(credit.advantages[start:end])
            row.places.extend([k] * (end - start))
        else:
            row.turns.extend([len(row.advantages)] * (end - start))
            row.advantages.append(advantages[k])
            row.places.append(k)
        if credit is not None:
            row.values.extend(credit.values[start:end])
            targets = credit.targets[start:end]
            row.value_targets.extend(math.nan if t is None else t for t in targets)
        start = end
        tokens.extend(turn.sampled_ids)
    for row in rows:
        # what follows the last hidden state that predicts anything is never computed
        del row.tokens[row.rows[-1] + 1 if row.rows else 0 :]
    return [row for row in rows if row.targets]


def without_idle_end(row: Row) -> Row:
    """The row up to its last target with an advantage; the turns behind it stay, without tokens."""
    live = len(row.targets)
    while live and row.advantages[row.turns[live - 1]] == 0.0:
        live -= 1
    if live == len(row.targets):
        return row
    return replace(
        row,
        tokens=row.tokens[: row.rows[live - 1] + 1 if live else 0],
        rows=row.rows[:live],
        targets=row.targets[:live],
        turns=row.turns[:live],
        logprobs=row.logprobs[:live],
        values=row.values[:live],
        value_targets=row.value_targets[:live],
    )
