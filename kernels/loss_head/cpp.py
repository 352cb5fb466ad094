"""The loss head on the CPU, in C++: a whole policy loss, or log-probs alone, in one call
(csrc/policy_loss.cpp), and the driver's Head over the operators of one chunk for heads in shards.

With the logit z_y of a token's target known first (one dot product), every exponential is anchored
there and no pass over the logits looks for a maximum:

    E_j = exp(z_j - z_y) for j != y, E_y = 0        S = sum_j E_j, logprob = -log1p(S)
    dx  = c (E @ W) + p W_y                         c = -g / (1 + S), p = -c S
    dW  = E^T @ (c x), row y plus p x               g = dloss/dlogprob

An entropy bonus or a soft cap makes dz more than a factor times E; it is then computed from E block
by block, with z_j - z_y = log E_j. Tokens whose largest logit is far above the target's are
anchored at the maximum in a second pass. Memory: E [V, C] (float32; bf16 for bf16 heads where the
CPU has bf16 products), about one block of W per thread, and dx [C, D] per thread.
Source of the anchoring: a softmax is invariant to any shift, the maximum is only one choice.
"""

from __future__ import annotations

from dataclasses import fields

import torch
from torch import Tensor

from ..extension import load_error
from .driver import head_sum, run_logprobs, run_policy_loss
from .problem import LogprobsProblem, Outcome, Problem, Vocab

# Tokens per chunk. A chunk reads W twice and reads and writes dW, 6 C flops for each of their
# elements: HIDING tokens hide that traffic, as far as E stays within LARGE_BYTES. Where more tokens
# fit into SMALL_BYTES, a shared cache, they also make the steps between forward and backward few.
SMALL_BYTES, LARGE_BYTES = 32 << 20, 128 << 20
HIDING_TOKENS, MAX_TOKENS, STEP = 384, 2304, 96
# Above this, sums of exponentials anchored at the target come near the end of float32.
ANCHOR_LIMIT = 60.0

OUTCOME_FIELDS = tuple(field.name for field in fields(Outcome))
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def unavailable(device: torch.device, dtype: torch.dtype) -> str:
    """Why this implementation cannot take the device and dtype; empty if it can."""
    error = load_error()
    if error is not None:
        return f"the C++ extension is not built or does not load ({error})"
    if device.type != "cpu":
        return f"it runs on the cpu, the tensors are on {device.type}"
    if dtype not in DTYPES:
        return f"it takes float32, bfloat16 and float16, not {str(dtype).removeprefix('torch.')}"
    return ""


class CppHead:
    """The driver's Head; `kernel` names an instruction set, empty for the best one here."""

    def __init__(
        self,
        head_VD: Tensor,
        vocab: Vocab,
        temperature: float,
        softcap: float | None,
        need_hidden: bool,
        d_head_VD: Tensor | None,
        kernel: str = "",
    ) -> None:
        self.head_VD = head_VD.contiguous()
        self.vocab = vocab
        self.temperature, self.softcap = temperature, softcap
        self.scaling = (1.0 / temperature, softcap or 0.0)
        self.need_hidden, self.d_head_VD = need_hidden, d_head_VD
        self.kernel = kernel
        self.ops = torch.ops.turnfast
        self.exps = torch.empty(0, dtype=torch.uint8)
        self.kept: tuple[Tensor, ...] = ()

    def chunk_tokens(self) -> int:
        step_bytes = self._exps_bytes(STEP)
        hiding = min(HIDING_TOKENS // STEP, LARGE_BYTES // step_bytes)
        return min(MAX_TOKENS, STEP * max(1, hiding, SMALL_BYTES // step_bytes))

    def forward(self, x_CD: Tensor, targets_C: Tensor, *, keep: bool) -> tuple[Tensor, Tensor]:
        self.kept = ()
        x_CD = x_CD.contiguous()
        column_C, owned_C = self.vocab.local(targets_C)
        column_C = column_C.where(owned_C, -1).int()
        given = (x_CD, self.head_VD, column_C)
        if keep:
            need = self._exps_bytes(x_CD.shape[0])
            if self.exps.numel() < need:
                self.exps = torch.empty(need, dtype=torch.uint8)
        exps = self.exps if keep else None
        z_y_C = self.vocab.sum(self.ops.head_pick(*given, *self.scaling, self.kernel))
        anchor_C = z_y_C
        sums = self.ops.head_forward(*given, anchor_C, *self.scaling, exps, self.kernel)
        over_C = self.vocab.max(sums[2])
        if bool((over_C > ANCHOR_LIMIT).any()):
            anchor_C = torch.where(over_C > ANCHOR_LIMIT, z_y_C + over_C, z_y_C)
            sums = self.ops.head_forward(*given, anchor_C, *self.scaling, exps, self.kernel)
        S_C, Eu_C = self.vocab.sum(sums[0]), self.vocab.sum(sums[1])
        u_y_C = z_y_C - anchor_C
        E_y_C = u_y_C.exp()
        Z_C = S_C + E_y_C
        logprobs_C = torch.where(anchor_C == z_y_C, -S_C.log1p(), u_y_C - Z_C.log())
        log_Z_C = u_y_C - logprobs_C
        entropies_C = log_Z_C - (Eu_C + E_y_C * u_y_C) / Z_C
        if keep:
            self.kept = (x_CD, column_C, z_y_C, anchor_C, S_C, E_y_C, Z_C, log_Z_C, entropies_C)
        return logprobs_C, entropies_C

    def backward(self, d_logprob_C: Tensor, d_entropy_C: Tensor | None) -> Tensor | None:
        x_CD, column_C, z_y_C, anchor_C, S_C, E_y_C, Z_C, log_Z_C, entropies_C = self.kept
        if not self.need_hidden and self.d_head_VD is None:
            return None
        scale_C = -d_logprob_C / (Z_C * self.temperature)
        slope_C = bonus_C = None
        if d_entropy_C is not None:
            bonus_C = entropies_C - log_Z_C
            slope_C = -d_entropy_C / (Z_C * self.temperature)
        d_x_CD, G_sum_C = self.ops.head_backward(
            x_CD,
            self.head_VD,
            anchor_C,
            *self.scaling,
            self.exps,
            scale_C,
            slope_C,
            bonus_C,
            self.d_head_VD,
            False,
            self.need_hidden,
            self.kernel,
        )
        if self.softcap is None:
            # A softmax is shift invariant: its dz sum to 0. Taking the target's from the sum of the
            # others as they were rounded keeps that, so a part common to all rows of W still
            # cancels in dx.
            patch_C = -self.vocab.sum(G_sum_C)
        else:
            patch_C = -scale_C * S_C
            if slope_C is not None and bonus_C is not None:
                patch_C = patch_C + slope_C * (z_y_C - anchor_C + bonus_C) * E_y_C
            patch_C = patch_C * (1.0 - (z_y_C * (self.temperature / self.softcap)).square())
        d_x_or_none = d_x_CD if self.need_hidden else None
        self.ops.head_patch(
            x_CD, self.head_VD, column_C, patch_C, d_x_or_none, self.d_head_VD, self.kernel
        )
        return self.vocab.sum(d_x_CD) if self.need_hidden else None

    def _exps_bytes(self, tokens: int) -> int:
        return self.ops.head_exps_bytes(self.head_VD, tokens, self.kernel)


def policy_loss(problem: Problem) -> Outcome:
    """Loss and gradients of a problem: in one call of C++ where that can take it."""
    p = problem
    if p.vocab.group is None:
        found = torch.ops.turnfast.policy_loss(*_flat(p))
        if found:
            return Outcome(**dict(zip(OUTCOME_FIELDS, found, strict=True)))
    # Of a head in shards, and to say what is wrong with a problem.
    head = CppHead(p.head_VD, p.vocab, p.temperature, p.softcap, p.need_hidden, head_sum(p))
    return run_policy_loss(p, head)


def _flat(p: Problem) -> tuple[object, ...]:
    given = (p.hidden_TD, p.head_VD, p.rows_N, p.targets_N, p.turns_N, p.sequences_K)
    given += (p.advantages_K, p.weights_N, p.old_N, p.ref_N, p.sampler_N)
    r = p.rule
    return (
        *(x if x is None else x.contiguous() for x in given),
        *(r.ratio, r.kind, r.clip_low, r.clip_high, r.dual_clip, r.kl_coef, r.entropy_coef),
        *(r.is_cap, p.temperature, p.softcap or 0.0, p.chunk_tokens or 0),
        *(p.need_hidden, p.need_head, p.head_grad_VD),
    )


def logprobs(problem: LogprobsProblem) -> tuple[Tensor, Tensor]:
    """log-probs and entropies, [N] float32: in one call of C++ where that can take it."""
    p = problem
    if p.vocab.group is None:
        given = (p.hidden_TD, p.head_VD, p.rows_N, p.targets_N)
        options = (p.temperature, p.softcap or 0.0, p.chunk_tokens or 0)
        found = torch.ops.turnfast.logprobs(*(x.contiguous() for x in given), *options)
        if found:
            logprobs_N, entropies_N = found
            return logprobs_N, entropies_N
    return run_logprobs(p, CppHead(p.head_VD, p.vocab, p.temperature, p.softcap, False, None))


def _fake_like_tokens(x: Tensor, *_: object) -> Tensor:
    return x.new_empty(x.shape[0], dtype=torch.float32)


def _fake_forward(x: Tensor, *_: object) -> tuple[Tensor, Tensor, Tensor]:
    return _fake_like_tokens(x), _fake_like_tokens(x), _fake_like_tokens(x)


def _fake_backward(x: Tensor, *given: object) -> tuple[Tensor, Tensor]:
    need_hidden = given[10]
    d_x = x.new_empty(x.shape if need_hidden else (0,), dtype=torch.float32)
    return d_x, _fake_like_tokens(x)


if load_error() is None:
    torch.library.register_fake("turnfast::head_pick")(_fake_like_tokens)
    torch.library.register_fake("turnfast::head_forward")(_fake_forward)
    torch.library.register_fake("turnfast::head_backward")(_fake_backward)
    torch.library.register_fake("turnfast::head_patch")(lambda *given: None)
    torch.library.register_fake("turnfast::exp_anchored")(lambda x, kernel="": torch.empty_like(x))
