"""Attention over a prefix tree, q [H, T, d] and k, v [H_kv, T, d], tokens in depth-first order.

    o_q = Σ_k softmax_k(scale · q_q·k_k) v_k     over k ≤ q < ends[k], depth_q − depth_k < window

The keys of a token are its ancestors and itself. In depth-first order the ancestors of all tokens
of a tile [a, b) are those of its first token and tokens of the tile: a token before `a` whose
subtree reaches into the tile has `a` itself below it. So a tile attends to one path and to itself,
and nothing of size T × T is ever made.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from .block_lists import BlockLists, block_lists
from .packed import check_shapes

TreeBackend = Literal["sdpa", "triton"]

# By bytes of a number: the float32 tiles of 64 dimensions take 161 of the 163 KiB of shared memory
# that a block has on an A100, those of 128 take 225.
_WIDEST_TRITON_HEAD = {2: 256, 4: 64}

# Queries per tile: long enough to fill a matrix product, short beside the paths they look at.
_TILE = 128
# Masks of a whole pack are kept from layer to layer up to this many numbers, 64 MiB in float32.
_MOST_KEPT = 1 << 24


@dataclass(frozen=True)
class TreeRows:
    """Who descends from whom in one pack of token trees, and what attends over it.

    Args:
        ends_T: int32 on the device of the pack, the place after the last descendant of each token.
        positions_T: int64, depth of each token.
        backend: from `pick_tree_backend`.
    """

    ends_T: Tensor
    positions_T: Tensor
    backend: TreeBackend = "sdpa"
    _lists: dict[tuple[int, int, int], BlockLists] = field(default_factory=dict, repr=False)
    _masks: dict[tuple[int, int, torch.dtype], Tensor] = field(default_factory=dict, repr=False)

    @cached_property
    def tiles(self) -> list[tuple[int, int, Tensor]]:
        """(first, stop, places of the keys) of each tile; the tile's own tokens come last."""
        made = []
        for first in range(0, len(self.ends_T), _TILE):
            stop = min(first + _TILE, len(self.ends_T))
            path = (self.ends_T[:first] > first).nonzero().squeeze(1)
            own = torch.arange(first, stop, device=path.device)
            made.append((first, stop, torch.cat([path, own])))
        return made

    @cached_property
    def gathered(self) -> tuple[Tensor, list[int]]:
        """Places of the keys of all tiles, one tile after the other, and how many each has."""
        return torch.cat([keys for _, _, keys in self.tiles]), [len(keys) for *_, keys in self.tiles]

    def mask(self, tile: int, window: int, dtype: torch.dtype) -> Tensor:
        """[queries, keys] of a tile, 0 or -inf; kept for the next layer where the pack is short."""
        if (tile, window, dtype) in self._masks:
            return self._masks[tile, window, dtype]
        first, stop, keys = self.tiles[tile]
        seen = _visible(self, keys[first - stop :], keys, window)
        mask = torch.zeros(seen.shape, dtype=dtype, device=seen.device)
        mask = mask.masked_fill_(~seen, float("-inf"))
        if _TILE * sum(len(keys) for _, _, keys in self.tiles) <= _MOST_KEPT:
            self._masks[tile, window, dtype] = mask
        return mask

    def block_lists(self, window: int, queries: int, keys: int) -> BlockLists:
        """Made once per layout, window and block size; all layers of a model share them."""
        wanted = (window, queries, keys)
        if wanted not in self._lists:
            made = block_lists(self.ends_T, self.positions_T, queries, keys, window)
            self._lists[wanted] = made
        return self._lists[wanted]


def pick_tree_backend(
    device: torch.device,
    wanted: str = "auto",
    *,
    head_dim: int = 0,
    value_dim: int = 0,
    dtype: torch.dtype = torch.bfloat16,
) -> TreeBackend:
    """What attends over trees on a device: Triton on CUDA, SDPA in tiles on the CPU.

    Args:
        head_dim, dtype: of the model, to be refused here and not in the middle of a step; a
            head_dim of 0 is unknown.
        value_dim: dimensions of a value where they are not those of a key, as in latent attention.

    Raises:
        ValueError: `wanted` cannot run here, or not this model; the text names what would.
    """
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    if wanted not in ("auto", "sdpa", "triton"):
        raise ValueError(f"tree attention: {wanted!r} is none of 'auto', 'sdpa', 'triton'")
    if wanted == "sdpa" or (wanted == "auto" and device.type != "cuda"):
        return "sdpa"
    widest, name = _WIDEST_TRITON_HEAD.get(dtype.itemsize, 0), str(dtype).removeprefix("torch.")
    problems = {
        "Triton is not installed": importlib.util.find_spec("triton") is None,
        f"it needs a CUDA device, not {device.type}": device.type != "cuda" and not interpreted,
        f"its {name} heads have at most {widest} dimensions, the model's have {head_dim}": (
            head_dim > widest
        ),
        f"it needs values as wide as keys, the model's have {value_dim} and {head_dim} "
        "dimensions": value_dim not in (0, head_dim),
    }
    for problem, found in problems.items():
        if found and wanted == "auto":
            return "sdpa"
        if found:
            raise ValueError(f"tree attention 'triton': {problem}; 'sdpa' works here")
    return "triton"


def tree_attention(
    q_HTd: Tensor, k_HTd: Tensor, v_HTd: Tensor, rows: TreeRows, *, scale: float, window: int = 0
) -> Tensor:
    """Attention of every token to its ancestors and itself.

    Args:
        q_HTd: [H, T, d]; k_HTd, v_HTd: [H_kv, T, d] with H a multiple of H_kv. With "sdpa" values
            may have a width of their own.
        window: 0 for all ancestors, else a token sees itself and its `window - 1` nearest ones.
    Returns:
        [T, H, d], d that of the values.
    Raises:
        ValueError: shapes that do not fit each other, or not the tree.
    """
    num_tokens = len(rows.ends_T)
    if len(rows.positions_T) != num_tokens:
        raise ValueError(
            f"expected a position for each of {num_tokens} ends, got {len(rows.positions_T)}"
        )
    check_shapes(q_HTd, k_HTd, v_HTd, num_tokens, rows.backend)
    if rows.backend == "sdpa":
        return _sdpa(q_HTd, k_HTd, v_HTd, rows, scale, window)
    lists = partial(rows.block_lists, window)
    apply = importlib.import_module(".triton_tree", __package__).TreeAttention.apply
    return apply(q_HTd, k_HTd, v_HTd, rows.ends_T, rows.positions_T, lists, scale, window)


def reference(
    q_HTd: Tensor, k_HTd: Tensor, v_HTd: Tensor, rows: TreeRows, *, scale: float, window: int = 0
) -> Tensor:
    """The specification: every score, float32 or better inside, any device. Memory H·T²."""
    group = q_HTd.shape[0] // k_HTd.shape[0]
    wide = torch.promote_types(q_HTd.dtype, torch.float32)
    q, k, v = q_HTd.to(wide), *(x.to(wide).repeat_interleave(group, 0) for x in (k_HTd, v_HTd))
    place = torch.arange(q.shape[1], device=q.device)
    visible = _visible(rows, place, place, window)
    scores = (q @ k.transpose(1, 2) * scale).masked_fill(~visible, float("-inf"))
    return (scores.softmax(-1) @ v).transpose(0, 1).to(q_HTd.dtype)


def _visible(rows: TreeRows, queries: Tensor, keys: Tensor, window: int) -> Tensor:
    """[queries, keys] bool."""
    queries = queries[:, None]
    visible = (keys <= queries) & (queries < rows.ends_T[keys])
    if window:
        depth = rows.positions_T
        visible &= depth[queries] - depth[keys] < window
    return visible


def _sdpa(q: Tensor, k: Tensor, v: Tensor, rows: TreeRows, scale: float, window: int) -> Tensor:
    # gathered and taken apart once: were it done tile by tile, the backward pass would add up a
    # gradient of the whole pack for each
    keys, sizes = rows.gathered
    tiles = zip(
        q.split(_TILE, dim=1),
        k.index_select(1, keys).split(sizes, dim=1),
        v.index_select(1, keys).split(sizes, dim=1),
        strict=True,
    )
    outputs = [
        F.scaled_dot_product_attention(
            q_tile[None],
            k_tile[None],
            v_tile[None],
            attn_mask=rows.mask(tile, window, q.dtype),
            scale=scale,
            enable_gqa=True,
        )[0].transpose(0, 1)
        for tile, (q_tile, k_tile, v_tile) in enumerate(tiles)
    ]
    return torch.cat(outputs)
