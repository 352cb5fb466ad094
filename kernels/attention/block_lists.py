"""Lists of the key blocks that a query block sees, for trees in depth-first order.

A pair of blocks without a visible key is in no list. The other pairs are *whole* (every query sees
every key, no mask needed) or *mixed*. With queries [q0, q1] and keys [k0, k1] before them, some
query sees some key iff max ends[k0..k1] > q0, and all see all keys iff min ends[k0..k1] > q1.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F


@dataclass(frozen=True, slots=True, kw_only=True)
class Blocks:
    """Lists in compressed-row form: `items[offsets[i] : offsets[i + 1]]` of block i; int32."""

    offsets: Tensor
    items: Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockLists:
    """Key blocks of each query block, and query blocks of each key block."""

    whole_keys: Blocks
    mixed_keys: Blocks
    whole_queries: Blocks
    mixed_queries: Blocks


def block_lists(
    ends_T: Tensor, positions_T: Tensor, block_queries: int, block_keys: int, window: int = 0
) -> BlockLists:
    """Compute the lists of one layout on the device of `ends_T`.

    Example: two rows of 64 tokens that share 32, blocks of 32. The layout has three blocks. Each
    sees itself (mixed), blocks 1 and 2 see block 0 (whole), and 2 does not see 1.
    """
    queries, keys = _spans(len(ends_T), block_queries), _spans(len(ends_T), block_keys)
    q0, q1 = (x.to(ends_T.device)[:, None] for x in queries)
    k0, k1 = (x.to(ends_T.device)[None, :] for x in keys)
    ends_max, ends_min = _extremes(ends_T, block_keys)
    seen = (k0 <= q1) & ((k1 >= q0) | (ends_max > q0))
    whole = (k1 < q0) & (ends_min > q1)
    if window:
        near_q, far_q = reversed(_extremes(positions_T, block_queries))
        far_k, near_k = _extremes(positions_T, block_keys)
        seen &= near_q[:, None] - far_k < window
        whole &= far_q[:, None] - near_k < window
    whole &= seen
    mixed = seen & ~whole
    return BlockLists(
        whole_keys=_compress(whole),
        mixed_keys=_compress(mixed),
        whole_queries=_compress(whole.T),
        mixed_queries=_compress(mixed.T),
    )


def _spans(length: int, block: int) -> tuple[Tensor, Tensor]:
    """First and last token of each block."""
    first = torch.arange(0, length, block)
    return first, (first + block).clamp(max=length) - 1


def _extremes(values_T: Tensor, block: int) -> tuple[Tensor, Tensor]:
    """Largest and smallest value of each block; the last block may be shorter."""
    last = values_T[-1:].expand(-len(values_T) % block)
    blocks = torch.cat([values_T, last]).view(-1, block)
    return blocks.amax(1), blocks.amin(1)


def _compress(pairs: Tensor) -> Blocks:
    counts = pairs.sum(1)
    offsets = F.pad(counts.cumsum(0), (1, 0))
    return Blocks(offsets=offsets.int(), items=pairs.nonzero()[:, 1].int())
