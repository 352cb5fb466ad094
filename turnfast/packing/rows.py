"""Convert trajectories to rows: their contexts, and the hidden state that predicts each sampled id.

Example, one trajectory of two turns, ids as in `turnfast.types`::

    tokens_T   p p p p a a a E r r r b b       without the last sampled id, which predicts nothing
    states_N         3 4 5 6       10 11 12    index in the row of the hidden state that predicts
    targets_N        a a a E        b  b  E    this sampled id
    turns_N          0 0 0 0        1  1  1    index into advantages_K
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from itertools import chain

import numpy as np

from ..types import TokenCredit, Turn

Array = np.ndarray


@dataclass(frozen=True, slots=True, kw_only=True)
class Rows:
    """S contexts with their targets, concatenated in flat arrays.

    A "turn" is the unit that has an advantage: a turn, or a single token for some credit rules.

    Attributes:
        tokens_T: int64, the tokens of all rows.
        lengths_S, num_targets_S, num_turns_S: int64, tokens, targets and turns of each row.
        trajectories_S: int64 number of the row's trajectory, from 0.
        states_N: int64 index in the row of the hidden state that predicts the target.
        targets_N: int64 token ids.
        turns_N: int64 index of the target's turn in its row.
        logprobs_N: float32 log-probs of the sampler.
        advantages_K: float32.
        places_K: int64 index of the turn in its trajectory.
        values_N, value_targets_N: float32, NaN without a target; empty without a critic.
    """

    tokens_T: Array
    lengths_S: Array
    num_targets_S: Array
    num_turns_S: Array
    trajectories_S: Array
    states_N: Array
    targets_N: Array
    turns_N: Array
    logprobs_N: Array
    advantages_K: Array
    places_K: Array
    values_N: Array
    value_targets_N: Array

    def __len__(self) -> int:
        return len(self.lengths_S)

    def arrays(self) -> list[Array]:
        """All fields in their order."""
        return [getattr(self, field.name) for field in fields(self)]

    def take(self, chosen: Sequence[int] | Array) -> Rows:
        """Select rows, in the given order."""
        chosen = np.asarray(chosen, np.int64)
        return _cut(self, chosen, self.lengths_S[chosen], self.num_targets_S[chosen])


def rows_of(
    trajectories: Sequence[Sequence[Turn]],
    advantages: Sequence[float],
    credits: Sequence[TokenCredit] = (),
) -> Rows:
    """Build the rows of trajectories: one each, and one more per turn that is a restart.

    Trajectories without a target have no row and no number.

    Args:
        advantages: one per turn, over all trajectories.
        credits: one per trajectory if there is a critic, else none; either all or none of them have
            one advantage per token.

    Raises:
        ValueError: a turn has no token before it, or `advantages` has the wrong length.
    """
    turns = list(chain.from_iterable(trajectories))
    num_turns = np.array([len(one) for one in trajectories], np.int64)
    places_K = ranges(np.zeros_like(num_turns), num_turns)
    trajectories_K = np.repeat(np.arange(len(num_turns)), num_turns)
    opens_row_K = np.array([turn.restart for turn in turns], bool) | (places_K == 0)
    row_of_K = opens_row_K.cumsum() - 1
    num_prompt_K = np.array([len(turn.prompt_ids) for turn in turns], np.int64)
    num_sampled_K = np.array([len(turn.sampled_ids) for turn in turns], np.int64)
    stops_K = (num_prompt_K + num_sampled_K).cumsum()
    starts_K = stops_K - num_sampled_K
    first_turns_S = opens_row_K.nonzero()[0]
    starts_S = (starts_K - num_prompt_K)[first_turns_S]
    _check_prompts(starts_K == starts_S[row_of_K], trajectories_K, places_K)

    ids = _flat(chain.from_iterable((t.prompt_ids, t.sampled_ids) for t in turns), np.int64)
    token_N = ranges(starts_K, num_sampled_K)
    turn_of_N = np.repeat(np.arange(len(turns)), num_sampled_K)
    num_targets_S, num_turns_S = (
        np.bincount(row_of_K, weights, minlength=len(first_turns_S)).astype(np.int64)
        for weights in (num_sampled_K, None)
    )
    # a row ends with the last hidden state that predicts a target
    stops_S = np.zeros(len(first_turns_S), np.int64)
    np.maximum.at(stops_S, row_of_K, np.where(num_sampled_K > 0, stops_K - 1, 0))
    lengths_S = np.maximum(stops_S - starts_S, 0)
    turns_N = turn_of_N - first_turns_S[row_of_K[turn_of_N]]
    advantages_K = np.array(advantages, np.float32)
    if len(advantages_K) != len(turns):
        raise ValueError(
            f"advantages: expected {len(turns)}, one per turn, got {len(advantages_K)}"
        )
    if credits and credits[0].advantages is not None:
        advantages_K = _flat((c.advantages or () for c in credits), np.float32)
        places_K, num_turns_S = places_K[turn_of_N], num_targets_S
        turns_N = ranges(np.zeros_like(num_targets_S), num_targets_S)
    rows = Rows(
        tokens_T=ids[ranges(starts_S, lengths_S)],
        lengths_S=lengths_S,
        num_targets_S=num_targets_S,
        num_turns_S=num_turns_S,
        trajectories_S=trajectories_K[first_turns_S],
        states_N=token_N - 1 - starts_S[row_of_K[turn_of_N]],
        targets_N=ids[token_N],
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


def join_ranks(arrays_by_rank: Sequence[Sequence[Array]]) -> Rows:
    """Concatenate the rows of all ranks (`Rows.arrays` of each) and renumber their trajectories."""
    names = [field.name for field in fields(Rows)]
    columns = dict(zip(names, zip(*arrays_by_rank, strict=True), strict=True))
    by_rank = columns["trajectories_S"]
    firsts = _starts(np.array([numbers.max(initial=-1) + 1 for numbers in by_rank]))
    columns["trajectories_S"] = tuple(map(np.add, by_rank, firsts))
    return Rows(**{name: np.concatenate(column) for name, column in columns.items()})


def drop_idle_ends(rows: Rows) -> Rows:
    """Cut each row after its last target with an advantage, and drop rows without one.

    Turns after the cut keep their place in advantages_K, without tokens.
    """
    first_turn_N = np.repeat(_starts(rows.num_turns_S), rows.num_targets_S)
    live = rows.advantages_K[rows.turns_N + first_turn_N].nonzero()[0]
    if len(live) == len(rows.targets_N):
        return rows
    firsts_S = _starts(rows.num_targets_S)
    stops_S = np.zeros(len(rows), np.int64)
    # assignment keeps the last of the repeated indices: the last live target of each row
    stops_S[np.searchsorted(firsts_S, live, side="right") - 1] = live + 1
    kept = stops_S.nonzero()[0]
    states = rows.states_N[stops_S[kept] - 1]
    return _cut(rows, kept, states + 1, (stops_S - firsts_S)[kept])


def ranges(starts: Array, counts: Array) -> Array:
    """Concatenate the ranges [starts[i], starts[i] + counts[i])."""
    return np.repeat(starts - _starts(counts), counts) + np.arange(counts.sum())


def _cut(rows: Rows, chosen: Array, lengths: Array, num_targets: Array) -> Rows:
    """Select rows, and of each the first `lengths` tokens and `num_targets` targets."""
    index = {
        "T": ranges(_starts(rows.lengths_S)[chosen], lengths),
        "S": chosen,
        "N": ranges(_starts(rows.num_targets_S)[chosen], num_targets),
        "K": ranges(_starts(rows.num_turns_S)[chosen], rows.num_turns_S[chosen]),
    }
    columns = {f.name: getattr(rows, f.name) for f in fields(Rows)}
    columns = {n: column[index[n[-1]]] if len(column) else column for n, column in columns.items()}
    return Rows(**{**columns, "lengths_S": lengths, "num_targets_S": num_targets})


def _starts(counts: Array) -> Array:
    """Index of the first entry of each row."""
    return counts.cumsum() - counts


def _flat(lists: Iterable[Sequence[float]], dtype: type[np.generic]) -> Array:
    return np.fromiter(chain.from_iterable(lists), dtype)


def _check_prompts(is_first_K: Array, trajectories_K: Array, places_K: Array) -> None:
    """Raise ValueError if the first sampled token of a turn is the first token of its row."""
    if is_first_K.any():
        k = int(is_first_K.argmax())
        raise ValueError(
            f"turn {places_K[k]} of trajectory {trajectories_K[k]} has no prompt to predict from"
        )
