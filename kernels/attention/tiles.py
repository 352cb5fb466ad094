"""Cut a prefix tree into tiles of queries for SDPA; the keys of a tile are one path and the tile.

In depth-first order the ancestors of the tokens of a tile [a, b) are the ancestors of token `a` and
tokens of the tile: a subtree that starts before `a` and reaches into the tile contains `a`::

    layout   p p p a a b b d c c      tile [3, 7), tokens a a b b: its path is p p p
    depth    0 1 2 3 4 5 6 5 3 4      tile [7, 10), tokens d c c: its path is p p p a a

`c` does not see the `a` in the path of its tile, so a tile has a mask. A long stretch without a
branch needs none: it becomes one causal tile, with its path as additional queries. Their output is
dropped, which costs little if the path is short compared with the stretch.
"""

from __future__ import annotations

from bisect import bisect
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

_QUERIES, _MANY_QUERIES = 128, 256
_LONG_PATH = 1024
"""Number of path keys from which a tile has many queries, for larger blocks in the kernel. With a
shorter path the tile's own keys cost most, and half of those are masked."""
_LONG_STRETCH = 2048
"""Number of tokens from which one causal tile is faster than several masked ones. A path of up to
half as many tokens adds at most an eighth to the work."""

_MAX_CACHED_ELEMENTS = 1 << 24
"""Limit of cached mask elements in a forward without gradient, 64 MiB in float32. With gradients
masks are always cached for the next layers, as autograd would keep one copy per layer."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Tile:
    """Queries [first, stop) and the indices of their keys; the tile's own tokens are the last keys.

    Attributes:
        causal: the keys are one path from a root. All keys are then queries, and the last
            `stop - first` outputs are those of the tile.
    """

    first: int
    stop: int
    keys: Tensor
    causal: bool

    @property
    def own(self) -> Tensor:
        return self.keys[self.first - self.stop :]

    @property
    def queries(self) -> Tensor:
        return self.keys if self.causal else self.own


class Tiles:
    """All tiles of one layout in order, for one window (0 for none)."""

    def __init__(self, ends_T: Tensor, positions_T: Tensor, window: int) -> None:
        self._ends_T, self._positions_T, self._window = ends_T, positions_T, window
        self._tiles = _cut(ends_T, positions_T, window)
        self._masks: dict[tuple[int, torch.dtype], Tensor] = {}
        self.keys = torch.cat([tile.keys for tile in self._tiles])
        self.queries = torch.cat([tile.queries for tile in self._tiles])
        self.num_queries = [len(tile.queries) for tile in self._tiles]
        self.num_keys = [len(tile.keys) for tile in self._tiles]
        self._num_masked = sum(
            len(tile.own) * len(tile.keys) for tile in self._tiles if not tile.causal
        )

    def __iter__(self) -> Iterator[Tile]:
        return iter(self._tiles)

    def mask(self, tile: Tile, dtype: torch.dtype) -> Tensor | None:
        """[queries, keys] additive mask, 0 or -inf; None for a causal tile."""
        if tile.causal:
            return None
        if (tile.first, dtype) in self._masks:
            return self._masks[tile.first, dtype]
        seen = visible(self._ends_T, self._positions_T, tile.own, tile.keys, self._window)
        mask = torch.zeros(seen.shape, dtype=dtype, device=seen.device)
        mask = mask.masked_fill_(~seen, float("-inf"))
        if torch.is_grad_enabled() or self._num_masked <= _MAX_CACHED_ELEMENTS:
            self._masks[tile.first, dtype] = mask
        return mask


def visible(
    ends_T: Tensor, positions_T: Tensor, queries: Tensor, keys: Tensor, window: int
) -> Tensor:
    """[queries, keys] bool: which keys are ancestors of (or equal to) which query in the window."""
    queries = queries[:, None]
    seen = (keys <= queries) & (queries < ends_T[keys])
    if window:
        seen &= positions_T[queries] - positions_T[keys] < window
    return seen


def queries_per_tile(path: int) -> int:
    """The number of queries of a tile whose path has `path` tokens."""
    return _QUERIES if path < _LONG_PATH else _MANY_QUERIES


def _cut(ends_T: Tensor, positions_T: Tensor, window: int) -> list[Tile]:
    stretches = _long_stretches(positions_T.tolist(), window)
    edges = [*stretches, len(ends_T)]
    tiles: list[Tile] = []
    first = 0
    while first < len(ends_T):
        path = (ends_T[:first] > first).nonzero().squeeze(1)
        causal = first in stretches
        if causal:
            stop = stretches[first]
        else:
            seen = min(len(path), window or len(path))
            stop = min(first + queries_per_tile(seen), edges[bisect(edges, first)])
        own = torch.arange(first, stop, device=path.device)
        if window:
            path = path[visible(ends_T, positions_T, own, path, window).any(0)]
        tiles.append(Tile(first=first, stop=stop, keys=torch.cat([path, own]), causal=causal))
        first = stop
    return tiles


def _long_stretches(depths: Sequence[int], window: int) -> dict[int, int]:
    """Map the first token to the end (exclusive) of each stretch that becomes a causal tile."""
    stretches: dict[int, int] = {}
    first = 0
    for t in range(1, len(depths) + 1):
        if t < len(depths) and depths[t] == depths[t - 1] + 1:
            continue
        length, path = t - first, depths[first]
        if length >= max(_LONG_STRETCH, 2 * path) and path + length <= (window or path + length):
            stretches[first] = t
        first = t
    return stretches
