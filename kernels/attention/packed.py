"""Causal attention over packed rows, q [H, T, d] and k, v [H_kv, T, d].

    o_t = Σ_s softmax_s(scale · q_t·k_s) v_s     over s ≤ t in the same row, t − s < window

Backends: flash-attn and torch's `varlen_attn` take row boundaries (CUDA). On the CPU these have no
backward pass, so rows of similar length are gathered into rectangles for SDPA. Row boundaries are
always explicit, never inferred from positions.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from inspect import Parameter, signature
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import varlen

Backend = Literal["flash", "varlen", "sdpa"]

# The limit of flash-attn and of the kernels of varlen_attn.
_WIDEST_HEAD = 256

# The most padding of a rectangle, relative to its tokens: fewer and larger SDPA calls.
_MAX_RECTANGLE_WASTE = 0.15


@dataclass(frozen=True)
class PackedRows:
    """Row boundaries of one batch, and the attention backend.

    Args:
        cu_seqlens: [S + 1] int32 from 0 to T, on the device of the batch.
        lengths: the S row lengths on the host.
        max_seqlen: the longest row; not used by "sdpa".
    """

    cu_seqlens: Tensor
    lengths: tuple[int, ...]
    backend: Backend
    max_seqlen: int = 0

    @cached_property
    def rectangles(self) -> list[tuple[Tensor, Tensor, int, int]]:
        """Per rectangle: index [B·L] into T, indices of the row tokens in it, B and L.

        Short rows are padded with their first token. The padding comes after all tokens of the row,
        so with causal attention it changes nothing, and its output is dropped.
        """
        device = self.cu_seqlens.device
        starts = self.cu_seqlens.tolist()
        order = sorted(range(len(self.lengths)), key=lambda s: -self.lengths[s])
        rectangles, begin = [], 0
        while begin < len(order):
            longest, real, end = self.lengths[order[begin]], 0, begin
            while end < len(order):
                real += self.lengths[order[end]]
                if (end + 1 - begin) * longest > (1 + _MAX_RECTANGLE_WASTE) * real:
                    break
                end += 1
            rows = order[begin:end]
            column = torch.arange(longest)
            length = torch.tensor([self.lengths[s] for s in rows])[:, None]
            start = torch.tensor([starts[s] for s in rows])[:, None]
            valid = column[None] < length
            index = torch.where(valid, start + column[None], start).reshape(-1)
            kept = valid.reshape(-1).nonzero().squeeze(1)
            rectangles.append((index.to(device), kept.to(device), len(rows), longest))
            begin = end
        return rectangles

    @cached_property
    def restore(self) -> Tensor:
        """Index that restores the order of the batch from the concatenated rectangles."""
        tokens = torch.cat([index[kept] for index, kept, _, _ in self.rectangles])
        return torch.argsort(tokens)


def pick_backend(
    device: torch.device,
    wanted: Backend | Literal["auto"] = "auto",
    *,
    head_dim: int = 0,
    value_dim: int = 0,
    dtype: torch.dtype = torch.bfloat16,
    window: int = 0,
) -> Backend:
    """Choose the attention backend for a device and a model.

    Args:
        head_dim: head dimension of the model, 0 if unknown.
        value_dim: dimension of the values if it differs from `head_dim` (latent attention).
        window: the model's sliding window, 0 for none.

    Raises:
        ValueError: `wanted` cannot run on this device or with this model.
    """
    if wanted not in ("auto", "flash", "varlen", "sdpa"):
        raise ValueError(f"{wanted!r} is none of 'auto', 'flash', 'varlen', 'sdpa'")
    common = {
        f"a CUDA device, not {device.type}": device.type != "cuda",
        f"bfloat16 or float16, the model is {str(dtype).removeprefix('torch.')}": (
            dtype not in (torch.bfloat16, torch.float16)
        ),
        f"heads of at most {_WIDEST_HEAD} dimensions, the model's have {head_dim}": (
            head_dim > _WIDEST_HEAD
        ),
        f"values as wide as keys, the model's have {value_dim} and {head_dim} dimensions": (
            value_dim not in (0, head_dim)
        ),
    }
    specific: dict[Backend, dict[str, bool]] = {
        "flash": {"flash-attn installed": importlib.util.find_spec("flash_attn") is None},
        "varlen": {
            f"a newer torch for a sliding window, varlen_attn of {torch.__version__} has none": (
                window > 0 and "window_size" not in _varlen_parameters()
            )
        },
    }
    problems: dict[Backend, str] = {
        name: next((need for need, missing in (common | extra).items() if missing), "")
        for name, extra in specific.items()
    }
    problems["sdpa"] = ""
    best: Backend = next(name for name, problem in problems.items() if not problem)
    if wanted == "auto":
        return best
    if problems[wanted]:
        raise ValueError(f"{wanted!r} needs {problems[wanted]}; {best!r} works here")
    return wanted


def packed_attention(
    q_HTd: Tensor, k_HTd: Tensor, v_HTd: Tensor, rows: PackedRows, *, scale: float, window: int = 0
) -> Tensor:
    """Compute causal attention within each row.

    Args:
        q_HTd: [H, T, d]; k_HTd, v_HTd: [H_kv, T, d] with H a multiple of H_kv. With "sdpa" the
            width of the values may differ.
        window: 0 for full attention, else a token sees itself and `window - 1` tokens before it.

    Returns:
        [T, H, d] with the d of the values.

    Raises:
        ValueError: the shapes do not match each other or the rows.
    """
    check_shapes(q_HTd, k_HTd, v_HTd, sum(rows.lengths), rows.backend)
    if rows.backend == "sdpa":
        return _sdpa(q_HTd, k_HTd, v_HTd, rows, scale, window)
    q, k, v = (x.transpose(0, 1).contiguous() for x in (q_HTd, k_HTd, v_HTd))
    span = (window - 1, 0) if window else (-1, 0)
    if rows.backend == "flash":
        return _flash(q, k, v, rows, scale, span)
    return _varlen(q, k, v, rows, scale, span)


def check_shapes(q: Tensor, k: Tensor, v: Tensor, num_tokens: int, backend: str) -> None:
    """Raise ValueError if the shapes do not match; some backends would read out of bounds."""
    shapes = f"q {list(q.shape)}, k {list(k.shape)}, v {list(v.shape)}"
    if any(x.ndim != 3 or x.shape[1] != num_tokens for x in (q, k, v)):
        raise ValueError(f"expected {num_tokens} tokens, as in the layout, got {shapes}")
    if k.shape[0] != v.shape[0] or k.shape[0] == 0 or q.shape[0] % k.shape[0]:
        raise ValueError(f"expected query heads a multiple of key and value heads, got {shapes}")
    if q.shape[2] != k.shape[2]:
        raise ValueError(f"expected keys as wide as queries, got {shapes}")
    if backend != "sdpa" and v.shape[2] != k.shape[2]:
        raise ValueError(f"{backend!r} needs values as wide as keys, got {shapes}")


def _sdpa(q: Tensor, k: Tensor, v: Tensor, rows: PackedRows, scale: float, window: int) -> Tensor:
    outputs = []
    for index, kept, num_rows, length in rows.rectangles:
        qkv = [
            x.index_select(1, index).view(x.shape[0], num_rows, length, -1).transpose(0, 1)
            for x in (q, k, v)
        ]
        mask = None
        if window and length > window:
            distance = torch.arange(length, device=q.device)
            distance = distance[:, None] - distance[None, :]
            mask = (distance >= 0) & (distance < window)
        out = F.scaled_dot_product_attention(
            *qkv, attn_mask=mask, is_causal=mask is None, scale=scale, enable_gqa=True
        )
        out = out.permute(0, 2, 1, 3).reshape(num_rows * length, q.shape[0], -1)
        outputs.append(out.index_select(0, kept))
    return torch.cat(outputs).index_select(0, rows.restore)


def _flash(q, k, v, rows: PackedRows, scale: float, span: tuple[int, int]) -> Tensor:
    from flash_attn import flash_attn_varlen_func  # pyright: ignore[reportMissingImports]

    edges, longest = rows.cu_seqlens, rows.max_seqlen
    return flash_attn_varlen_func(
        q, k, v, edges, edges, longest, longest, softmax_scale=scale, causal=True, window_size=span
    )


def _varlen(q, k, v, rows: PackedRows, scale: float, span: tuple[int, int]) -> Tensor:
    if k.shape[1] != q.shape[1]:
        # torch 2.10 has no grouped heads
        k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
    edges, longest = rows.cu_seqlens, rows.max_seqlen
    options: dict[str, Any] = {}
    parameters = _varlen_parameters()
    if "window_size" in parameters:
        options["window_size"] = span
    else:
        options["is_causal"] = True
    if "scale" in parameters:
        options["scale"] = scale
    else:
        q = q * (scale * q.shape[-1] ** 0.5)
    out = varlen.varlen_attn(q, k, v, edges, edges, longest, longest, **options)
    return out if isinstance(out, Tensor) else out[0]


def _varlen_parameters() -> Mapping[str, Parameter]:
    # torch 2.10 has only causal attention with a scale of 1 / sqrt(d); later versions have a window
    return signature(varlen.varlen_attn).parameters
