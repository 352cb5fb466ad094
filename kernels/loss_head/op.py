"""The loss head as torch.library operators: real body, fake body, autograd.

The operators take the arguments of the public functions flattened, so that torch.compile sees one
opaque node whose output shapes do not depend on values; checks that need values happen inside.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .backends import implementation
from .problem import Problem, Vocab, check_indices, check_values, compute_dtype
from .records import PolicyRule

NUM_STATS = 11


@torch.library.custom_op("turnfast::turn_policy_loss", mutates_args=())
def policy_loss_op(
    hidden: Tensor,
    head_weight: Tensor,
    rows: Tensor,
    targets: Tensor,
    turns: Tensor,
    sequences: Tensor | None,
    advantages: Tensor,
    old_logprobs: Tensor | None,
    weights: Tensor | None,
    ref_logprobs: Tensor | None,
    sampler_logprobs: Tensor | None,
    clip_low: float,
    clip_high: float,
    ratio: str,
    kind: str,
    dual_clip: float | None,
    kl_coef: float,
    entropy_coef: float,
    is_cap: float | None,
    temperature: float,
    softcap: float | None,
    chunk_tokens: int | None,
    group: str,
    vocab_start: int,
    need_hidden: bool,
    need_head: bool,
    impl: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    chosen = implementation(impl, hidden.device, hidden.dtype)
    dtype = compute_dtype(hidden.dtype)
    N = rows.shape[0]
    rule = PolicyRule(
        clip_low=clip_low,
        clip_high=clip_high,
        ratio=ratio,  # type: ignore[arg-type]
        kind=kind,  # type: ignore[arg-type]
        dual_clip=dual_clip,
        kl_coef=kl_coef,
        entropy_coef=entropy_coef,
        is_cap=is_cap,
    )
    if weights is None:
        weights = torch.full((N,), 1.0 / max(N, 1), dtype=dtype, device=hidden.device)

    def cast(x: Tensor | None) -> Tensor | None:
        return None if x is None else x.to(dtype)

    problem = Problem(
        hidden_TD=hidden,
        head_VD=head_weight,
        vocab=Vocab.of(head_weight, vocab_start, group),
        rows_N=rows.long(),
        targets_N=targets.long(),
        turns_N=turns.long(),
        sequences_K=None if sequences is None else sequences.long(),
        advantages_K=advantages.to(dtype),
        weights_N=weights.to(dtype),
        old_N=cast(old_logprobs),
        ref_N=cast(ref_logprobs),
        sampler_N=cast(sampler_logprobs),
        rule=rule,
        temperature=temperature,
        softcap=softcap,
        chunk_tokens=chunk_tokens,
        need_hidden=need_hidden,
        need_head=need_head,
    )
    check_values(problem)
    # The dtypes are chosen here, float32 where it counts: a caller's autocast would undo that.
    with torch.autocast(hidden.device.type, enabled=False):
        out = chosen.policy_loss(problem)
    return (
        out.loss,
        out.logprobs_N,
        out.entropies_N,
        out.turn_logprobs_K,
        out.stats,
        out.d_hidden_TD,
        out.d_head_VD,
    )


@policy_loss_op.register_fake
def _(
    hidden: Tensor,
    head_weight: Tensor,
    rows: Tensor,
    targets: Tensor,
    turns: Tensor,
    sequences: Tensor | None,
    advantages: Tensor,
    old_logprobs: Tensor | None,
    weights: Tensor | None,
    ref_logprobs: Tensor | None,
    sampler_logprobs: Tensor | None,
    clip_low: float,
    clip_high: float,
    ratio: str,
    kind: str,
    dual_clip: float | None,
    kl_coef: float,
    entropy_coef: float,
    is_cap: float | None,
    temperature: float,
    softcap: float | None,
    chunk_tokens: int | None,
    group: str,
    vocab_start: int,
    need_hidden: bool,
    need_head: bool,
    impl: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    dtype = compute_dtype(hidden.dtype)

    def new(*shape: int | torch.SymInt) -> Tensor:
        return hidden.new_empty(shape, dtype=dtype)

    return (
        new(),
        new(rows.shape[0]),
        new(rows.shape[0]),
        new(advantages.shape[0]),
        hidden.new_empty(NUM_STATS, dtype=torch.float64),
        new(*(hidden.shape if need_hidden else (0,))),
        new(*(head_weight.shape if need_head else (0,))),
    )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    hidden, head_weight = inputs[0], inputs[1]
    ctx.dtypes = hidden.dtype, head_weight.dtype
    ctx.needs = inputs[-3], inputs[-2]
    ctx.num_inputs = len(inputs)
    ctx.save_for_backward(output[5], output[6])
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, d_loss: Tensor | None, *_: Tensor | None) -> tuple[Tensor | None, ...]:
    nothing = (None,) * (ctx.num_inputs - 2)
    if d_loss is None:
        return None, None, *nothing
    grads = tuple(
        _scaled(grad, d_loss, dtype) if need else None
        for grad, dtype, need in zip(ctx.saved_tensors, ctx.dtypes, ctx.needs, strict=True)
    )
    return *grads, *nothing


def _scaled(grad: Tensor, d_loss: Tensor, dtype: torch.dtype) -> Tensor:
    # One pass from float32 to the model's dtype: a float32 product of the head's size, 2 GB for a
    # vocabulary of 150,000, would only be in the way. Under a compiler that fuses it itself.
    if torch.compiler.is_compiling():
        return (grad * d_loss).to(dtype)
    return torch.mul(grad, d_loss, out=torch.empty_like(grad, dtype=dtype))


policy_loss_op.register_autograd(_backward, setup_context=_setup_context)


@torch.library.custom_op("turnfast::linear_logprobs", mutates_args=())
def logprobs_op(
    hidden: Tensor,
    head_weight: Tensor,
    rows: Tensor,
    targets: Tensor,
    temperature: float,
    softcap: float | None,
    chunk_tokens: int | None,
    group: str,
    vocab_start: int,
    impl: str,
) -> tuple[Tensor, Tensor]:
    chosen = implementation(impl, hidden.device, hidden.dtype)
    vocab = Vocab.of(head_weight, vocab_start, group)
    rows, targets = rows.long(), targets.long()
    check_indices(hidden, vocab, rows, targets)
    with torch.autocast(hidden.device.type, enabled=False):
        return chosen.logprobs(
            hidden, head_weight, vocab, rows, targets, temperature, softcap, chunk_tokens
        )


@logprobs_op.register_fake
def _(
    hidden: Tensor,
    head_weight: Tensor,
    rows: Tensor,
    targets: Tensor,
    temperature: float,
    softcap: float | None,
    chunk_tokens: int | None,
    group: str,
    vocab_start: int,
    impl: str,
) -> tuple[Tensor, Tensor]:
    out = hidden.new_empty(rows.shape[0], dtype=compute_dtype(hidden.dtype))
    return out, torch.empty_like(out)
