"""Causal attention over packed rows, q [H, T, d] and k, v [H_kv, T, d].

    o_t = Σ_s softmax_s(scale · q_t·k_s) v_s     over s ≤ t in the same row, t − s < window

Three ways to compute it, one meaning: flash-attn and torch's `varlen_attn` take the row boundaries
as they are (CUDA); on the CPU neither has a backward pass, so rows of similar length are gathered
into small rectangles for SDPA. Row boundaries are always explicit, never inferred from positions.
"""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass, field
from functools import cached_property
from inspect import signature
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention.varlen import varlen_attn

Backend = Literal["flash", "varlen", "sdpa"]

# Of flash-attn and of the flash kernels behind varlen_attn.
_WIDEST_HEAD = 256

# torch 2.10 has a flag for causal attention, and neither a window nor a scale but 1 / sqrt(d).
_VARLEN_TAKES = signature(varlen_attn).parameters

# A rectangle may hold this much more than its rows: fewer, larger calls for a little waste.
_MAX_RECTANGLE_WASTE = 0.15


@dataclass(frozen=True)
class PackedRows:
    """Row boundaries of one pack and the backend that attends over it.

    Args:
        cu_seqlens: [S + 1] int32 on the device of the pack; starts with 0, ends with T.
        lengths: the S row lengths on the host, so that nothing has to be read back from the device.
    """

    cu_seqlens: Tensor
    lengths: tuple[int, ...]
    backend: Backend
    max_seqlen: int = field(default=0)

    @cached_property
    def rectangles(self) -> list[tuple[Tensor, Tensor, int, int]]:
        """(index [B·L] into T, flat positions of real tokens in it, B, L) per rectangle.

        The filler of a short row points at the row's first token; causal attention puts it behind
        every real query of its row, so it is computed and thrown away.
        """
        device = self.cu_seqlens.device
        starts = self.cu_seqlens.tolist()
        order = sorted(range(len(self.lengths)), key=lambda s: -self.lengths[s])
        made, begin = [], 0
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
            made.append((index.to(device), kept.to(device), len(rows), longest))
            begin = end
        return made

    @cached_property
    def restore(self) -> Tensor:
        """Index that puts the rectangles' real tokens, one after the other, back in pack order."""
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
    """The attention backend for a device and a model.

    Args:
        head_dim, dtype: of the model, to be refused here and not in the middle of a step.
        value_dim: dimensions of a value where they are not those of a key, as in latent attention.
        window: the model's sliding window, 0 for none.

    Raises:
        ValueError: `wanted` cannot run here, or not this model; the text names what would.
    """
    if wanted not in ("auto", "flash", "varlen", "sdpa"):
        raise ValueError(f"{wanted!r} is none of 'auto', 'flash', 'varlen', 'sdpa'")
    both = {
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
    own: dict[Backend, dict[str, bool]] = {
        "flash": {"flash-attn installed": importlib.util.find_spec("flash_attn") is None},
        "varlen": {
            f"a newer torch for a sliding window, varlen_attn of {torch.__version__} has none": (
                window > 0 and "window_size" not in _VARLEN_TAKES
            )
        },
    }
    problems: dict[Backend, str] = {
        name: next((text for text, found in (both | extra).items() if found), "")
        for name, extra in own.items()
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
    """Causal attention within each row.

    Args:
        q_HTd: [H, T, d]; k_HTd, v_HTd: [H_kv, T, d] with H a multiple of H_kv. With "sdpa" values
            may have a width of their own.
        window: 0 for full attention, else a token sees itself and `window - 1` tokens before it.
    Returns:
        [T, H, d], d that of the values.
    Raises:
        ValueError: shapes that do not fit each other, or not the rows.
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
    """What every backend takes for granted, and some would read past the end without.

    Raises:
        ValueError: with the numbers.
    """
    shapes = f"q {list(q.shape)}, k {list(k.shape)}, v {list(v.shape)}"
    if any(x.ndim != 3 or x.shape[1] != num_tokens for x in (q, k, v)):
        raise ValueError(f"expected {num_tokens} tokens, as the layout has, got {shapes}")
    if k.shape[0] != v.shape[0] or k.shape[0] == 0 or q.shape[0] % k.shape[0]:
        raise ValueError(f"expected query heads a multiple of key and value heads, got {shapes}")
    if q.shape[2] != k.shape[2]:
        raise ValueError(f"expected keys as wide as queries, got {shapes}")
    if backend != "sdpa" and v.shape[2] != k.shape[2]:
        raise ValueError(f"{backend!r} needs values as wide as keys, got {shapes}")


def _sdpa(q: Tensor, k: Tensor, v: Tensor, rows: PackedRows, scale: float, window: int) -> Tensor:
    outputs = []
    for index, kept, num_rows, length in rows.rectangles:
        cut = [
            x.index_select(1, index).view(x.shape[0], num_rows, length, -1).transpose(0, 1)
            for x in (q, k, v)
        ]
        mask = None
        if window and length > window:
            distance = torch.arange(length, device=q.device)
            distance = distance[:, None] - distance[None, :]
            mask = (distance >= 0) & (distance < window)
        out = F.scaled_dot_product_attention(
            *cut, attn_mask=mask, is_causal=mask is None, scale=scale, enable_gqa=True
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
        # repeated heads rather than the operator's own grouping, whose flag came after torch 2.10
        k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
    edges, longest = rows.cu_seqlens, rows.max_seqlen
    options: dict[str, Any] = {}
    if "window_size" in _VARLEN_TAKES:
        options["window_size"] = span
    else:
        options["is_causal"] = True
    if "scale" in _VARLEN_TAKES:
        options["scale"] = scale
    else:
        q = q * (scale * q.shape[-1] ** 0.5)
    out = varlen_attn(q, k, v, edges, edges, longest, longest, **options)
    return out if isinstance(out, Tensor) else out[0]
