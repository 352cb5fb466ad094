"""Trajectories as rows: contexts whole, and which hidden state predicts which sampled id.

Worked example, one trajectory of two turns, ids as in `turnfast.types`::

    tokens_T   p p p p a a a E r r r b b       the last sampled id predicts nothing and is left out
    states_N         3 4 5 6       10 11 12    place in the row of the hidden state that predicts
    targets_N        a a a E        b  b  E    this sampled id
    turns_N          0 0 0 0        1  1  1    -> advantages_K
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from itertools import chain

import numpy as np

from ..types import TokenCredit, Turn

Numbers = np.ndarray


@dataclass(frozen=True, slots=True, kw_only=True)
class Rows:
    """S contexts with their targets in flat arrays: the first row's entries, the second's, …

    A "turn" is whatever has an advantage of its own, a single token for some rules.

    Attributes:
        tokens_T: int64, the tokens of all rows.
        lengths_S, num_targets_S, num_turns_S: int64, how many of each a row has.
        trajectories_S: int64, numbered from 0; all of a trajectory's rows have its number.
        states_N: int64, place in its row of the hidden state that predicts the target.
        targets_N: int64 ids. turns_N: int64, which of its row's turns the target is in.
        logprobs_N: float32, the sampler's.
        advantages_K: float32. places_K: int64, in which turn of the trajectory it is.
        values_N, value_targets_N: float32, NaN without a target; empty without a critic.
    """

    tokens_T: Numbers
    lengths_S: Numbers
    num_targets_S: Numbers
    num_turns_S: Numbers
    trajectories_S: Numbers
    states_N: Numbers
    targets_N: Numbers
    turns_N: Numbers
    logprobs_N: Numbers
    advantages_K: Numbers
    places_K: Numbers
    values_N: Numbers
    value_targets_N: Numbers

    def __len__(self) -> int:
        return len(self.lengths_S)

    def take(self, chosen: Sequence[int] | Numbers) -> Rows:
        """These rows, in the given order."""
        chosen = np.asarray(chosen, np.int64)
        if len(chosen) and (np.diff(chosen) == 1).all():
            return _run(self, slice(chosen[0], chosen[-1] + 1))
        return _cut(self, chosen, self.lengths_S[chosen], self.num_targets_S[chosen])


def rows_of(
    trajectories: Sequence[Sequence[Turn]],
    advantages: Sequence[float],
    credits: Sequence[TokenCredit] = (),
) -> Rows:
    """The rows of trajectories, one for each, or more where a template rewrote earlier turns.

    Args:
        advantages: one per turn, those of all trajectories one after the other.
        credits: one per trajectory where there is a critic; either all of them or none give every
            token an advantage of its own.

    Trajectories without a target have no row and no number. Raises ValueError for a turn that has
    nothing before it to be predicted from.
    """
    turns = list(chain.from_iterable(trajectories))
    turns_of = np.array([len(one) for one in trajectories], np.int64)
    places_K = ranges(np.zeros_like(turns_of), turns_of)
    trajectories_K = np.repeat(np.arange(len(turns_of)), turns_of)
    opens_K = np.array([turn.restart for turn in turns], bool) | (places_K == 0)
    row_K = opens_K.cumsum() - 1
    given_K = np.array([len(turn.prompt_ids) for turn in turns], np.int64)
    sampled_K = np.array([len(turn.sampled_ids) for turn in turns], np.int64)
    ends_K = (given_K + sampled_K).cumsum()
    first_K = ends_K - sampled_K
    firsts = opens_K.nonzero()[0]
    start_S = (first_K - given_K)[firsts]
    _refuse_nothing_before(first_K == start_S[row_K], trajectories_K, places_K)

    ids = _flat(chain.from_iterable((t.prompt_ids, t.sampled_ids) for t in turns), np.int64)
    at_N = ranges(first_K, sampled_K)
    turn_N = np.repeat(np.arange(len(turns)), sampled_K)
    num_targets_S, num_turns_S = (
        np.bincount(row_K, weights, minlength=len(firsts)).astype(np.int64)
        for weights in (sampled_K, None)
    )
    # what follows the last hidden state that predicts anything is never computed
    stop_S = np.zeros(len(firsts), np.int64)
    np.maximum.at(stop_S, row_K, np.where(sampled_K > 0, ends_K - 1, 0))
    lengths_S = np.maximum(stop_S - start_S, 0)
    turns_N = turn_N - firsts[row_K[turn_N]]
    advantages_K = np.array(advantages, np.float32)
    if len(advantages_K) != len(turns):
        raise ValueError(f"advantages: {len(advantages_K)} for {len(turns)} turns")
    if credits and credits[0].advantages is not None:
        advantages_K = _flat((c.advantages or () for c in credits), np.float32)
        places_K, num_turns_S = places_K[turn_N], num_targets_S
        turns_N = ranges(np.zeros_like(num_targets_S), num_targets_S)
    rows = Rows(
        tokens_T=ids[ranges(start_S, lengths_S)],
        lengths_S=lengths_S,
        num_targets_S=num_targets_S,
        num_turns_S=num_turns_S,
        trajectories_S=trajectories_K[firsts],
        states_N=at_N - 1 - start_S[row_K[turn_N]],
        targets_N=ids[at_N],
        turns_N=turns_N,
        logprobs_N=_flat((turn.logprobs for turn in turns), np.float32),
        advantages_K=advantages_K,
        places_K=places_K,
        values_N=_flat((c.values for c in credits), np.float32),
        # None becomes NaN
        value_targets_N=np.array([t for c in credits for t in c.targets], np.float32),
    )
    rows = rows.take(rows.num_targets_S.nonzero()[0])
    rows.trajectories_S[:] = np.unique(rows.trajectories_S, return_inverse=True)[1]
    return rows


def join(parts: Sequence[Rows]) -> Rows:
    """All rows, their trajectories numbered through."""
    first = 0
    numbers = []
    for rows in parts:
        numbers.append(rows.trajectories_S + first)
        first += int(rows.trajectories_S.max(initial=-1)) + 1
    columns = {f.name: [getattr(rows, f.name) for rows in parts] for f in fields(Rows)}
    columns["trajectories_S"] = numbers
    return Rows(**{name: np.concatenate(column) for name, column in columns.items()})


def without_idle_ends(rows: Rows) -> Rows:
    """Each row up to its last target with an advantage; the turns behind it stay, without tokens.
    Rows without any such target are left out."""
    owner_N = np.repeat(_before(rows.num_turns_S), rows.num_targets_S)
    live = rows.advantages_K[rows.turns_N + owner_N].nonzero()[0]
    if len(live) == len(rows.targets_N):
        return rows
    first_S = _before(rows.num_targets_S)
    stop_S = np.zeros(len(rows), np.int64)
    stop_S[np.searchsorted(first_S, live, side="right") - 1] = live + 1  # the last one stays
    kept = stop_S.nonzero()[0]
    states = rows.states_N[stop_S[kept] - 1]
    return _cut(rows, kept, states + 1, (stop_S - first_S)[kept])


def ranges(starts: Numbers, counts: Numbers) -> Numbers:
    """starts[0], starts[0] + 1, …, `counts[0]` of them, then those from starts[1], …"""
    return np.repeat(starts - _before(counts), counts) + np.arange(counts.sum())


def _cut(rows: Rows, chosen: Numbers, lengths: Numbers, num_targets: Numbers) -> Rows:
    """The first tokens and targets of some rows."""
    index = {
        "T": ranges(_before(rows.lengths_S)[chosen], lengths),
        "S": chosen,
        "N": ranges(_before(rows.num_targets_S)[chosen], num_targets),
        "K": ranges(_before(rows.num_turns_S)[chosen], rows.num_turns_S[chosen]),
    }
    columns = {f.name: getattr(rows, f.name) for f in fields(Rows)}
    columns = {n: column[index[n[-1]]] if len(column) else column for n, column in columns.items()}
    return Rows(**{**columns, "lengths_S": lengths, "num_targets_S": num_targets})


def _run(rows: Rows, chosen: slice) -> Rows:
    """Neighbours, without a copy."""
    index = {"S": chosen}
    for kind, counts in zip(
        "TNK", (rows.lengths_S, rows.num_targets_S, rows.num_turns_S), strict=True
    ):
        first = counts[: chosen.start].sum()
        index[kind] = slice(first, first + counts[chosen].sum())
    return Rows(**{f.name: getattr(rows, f.name)[index[f.name[-1]]] for f in fields(Rows)})


def _before(counts: Numbers) -> Numbers:
    """How many there are before each."""
    return counts.cumsum() - counts


def _flat(lists: Iterable[Sequence[float]], dtype: type[np.generic]) -> Numbers:
    return np.fromiter(chain.from_iterable(lists), dtype)


def _refuse_nothing_before(bare_K: Numbers, trajectories_K: Numbers, places_K: Numbers) -> None:
    if bare_K.any():
        at = int(bare_K.argmax())
        raise ValueError(
            f"turn {places_K[at]} of trajectory {trajectories_K[at]} has no prompt to predict from"
        )
