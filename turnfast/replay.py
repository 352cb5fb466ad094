"""When a step does not fit the memory: halve its micro-batches and compute the same step again.

A micro-batch is cut by its targets: each part keeps the tokens that its targets look at, which are
the prefixes of their rows, and every number that was fixed for the step before (weights, log-probs,
advantages). So the gradient of the parts is that of the whole.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import fields, replace
from typing import TypeVar

import torch
from torch import Tensor

from .types import Batch

MOST_REPLAYS = 3

Result = TypeVar("Result")


class OutOfMemory(RuntimeError):
    """The step does not fit, however it is cut; the text names the settings that help."""


def replayed(
    attempt: Callable[[Sequence[Batch]], Result],
    batches: Sequence[Batch],
    forget: Callable[[], None],
    *,
    whole_sequences: bool = False,
) -> tuple[Result, Sequence[Batch], int]:
    """`attempt(batches)`, on smaller batches if memory runs out, at most three times.

    Args:
        attempt: computes all batches of one optimizer step; changes no weight.
        forget: drops what a failed attempt has left behind, such as half of a gradient.
        whole_sequences: the loss looks at whole sequences, so their targets stay together.

    Returns:
        The result, the batches that it is of, and how often their budget was halved.

    Raises:
        OutOfMemory: three halvings were not enough, or there is nothing left to halve.
    """
    largest = budget = max((len(batch.tokens_T) for batch in batches), default=0)
    for replay in range(MOST_REPLAYS + 1):
        try:
            return attempt(batches), batches, replay
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            reason = str(error).partition("\n")[0]
        # here the traceback is gone, and with it the activations of the attempt
        forget()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        budget //= 2
        cut = [
            part
            for batch in batches
            for part in split_batch(batch, budget, whole_sequences=whole_sequences)
        ]
        if replay == MOST_REPLAYS or len(cut) == len(batches):
            break
        logging.getLogger(__name__).warning(
            "out of memory on a micro-batch of %d tokens: the step is computed again with %d",
            2 * budget,
            budget,
        )
        batches = cut
    raise OutOfMemory(
        f"out of memory on micro-batches of {largest} tokens, and still after {replay} halvings: "
        f"lower train.tokens_per_microbatch, or set model.checkpointing = true ({reason})"
    )


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
