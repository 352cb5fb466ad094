"""Attention over a prefix tree, q [H, T, d] and k, v [H_kv, T, d], tokens in depth-first order.

    o_q = Σ_k softmax_k(scale · q_q·k_k) v_k     over k ≤ q < ends[k], depth_q − depth_k < window

The keys of a token are its ancestors and itself. On CUDA a Triton kernel skips pairs of blocks
without a visible key; elsewhere SDPA runs tile by tile (tiles.py). There are no T × T scores or
masks; the masks of all tiles have at most T × depth elements.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from .block_lists import BlockLists, block_lists
from .packed import check_shapes
from .tiles import Tiles, visible

TreeBackend = Literal["sdpa", "triton"]

# By bytes per element. The float32 tiles of 64 dimensions use 161 of the 163 KiB of shared memory
# per block of an A100, those of 128 dimensions would need 225 KiB.
_WIDEST_TRITON_HEAD = {2: 256, 4: 64}


@dataclass(frozen=True)
class TreeRows:
    """The layout of the prefix trees of one batch, and the attention backend.

    Args:
        ends_T: int32 index after the last descendant of each token, on the device of the batch.
        positions_T: int64 depth of each token.
        backend: from `pick_tree_backend`.
    """

    ends_T: Tensor
    positions_T: Tensor
    backend: TreeBackend = "sdpa"
    _lists: dict[tuple[int, int, int], BlockLists] = field(default_factory=dict, repr=False)
    _tiles: dict[int, Tiles] = field(default_factory=dict, repr=False)

    def tiles(self, window: int) -> Tiles:
        """The tiles for SDPA, computed once per window."""
        if window not in self._tiles:
            self._tiles[window] = Tiles(self.ends_T, self.positions_T, window)
        return self._tiles[window]

    def block_lists(self, window: int, queries: int, keys: int) -> BlockLists:
        """The block lists for Triton, computed once per window and block sizes."""
        key = (window, queries, keys)
        if key not in self._lists:
            self._lists[key] = block_lists(self.ends_T, self.positions_T, queries, keys, window)
        return self._lists[key]


def pick_tree_backend(
    device: torch.device,
    wanted: str = "auto",
    *,
    head_dim: int = 0,
    value_dim: int = 0,
    dtype: torch.dtype = torch.bfloat16,
) -> TreeBackend:
    """Choose the backend of tree attention: Triton on CUDA if it can run, else SDPA.

    Args:
        head_dim: head dimension of the model, 0 if unknown.
        value_dim: dimension of the values if it differs from `head_dim` (latent attention).

    Raises:
        ValueError: `wanted` cannot run on this device or with this model.
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
    """Compute attention of every token to its ancestors and itself.

    Args:
        q_HTd: [H, T, d]; k_HTd, v_HTd: [H_kv, T, d] with H a multiple of H_kv. With "sdpa" the
            width of the values may differ.
        window: 0 for all ancestors, else a token sees itself and the `window - 1` nearest ones.

    Returns:
        [T, H, d] with the d of the values.

    Raises:
        ValueError: the shapes do not match each other or the tree.
    """
    num_tokens = len(rows.ends_T)
    if len(rows.positions_T) != num_tokens:
        raise ValueError(
            f"positions_T: expected {num_tokens} entries like ends_T, got {len(rows.positions_T)}"
        )
    check_shapes(q_HTd, k_HTd, v_HTd, num_tokens, rows.backend)
    if rows.backend == "sdpa":
        return _sdpa(q_HTd, k_HTd, v_HTd, rows.tiles(window), scale)
    forward = importlib.import_module(".triton.forward", __package__)
    return forward.TreeAttention.apply(q_HTd, k_HTd, v_HTd, rows, scale, window)


def reference(
    q_HTd: Tensor, k_HTd: Tensor, v_HTd: Tensor, rows: TreeRows, *, scale: float, window: int = 0
) -> Tensor:
    """Reference: all scores, float32 or better inside, any device. Memory H·T²."""
    group = q_HTd.shape[0] // k_HTd.shape[0]
    wide = torch.promote_types(q_HTd.dtype, torch.float32)
    q, k, v = q_HTd.to(wide), *(x.to(wide).repeat_interleave(group, 0) for x in (k_HTd, v_HTd))
    index = torch.arange(q.shape[1], device=q.device)
    seen = visible(rows.ends_T, rows.positions_T, index, index, window)
    scores = (q @ k.transpose(1, 2) * scale).masked_fill(~seen, float("-inf"))
    return (scores.softmax(-1) @ v).transpose(0, 1).to(q_HTd.dtype)


def _sdpa(q: Tensor, k: Tensor, v: Tensor, tiles: Tiles, scale: float) -> Tensor:
    # one gather for all tiles: with one per tile the backward pass would add a full-size gradient
    # for each
    pieces = zip(
        tiles,
        q.index_select(1, tiles.queries).split(tiles.num_queries, dim=1),
        k.index_select(1, tiles.keys).split(tiles.num_keys, dim=1),
        v.index_select(1, tiles.keys).split(tiles.num_keys, dim=1),
        strict=True,
    )
    outputs = [
        F.scaled_dot_product_attention(
            q_tile[None],
            k_tile[None],
            v_tile[None],
            attn_mask=tiles.mask(tile, q.dtype),
            is_causal=tile.causal,
            scale=scale,
            enable_gqa=True,
        )[0, :, tile.first - tile.stop :].transpose(0, 1)
        for tile, q_tile, k_tile, v_tile in pieces
    ]
    return torch.cat(outputs)
