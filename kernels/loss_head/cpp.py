"""The loss head on the CPU in C++ (csrc/loss_head/policy_loss.cpp).

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
from .problem import LogprobsProblem, Outcome, Problem
from .values import check_values

OUTCOME_FIELDS = tuple(field.name for field in fields(Outcome))
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def unavailable(device: torch.device, dtype: torch.dtype, sharded: bool) -> str:
    """Return why this device, dtype or sharding is not supported, or an empty string."""
    error = load_error()
    if error is not None:
        return f"the C++ extension is not built or does not load ({error})"
    if device.type != "cpu":
        return f"it runs on the cpu, the tensors are on {device.type}"
    if sharded:
        return "it does not support a head that is sharded over a group"
    if dtype not in DTYPES:
        name = str(dtype).removeprefix("torch.")
        return f"it supports float32, bfloat16 and float16, not {name}"
    return ""


def policy_loss(problem: Problem) -> Outcome:
    """Compute loss and gradients of a problem."""
    results = torch.ops.turnfast.policy_loss(*flat_arguments(problem))
    if not results:
        check_values(problem)  # raises the error of the value that is not valid
    return Outcome(**dict(zip(OUTCOME_FIELDS, results, strict=True)))


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
    tensors = (p.hidden_TD, p.head_VD, p.rows_N, p.targets_N)
    options = (p.temperature, p.softcap or 0.0, p.chunk_tokens or 0)
    return torch.ops.turnfast.logprobs(*(x.contiguous() for x in tensors), *options)
