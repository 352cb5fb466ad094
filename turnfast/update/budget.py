"""When a step does not fit the memory: halve its micro-batches and compute the same step again.

A micro-batch is cut by its targets: each part keeps the tokens that its targets look at, which are
the prefixes of their rows, and every number that was fixed for the step before (weights, log-probs,
advantages). So the gradient of the parts is that of the whole.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Sequence
from dataclasses import fields, replace
from typing import TypeVar

import torch
from torch import Tensor

from ..errors import OutOfMemory
from ..types import Batch

MOST_HALVINGS = 3
"""In one step, whatever it consists of: a critic's values, a reference pass, several updates."""

Result = TypeVar("Result")


class Budget:
    """The tokens that a micro-batch may have: those of the recipe, until memory runs out.

    It lasts as long as the run, so that what did not fit is not tried again in the next step. A
    resumed run begins with the recipe's again: what was scarce then may not be now, and otherwise
    costs one replay.

    Args:
        tokens: the most tokens of a micro-batch at first.
        row: the most tokens of one row, which a pack must be able to hold.
    """

    def __init__(self, tokens: int = sys.maxsize, *, row: int = 1) -> None:
        self._tokens, self._row = tokens, row
        self._fits: int | None = None
        self._halvings = 0

    @property
    def tokens(self) -> int:
        """The budget to pack with. Batches are cut further where not even one row fits."""
        if self._fits is None:
            return self._tokens
        return max(min(self._tokens, self._fits), self._row)

    @property
    def halvings(self) -> int:
        """How often it was halved since `begin_step`."""
        return self._halvings

    def begin_step(self) -> None:
        """From here on it may be halved three times again."""
        self._halvings = 0

    def replayed(
        self,
        attempt: Callable[[Sequence[Batch]], Result],
        batches: Sequence[Batch],
        forget: Callable[[], None] = lambda: None,
        *,
        whole_sequences: bool = False,
    ) -> tuple[Result, Sequence[Batch]]:
        """`attempt(batches)`, again on smaller batches whenever memory runs out.

        Args:
            attempt: computes all batches of one pass; changes no weight.
            forget: drops what a failed attempt has left behind, such as half of a gradient.
            whole_sequences: the loss looks at whole sequences, so their targets stay together.

        Returns:
            The result, and the batches that it is of.

        Raises:
            OutOfMemory: the step has used up its halvings, or there is nothing left to halve.
        """
        if self._fits is not None:
            batches = _cut(batches, self._fits, whole_sequences)
        tried = max((len(batch.tokens_T) for batch in batches), default=0)
        while True:
            try:
                return attempt(batches), batches
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
                reason = str(error).partition("\n")[0]
            # here the traceback is gone, and with it the activations of the attempt
            forget()
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
            largest = max((len(batch.tokens_T) for batch in batches), default=0)
            half = min(largest, self._fits or largest) // 2
            smaller = _cut(batches, half, whole_sequences)
            if self._halvings == MOST_HALVINGS or len(smaller) == len(batches):
                raise OutOfMemory(
                    f"out of memory on micro-batches of {tried} tokens, and still after "
                    f"{self._halvings} halvings in this step: lower train.tokens_per_microbatch, "
                    f"or set model.checkpointing = true ({reason})"
                )
            self._fits, batches = half, smaller
            self._halvings += 1
            logging.getLogger(__name__).warning(
                "out of memory on a micro-batch of %d tokens: the step is computed again with %d",
                largest,
                half,
            )


def _cut(batches: Sequence[Batch], budget: int, whole_sequences: bool) -> list[Batch]:
    return [
        part
        for batch in batches
        for part in split_batch(batch, budget, whole_sequences=whole_sequences)
    ]


def is_out_of_memory(error: BaseException) -> bool:
    """CUDA has a type of its own for it; torch's CPU allocator raises a plain RuntimeError."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    text = str(error)
    return "can't allocate memory" in text or "not enough memory" in text or "bad_alloc" in text


def split_batch(batch: Batch, budget: int, *, whole_sequences: bool = False) -> list[Batch]:
    """Parts of a batch with at most `budget` tokens each.

    A turn is never cut, nor a sequence if they are to stay whole: a part of one alone may have
    more. Prefixes that two parts share are in both.

    Example: rows p p a a and p p b, laid out p p a a b, with budget 4: p p a a and p p b.
    """
    if len(batch.tokens_T) <= budget:
        return [batch]
    owners_K = batch.sequences_K
    if not whole_sequences:
        owners_K = owners_K * (1 + batch.places_K.max()) + batch.places_K
    owners_N = owners_K[batch.turns_N.long()]
    parts: list[Batch] = []
    chosen_N = torch.zeros_like(owners_N, dtype=torch.bool)
    for owner in owners_N.unique().tolist():
        grown_N = chosen_N | (owners_N == owner)
        if chosen_N.any() and int(_needed(batch, grown_N).sum()) > budget:
            parts.append(_part(batch, chosen_N))
            grown_N = owners_N == owner
        chosen_N = grown_N
    return [*parts, _part(batch, chosen_N)]


def _needed(batch: Batch, chosen_N: Tensor) -> Tensor:
    """[T] bool: the tokens that the hidden states of the chosen targets depend on."""
    looked_T = torch.zeros(len(batch.tokens_T) + 1, dtype=torch.int64, device=batch.rows_N.device)
    looked_T[batch.rows_N[chosen_N] + 1] = 1
    before_T = looked_T.cumsum(0)
    # a token is an ancestor of what stands between it and its end
    return before_T[_ends(batch)] > before_T[:-1]


def _ends(batch: Batch) -> Tensor:
    if batch.ends_T is not None:
        return batch.ends_T.long()
    edges = batch.cu_seqlens.long()
    return edges[1:].repeat_interleave(edges.diff())


def _part(batch: Batch, chosen_N: Tensor) -> Batch:
    kept_T = _needed(batch, chosen_N)
    places_T = torch.cat([kept_T.new_zeros(1, dtype=torch.int64), kept_T.cumsum(0)])
    positions_T = batch.positions_T[kept_T]
    starts = (positions_T == 0).nonzero().squeeze(1)
    per_target = {
        field.name: value[chosen_N]
        for field in fields(batch)
        if field.name.endswith("_N") and (value := getattr(batch, field.name)) is not None
    }
    return replace(
        batch,
        **{**per_target, "rows_N": places_T[batch.rows_N[chosen_N]]},
        tokens_T=batch.tokens_T[kept_T],
        positions_T=positions_T,
        cu_seqlens=torch.cat([starts, places_T[-1:]]).int(),
        max_seqlen=int(positions_T.max()) + 1,
        ends_T=None if batch.ends_T is None else places_T[batch.ends_T.long()][kept_T].int(),
    )
