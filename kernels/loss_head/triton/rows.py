"""The row-wise kernels of the loss head, between the matrix products.

    exp_rows      z [C, V] float32 -> E [C, V], row sums           reads 4CV, writes 2CV bytes
    max_rows, sum_rows   per-tile values of the anchored product   12 bytes per row and tile
    choose_shifts shifts, and the rows that have to be repeated
    finish_rows   sums -> log-prob, entropy
    dlogits_rows  E -> dloss/dlogits in place                      reads and writes 2CV
    row_dots      target logits from hidden and head rows          reads 4CD
    scale_rows    the D-wide factor of the head's gradient         reads and writes 2CD
    finish_dx     row factors and target terms of dx               reads 6CD, writes 4CD

    u_j = z_j - shift, E_j = exp(u_j), S = sum E_j, U = sum E_j u_j, M = max u_j, all over j != y

The shift of a row is its target's logit: S is then the odds against the target and keeps its
relative precision. Where M exceeds a limit, the same kernel repeats the row with its maximum as
shift, without a host synchronisation.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def scaled_logits(raw, scale, softcap, HAS_SOFTCAP: tl.constexpr):
    """softcap * tanh(raw / softcap) * scale, or raw * scale; scale = 1 / temperature."""
    if HAS_SOFTCAP:
        # tanh(t) = 2 sigmoid(2t) - 1 is exact to float32 except for small |t|.
        t = raw / softcap
        tanh = 2.0 * tl.sigmoid(2.0 * t) - 1.0
        tanh = tl.where(tl.abs(t) < 0.01, t - t * t * t / 3.0, tanh)
        return softcap * tanh * scale
    return raw * scale


@triton.jit
def exp_rows_kernel(
    z_ptr, stride_zc, E_ptr, stride_ec, shift_ptr, target_ptr, flag_ptr, S_ptr, U_ptr, M_ptr,
    V, scale, softcap, HAS_SOFTCAP: tl.constexpr, KEEP: tl.constexpr, ONLY_FLAGGED: tl.constexpr,
    CEILING: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    c = tl.program_id(0).to(tl.int64)
    wanted = True
    if ONLY_FLAGGED:
        wanted = tl.load(flag_ptr + c) != 0
    if wanted:
        shift = tl.load(shift_ptr + c)
        target = tl.load(target_ptr + c)
        S = tl.zeros([BLOCK_V], tl.float32)
        U = tl.zeros([BLOCK_V], tl.float32)
        M = tl.full([BLOCK_V], float("-inf"), tl.float32)
        for first in range(0, V, BLOCK_V):
            j = first + tl.arange(0, BLOCK_V)
            inside = j < V
            raw = tl.load(z_ptr + c * stride_zc + j, mask=inside, other=0.0)
            other = inside & (j != target)
            u = scaled_logits(raw, scale, softcap, HAS_SOFTCAP) - shift
            # Not -inf, because 0 * -inf in U would be NaN.
            u = tl.where(other, u, -1e30)
            # Keep NaN: a maximum that drops it would hide a broken weight.
            M = tl.maximum(M, u, propagate_nan=tl.PropagateNan.ALL)
            # A row above the ceiling is repeated; its sums only have to stay finite.
            u = tl.minimum(u, CEILING, propagate_nan=tl.PropagateNan.ALL)
            E = tl.exp(u)
            S += E
            U += E * u
            if KEEP:
                tl.store(E_ptr + c * stride_ec + j, E.to(E_ptr.dtype.element_ty), mask=inside)
        tl.store(S_ptr + c, tl.sum(S, 0))
        tl.store(U_ptr + c, tl.sum(U, 0))
        tl.store(M_ptr + c, tl.max(M, 0))


@triton.jit
def max_rows_kernel(
    M_ptr, stride_mt, max_ptr, C, TILES, BLOCK_C: tl.constexpr, BLOCK_T: tl.constexpr
):
    c = tl.program_id(0).to(tl.int64) * BLOCK_C + tl.arange(0, BLOCK_C)
    best = tl.full([BLOCK_C], float("-inf"), tl.float32)
    for first in range(0, TILES, BLOCK_T):
        t = first + tl.arange(0, BLOCK_T)
        mask = (t < TILES)[:, None] & (c < C)[None, :]
        at = t.to(tl.int64)[:, None] * stride_mt + c[None, :]
        best = tl.maximum(best, tl.max(tl.load(M_ptr + at, mask=mask, other=float("-inf")), 0))
    tl.store(max_ptr + c, best, mask=c < C)


@triton.jit
def choose_shifts_kernel(max_ptr, z_y_ptr, shift_ptr, flag_ptr, C, LIMIT, BLOCK_C: tl.constexpr):
    c = tl.program_id(0).to(tl.int64) * BLOCK_C + tl.arange(0, BLOCK_C)
    inside = c < C
    best = tl.load(max_ptr + c, mask=inside, other=0.0)
    z_y = tl.load(z_y_ptr + c, mask=inside, other=0.0)
    repeat = best > LIMIT
    tl.store(shift_ptr + c, tl.where(repeat, z_y + tl.maximum(best, 0.0), z_y), mask=inside)
    tl.store(flag_ptr + c, repeat.to(tl.int32), mask=inside)


@triton.jit
def sum_rows_kernel(
    S_ptr, U_ptr, stride_st, S_out_ptr, U_out_ptr, C, TILES,
    BLOCK_C: tl.constexpr, BLOCK_T: tl.constexpr,
):  # fmt: skip
    c = tl.program_id(0).to(tl.int64) * BLOCK_C + tl.arange(0, BLOCK_C)
    S = tl.zeros([BLOCK_C], tl.float32)
    U = tl.zeros([BLOCK_C], tl.float32)
    for first in range(0, TILES, BLOCK_T):
        t = first + tl.arange(0, BLOCK_T)
        mask = (t < TILES)[:, None] & (c < C)[None, :]
        at = t.to(tl.int64)[:, None] * stride_st + c[None, :]
        S += tl.sum(tl.load(S_ptr + at, mask=mask, other=0.0), 0)
        U += tl.sum(tl.load(U_ptr + at, mask=mask, other=0.0), 0)
    tl.store(S_out_ptr + c, S, mask=c < C)
    tl.store(U_out_ptr + c, U, mask=c < C)


@triton.jit
def log1p(x):
    """log(1 + x) for x >= 0, without the rounding of 1 + x (Kahan)."""
    w = 1.0 + x
    # For w == 1 the result is x; otherwise log(w) * x / (w - 1) cancels the rounding of w.
    d = w - 1.0
    return tl.where(d == 0.0, x, tl.log(w) * (x / tl.where(d == 0.0, 1.0, d)))


@triton.jit
def finish_rows_kernel(
    S_ptr, U_ptr, z_y_ptr, shift_ptr, logprob_ptr, entropy_ptr, Z_ptr, log_Z_ptr, C,
    BLOCK_C: tl.constexpr,
):  # fmt: skip
    c = tl.program_id(0).to(tl.int64) * BLOCK_C + tl.arange(0, BLOCK_C)
    inside = c < C
    S = tl.load(S_ptr + c, mask=inside, other=0.0)
    U = tl.load(U_ptr + c, mask=inside, other=0.0)
    u_y = tl.load(z_y_ptr + c, mask=inside, other=0.0)
    u_y -= tl.load(shift_ptr + c, mask=inside, other=0.0)
    E_y = tl.exp(u_y)
    Z = S + E_y
    anchored = u_y + log1p(S * tl.exp(-tl.maximum(u_y, -60.0)))
    log_Z = tl.where(u_y > -60.0, anchored, tl.log(Z))
    tl.store(logprob_ptr + c, u_y - log_Z, mask=inside)
    tl.store(entropy_ptr + c, log_Z - (U + E_y * u_y) / Z, mask=inside)
    tl.store(Z_ptr + c, Z, mask=inside)
    tl.store(log_Z_ptr + c, log_Z, mask=inside)


@triton.jit
def dlogits_rows_kernel(
    E_ptr, stride_ec, z_y_ptr, shift_ptr, target_ptr, S_ptr, Z_ptr, log_Z_ptr, entropy_ptr,
    d_logprob_ptr, d_entropy_ptr, y_ptr, grad_scale_ptr, V, scale, softcap,
    HAS_SOFTCAP: tl.constexpr, HAS_ENTROPY: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    c = tl.program_id(0).to(tl.int64)
    shift = tl.load(shift_ptr + c)
    owned = tl.load(target_ptr + c) >= 0
    Z = tl.load(Z_ptr + c)
    u_y = tl.load(z_y_ptr + c) - shift
    by_Z = scale / Z
    g = tl.load(d_logprob_ptr + c) * by_Z
    offset = tl.load(entropy_ptr + c) - tl.load(log_Z_ptr + c)
    h = 0.0
    if HAS_ENTROPY:
        h = tl.load(d_entropy_ptr + c) * by_Z
    E_y = tl.exp(u_y)
    d_y = g * tl.load(S_ptr + c) - h * (u_y + offset) * E_y
    if HAS_SOFTCAP:
        t_y = (u_y + shift) / (scale * softcap)
        d_y *= 1.0 - tl.minimum(t_y * t_y, 1.0)
    tl.store(y_ptr + c, tl.where(owned, d_y, 0.0))
    grad_scale = tl.load(grad_scale_ptr)
    for first in range(0, V, BLOCK_V):
        j = first + tl.arange(0, BLOCK_V)
        inside = j < V
        at = E_ptr + c * stride_ec + j
        E = tl.load(at, mask=inside, other=0.0).to(tl.float32)
        # The target's column is 0 and stays 0: its term is added separately in float32.
        u = tl.log(tl.maximum(E, 1e-37))
        d = -(g + h * (u + offset)) * E / grad_scale
        if HAS_SOFTCAP:
            t = (u + shift) / (scale * softcap)
            d *= 1.0 - tl.minimum(t * t, 1.0)
        tl.store(at, d.to(E_ptr.dtype.element_ty), mask=inside)


@triton.jit
def finish_dx_kernel(
    d_x_ptr, factor_ptr, y_ptr, w_ptr, stride_wv, column_ptr, D, BLOCK_D: tl.constexpr
):
    """d_x = factor * d_x + y * w[column]: the row's factor and the target's term."""
    c = tl.program_id(0).to(tl.int64)
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    v = tl.load(column_ptr + c).to(tl.int64)
    w = tl.load(w_ptr + v * stride_wv + d, mask=d < D, other=0.0).to(tl.float32)
    d_x = tl.load(d_x_ptr + c * D + d, mask=d < D, other=0.0)
    d_x = d_x * tl.load(factor_ptr + c) + tl.load(y_ptr + c) * w
    tl.store(d_x_ptr + c * D + d, d_x, mask=d < D)


@triton.jit
def row_dots_kernel(
    x_ptr, stride_xc, w_ptr, stride_wv, column_ptr, target_ptr, z_y_ptr, D, scale, softcap,
    HAS_SOFTCAP: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    c = tl.program_id(0).to(tl.int64)
    v = tl.load(column_ptr + c).to(tl.int64)
    total = tl.zeros([BLOCK_D], tl.float32)
    for first in range(0, D, BLOCK_D):
        d = first + tl.arange(0, BLOCK_D)
        x = tl.load(x_ptr + c * stride_xc + d, mask=d < D, other=0.0).to(tl.float32)
        w = tl.load(w_ptr + v * stride_wv + d, mask=d < D, other=0.0).to(tl.float32)
        total += x * w
    z_y = scaled_logits(tl.sum(total, 0), scale, softcap, HAS_SOFTCAP)
    # A target of another shard adds nothing to the sum over the group.
    owned = tl.load(target_ptr + c) >= 0
    tl.store(z_y_ptr + c, tl.where(owned, z_y, 0.0))


@triton.jit
def scale_rows_kernel(
    x_ptr, stride_xc, factor_ptr, grad_scale_ptr, out_ptr, D, BLOCK_D: tl.constexpr
):
    """out = x * factor / grad_scale, the D-wide factor of the head's gradient."""
    c = tl.program_id(0).to(tl.int64)
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    factor = tl.load(factor_ptr + c) / tl.load(grad_scale_ptr)
    x = tl.load(x_ptr + c * stride_xc + d, mask=d < D, other=0.0).to(tl.float32)
    tl.store(out_ptr + c * D + d, (x * factor).to(out_ptr.dtype.element_ty), mask=d < D)
