"""The turn-level policy loss and its gradients from hidden states, without a [T, V] tensor.

T rows of a pack   D hidden   V vocab   N loss-bearing tokens   K turns   C tokens per chunk
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from .checks import check_head, check_head_grad, check_options, check_policy_tensors
from .op import (
    LogprobsArguments,
    PolicyArguments,
    logprobs_op,
    policy_loss_onto_op,
    policy_loss_op,
    with_hidden_gradient,
)
from .records import LinearLogprobs, PolicyLoss, PolicyRule, PolicyStats

__all__ = [
    "LinearLogprobs",
    "PolicyLoss",
    "PolicyRule",
    "PolicyStats",
    "linear_logprobs",
    "turn_policy_loss",
]

DEFAULT_RULE = PolicyRule()


def turn_policy_loss(
    hidden: Tensor,
    head_weight: Tensor,
    rows: Tensor,
    targets: Tensor,
    turns: Tensor,
    advantages: Tensor,
    old_logprobs: Tensor | None = None,
    *,
    weights: Tensor | None = None,
    ref_logprobs: Tensor | None = None,
    sampler_logprobs: Tensor | None = None,
    sequences: Tensor | None = None,
    head_grad: Tensor | None = None,
    rule: PolicyRule = DEFAULT_RULE,
    temperature: float = 1.0,
    softcap: float | None = None,
    chunk_tokens: int | None = None,
    group: dist.ProcessGroup | None = None,
    vocab_start: int = 0,
    impl: str = "auto",
) -> PolicyLoss:
    """Compute the policy loss of packed turns, with gradients for hidden and head_weight.

    hidden [T, D] and head_weight [V, D]: model dtype (bf16, fp16, fp32, fp64), same device.
    rows [N]: the hidden row that predicts token n; a row may occur several times.
    targets [N]: token ids.
    turns [N]: the turn of each token, 0 to K - 1; the tokens of a turn are contiguous.
    advantages [K].
    old_logprobs [N]: log-probs of the behaviour policy; None means on policy (ratio 1).
    weights [N] >= 0: the normaliser, fixed for a whole optimizer step; None means 1 / N. Tokens of
        weight 0 are masked: they are not computed and enter no loss, ratio or statistic.
    ref_logprobs [N]: log-probs of the reference policy, for stats.ref_kl and rule.kl_coef.
    sampler_logprobs [N]: log-probs that the sampler reported, for rule.is_cap.
    sequences [K]: the sequence of each turn, any ids >= 0; required by rule.ratio == "sequence".
    head_grad [V, D], float32 (float64 for float64): the call adds the head's gradient to this
        contiguous buffer, and autograd gives head_weight none. Micro-batches can share one buffer,
        for example head_weight.grad. The forward pass adds with factor 1. A backward pass with
        another factor raises ValueError; a compiled or CUDA one makes the gradient of hidden NaN.
        A repeated call, as in activation checkpointing, adds twice; a call that raises may have
        added some chunks.
    temperature, softcap: logits are softcap * tanh(logits / softcap) / temperature.
    chunk_tokens: tokens per workspace chunk; None lets the implementation choose. It changes
        results only by float32 rounding.
    group, vocab_start: head_weight is the slice of the vocabulary that starts at vocab_start, and
        the other ranks of the group hold the rest. All other arguments are equal on all ranks.
        Every rank gets the full gradient of hidden. On the CPU only by the reference.
    impl: "auto", "reference", "cpp" or "triton"; an explicit name never falls back.

    The forward pass computes the gradients, only for those of hidden and head_weight that require
    them. Only .loss is differentiable. Raises ValueError naming the argument, with the index for
    bad values. Source: turn-level credit of arXiv 2505.11821; see PolicyRule for the rules.

    Example: two turns, [5, 9] with advantage 1 and [7] with advantage -1:
        out = turn_policy_loss(hidden, head, rows=tensor([0, 1, 4]), targets=tensor([5, 9, 7]),
                               turns=tensor([0, 0, 1]), advantages=tensor([1.0, -1.0]))
        out.loss               # -(1 + 1 - 1) / 3: on policy all ratios are 1
        out.loss.backward()    # gradient descent raises log p(5) and log p(9), lowers log p(7)
    """
    check_options(temperature, softcap, chunk_tokens, vocab_start, impl)
    N = check_head(hidden, head_weight, rows, targets)
    per_token = {
        "old_logprobs": old_logprobs,
        "weights": weights,
        "ref_logprobs": ref_logprobs,
        "sampler_logprobs": sampler_logprobs,
    }
    check_policy_tensors(hidden, N, turns, advantages, sequences, per_token, rule)
    if head_grad is not None:
        check_head_grad(head_grad, head_weight)
    grads = torch.is_grad_enabled()
    arguments = PolicyArguments(
        hidden=hidden,
        head_weight=head_weight,
        rows=rows,
        targets=targets,
        turns=turns,
        sequences=sequences if rule.ratio == "sequence" else None,
        advantages=advantages.detach(),
        rule=rule,
        temperature=temperature,
        softcap=softcap,
        chunk_tokens=chunk_tokens,
        group=_group_name(group),
        vocab_start=vocab_start,
        need_hidden=grads and hidden.requires_grad,
        need_head=grads and head_weight.requires_grad,
        impl=impl,
        **{name: None if x is None else x.detach() for name, x in per_token.items()},
    )
    if head_grad is None or not arguments.need_head:
        loss, logprobs, entropies, turn_logprobs, stats, _, _ = policy_loss_op(*arguments.flat())
    else:
        detached = arguments._replace(hidden=hidden.detach(), head_weight=head_weight.detach())
        results = policy_loss_onto_op(*detached.flat(), head_grad)
        loss, logprobs, entropies, turn_logprobs, stats, d_hidden = results
        loss = with_hidden_gradient(hidden, head_weight, loss, d_hidden)
    return PolicyLoss(
        loss=loss,
        logprobs=logprobs.detach(),
        entropies=entropies.detach(),
        turn_logprobs=turn_logprobs.detach(),
        stats=PolicyStats(*stats.detach().unbind()),
    )


def linear_logprobs(
    hidden: Tensor,
    head_weight: Tensor,
    rows: Tensor,
    targets: Tensor,
    *,
    temperature: float = 1.0,
    softcap: float | None = None,
    chunk_tokens: int | None = None,
    group: dist.ProcessGroup | None = None,
    vocab_start: int = 0,
    impl: str = "auto",
) -> LinearLogprobs:
    """Compute log-probs and entropies of targets, without gradients and without an [N, V] tensor.

    Arguments as in turn_policy_loss. Returns [N] float32 vectors (float64 for float64 input), in
    nats. Raises ValueError naming the argument, with the index for bad values.

    Example: rows 0 and 1 of hidden predict the tokens 9 and 7:
        out = linear_logprobs(hidden, head, rows=tensor([0, 1]), targets=tensor([9, 7]))
        out.logprobs    # [log p(9), log p(7)]
    """
    check_options(temperature, softcap, chunk_tokens, vocab_start, impl)
    check_head(hidden, head_weight, rows, targets)
    arguments = LogprobsArguments(
        hidden=hidden.detach(),
        head_weight=head_weight.detach(),
        rows=rows,
        targets=targets,
        temperature=temperature,
        softcap=softcap,
        chunk_tokens=chunk_tokens,
        group=_group_name(group),
        vocab_start=vocab_start,
        impl=impl,
    )
    logprobs, entropies = logprobs_op(*arguments)
    return LinearLogprobs(logprobs=logprobs, entropies=entropies)


def _group_name(group: dist.ProcessGroup | None) -> str:
    if group is not None and not isinstance(group, dist.ProcessGroup):
        raise ValueError(f"group: expected a process group or None, got {type(group).__name__}")
    return "" if group is None else group.group_name
