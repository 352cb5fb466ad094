"""Attention of a model over packed rows and trees, through transformers' attention interface.

A packed forward hands its rows to every layer as the keyword `packed_rows`. In the place of a mask
the layers get the window that the model asks of transformers for them, as a number: how far a token
sees is then said once, by the mask, and is right also in models that say it nowhere else.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from ..kernels.attention import PackedRows, TreeRows, packed_attention, tree_attention

ATTENTION = "turnfast"
_in_packed_forward: ContextVar[bool] = ContextVar("in_packed_forward", default=False)


@contextmanager
def packed_forward() -> Iterator[None]:
    """Within, the model runs over packed rows and nothing else."""
    token = _in_packed_forward.set(True)
    try:
        yield
    finally:
        _in_packed_forward.reset(token)


# a compiled model leaves attention as it is: its tiles depend on the pack
@torch.compiler.disable
def _attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | int | None,
    *,
    packed_rows: PackedRows | TreeRows | None = None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    if packed_rows is None:
        if _in_packed_forward.get() or isinstance(attention_mask, int):
            raise NotImplementedError(
                f"{type(module).__name__} does not pass on the keyword arguments of a forward, "
                "through which its rows arrive"
            )
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, scaling=scaling, dropout=dropout, **kwargs
        )
    if isinstance(attention_mask, Tensor):
        raise NotImplementedError(f"{type(module).__name__} makes a mask of its own")
    if kwargs.get("s_aux") is not None or kwargs.get("softcap") is not None:
        raise NotImplementedError("attention sinks and capped attention logits are not computed")
    if dropout:
        raise NotImplementedError(f"attention dropout ({dropout}) is not computed")
    scale = scaling if scaling is not None else query.shape[-1] ** -0.5
    window = sliding_window or 0 if attention_mask is None else attention_mask
    qkv = query[0], key[0], value[0]
    if isinstance(packed_rows, TreeRows):
        return tree_attention(*qkv, packed_rows, scale=scale, window=window)[None], None
    return packed_attention(*qkv, packed_rows, scale=scale, window=window)[None], None


def _mask(*args: Any, local_size: int | None = None, **kwargs: Any) -> Tensor | int | None:
    """For packed rows the window alone, 0 for none: their boundaries arrive explicitly."""
    if _in_packed_forward.get():
        return local_size or 0
    return sdpa_mask(*args, local_size=local_size, **kwargs)


AttentionInterface.register(ATTENTION, _attend)
AttentionMaskInterface.register(ATTENTION, _mask)
