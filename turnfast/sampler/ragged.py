"""Attention of the local sampler over one flat row of tokens from many requests.

A step feeds T tokens of many requests as one row [1, T] without padding, so the linear layers
compute only real tokens. `StepPlan` has the slot and position of each token; `ragged_attention`
replaces the attention of Hugging Face models (registered under `ATTENTION_NAME`).

The flat order: first the requests that feed a single token (R of them), then the others. For two
decoding requests and a prompt of three tokens::

    tokens   [41, 17,   5, 6, 7]
    slots    [ 0,  2,   1, 1, 1]       position in the slot  [9, 4,  0, 1, 2]
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention

from ..errors import ConfigError
from .cache import KVCache

ATTENTION_NAME = "turnfast_ragged"


@dataclass(frozen=True, slots=True, kw_only=True)
class Segment:
    """Tokens that one request feeds in this step: positions `start` to `stop` of its slot."""

    slot: int
    start: int
    stop: int

    @property
    def size(self) -> int:
        return self.stop - self.start


@dataclass(frozen=True, slots=True, kw_only=True)
class Copy:
    """A copy of the first `length` tokens of slot `source` into the slots `targets`."""

    source: int
    length: int
    targets: tuple[int, ...]


class StepPlan:
    """Index tensors of one forward, shared by all layers.

    Args:
        segments: first those of one token, sorted by slot, then the others.
        copies: run in order, after this step's tokens are written and before attention.
    """

    def __init__(
        self,
        cache: KVCache,
        segments: Sequence[Segment],
        copies: Sequence[Copy],
        device: torch.device,
    ) -> None:
        self.cache = cache
        self.copies = [(c, torch.tensor(c.targets, device=device)) for c in copies]
        self.positions_T = torch.tensor(
            [p for s in segments for p in range(s.start, s.stop)], device=device
        )
        self.slots_T = torch.tensor(
            [s.slot for s in segments for _ in range(s.size)], device=device
        )
        self.last_tokens = torch.tensor([s.size for s in segments], device=device).cumsum(0) - 1
        self.num_singles = sum(s.size == 1 for s in segments)
        singles, blocks = segments[: self.num_singles], segments[self.num_singles :]
        self.singles = _Singles(singles, device) if singles else None
        self.blocks = _Blocks(blocks, device) if blocks else None

    def attend(
        self,
        layer: int,
        query_THD: torch.Tensor,
        key_THD: torch.Tensor,
        value_THD: torch.Tensor,
        scale: float | None,
        window: int | None,
    ) -> torch.Tensor:
        """Write this step's keys and values into the cache and attend; returns [T, heads, D]."""
        keys, values = self.cache.layer(layer, key_THD, value_THD)
        keys[self.slots_T, :, self.positions_T] = key_THD
        values[self.slots_T, :, self.positions_T] = value_THD
        for copy, targets in self.copies:
            keys[targets, :, : copy.length] = keys[copy.source, :, : copy.length]
            values[targets, :, : copy.length] = values[copy.source, :, : copy.length]
        parts = []
        if self.singles:
            part = query_THD[: self.num_singles]
            parts.append(self.singles.attend(part, keys, values, scale, window))
        if self.blocks:
            part = query_THD[self.num_singles :]
            parts.append(self.blocks.attend(part, keys, values, scale, window))
        return torch.cat(parts)


class _Singles:
    """Attention of segments with one query each, to all tokens of their slot.

    Keys are not repeated for the query heads that share them. While at least half of the slots are
    in use, the cache is read in place, unused slots included.
    """

    def __init__(self, segments: Sequence[Segment], device: torch.device) -> None:
        slots = [s.slot for s in segments]
        self.slots = torch.tensor(slots, device=device)
        self.num_read = slots[-1] + 1
        self.in_place = 2 * len(slots) >= self.num_read
        positions = torch.tensor([s.start for s in segments], device=device)
        if self.in_place:
            positions = positions.new_zeros(self.num_read).index_copy_(0, self.slots, positions)
        self.masks = _Masks(positions[:, None], max(s.stop for s in segments))

    def attend(
        self,
        query_RHD: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        scale: float | None,
        window: int | None,
    ) -> torch.Tensor:
        mask = self.masks.get(window, query_RHD.dtype)
        keys, values = keys[:, :, : mask.shape[-1]], values[:, :, : mask.shape[-1]]
        if self.in_place:
            keys, values = keys[: self.num_read], values[: self.num_read]
            spread = query_RHD.new_zeros(self.num_read, *query_RHD.shape[1:])
            query_RHD = spread.index_copy_(0, self.slots, query_RHD)
        else:
            keys, values = keys.index_select(0, self.slots), values.index_select(0, self.slots)
        if query_RHD.device.type == "cpu":
            out = scaled_dot_product_attention(
                query_RHD[:, :, None], keys, values, attn_mask=mask, scale=scale, enable_gqa=True
            ).squeeze(2)
        else:
            # CUDA's fast kernels do not support a mask with shared key heads: make the query heads
            # of one key head queries of one head
            shared = query_RHD.shape[1] // keys.shape[1]
            out = scaled_dot_product_attention(
                query_RHD.unflatten(1, (-1, shared)),
                keys,
                values,
                attn_mask=mask.expand(-1, -1, shared, -1),
                scale=scale,
            ).flatten(1, 2)
        return out.index_select(0, self.slots) if self.in_place else out


class _Blocks:
    """Attention of segments with several queries each (prompts), padded to the longest."""

    def __init__(self, segments: Sequence[Segment], device: torch.device) -> None:
        sizes = torch.tensor([s.size for s in segments], device=device)
        self.width = max(s.size for s in segments)
        self.slots = torch.tensor([s.slot for s in segments], device=device)
        offsets = torch.arange(self.width, device=device)
        real = offsets < sizes[:, None]
        self.flat = real.flatten().nonzero().squeeze(1)
        starts = torch.tensor([s.start for s in segments], device=device)
        # a padded query sees what the last real one sees: an empty softmax row would be NaN
        positions = starts[:, None] + torch.minimum(offsets, sizes[:, None] - 1)
        self.masks = _Masks(positions, max(s.stop for s in segments))

    def attend(
        self,
        query_THD: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        scale: float | None,
        window: int | None,
    ) -> torch.Tensor:
        num_rows, num_heads = len(self.slots), query_THD.shape[1]
        padded = query_THD.new_zeros(num_rows * self.width, *query_THD.shape[1:])
        padded.index_copy_(0, self.flat, query_THD)
        shared = num_heads // keys.shape[1]
        query = padded.view(num_rows, self.width, -1, shared, padded.shape[-1])
        mask = self.masks.get(window, query_THD.dtype)
        out = scaled_dot_product_attention(
            query.permute(0, 2, 3, 1, 4).flatten(2, 3),
            keys[:, :, : mask.shape[-1]].index_select(0, self.slots),
            values[:, :, : mask.shape[-1]].index_select(0, self.slots),
            attn_mask=mask.repeat(1, 1, shared, 1),
            scale=scale,
        )
        out = out.unflatten(2, (shared, self.width)).permute(0, 3, 1, 2, 4)
        return out.reshape(num_rows * self.width, num_heads, -1).index_select(0, self.flat)


class _Masks:
    """Additive masks [R, 1, Q, keys] by the size of the sliding window.

    Args:
        positions_RQ: a query at position p sees the keys from p - window + 1 to p.
        num_keys: the number of keys.
    """

    def __init__(self, positions_RQ: torch.Tensor, num_keys: int) -> None:
        self.positions = positions_RQ[:, :, None]
        self.num_keys = num_keys
        self.masks: dict[int | None, torch.Tensor] = {}

    def get(self, window: int | None, dtype: torch.dtype) -> torch.Tensor:
        if window not in self.masks:
            columns = torch.arange(self.num_keys, device=self.positions.device)
            seen = columns <= self.positions
            if window is not None:
                seen &= columns > self.positions - window
            zeros = torch.zeros(seen.shape, dtype=dtype, device=seen.device)
            self.masks[window] = zeros.masked_fill_(~seen, float("-inf"))[:, None]
        return self.masks[window]


def ragged_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    **options: Any,
) -> tuple[torch.Tensor, None]:
    """Attention function for transformers' interface: [1, heads, T, D] in, [1, T, heads, D] out.

    Args:
        options: `step_plan` from the sampler, `scaling` and `sliding_window` from the model.
    Raises:
        ConfigError: the model's attention needs something that is not computed here.
    """
    for name in ("softcap", "s_aux", "position_bias"):
        if options.get(name) is not None:
            raise ConfigError(
                f"sampler.backend: the local sampler's attention has no {name!r}; set it to 'vllm'"
            )
    plan = options.get("step_plan")
    if plan is None:
        raise ConfigError(
            f"sampler.backend: {type(module).__name__} does not pass keyword arguments to its "
            "attention, which the local sampler needs; set it to 'vllm'"
        )
    layer: Any = module.layer_idx
    out = plan.attend(
        layer,
        query[0].transpose(0, 1),
        key[0].transpose(0, 1),
        value[0].transpose(0, 1),
        options.get("scaling"),
        options.get("sliding_window"),
    )
    return out.unsqueeze(0), None
