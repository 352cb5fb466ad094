"""The policy loss of complete segments in one kernel, with the mathematics of ../policy.py.

Token level: one program per BLOCK tokens. Turn and sequence level: one program per segment, which
reads it up to three times (mean log-ratio; losses and shared derivative; coefficients).
Reads at most 28C bytes, writes 8C bytes and 9 numbers per program, summed in a fixed order.
"""

# Type checkers do not know the type of a launch, kernel[grid](...).
# pyright: reportArgumentType=false, reportCallIssue=false, reportIndexIssue=false

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..policy import Terms, Tokens
from ..records import PolicyRule

BLOCK = 512


@triton.jit
def expm1(x):
    """exp(x) - 1 without cancellation near 0."""
    series = x * (1.0 + x * (0.5 + x * (1.0 / 6 + x * (1.0 / 24 + x / 120))))
    return tl.where(tl.abs(x) < 0.1, series, tl.exp(x) - 1.0)


@triton.jit
def policy_kernel(
    logprob_ptr, entropy_ptr, advantage_ptr, weight_ptr, old_ptr, ref_ptr, sampler_ptr, offset_ptr,
    d_logprob_ptr, d_entropy_ptr, partial_ptr,
    C, programs, clip_low, clip_high, dual_clip, kl_coef, entropy_coef, is_cap,
    HAS_OLD: tl.constexpr, HAS_REF: tl.constexpr, HAS_CAP: tl.constexpr, HAS_DUAL: tl.constexpr,
    HAS_ENTROPY: tl.constexpr, SEGMENTS: tl.constexpr, CISPO: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0).to(tl.int64)
    if SEGMENTS:
        start = tl.load(offset_ptr + pid)
        stop = tl.load(offset_ptr + pid + 1)
    else:
        start = pid * BLOCK
        stop = tl.minimum(start + BLOCK, C)
    count = (stop - start).to(tl.float32)
    mean = 0.0
    if SEGMENTS and HAS_OLD:
        total = tl.zeros([BLOCK], tl.float32)
        for first in range(start, stop, BLOCK):
            n = first + tl.arange(0, BLOCK)
            logprob = tl.load(logprob_ptr + n, mask=n < stop, other=0.0)
            total += logprob - tl.load(old_ptr + n, mask=n < stop, other=0.0)
        mean = tl.sum(total, 0) / count
    loss = tl.zeros([BLOCK], tl.float32)
    shared = tl.zeros([BLOCK], tl.float32)
    lows = tl.zeros([BLOCK], tl.float32)
    highs = tl.zeros([BLOCK], tl.float32)
    duals = tl.zeros([BLOCK], tl.float32)
    kls = tl.zeros([BLOCK], tl.float32)
    ref_kls = tl.zeros([BLOCK], tl.float32)
    entropies = tl.zeros([BLOCK], tl.float32)
    least = tl.full([BLOCK], float("inf"), tl.float32)
    most = tl.full([BLOCK], float("-inf"), tl.float32)
    for first in range(start, stop, BLOCK):
        n = first + tl.arange(0, BLOCK)
        inside = n < stop
        logprob = tl.load(logprob_ptr + n, mask=inside, other=0.0)
        entropy = tl.load(entropy_ptr + n, mask=inside, other=0.0)
        A = tl.load(advantage_ptr + n, mask=inside, other=0.0)
        weight = tl.load(weight_ptr + n, mask=inside, other=0.0)
        old = logprob
        if HAS_OLD:
            old = tl.load(old_ptr + n, mask=inside, other=0.0)
        log_ratio = logprob - old
        scale = weight
        if HAS_CAP:
            sampler = tl.load(sampler_ptr + n, mask=inside, other=0.0)
            scale = weight * tl.minimum(tl.exp(old - sampler), is_cap)
        level = log_ratio
        if SEGMENTS:
            level = tl.zeros([BLOCK], tl.float32) + mean
        ratio = tl.exp(level)
        high = ratio > 1 + clip_high
        low = ratio < 1 - clip_low
        if CISPO:
            low = low & False
            dual = low
            coef = -tl.minimum(ratio, 1 + clip_high) * A
            policy = coef * logprob
            own = coef * scale
        else:
            high = high & (A > 0)
            low = low & (A < 0)
            dual = low & False
            if HAS_DUAL:
                dual = (ratio > dual_clip) & (A < 0)
            bounded = tl.where(high, 1 + clip_high, tl.where(low, 1 - clip_low, ratio))
            if HAS_DUAL:
                bounded = tl.where(dual, dual_clip, bounded)
            policy = -bounded * A
            own = tl.where(high | low | dual, 0.0, policy) * scale
            if SEGMENTS:
                shared += tl.where(inside, own, 0.0)
                own = own * 0.0
        term = policy * scale
        if HAS_REF:
            gap = tl.load(ref_ptr + n, mask=inside, other=0.0) - logprob
            k3 = expm1(gap) - gap
            ref_kls += tl.where(inside, k3, 0.0)
            term += kl_coef * weight * k3
            own -= kl_coef * weight * expm1(gap)
        if HAS_ENTROPY:
            term -= entropy_coef * weight * entropy
            tl.store(d_entropy_ptr + n, -entropy_coef * weight, mask=inside)
        tl.store(d_logprob_ptr + n, own, mask=inside)
        loss += tl.where(inside, term, 0.0)
        lows += tl.where(inside & low, 1.0, 0.0)
        highs += tl.where(inside & high, 1.0, 0.0)
        duals += tl.where(inside & dual, 1.0, 0.0)
        kls += tl.where(inside, expm1(-log_ratio) + log_ratio, 0.0)
        entropies += tl.where(inside, entropy, 0.0)
        least = tl.minimum(least, tl.where(inside, ratio, float("inf")))
        most = tl.maximum(most, tl.where(inside, ratio, float("-inf")))
    if SEGMENTS and not CISPO:
        # Other threads of this program wrote these values.
        tl.debug_barrier()
        d_shared = tl.sum(shared, 0) / count
        for first in range(start, stop, BLOCK):
            n = first + tl.arange(0, BLOCK)
            own = tl.load(d_logprob_ptr + n, mask=n < stop, other=0.0)
            tl.store(d_logprob_ptr + n, own + d_shared, mask=n < stop)
    tl.store(partial_ptr + pid, tl.sum(loss, 0))
    tl.store(partial_ptr + programs + pid, tl.sum(lows, 0))
    tl.store(partial_ptr + 2 * programs + pid, tl.sum(highs, 0))
    tl.store(partial_ptr + 3 * programs + pid, tl.sum(duals, 0))
    tl.store(partial_ptr + 4 * programs + pid, tl.sum(kls, 0))
    tl.store(partial_ptr + 5 * programs + pid, tl.sum(ref_kls, 0))
    tl.store(partial_ptr + 6 * programs + pid, tl.sum(entropies, 0))
    tl.store(partial_ptr + 7 * programs + pid, tl.min(least, 0))
    tl.store(partial_ptr + 8 * programs + pid, tl.max(most, 0))


def policy_terms(rule: PolicyRule, t: Tokens, logprobs_C: Tensor, entropies_C: Tensor) -> Terms:
    """Compute policy.policy_terms in one launch; equal up to float32 rounding."""
    C, device = logprobs_C.shape[0], logprobs_C.device
    segments = t.segment_C is not None
    offsets = logprobs_C
    programs = triton.cdiv(C, BLOCK)
    if segments:
        assert t.lengths_S is not None
        programs = t.lengths_S.shape[0]
        offsets = torch.zeros(programs + 1, dtype=torch.int64, device=device)
        torch.cumsum(t.lengths_S, 0, out=offsets[1:])
    d_logprob_C = torch.empty_like(logprobs_C)
    d_entropy_C = torch.empty_like(logprobs_C) if rule.entropy_coef else None
    partial = torch.empty(9, programs, dtype=torch.float32, device=device)
    policy_kernel[(programs,)](
        logprobs_C, entropies_C, t.advantages_C, t.weights_C,
        *(logprobs_C if x is None else x for x in (t.old_C, t.ref_C, t.sampler_C)),
        offsets, d_logprob_C, d_logprob_C if d_entropy_C is None else d_entropy_C, partial,
        C, programs, rule.clip_low, rule.clip_high, rule.dual_clip or 0.0, rule.kl_coef,
        rule.entropy_coef, rule.is_cap or 0.0,
        HAS_OLD=t.old_C is not None, HAS_REF=t.ref_C is not None, HAS_CAP=rule.is_cap is not None,
        HAS_DUAL=rule.dual_clip is not None, HAS_ENTROPY=d_entropy_C is not None,
        SEGMENTS=segments, CISPO=rule.kind == "cispo", BLOCK=BLOCK,
    )  # fmt: skip
    sums = partial[:7].double().sum(dim=1)
    extremes = [partial[7].min().double(), partial[8].max().double()]
    return Terms(
        loss=sums[0].float(),
        d_logprob_C=d_logprob_C,
        d_entropy_C=d_entropy_C,
        sums=torch.cat([sums[1:], torch.stack(extremes)]),
    )
