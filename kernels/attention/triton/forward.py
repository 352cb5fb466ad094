"""Tree attention on CUDA; pairs of blocks without a visible key are skipped.

    o_q = Σ_k p_qk v_k,  p_qk = exp(scale·q·k − lse_q)          one program per (query block, head)

With B key blocks of N keys in its list, a program of M queries does 4·M·N·B·d operations. It reads
M·d queries once, and 2·N·B·d keys and values, mostly from L2. The softmax is online, in base 2.
Blocks that are visible as a whole come first and need no mask.
"""

from __future__ import annotations

# pyright has no type for a kernel launch, kernel[grid](...)
# pyright: reportCallIssue=false, reportArgumentType=false
from typing import Any

import torch
import triton
import triton.language as tl

from .backward import tree_gradients
from .blocks import (
    LOG2_E,
    Tile,
    load_depth,
    load_tile,
    padded,
    precision,
    store_tile,
    visible,
)


def forward_tile(head_dim: int) -> Tile:
    if head_dim <= 64:
        return Tile(queries=128, keys=64, warps=4, stages=3)
    return Tile(queries=128, keys=64, warps=8, stages=3 if head_dim <= 128 else 2)


@triton.jit
def attend_blocks(
    acc_MD, total_M, high_M, q_MD, q_M, depth_q_M,
    k_ptr, v_ptr, ends_ptr, depth_ptr, items_ptr, begin, stop,
    stride_kt, stride_vt, T, D, scale, window,
    MASKED: tl.constexpr, HAS_WINDOW: tl.constexpr, EVEN_D: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    for i in range(begin, stop):
        n = tl.load(items_ptr + i) * BLOCK_N + tl.arange(0, BLOCK_N)
        k_ND = load_tile(k_ptr, n, stride_kt, T, D, EVEN_D, BLOCK_D)
        score_MN = tl.dot(q_MD, tl.trans(k_ND), input_precision=PRECISION) * (scale * LOG2_E)
        if MASKED:
            ends_N = tl.load(ends_ptr + n, mask=n < T, other=0)
            depth_k_N = load_depth(depth_ptr, n, T, HAS_WINDOW)
            seen = visible(
                q_M[:, None], n[None, :], ends_N[None, :], depth_q_M[:, None], depth_k_N[None, :],
                window, HAS_WINDOW,
            )  # fmt: skip
            score_MN = tl.where(seen, score_MN, float("-inf"))
        new_M = tl.maximum(high_M, tl.max(score_MN, 1))
        # a query without a visible key so far has a maximum of -inf: subtract 0 instead
        base_M = tl.where(new_M == float("-inf"), 0.0, new_M)
        p_MN = tl.exp2(score_MN - base_M[:, None])
        shrink_M = tl.exp2(high_M - base_M)
        total_M = total_M * shrink_M + tl.sum(p_MN, 1)
        v_ND = load_tile(v_ptr, n, stride_vt, T, D, EVEN_D, BLOCK_D)
        acc_MD = acc_MD * shrink_M[:, None]
        acc_MD = tl.dot(p_MN.to(v_ND.dtype), v_ND, acc_MD, input_precision=PRECISION)
        high_M = new_M
    return acc_MD, total_M, high_M


@triton.jit
def forward_kernel(
    q_ptr, k_ptr, v_ptr, out_ptr, lse_ptr, ends_ptr, depth_ptr,
    whole_ptr, whole_at_ptr, mixed_ptr, mixed_at_ptr,
    stride_qh, stride_qt, stride_kh, stride_kt, stride_vh, stride_vt, stride_oh, stride_ot,
    T, D, group, scale, window,
    HAS_WINDOW: tl.constexpr, EVEN_D: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    block, h = tl.program_id(0), tl.program_id(1).to(tl.int64)
    m = block * BLOCK_M + tl.arange(0, BLOCK_M)
    k_ptr += (h // group) * stride_kh
    v_ptr += (h // group) * stride_vh
    q_MD = load_tile(q_ptr + h * stride_qh, m, stride_qt, T, D, EVEN_D, BLOCK_D)
    depth_q_M = load_depth(depth_ptr, m, T, HAS_WINDOW)
    acc_MD = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    total_M = tl.zeros([BLOCK_M], tl.float32)
    high_M = tl.full([BLOCK_M], float("-inf"), tl.float32)
    acc_MD, total_M, high_M = attend_blocks(
        acc_MD, total_M, high_M, q_MD, m, depth_q_M, k_ptr, v_ptr, ends_ptr, depth_ptr,
        whole_ptr, tl.load(whole_at_ptr + block), tl.load(whole_at_ptr + block + 1),
        stride_kt, stride_vt, T, D, scale, window,
        False, HAS_WINDOW, EVEN_D, PRECISION, BLOCK_N, BLOCK_D,
    )  # fmt: skip
    acc_MD, total_M, high_M = attend_blocks(
        acc_MD, total_M, high_M, q_MD, m, depth_q_M, k_ptr, v_ptr, ends_ptr, depth_ptr,
        mixed_ptr, tl.load(mixed_at_ptr + block), tl.load(mixed_at_ptr + block + 1),
        stride_kt, stride_vt, T, D, scale, window,
        True, HAS_WINDOW, EVEN_D, PRECISION, BLOCK_N, BLOCK_D,
    )  # fmt: skip
    # every token sees itself: only masked queries of the last block have a total of 0
    total_M = tl.where(m < T, total_M, 1.0)
    out_MD = acc_MD / total_M[:, None]
    store_tile(out_ptr + h * stride_oh, m, stride_ot, out_MD, T, D, EVEN_D, BLOCK_D)
    tl.store(lse_ptr + h * T + m, high_M + tl.log2(total_M), mask=m < T)


class TreeAttention(torch.autograd.Function):
    """q [H, T, d], k and v [H_kv, T, d] -> [T, H, d]."""

    @staticmethod
    def forward(ctx: Any, q, k, v, rows, scale, window):
        q, k, v = (x if x.stride(2) == 1 else x.contiguous() for x in (q, k, v))
        H, T, D = q.shape
        out_THD = q.new_empty(T, H, D)
        lse_HT = q.new_empty(H, T, dtype=torch.float32)
        tile = forward_tile(D)
        blocks = rows.block_lists(window, tile.queries, tile.keys)
        forward_kernel[(triton.cdiv(T, tile.queries), H)](
            q, k, v, out_THD, lse_HT, rows.ends_T, rows.positions_T,
            blocks.whole_keys.items, blocks.whole_keys.offsets,
            blocks.mixed_keys.items, blocks.mixed_keys.offsets,
            *q.stride()[:2], *k.stride()[:2], *v.stride()[:2], D, H * D,
            T, D, H // k.shape[0], scale, window, window > 0, padded(D) == D, precision(q),
            tile.queries, tile.keys, padded(D), num_warps=tile.warps, num_stages=tile.stages,
        )  # fmt: skip
        ctx.save_for_backward(q, k, v, out_THD, lse_HT)
        ctx.rows, ctx.scale, ctx.window = rows, scale, window
        return out_THD

    @staticmethod
    def backward(ctx: Any, d_out):  # type: ignore[override]
        gradients = tree_gradients(ctx.saved_tensors, d_out, ctx.rows, ctx.scale, ctx.window)
        return *gradients, None, None, None
