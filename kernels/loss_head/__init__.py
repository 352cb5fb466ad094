"""From hidden states to the turn-level policy loss and its gradients, without [tokens, vocab].

T rows of a pack   D hidden   V vocab   N loss-bearing tokens   K turns   C tokens per chunk
"""

from __future__ import annotations

import math

import torch
import torch.distributed as dist
from torch import Tensor

from .op import (
    LogprobsArguments,
    PolicyArguments,
    logprobs_op,
    policy_loss_onto_op,
    policy_loss_op,
    with_hidden_gradient,
)
from .problem import compute_dtype
from .records import LinearLogprobs, PolicyLoss, PolicyRule, PolicyStats

__all__ = [
    "LinearLogprobs",
    "PolicyLoss",
    "PolicyRule",
    "PolicyStats",
    "linear_logprobs",
    "turn_policy_loss",
]

FLOATS = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
INTS = (torch.int32, torch.int64)
# A compiler traces numbers as symbols.
WHOLE = (int, torch.SymInt)
NUMBERS = (*WHOLE, float, torch.SymFloat)
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
    """The policy loss of packed turns from hidden states, with gradients for hidden and head.

    hidden [T, D] and head_weight [V, D]: model dtype (bf16, fp16, fp32, fp64), same device.
    rows [N]: hidden row that predicts token n; a row may occur several times.
    targets [N]: token ids.
    turns [N]: the token's turn, an index into the K turns; the tokens of a turn are contiguous.
    advantages [K].
    old_logprobs [N]: log-probs of the behaviour policy; None means on policy (ratio 1).
    weights [N] >= 0: the normaliser as data, fixed for a whole optimizer step; None means 1 / N.
        Tokens of weight 0 are masked: no part in loss, ratios or statistics, never computed.
    ref_logprobs [N]: reference model, measured as ref_kl and weighted by rule.kl_coef.
    sampler_logprobs [N]: log-probs the sampler reported, for rule.is_cap.
    sequences [K]: sequence of each turn, any ids >= 0, needed for rule.ratio == "sequence".
    head_grad [V, D], float32 (float64 for float64): the call adds the head's gradient to it, as a
        kernel adds to Megatron's main_grad; head_weight gets none from autograd. So micro-batches
        share one buffer, which may be head_weight.grad. It is added to in the forward pass, with
        the factor 1: backward with another one raises ValueError (a compiled or CUDA one makes the
        gradient of hidden NaN), and a call that is repeated, as by activation checkpointing, or
        that raises after its first chunk has changed it.
    temperature, softcap: logits are softcap * tanh(logits / softcap) / temperature.
    chunk_tokens: tokens per workspace chunk; None lets the implementation choose. Changes no
        result beyond float32 rounding.
    group, vocab_start: head_weight is the slice of the vocabulary that starts at vocab_start, the
        ranks of the group hold the rest; all other arguments are the same on every rank. hidden
        gets the full gradient.
    impl: "auto", "reference", "cpp" or "triton"; an explicit name never falls back.

    Gradients are computed in the forward pass, only for those of hidden and head_weight that
    require them. Only .loss is differentiable. Raises ValueError naming the argument and what was
    expected, with the index for bad values. Source: turn-level credit of arXiv 2505.11821; see
    PolicyRule for the rules.

    Example: two turns [5, 9] and [7], turn 0 good, turn 1 bad, first hidden row at 0:
        out = turn_policy_loss(hidden, head, rows=tensor([0, 1, 4]), targets=tensor([5, 9, 7]),
                               turns=tensor([0, 0, 1]), advantages=tensor([1.0, -1.0]))
        out.loss               # -(1 + 1 - 1) / 3: on policy the ratios are 1
        out.loss.backward()    # a step down raises log p(5) and log p(9), lowers log p(7)
    """
    _check_options(temperature, softcap, chunk_tokens, vocab_start, impl)
    N = _check_head(hidden, head_weight, rows, targets)
    _check("turns", turns, hidden, (N,), INTS)
    _check_is_tensor("advantages", advantages)
    if advantages.ndim != 1:
        raise ValueError(f"advantages: expected shape [K], got {list(advantages.shape)}")
    K = advantages.shape[0]
    _check("advantages", advantages, hidden, (K,), FLOATS)
    for name, values in (
        ("old_logprobs", old_logprobs),
        ("weights", weights),
        ("ref_logprobs", ref_logprobs),
        ("sampler_logprobs", sampler_logprobs),
    ):
        if values is not None:
            _check(name, values, hidden, (N,), FLOATS)
    if sequences is not None:
        _check("sequences", sequences, hidden, (K,), INTS)
    if not isinstance(rule, PolicyRule):
        raise ValueError(f"rule: expected a PolicyRule, got {type(rule).__name__}")
    if rule.ratio == "sequence" and sequences is None:
        raise ValueError("sequences: expected the sequence of each turn [K] for ratio='sequence'")
    if rule.kl_coef and ref_logprobs is None:
        raise ValueError(f"ref_logprobs: expected with kl_coef={rule.kl_coef}")
    if rule.is_cap is not None and sampler_logprobs is None:
        raise ValueError(f"sampler_logprobs: expected with is_cap={rule.is_cap}")
    if rule.is_cap is None and sampler_logprobs is not None:
        raise ValueError(
            "sampler_logprobs: given, but rule.is_cap is None so they would be ignored"
        )
    if head_grad is not None:
        _check_head_grad(head_grad, head_weight)
    grads = torch.is_grad_enabled()
    given = PolicyArguments(
        hidden=hidden,
        head_weight=head_weight,
        rows=rows,
        targets=targets,
        turns=turns,
        sequences=sequences if rule.ratio == "sequence" else None,
        advantages=advantages.detach(),
        old_logprobs=_constant(old_logprobs),
        weights=_constant(weights),
        ref_logprobs=_constant(ref_logprobs),
        sampler_logprobs=_constant(sampler_logprobs),
        rule=rule,
        temperature=temperature,
        softcap=softcap,
        chunk_tokens=chunk_tokens,
        group=_group_name(group),
        vocab_start=vocab_start,
        need_hidden=grads and hidden.requires_grad,
        need_head=grads and head_weight.requires_grad,
        impl=impl,
    )
    if head_grad is None or not given.need_head:
        loss, logprobs, entropies, turn_logprobs, stats, _, _ = policy_loss_op(*given.flat())
    else:
        plain = given._replace(hidden=hidden.detach(), head_weight=head_weight.detach())
        found = policy_loss_onto_op(*plain.flat(), head_grad)
        loss, logprobs, entropies, turn_logprobs, stats, d_hidden = found
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
    """log-probs and entropies of targets from hidden states, without gradient and without [N, V].

    Arguments as in turn_policy_loss. Returns [N] float32 vectors (float64 for float64 input), in
    nats. Raises ValueError naming the argument, with the index for bad values. Used for the old
    policy, a reference model and the sampler check.

    Example: hidden of three positions, the tokens 9 and 7 predicted by rows 0 and 1:
        out = linear_logprobs(hidden, head, rows=tensor([0, 1]), targets=tensor([9, 7]))
        out.logprobs    # [log p(9), log p(7)]
    """
    _check_options(temperature, softcap, chunk_tokens, vocab_start, impl)
    _check_head(hidden, head_weight, rows, targets)
    given = LogprobsArguments(
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
    logprobs, entropies = logprobs_op(*given)
    return LinearLogprobs(logprobs=logprobs, entropies=entropies)


def _check_options(
    temperature: float,
    softcap: float | None,
    chunk_tokens: int | None,
    vocab_start: int,
    impl: str,
) -> None:
    # Comparisons, not isfinite, which a compiler cannot trace for a symbol.
    if not isinstance(temperature, NUMBERS) or not 0 < temperature < math.inf:
        raise ValueError(f"temperature: expected a finite number > 0, got {temperature!r}")
    if softcap is not None and (not isinstance(softcap, NUMBERS) or not 0 < softcap < math.inf):
        raise ValueError(f"softcap: expected a finite number > 0 or None, got {softcap!r}")
    if chunk_tokens is not None and (not isinstance(chunk_tokens, WHOLE) or chunk_tokens < 1):
        raise ValueError(f"chunk_tokens: expected an integer >= 1 or None, got {chunk_tokens!r}")
    if not isinstance(vocab_start, WHOLE):
        raise ValueError(f"vocab_start: expected an integer, got {vocab_start!r}")
    if not isinstance(impl, str):
        raise ValueError(f"impl: expected a name, got {impl!r}")


def _check_head(hidden: Tensor, head_weight: Tensor, rows: Tensor, targets: Tensor) -> int:
    for name, x in (("hidden", hidden), ("head_weight", head_weight), ("rows", rows)):
        _check_is_tensor(name, x)
    if hidden.ndim != 2 or hidden.dtype not in FLOATS:
        raise ValueError(
            f"hidden: expected [T, D] of a floating dtype, got {list(hidden.shape)} {hidden.dtype}"
        )
    if head_weight.ndim != 2 or head_weight.shape[0] == 0:
        raise ValueError(f"head_weight: expected [V, D] with V >= 1, got {list(head_weight.shape)}")
    _check("head_weight", head_weight, hidden, (*head_weight.shape[:1], *hidden.shape[1:]), FLOATS)
    if head_weight.dtype != hidden.dtype:
        raise ValueError(
            f"head_weight: expected the dtype of hidden, {hidden.dtype}, got {head_weight.dtype}"
        )
    if rows.ndim != 1:
        raise ValueError(f"rows: expected shape [N], got {list(rows.shape)}")
    N = rows.shape[0]
    _check("rows", rows, hidden, (N,), INTS)
    _check("targets", targets, hidden, (N,), INTS)
    return N


def _check_head_grad(head_grad: Tensor, head_weight: Tensor) -> None:
    dtypes = (compute_dtype(head_weight.dtype),)
    _check("head_grad", head_grad, head_weight, tuple(head_weight.shape), dtypes)
    if not head_grad.is_contiguous():
        raise ValueError("head_grad: expected a contiguous tensor")
    if head_grad.requires_grad:
        raise ValueError("head_grad: expected a tensor that requires no gradient itself")
    if not head_weight.requires_grad:
        raise ValueError("head_grad: given, but head_weight requires no gradient to be added to it")


def _check_is_tensor(name: str, x: object) -> None:
    if not isinstance(x, Tensor) or x.layout != torch.strided:
        found = f"one of layout {x.layout}" if isinstance(x, Tensor) else type(x).__name__
        raise ValueError(f"{name}: expected a dense tensor, got {found}")


def _check(
    name: str,
    x: Tensor,
    hidden: Tensor,
    shape: tuple[int, ...],
    dtypes: tuple[torch.dtype, ...],
) -> None:
    _check_is_tensor(name, x)
    if tuple(x.shape) != tuple(shape):
        raise ValueError(f"{name}: expected shape {list(shape)}, got {list(x.shape)}")
    if x.dtype not in dtypes:
        names = ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        raise ValueError(f"{name}: expected a dtype of {names}, got {x.dtype}")
    if x.device != hidden.device:
        raise ValueError(f"{name}: expected device {hidden.device} like hidden, got {x.device}")


def _constant(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.detach()


def _group_name(group: dist.ProcessGroup | None) -> str:
    if group is not None and not isinstance(group, dist.ProcessGroup):
        raise ValueError(f"group: expected a process group or None, got {type(group).__name__}")
    return "" if group is None else group.group_name
