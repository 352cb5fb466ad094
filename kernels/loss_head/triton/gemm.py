"""The anchored product: logits, exponentials and row sums in one persistent kernel.

    z = x @ W^T, then E = exp(z - shift) in the epilogue; 2CVD flops. Reads x and W; writes 2CV
    bytes of E (none when only log-probs are wanted) and 12 bytes of sums per row and tile.

The shift of a row, its target's logit, is known before the product from an indexed dot product. So
no row maximum and no second pass over [C, V] is needed. The epilogue processes two halves of the
accumulator in turn: a whole 128 x 256 tile and its exponentials do not fit the registers.
"""

# Type checkers do not know Triton's semantics inside a kernel.
# pyright: reportArgumentType=false, reportGeneralTypeIssues=false
# pyright: reportPossiblyUnboundVariable=false

from __future__ import annotations

import triton
import triton.language as tl

from .rows import scaled_logits


@triton.jit
def _half_epilogue(
    acc, first, E_ptr, E_desc, stride_ec, row, C, shift, target, V, scale, softcap,
    HAS_SOFTCAP: tl.constexpr, KEEP: tl.constexpr, CEILING: tl.constexpr, USE_TMA: tl.constexpr,
    BLOCK_C: tl.constexpr, HALF: tl.constexpr,
):  # fmt: skip
    j = first + tl.arange(0, HALF)
    u = scaled_logits(acc, scale, softcap, HAS_SOFTCAP) - shift[:, None]
    other = (j < V)[None, :] & (j[None, :] != target[:, None])
    # Not -inf, because 0 * -inf in U would be NaN.
    u = tl.where(other, u, -1e30)
    M = tl.max(u, 1)
    u = tl.minimum(u, CEILING, propagate_nan=tl.PropagateNan.ALL)
    E = tl.exp(u)
    S = tl.sum(E, 1)
    U = tl.sum(E * u, 1)
    if KEEP:
        E_16 = E.to(E_ptr.dtype.element_ty)
        if USE_TMA:
            E_desc.store([row, first], E_16)
        else:
            c = row + tl.arange(0, BLOCK_C)
            at = E_ptr + c.to(tl.int64)[:, None] * stride_ec + j[None, :]
            tl.store(at, E_16, mask=(c < C)[:, None] & (j < V)[None, :])
    return S, U, M


@triton.jit
def anchored_kernel(
    x_ptr, stride_xc, w_ptr, stride_wv, E_ptr, stride_ec,
    shift_ptr, target_ptr, flag_ptr, any_flag_ptr, S_ptr, U_ptr, M_ptr, stride_st,
    C, V, D, scale, softcap,
    HAS_SOFTCAP: tl.constexpr, KEEP: tl.constexpr, ONLY_FLAGGED: tl.constexpr,
    USE_TMA: tl.constexpr, CEILING: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_D: tl.constexpr,
    GROUP_C: tl.constexpr, PROGRAMS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    tiles_c = tl.cdiv(C, BLOCK_C)
    tiles_v = tl.cdiv(V, BLOCK_V)
    tiles = tiles_c * tiles_v
    HALF: tl.constexpr = BLOCK_V // 2
    if ONLY_FLAGGED:
        # Usually no row is flagged; then this pass costs only its launch.
        tiles = tiles * tl.load(any_flag_ptr)
    if USE_TMA:
        x_desc = tl.make_tensor_descriptor(x_ptr, [C, D], [stride_xc, 1], [BLOCK_C, BLOCK_D])
        w_desc = tl.make_tensor_descriptor(w_ptr, [V, D], [stride_wv, 1], [BLOCK_V, BLOCK_D])
    E_desc = None
    if USE_TMA and KEEP:
        E_desc = tl.make_tensor_descriptor(E_ptr, [C, V], [stride_ec, 1], [BLOCK_C, HALF])
    for tile in tl.range(tl.program_id(0), tiles, PROGRAMS):
        # GROUP_C row tiles use a slice of the head while it is in the L2 cache.
        group = tile // (GROUP_C * tiles_v)
        rows = min(tiles_c - group * GROUP_C, GROUP_C)
        tile_c = group * GROUP_C + tile % (GROUP_C * tiles_v) % rows
        tile_v = tile % (GROUP_C * tiles_v) // rows
        c = tile_c * BLOCK_C + tl.arange(0, BLOCK_C)
        inside_c = c < C
        wanted = True
        if ONLY_FLAGGED:
            wanted = tl.max(tl.load(flag_ptr + c, mask=inside_c, other=0), 0) != 0
        if wanted:
            v = tile_v * BLOCK_V + tl.arange(0, BLOCK_V)
            acc = tl.zeros([BLOCK_C, BLOCK_V], tl.float32)
            for k in tl.range(0, tl.cdiv(D, BLOCK_D), num_stages=STAGES):
                if USE_TMA:
                    x = x_desc.load([tile_c * BLOCK_C, k * BLOCK_D])
                    w = w_desc.load([tile_v * BLOCK_V, k * BLOCK_D])
                else:
                    d = k * BLOCK_D + tl.arange(0, BLOCK_D)
                    x_at = x_ptr + c.to(tl.int64)[:, None] * stride_xc + d[None, :]
                    w_at = w_ptr + v.to(tl.int64)[:, None] * stride_wv + d[None, :]
                    x = tl.load(x_at, mask=inside_c[:, None] & (d < D)[None, :], other=0.0)
                    w = tl.load(w_at, mask=(v < V)[:, None] & (d < D)[None, :], other=0.0)
                if UPCAST:
                    x = x.to(tl.float32)
                    w = w.to(tl.float32)
                acc = tl.dot(x, w.T, acc, input_precision=PRECISION)
            shift = tl.load(shift_ptr + c, mask=inside_c, other=0.0)
            target = tl.load(target_ptr + c, mask=inside_c, other=-1)
            halves = tl.permute(tl.reshape(acc, (BLOCK_C, 2, HALF)), (0, 2, 1))
            left, right = tl.split(halves)
            S0, U0, M0 = _half_epilogue(
                left, tile_v * BLOCK_V, E_ptr, E_desc, stride_ec, tile_c * BLOCK_C, C, shift,
                target, V, scale, softcap, HAS_SOFTCAP, KEEP, CEILING, USE_TMA, BLOCK_C, HALF,
            )  # fmt: skip
            S1, U1, M1 = _half_epilogue(
                right, tile_v * BLOCK_V + HALF, E_ptr, E_desc, stride_ec, tile_c * BLOCK_C, C,
                shift, target, V, scale, softcap, HAS_SOFTCAP, KEEP, CEILING, USE_TMA, BLOCK_C,
                HALF,
            )  # fmt: skip
            at = tile_v.to(tl.int64) * stride_st + c
            tl.store(S_ptr + at, S0 + S1, mask=inside_c)
            tl.store(U_ptr + at, U0 + U1, mask=inside_c)
            tl.store(M_ptr + at, tl.maximum(M0, M1), mask=inside_c)
