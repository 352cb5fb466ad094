"""Which tokens enter the matrix products, in which order, and where the chunks are cut."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .problem import Problem


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """The M active tokens of a call, ordered so that each ratio segment is contiguous.

    order_M: indices into the N tokens. segment_M: segment number per ordered token, counting up
    from 0 (None at token level). num_segments: their number. chunks: (start, stop) into the order,
    each holding whole segments and at most `chunk` tokens unless it is one longer segment. masked,
    skipped: counts of what was left out.
    """

    order_M: Tensor
    segment_M: Tensor | None
    chunks: tuple[tuple[int, int], ...]
    chunk: int
    masked: Tensor
    skipped: Tensor


def make_plan(problem: Problem, chunk: int) -> Plan:
    """Leave out tokens that cannot change the loss, and cut the rest at segment boundaries.

    Worked example: chunk 4, ratio "turn", turns of 3, 2 and 9 tokens, all with an advantage: chunks
    (0, 3), (3, 5), (5, 14); the last one is a segment longer than a chunk.
    """
    p = problem
    weighted_N = p.weights_N != 0
    always = p.rule.kl_coef != 0 or p.rule.entropy_coef != 0
    signal_N = weighted_N & (p.advantages_K != 0)[p.turns_N]
    segment_N: Tensor | None = None
    if p.rule.ratio == "turn":
        segment_N = p.turns_N
    elif p.rule.ratio == "sequence":
        assert p.sequences_K is not None
        segment_N = p.sequences_K[p.turns_N]
        # A token without advantage still moves the ratio of a sequence that has some.
        lit = torch.zeros(int(p.sequences_K.max()) + 1 if p.sequences_K.numel() else 0).to(signal_N)
        lit[segment_N[signal_N]] = True
        signal_N = weighted_N & lit[segment_N]
    active_N = weighted_N if always else signal_N
    order_M = active_N.nonzero().squeeze(1)
    masked = (~weighted_N).sum()
    skipped = (weighted_N & ~active_N).sum()
    if segment_N is None:
        chunks = _even_chunks(order_M.shape[0], chunk)
        return Plan(
            order_M=order_M,
            segment_M=None,
            chunks=chunks,
            chunk=chunk,
            masked=masked,
            skipped=skipped,
        )
    ids_M, by_segment_M = segment_N[order_M].sort(stable=True)
    _, number_M, lengths = torch.unique_consecutive(ids_M, return_inverse=True, return_counts=True)
    return Plan(
        order_M=order_M[by_segment_M],
        segment_M=number_M,
        chunks=_whole_segment_chunks(lengths.tolist(), chunk),
        chunk=chunk,
        masked=masked,
        skipped=skipped,
    )


def _even_chunks(total: int, chunk: int) -> tuple[tuple[int, int], ...]:
    return tuple((start, min(start + chunk, total)) for start in range(0, total, chunk))


def _whole_segment_chunks(lengths: list[int], chunk: int) -> tuple[tuple[int, int], ...]:
    chunks: list[tuple[int, int]] = []
    start = stop = 0
    for length in lengths:
        if stop > start and stop + length - start > chunk:
            chunks.append((start, stop))
            start = stop
        stop += length
    if stop > start:
        chunks.append((start, stop))
    return tuple(chunks)
