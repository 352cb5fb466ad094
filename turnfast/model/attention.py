"""Attention of a model over packed rows and trees, through transformers' attention interface.

A packed forward passes its rows to every layer as the keyword `packed_rows`. Instead of a mask each
layer gets the window that the model requests from transformers for it, as an integer. The window
is therefore right also in models whose layers have no `sliding_window` attribute.
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

from ..errors import ConfigError
from ..kernels.attention import PackedRows, TreeRows, packed_attention, tree_attention

ATTENTION = "turnfast"
_in_packed_forward: ContextVar[bool] = ContextVar("in_packed_forward", default=False)


@contextmanager
def packed_forward() -> Iterator[None]:
    """Context in which every forward of a model must be a packed forward."""
    token = _in_packed_forward.set(True)
    try:
        yield
    finally:
        _in_packed_forward.reset(token)


# not compiled: the tiles depend on the pack
@torch.compiler.disable
def _attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | int | None,
    *,
    packed_rows: PackedRows | TreeRows | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """Compute attention as transformers' interface requires.

    Raises:
        ConfigError: a layer of the model needs something that packed attention does not have.
    """
    name = type(module).__name__
    if packed_rows is None:
        if _in_packed_forward.get() or isinstance(attention_mask, int):
            raise ConfigError(
                f"model.path: {name} does not pass the keyword arguments of a forward to its "
                "attention, which packed rows need; use another model"
            )
        return sdpa_attention_forward(module, query, key, value, attention_mask, **options)
    if isinstance(attention_mask, Tensor):
        raise ConfigError(
            f"model.path: {name} makes its own attention mask, which is not supported with packed "
            "rows; use another model"
        )
    unsupported = [option for option in ("s_aux", "softcap") if options.get(option) is not None]
    if unsupported or options.get("dropout"):
        raise ConfigError(
            f"model.path: {name} needs attention with {' and '.join(unsupported) or 'dropout'}, "
            "which is not supported; use another model"
        )
    scale = options.get("scaling")
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    window = options.get("sliding_window") or 0 if attention_mask is None else attention_mask
    qkv = query[0], key[0], value[0]
    if isinstance(packed_rows, TreeRows):
        return tree_attention(*qkv, packed_rows, scale=scale, window=window)[None], None
    return packed_attention(*qkv, packed_rows, scale=scale, window=window)[None], None


def _mask(*args: Any, local_size: int | None = None, **kwargs: Any) -> Tensor | int | None:
    """In a packed forward return the window instead of a mask, 0 for full attention."""
    if _in_packed_forward.get():
        return local_size or 0
    return sdpa_mask(*args, local_size=local_size, **kwargs)


AttentionInterface.register(ATTENTION, _attend)
AttentionMaskInterface.register(ATTENTION, _mask)
