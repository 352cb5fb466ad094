"""Attention over a prefix tree, q [H, T, d] and k, v [H_kv, T, d], tokens in depth-first order.

    o_q = Σ_k softmax_k(scale · q_q·k_k) v_k     over k ≤ q < ends[k], depth_q − depth_k < window

The keys of a token are its ancestors and itself. On CUDA a Triton kernel skips the blocks in which
nobody is anybody's ancestor; elsewhere SDPA attends tile by tile, see tiles.py. No scores and no
mask of T × T are ever made; the masks of all tiles together have T × depth numbers at most.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
from dataclasses import dataclass, field
from functools import partial
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from .block_lists import BlockLists, block_lists
from .packed import check_shapes
from .tiles import Tiles, visible

TreeBackend = Literal["sdpa", "triton"]

# By bytes of a number: the float32 tiles of 64 dimensions take 161 of the 163 KiB of shared memory
# that a block has on an A100, those of 128 take 225.
_WIDEST_TRITON_HEAD = {2: 256, 4: 64}


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
    _tiles: dict[int, Tiles] = field(default_factory=dict, repr=False)

    def tiles(self, window: int) -> Tiles:
        """Made once per layout and window, as the block lists are."""
        if window not in self._tiles:
            self._tiles[window] = Tiles(self.ends_T, self.positions_T, window)
        return self._tiles[window]

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
        return _sdpa(q_HTd, k_HTd, v_HTd, rows.tiles(window), scale)
    lists = partial(rows.block_lists, window)
    apply = importlib.import_module(".triton.forward", __package__).TreeAttention.apply
    return apply(q_HTd, k_HTd, v_HTd, rows.ends_T, rows.positions_T, lists, scale, window)


def reference(
    q_HTd: Tensor, k_HTd: Tensor, v_HTd: Tensor, rows: TreeRows, *, scale: float, window: int = 0
) -> Tensor:
    """The specification: every score, float32 or better inside, any device. Memory H·T²."""
    group = q_HTd.shape[0] // k_HTd.shape[0]
    wide = torch.promote_types(q_HTd.dtype, torch.float32)
    q, k, v = q_HTd.to(wide), *(x.to(wide).repeat_interleave(group, 0) for x in (k_HTd, v_HTd))
    place = torch.arange(q.shape[1], device=q.device)
    seen = visible(rows.ends_T, rows.positions_T, place, place, window)
    scores = (q @ k.transpose(1, 2) * scale).masked_fill(~seen, float("-inf"))
    return (scores.softmax(-1) @ v).transpose(0, 1).to(q_HTd.dtype)


def _sdpa(q: Tensor, k: Tensor, v: Tensor, tiles: Tiles, scale: float) -> Tensor:
    # gathered and taken apart once: were it done tile by tile, the backward pass would add up a
    # gradient of the whole pack for each
    cut = zip(
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
        for tile, q_tile, k_tile, v_tile in cut
    ]
    return torch.cat(outputs)
