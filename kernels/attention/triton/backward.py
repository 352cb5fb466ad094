"""Backward kernels of the tree attention; the mathematics is that of forward.py.

    dv_k = Σ_q p_qk do_q,  dk_k = Σ_q ds_qk q_q        one program per (key block, key head)
    dq_q = Σ_k ds_qk k_k                                one program per (query block, head)
    ds = scale · p · (do·v − δ_q),  δ_q = do_q·o_q,  p recomputed from the forward's log-sum-exp

10·M·N·d operations per pair of blocks. There are no atomics: a program loops over the query heads
of its key head, so gradients repeat bitwise.
"""

from __future__ import annotations

# pyright has no type for a kernel launch, kernel[grid](...)
# pyright: reportCallIssue=false, reportArgumentType=false
from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl
from torch import Tensor

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

if TYPE_CHECKING:
    from ..tree import TreeRows


def query_gradient_tile(head_dim: int) -> Tile:
    if head_dim <= 64:
        return Tile(queries=64, keys=64, warps=4, stages=3)
    return Tile(queries=128 if head_dim <= 128 else 64, keys=64, warps=8, stages=2)


def key_gradient_tile(head_dim: int) -> Tile:
    # two accumulators of keys x head_dim fill the registers, which leaves space for few queries
    if head_dim <= 64:
        return Tile(queries=64, keys=128, warps=8, stages=3)
    return Tile(queries=32, keys=128 if head_dim <= 128 else 64, warps=8, stages=2)


@triton.jit
def query_gradient_blocks(
    dq_MD, q_MD, do_MD, lse_M, delta_M, q_M, depth_q_M,
    k_ptr, v_ptr, ends_ptr, depth_ptr, items_ptr, begin, stop,
    stride_kt, stride_vt, T, D, scale, window,
    MASKED: tl.constexpr, HAS_WINDOW: tl.constexpr, EVEN_D: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    for i in range(begin, stop):
        n = tl.load(items_ptr + i) * BLOCK_N + tl.arange(0, BLOCK_N)
        k_ND = load_tile(k_ptr, n, stride_kt, T, D, EVEN_D, BLOCK_D)
        score_MN = tl.dot(q_MD, tl.trans(k_ND), input_precision=PRECISION) * (scale * LOG2_E)
        p_MN = tl.exp2(score_MN - lse_M[:, None])
        if MASKED:
            ends_N = tl.load(ends_ptr + n, mask=n < T, other=0)
            depth_k_N = load_depth(depth_ptr, n, T, HAS_WINDOW)
            seen = visible(
                q_M[:, None], n[None, :], ends_N[None, :], depth_q_M[:, None], depth_k_N[None, :],
                window, HAS_WINDOW,
            )  # fmt: skip
            p_MN = tl.where(seen, p_MN, 0.0)
        v_ND = load_tile(v_ptr, n, stride_vt, T, D, EVEN_D, BLOCK_D)
        dp_MN = tl.dot(do_MD, tl.trans(v_ND), input_precision=PRECISION)
        ds_MN = p_MN * (dp_MN - delta_M[:, None])
        dq_MD = tl.dot(ds_MN.to(k_ND.dtype), k_ND, dq_MD, input_precision=PRECISION)
    return dq_MD


@triton.jit
def query_gradient_kernel(
    q_ptr, k_ptr, v_ptr, do_ptr, lse_ptr, delta_ptr, dq_ptr, ends_ptr, depth_ptr,
    whole_ptr, whole_at_ptr, mixed_ptr, mixed_at_ptr,
    stride_qh, stride_qt, stride_kh, stride_kt, stride_vh, stride_vt, stride_oh, stride_ot,
    stride_dqh, stride_dqt, T, D, group, scale, window,
    HAS_WINDOW: tl.constexpr, EVEN_D: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    block, h = tl.program_id(0), tl.program_id(1).to(tl.int64)
    m = block * BLOCK_M + tl.arange(0, BLOCK_M)
    q_MD = load_tile(q_ptr + h * stride_qh, m, stride_qt, T, D, EVEN_D, BLOCK_D)
    do_MD = load_tile(do_ptr + h * stride_oh, m, stride_ot, T, D, EVEN_D, BLOCK_D)
    lse_M = tl.load(lse_ptr + h * T + m, mask=m < T, other=0.0)
    delta_M = tl.load(delta_ptr + h * T + m, mask=m < T, other=0.0)
    k_ptr += (h // group) * stride_kh
    v_ptr += (h // group) * stride_vh
    depth_q_M = load_depth(depth_ptr, m, T, HAS_WINDOW)
    dq_MD = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    dq_MD = query_gradient_blocks(
        dq_MD, q_MD, do_MD, lse_M, delta_M, m, depth_q_M, k_ptr, v_ptr, ends_ptr, depth_ptr,
        whole_ptr, tl.load(whole_at_ptr + block), tl.load(whole_at_ptr + block + 1),
        stride_kt, stride_vt, T, D, scale, window,
        False, HAS_WINDOW, EVEN_D, PRECISION, BLOCK_N, BLOCK_D,
    )  # fmt: skip
    dq_MD = query_gradient_blocks(
        dq_MD, q_MD, do_MD, lse_M, delta_M, m, depth_q_M, k_ptr, v_ptr, ends_ptr, depth_ptr,
        mixed_ptr, tl.load(mixed_at_ptr + block), tl.load(mixed_at_ptr + block + 1),
        stride_kt, stride_vt, T, D, scale, window,
        True, HAS_WINDOW, EVEN_D, PRECISION, BLOCK_N, BLOCK_D,
    )  # fmt: skip
    store_tile(dq_ptr + h * stride_dqh, m, stride_dqt, dq_MD * scale, T, D, EVEN_D, BLOCK_D)


@triton.jit
def key_gradient_blocks(
    dk_ND, dv_ND, k_ND, v_ND, k_N, ends_N, depth_k_N,
    q_ptr, do_ptr, lse_ptr, delta_ptr, depth_ptr, items_ptr, begin, stop,
    stride_qt, stride_ot, T, D, scale, window,
    MASKED: tl.constexpr, HAS_WINDOW: tl.constexpr, EVEN_D: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    for i in range(begin, stop):
        m = tl.load(items_ptr + i) * BLOCK_M + tl.arange(0, BLOCK_M)
        inside = m < T
        q_MD = load_tile(q_ptr, m, stride_qt, T, D, EVEN_D, BLOCK_D)
        do_MD = load_tile(do_ptr, m, stride_ot, T, D, EVEN_D, BLOCK_D)
        # masked queries have p = exp2(0 − inf) = 0
        lse_M = tl.load(lse_ptr + m, mask=inside, other=float("inf"))
        delta_M = tl.load(delta_ptr + m, mask=inside, other=0.0)
        # transposed scores: both products into the accumulators use p and ds without a transpose
        score_NM = tl.dot(k_ND, tl.trans(q_MD), input_precision=PRECISION) * (scale * LOG2_E)
        p_NM = tl.exp2(score_NM - lse_M[None, :])
        if MASKED:
            depth_q_M = load_depth(depth_ptr, m, T, HAS_WINDOW)
            seen = visible(
                m[None, :], k_N[:, None], ends_N[:, None], depth_q_M[None, :], depth_k_N[:, None],
                window, HAS_WINDOW,
            )  # fmt: skip
            p_NM = tl.where(seen, p_NM, 0.0)
        dv_ND = tl.dot(p_NM.to(do_MD.dtype), do_MD, dv_ND, input_precision=PRECISION)
        dp_NM = tl.dot(v_ND, tl.trans(do_MD), input_precision=PRECISION)
        ds_NM = p_NM * (dp_NM - delta_M[None, :])
        dk_ND = tl.dot(ds_NM.to(q_MD.dtype), q_MD, dk_ND, input_precision=PRECISION)
    return dk_ND, dv_ND


@triton.jit
def key_gradient_kernel(
    q_ptr, k_ptr, v_ptr, do_ptr, lse_ptr, delta_ptr, dk_ptr, dv_ptr, ends_ptr, depth_ptr,
    whole_ptr, whole_at_ptr, mixed_ptr, mixed_at_ptr,
    stride_qh, stride_qt, stride_kh, stride_kt, stride_vh, stride_vt, stride_oh, stride_ot,
    stride_dh, stride_dt, T, D, group, scale, window,
    HAS_WINDOW: tl.constexpr, EVEN_D: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    block, h_kv = tl.program_id(0), tl.program_id(1).to(tl.int64)
    n = block * BLOCK_N + tl.arange(0, BLOCK_N)
    k_ND = load_tile(k_ptr + h_kv * stride_kh, n, stride_kt, T, D, EVEN_D, BLOCK_D)
    v_ND = load_tile(v_ptr + h_kv * stride_vh, n, stride_vt, T, D, EVEN_D, BLOCK_D)
    ends_N = tl.load(ends_ptr + n, mask=n < T, other=0)
    depth_k_N = load_depth(depth_ptr, n, T, HAS_WINDOW)
    whole_begin, whole_stop = tl.load(whole_at_ptr + block), tl.load(whole_at_ptr + block + 1)
    mixed_begin, mixed_stop = tl.load(mixed_at_ptr + block), tl.load(mixed_at_ptr + block + 1)
    dk_ND = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    dv_ND = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    for i in range(group):
        h = h_kv * group + i
        dk_ND, dv_ND = key_gradient_blocks(
            dk_ND, dv_ND, k_ND, v_ND, n, ends_N, depth_k_N, q_ptr + h * stride_qh,
            do_ptr + h * stride_oh, lse_ptr + h * T, delta_ptr + h * T, depth_ptr,
            whole_ptr, whole_begin, whole_stop, stride_qt, stride_ot, T, D, scale, window,
            False, HAS_WINDOW, EVEN_D, PRECISION, BLOCK_M, BLOCK_D,
        )  # fmt: skip
        dk_ND, dv_ND = key_gradient_blocks(
            dk_ND, dv_ND, k_ND, v_ND, n, ends_N, depth_k_N, q_ptr + h * stride_qh,
            do_ptr + h * stride_oh, lse_ptr + h * T, delta_ptr + h * T, depth_ptr,
            mixed_ptr, mixed_begin, mixed_stop, stride_qt, stride_ot, T, D, scale, window,
            True, HAS_WINDOW, EVEN_D, PRECISION, BLOCK_M, BLOCK_D,
        )  # fmt: skip
    store_tile(dk_ptr + h_kv * stride_dh, n, stride_dt, dk_ND * scale, T, D, EVEN_D, BLOCK_D)
    store_tile(dv_ptr + h_kv * stride_dh, n, stride_dt, dv_ND, T, D, EVEN_D, BLOCK_D)


def tree_gradients(
    saved: tuple[Tensor, ...], d_out: Tensor, rows: TreeRows, scale: float, window: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute dq, dk, dv with the shapes of q, k, v; `saved` is q, k, v, out_THD, lse_HT."""
    q, k, v, out_THD, lse_HT = saved
    ends_T, positions_T = rows.ends_T, rows.positions_T
    (H, T, D), H_kv = q.shape, k.shape[0]
    d_out = d_out.contiguous()
    delta_HT = (d_out.float() * out_THD.float()).sum(-1).T.contiguous()
    dq, dk = torch.empty_like(q), k.new_empty(k.shape)
    dv = torch.empty_like(dk)
    shared = (T, D, H // H_kv, scale, window, window > 0, padded(D) == D, precision(q))
    strides = (*q.stride()[:2], *k.stride()[:2], *v.stride()[:2], D, H * D)
    tile = key_gradient_tile(D)
    blocks = rows.block_lists(window, tile.queries, tile.keys)
    key_gradient_kernel[(triton.cdiv(T, tile.keys), H_kv)](
        q, k, v, d_out, lse_HT, delta_HT, dk, dv, ends_T, positions_T,
        blocks.whole_queries.items, blocks.whole_queries.offsets,
        blocks.mixed_queries.items, blocks.mixed_queries.offsets,
        *strides, *dk.stride()[:2], *shared,
        tile.queries, tile.keys, padded(D), num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
    tile = query_gradient_tile(D)
    blocks = rows.block_lists(window, tile.queries, tile.keys)
    query_gradient_kernel[(triton.cdiv(T, tile.queries), H)](
        q, k, v, d_out, lse_HT, delta_HT, dq, ends_T, positions_T,
        blocks.whole_keys.items, blocks.whole_keys.offsets,
        blocks.mixed_keys.items, blocks.mixed_keys.offsets,
        *strides, *dq.stride()[:2], *shared,
        tile.queries, tile.keys, padded(D), num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
    return dq, dk, dv
