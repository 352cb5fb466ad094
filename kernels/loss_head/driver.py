"""The steps that all implementations share: plan, then forward, policy and backward per chunk.

An implementation provides a Head, which turns the logits of a chunk into log-probs and entropies,
and their derivatives into gradients.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

from ..segments.reference import add_rows, segment_sum
from .plan import Chunk, Plan, make_plan
from .policy import Terms, Tokens, add_sums, no_sums, policy_terms, stats_vector
from .problem import LogprobsProblem, Outcome, Problem, Vocab, compute_dtype
from .records import PolicyRule
from .values import check_values

Policy = Callable[[PolicyRule, Tokens, Tensor, Tensor], Terms]


class Head(Protocol):
    """One linear head during one call; owns the workspace of one chunk.

    d_head_VD: `backward` adds the head's gradient to it, unless it is None.
    """

    vocab: Vocab
    d_head_VD: Tensor | None

    def chunk_tokens(self) -> int:
        """Return the number of tokens per chunk that the workspace allows."""
        ...

    def forward(self, x_CD: Tensor, targets_C: Tensor, *, keep: bool) -> tuple[Tensor, Tensor]:
        """Return log-probs and entropies of a chunk over the whole vocabulary of the group.

        Both are [C] in the compute dtype. With keep, the workspace holds what `backward` needs
        until the next forward.
        """
        ...

    def backward(self, d_logprob_C: Tensor, d_entropy_C: Tensor | None) -> Tensor | None:
        """Compute gradients of the last forward(keep=True) from dloss/dlogprob, dloss/dentropy.

        Returns d_x [C, D] in the compute dtype, summed over the group, or None if not wanted.
        """
        ...


def run_policy_loss(
    problem: Problem,
    head: Head,
    policy: Policy = policy_terms,
    turn_sums: Callable[[Tensor, Tensor, int], Tensor] = segment_sum,
) -> Outcome:
    """Check the values of a problem, then compute loss, statistics and gradients per chunk."""
    p = problem
    check_values(p)
    dtype = compute_dtype(p.hidden_TD.dtype)
    device = p.hidden_TD.device
    N = p.rows_N.shape[0]
    size = p.vocab.least(p.chunk_tokens or head.chunk_tokens(), device)
    plan = make_plan(p, size)
    logprobs_N = torch.full((N,), torch.nan, dtype=dtype, device=device)
    entropies_N = logprobs_N.clone()
    d_hidden_TD = torch.zeros(
        p.hidden_TD.shape if p.need_hidden else (0,), dtype=dtype, device=device
    )
    loss = torch.zeros((), dtype=dtype, device=device)
    sums = no_sums(device)
    gradients = p.need_hidden or p.need_head
    for chunk in plan.chunks:
        index_C = plan.order_M[chunk.start : chunk.stop]
        # A segment longer than a chunk is split. Its coefficients are known only after its last
        # part, so its logits are computed twice.
        parts = index_C.split(size)
        recompute = len(parts) > 1
        results = [_forward(p, head, part_C, gradients and not recompute) for part_C in parts]
        logprobs_C = torch.cat([logprobs for logprobs, _ in results])
        entropies_C = torch.cat([entropies for _, entropies in results])
        _check_finite(logprobs_C, index_C)
        terms = policy(p.rule, _tokens(p, plan, chunk), logprobs_C, entropies_C)
        loss = loss + terms.loss
        sums = add_sums(sums, terms.sums)
        logprobs_N[index_C] = logprobs_C
        entropies_N[index_C] = entropies_C
        if gradients:
            _backward(p, head, terms, parts, recompute, d_hidden_TD)
    turn_logprobs_K = turn_sums(logprobs_N.nan_to_num(0.0), p.turns_N, p.advantages_K.shape[0])
    return Outcome(
        loss=loss,
        logprobs_N=logprobs_N,
        entropies_N=entropies_N,
        turn_logprobs_K=turn_logprobs_K,
        stats=stats_vector(sums, plan.order_M.shape[0], plan.masked, plan.skipped),
        d_hidden_TD=d_hidden_TD,
        d_head_VD=loss.new_empty(0) if head.d_head_VD is None else head.d_head_VD,
    )


def run_logprobs(problem: LogprobsProblem, head: Head) -> tuple[Tensor, Tensor]:
    """Compute log-probs and entropies of all N tokens."""
    p, device = problem, problem.hidden_TD.device
    N = p.rows_N.shape[0]
    logprobs_N = torch.empty(N, dtype=compute_dtype(p.hidden_TD.dtype), device=device)
    entropies_N = torch.empty_like(logprobs_N)
    size = head.vocab.least(p.chunk_tokens or head.chunk_tokens(), device)
    for start in range(0, N, size):
        part = slice(start, start + size)
        x_CD = p.hidden_TD[p.rows_N[part]]
        logprobs_N[part], entropies_N[part] = head.forward(x_CD, p.targets_N[part], keep=False)
    _check_finite(logprobs_N, torch.arange(N, device=device))
    return logprobs_N, entropies_N


def _check_finite(logprobs_C: Tensor, index_C: Tensor) -> None:
    # Finds a broken head weight. On an accelerator the test would synchronise with the host; there
    # the loss or the log-prob becomes NaN.
    if logprobs_C.device.type != "cpu" or bool(logprobs_C.isfinite().all()):
        return
    token = int(index_C[(~logprobs_C.isfinite()).nonzero()[0, 0]])
    raise ValueError(f"head_weight: expected finite logits, got none at index {token} of rows")


def _forward(p: Problem, head: Head, index_C: Tensor, keep: bool) -> tuple[Tensor, Tensor]:
    return head.forward(p.hidden_TD[p.rows_N[index_C]], p.targets_N[index_C], keep=keep)


def _backward(
    p: Problem,
    head: Head,
    terms: Terms,
    parts: tuple[Tensor, ...],
    recompute: bool,
    d_hidden_TD: Tensor,
) -> None:
    start = 0
    for index_C in parts:
        stop = start + index_C.shape[0]
        if recompute:
            _forward(p, head, index_C, True)
        d_entropy_C = None if terms.d_entropy_C is None else terms.d_entropy_C[start:stop]
        d_x_CD = head.backward(terms.d_logprob_C[start:stop], d_entropy_C)
        if d_x_CD is not None:
            add_rows(d_hidden_TD, p.rows_N[index_C], d_x_CD)
        start = stop


def _tokens(p: Problem, plan: Plan, chunk: Chunk) -> Tokens:
    index_C = plan.order_M[chunk.start : chunk.stop]
    segment_C = lengths_S = None
    if plan.segment_M is not None and plan.lengths_S is not None:
        segment_C = plan.segment_M[chunk.start : chunk.stop] - chunk.first_segment
        lengths_S = plan.lengths_S[chunk.first_segment : chunk.stop_segment]
    return Tokens(
        advantages_C=p.advantages_K[p.turns_N[index_C]],
        weights_C=p.weights_N[index_C],
        old_C=None if p.old_N is None else p.old_N[index_C],
        ref_C=None if p.ref_N is None else p.ref_N[index_C],
        sampler_C=None if p.sampler_N is None else p.sampler_N[index_C],
        segment_C=segment_C,
        lengths_S=lengths_S,
    )
