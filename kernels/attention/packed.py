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
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

Backend = Literal["flash", "varlen", "sdpa"]

# Of flash-attn and of the flash kernels behind varlen_attn.
_WIDEST_HEAD = 256

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
    wanted: str = "auto",
    *,
    head_dim: int = 0,
    dtype: torch.dtype = torch.bfloat16,
) -> Backend:
    """The attention backend for a device and a model.

    Args:
        head_dim, dtype: of the model, to be refused here and not in the middle of a step.

    Raises:
        ValueError: `wanted` cannot run here, or not this model; the text names what would.
    """
    if wanted not in ("auto", "flash", "varlen", "sdpa"):
        raise ValueError(f"{wanted!r} is none of 'auto', 'flash', 'varlen', 'sdpa'")
    problems = {
        f"a CUDA device, not {device.type}": device.type != "cuda",
        f"bfloat16 or float16, the model is {str(dtype).removeprefix('torch.')}": (
            dtype not in (torch.bfloat16, torch.float16)
        ),
        f"heads of at most {_WIDEST_HEAD} dimensions, the model's have {head_dim}": (
            head_dim > _WIDEST_HEAD
        ),
    }
    problem = next((text for text, found in problems.items() if found), "")
    flash = importlib.util.find_spec("flash_attn") is not None
    best: Backend = "sdpa" if problem else "flash" if flash else "varlen"
    if wanted == "flash" and not problem and not flash:
        problem = "flash-attn installed"
    if wanted in ("flash", "varlen") and problem:
        raise ValueError(f"{wanted!r} needs {problem}; {best!r} works here")
    return best if wanted == "auto" else wanted  # type: ignore[return-value]


def packed_attention(
    q_HTd: Tensor, k_HTd: Tensor, v_HTd: Tensor, rows: PackedRows, *, scale: float, window: int = 0
) -> Tensor:
    """Causal attention within each row.

    Args:
        q_HTd: [H, T, d]; k_HTd, v_HTd: [H_kv, T, d] with H a multiple of H_kv.
        window: 0 for full attention, else a token sees itself and `window - 1` tokens before it.
    Returns:
        [T, H, d].
    """
    if rows.backend == "sdpa":
        return _sdpa(q_HTd, k_HTd, v_HTd, rows, scale, window)
    q, k, v = (x.transpose(0, 1).contiguous() for x in (q_HTd, k_HTd, v_HTd))
    span = (window - 1, 0) if window else (-1, 0)
    if rows.backend == "flash":
        return _flash(q, k, v, rows, scale, span)
    return _varlen(q, k, v, rows, scale, span)


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
    from torch.nn.attention.varlen import varlen_attn

    if k.shape[1] != q.shape[1]:
        # repeated heads rather than the operator's own grouping, whose flag came after torch 2.10
        k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
    edges, longest = rows.cu_seqlens, rows.max_seqlen
    out = varlen_attn(q, k, v, edges, edges, longest, longest, scale=scale, window_size=span)
    return out if isinstance(out, Tensor) else out[0]
