"""The tokens that enter the matrix products, their order, and the chunks."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .problem import Problem


@dataclass(frozen=True, slots=True, kw_only=True)
class Chunk:
    """Tokens [start, stop) of the order: the complete segments [first_segment, stop_segment)."""

    start: int
    stop: int
    first_segment: int
    stop_segment: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """The M active tokens of a call, ordered so that each ratio segment is contiguous.

    order_M: indices into the N tokens.
    segment_M, lengths_S: the segment of each ordered token, from 0, and tokens per segment; None at
        token level, where every token is its own segment.
    chunks: computed one at a time; at most `chunk` tokens, unless one segment is longer.
    masked, skipped: numbers of the other tokens, as in PolicyStats.
    """

    order_M: Tensor
    segment_M: Tensor | None
    lengths_S: Tensor | None
    chunks: tuple[Chunk, ...]
    masked: Tensor
    skipped: Tensor


def make_plan(problem: Problem, chunk: int) -> Plan:
    """Select the tokens that can change the loss and cut them into chunks at segment boundaries.

    Example: chunk 5, ratio "turn", turns of 3, 2 and 9 tokens, all with an advantage. The chunks
    are tokens [0, 5) of segments [0, 2) and tokens [5, 14) of segment 2, which exceeds a chunk.
    """
    p = problem
    weighted_N = p.weights_N != 0
    all_weighted = p.rule.kl_coef != 0 or p.rule.entropy_coef != 0
    signal_N = weighted_N & (p.advantages_K != 0)[p.turns_N]
    segment_N: Tensor | None = None
    if p.rule.ratio == "turn":
        segment_N = p.turns_N
    elif p.rule.ratio == "sequence":
        assert p.sequences_K is not None
        # Number the sequences from 0: their ids may be any integers.
        ids, number_K = p.sequences_K.unique(return_inverse=True)
        by_sequence_N = segment_N = number_K[p.turns_N]
        # A token without advantage still changes the ratio of a sequence that has one.
        has_signal = torch.zeros_like(ids, dtype=torch.bool)
        has_signal[by_sequence_N[signal_N]] = True
        signal_N = weighted_N & has_signal[by_sequence_N]
    active_N = weighted_N if all_weighted else signal_N
    order_M = active_N.nonzero().squeeze(1)
    masked = (~weighted_N).sum()
    skipped = (weighted_N & ~active_N).sum()
    if segment_N is None:
        return Plan(
            order_M=order_M,
            segment_M=None,
            lengths_S=None,
            chunks=_token_chunks(order_M.shape[0], chunk),
            masked=masked,
            skipped=skipped,
        )
    ids_M, by_segment_M = segment_N[order_M].sort(stable=True)
    _, number_M, lengths = torch.unique_consecutive(ids_M, return_inverse=True, return_counts=True)
    return Plan(
        order_M=order_M[by_segment_M],
        segment_M=number_M,
        lengths_S=lengths,
        chunks=_segment_chunks(lengths.tolist(), chunk),
        masked=masked,
        skipped=skipped,
    )


def _token_chunks(total: int, chunk: int) -> tuple[Chunk, ...]:
    # Equal chunks: a short last one would read as much of the head as a full one.
    size = -(-total // max(1, -(-total // chunk)))
    spans = ((start, min(start + size, total)) for start in range(0, total, max(size, 1)))
    return tuple(Chunk(start=a, stop=b, first_segment=a, stop_segment=b) for a, b in spans)


def _segment_chunks(lengths: list[int], chunk: int) -> tuple[Chunk, ...]:
    chunks: list[Chunk] = []
    start = stop = first = 0
    for number, length in enumerate([*lengths, chunk + 1]):
        if stop > start and stop + length - start > chunk:
            chunks.append(Chunk(start=start, stop=stop, first_segment=first, stop_segment=number))
            start, first = stop, number
        stop += length
    return tuple(chunks)
