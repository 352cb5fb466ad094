"""The loss head on the CPU in C++.

One call computes a whole policy loss, or log-probs alone (csrc/loss_head/policy_loss.cpp). Sharded
heads use the driver's Head over the operators of one chunk (csrc/loss_head/chunk_ops.cpp).

The target's logit z_y is known first, from one dot product. Exponentials are anchored there, so
no pass over the logits finds a maximum (a softmax is invariant to any shift):

    E_j = exp(z_j - z_y) for j != y, E_y = 0        S = sum_j E_j, logprob = -log1p(S)
    dx  = c (E @ W) + p W_y                         c = -g / (1 + S), p = -c S
    dW  = E^T @ (c x), row y plus p x               g = dloss/dlogprob

With an entropy bonus or a soft cap, dz is not one factor times E. It is then computed from E per
block, with z_j - z_y = log E_j. Tokens whose largest logit is far above the target's are anchored
at the maximum in a second pass. Memory: E [V, C] (float32; bf16 for bf16 heads where the CPU has
bf16 products), about one block of W and dx [C, D] per thread.
"""

from __future__ import annotations

from dataclasses import fields

import torch
from torch import Tensor

from ..extension import load_error
from .driver import run_logprobs, run_policy_loss
from .problem import HeadInputs, LogprobsProblem, Outcome, Problem

# Tokens per chunk. A chunk of C tokens reads W twice and reads and writes dW, with 6 C flops per
# element: from OVERLAP_TOKENS on, arithmetic hides that memory traffic. E may take LARGE_BYTES.
# Where E of more tokens fits into SMALL_BYTES, a shared cache, larger chunks reduce the overhead.
SMALL_BYTES, LARGE_BYTES = 32 << 20, 128 << 20
OVERLAP_TOKENS, MAX_TOKENS, STEP = 384, 2304, 96
# With a larger logit above the target, sums anchored at the target would overflow float32.
ANCHOR_LIMIT = 60.0

OUTCOME_FIELDS = tuple(field.name for field in fields(Outcome))
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def unavailable(device: torch.device, dtype: torch.dtype) -> str:
    """Return why this device and dtype are not supported, or an empty string."""
    error = load_error()
    if error is not None:
        return f"the C++ extension is not built or does not load ({error})"
    if device.type != "cpu":
        return f"it runs on the cpu, the tensors are on {device.type}"
    if dtype not in DTYPES:
        name = str(dtype).removeprefix("torch.")
        return f"it supports float32, bfloat16 and float16, not {name}"
    return ""


class CppHead:
    """The driver's Head; `kernel` names an instruction set, empty for the fastest one."""

    def __init__(self, inputs: HeadInputs, kernel: str = "") -> None:
        self.head_VD = inputs.head_VD.contiguous()
        self.vocab = inputs.vocab
        self.temperature, self.softcap = inputs.temperature, inputs.softcap
        self.scaling = (1.0 / self.temperature, self.softcap or 0.0)
        self.need_hidden, self.d_head_VD = inputs.need_hidden, inputs.d_head_VD
        self.kernel = kernel
        self.ops = torch.ops.turnfast
        self.exps = torch.empty(0, dtype=torch.uint8)
        self.kept: tuple[Tensor, ...] = ()

    def chunk_tokens(self) -> int:
        step_bytes = self._exps_bytes(STEP)
        overlapping = min(OVERLAP_TOKENS // STEP, LARGE_BYTES // step_bytes)
        return min(MAX_TOKENS, STEP * max(1, overlapping, SMALL_BYTES // step_bytes))

    def forward(self, x_CD: Tensor, targets_C: Tensor, *, keep: bool) -> tuple[Tensor, Tensor]:
        self.kept = ()
        x_CD = x_CD.contiguous()
        column_C, owned_C = self.vocab.local(targets_C)
        column_C = column_C.where(owned_C, -1).int()
        inputs = (x_CD, self.head_VD, column_C)
        if keep:
            need = self._exps_bytes(x_CD.shape[0])
            if self.exps.numel() < need:
                self.exps = torch.empty(need, dtype=torch.uint8)
        exps = self.exps if keep else None
        z_y_C = self.vocab.sum(self.ops.head_target_logits(*inputs, *self.scaling, self.kernel))
        anchor_C = z_y_C
        sums = self.ops.head_forward(*inputs, anchor_C, *self.scaling, exps, self.kernel)
        excess_C = self.vocab.max(sums[2])
        if bool((excess_C > ANCHOR_LIMIT).any()):
            anchor_C = torch.where(excess_C > ANCHOR_LIMIT, z_y_C + excess_C, z_y_C)
            sums = self.ops.head_forward(*inputs, anchor_C, *self.scaling, exps, self.kernel)
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
        entropy_scale_C = offset_C = None
        if d_entropy_C is not None:
            offset_C = entropies_C - log_Z_C
            entropy_scale_C = -d_entropy_C / (Z_C * self.temperature)
        d_x_CD, G_sum_C = self.ops.head_backward(
            x_CD,
            self.head_VD,
            anchor_C,
            *self.scaling,
            self.exps,
            scale_C,
            entropy_scale_C,
            offset_C,
            self.d_head_VD,
            False,
            self.need_hidden,
            self.kernel,
        )
        if self.softcap is None:
            # A softmax is shift invariant, so its dz sum to 0. The target's is minus the sum of the
            # others as rounded: a part common to all rows of W still cancels in dx.
            dz_y_C = -self.vocab.sum(G_sum_C)
        else:
            dz_y_C = -scale_C * S_C
            if entropy_scale_C is not None and offset_C is not None:
                dz_y_C = dz_y_C + entropy_scale_C * (z_y_C - anchor_C + offset_C) * E_y_C
            dz_y_C = dz_y_C * (1.0 - (z_y_C * (self.temperature / self.softcap)).square())
        d_x_or_none = d_x_CD if self.need_hidden else None
        self.ops.head_add_targets(
            x_CD, self.head_VD, column_C, dz_y_C, d_x_or_none, self.d_head_VD, self.kernel
        )
        return self.vocab.sum(d_x_CD) if self.need_hidden else None

    def _exps_bytes(self, tokens: int) -> int:
        return self.ops.head_exps_bytes(self.head_VD, tokens, self.kernel)


def policy_loss(problem: Problem) -> Outcome:
    """Compute loss and gradients of a problem."""
    p = problem
    if p.vocab.group is None:
        results = torch.ops.turnfast.policy_loss(*flat_arguments(p))
        if results:
            return Outcome(**dict(zip(OUTCOME_FIELDS, results, strict=True)))
    # A sharded head, or values that are not valid: the driver raises the error.
    return run_policy_loss(p, CppHead(HeadInputs.of(p)))


def flat_arguments(p: Problem) -> tuple[object, ...]:
    """Return the arguments of the operator turnfast::policy_loss for a problem."""
    tensors = (p.hidden_TD, p.head_VD, p.rows_N, p.targets_N, p.turns_N, p.sequences_K)
    tensors += (p.advantages_K, p.weights_N, p.old_N, p.ref_N, p.sampler_N)
    r = p.rule
    return (
        *(x if x is None else x.contiguous() for x in tensors),
        *(r.ratio, r.kind, r.clip_low, r.clip_high, r.dual_clip, r.kl_coef, r.entropy_coef),
        *(r.is_cap, p.temperature, p.softcap or 0.0, p.chunk_tokens or 0),
        *(p.need_hidden, p.need_head, p.head_grad_VD),
    )


def logprobs(problem: LogprobsProblem) -> tuple[Tensor, Tensor]:
    """Compute log-probs and entropies, [N] float32."""
    p = problem
    if p.vocab.group is None:
        tensors = (p.hidden_TD, p.head_VD, p.rows_N, p.targets_N)
        options = (p.temperature, p.softcap or 0.0, p.chunk_tokens or 0)
        results = torch.ops.turnfast.logprobs(*(x.contiguous() for x in tensors), *options)
        if results:
            logprobs_N, entropies_N = results
            return logprobs_N, entropies_N
    return run_logprobs(p, CppHead(HeadInputs.of(p)))


def _fake_per_token(x: Tensor, *_: object) -> Tensor:
    return x.new_empty(x.shape[0], dtype=torch.float32)


def _fake_forward(x: Tensor, *_: object) -> tuple[Tensor, Tensor, Tensor]:
    return _fake_per_token(x), _fake_per_token(x), _fake_per_token(x)


def _fake_backward(x: Tensor, *arguments: object) -> tuple[Tensor, Tensor]:
    need_hidden = arguments[10]
    d_x = x.new_empty(x.shape if need_hidden else (0,), dtype=torch.float32)
    return d_x, _fake_per_token(x)


if load_error() is None:
    torch.library.register_fake("turnfast::head_target_logits")(_fake_per_token)
    torch.library.register_fake("turnfast::head_forward")(_fake_forward)
    torch.library.register_fake("turnfast::head_backward")(_fake_backward)
    torch.library.register_fake("turnfast::head_add_targets")(lambda *arguments: None)
    torch.library.register_fake("turnfast::exp_anchored")(lambda x, kernel="": torch.empty_like(x))
