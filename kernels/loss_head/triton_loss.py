"""The Triton implementation's two entries: the policy loss and the log-probs."""

from __future__ import annotations

import torch
from torch import Tensor

from ..segments.triton_segments import segment_sum
from . import selftest
from .choice import choose_design
from .driver import run_logprobs, run_policy_loss
from .problem import Outcome, Problem, Vocab
from .triton_head import DESIGNS, TritonHead
from .triton_policy import policy_terms


def unavailable(device: torch.device, dtype: torch.dtype) -> str:
    """Why this implementation cannot take a device and dtype; empty if it can."""
    if dtype == torch.float64:
        return "float64 is taken by the reference only"
    if device.type == "cuda":
        if torch.cuda.get_device_capability(device) < (8, 0):
            return "it needs compute capability 8.0 or higher"
        return selftest.failure(device)
    return ""


def policy_loss(problem: Problem, impl: str) -> Outcome:
    """Loss and gradients of a checked problem, in the design that impl names or measures."""
    p = problem
    tokens = p.chunk_tokens or p.rows_N.shape[0]
    head = TritonHead(
        p.head_VD,
        p.vocab,
        p.temperature,
        p.softcap,
        p.need_hidden,
        p.need_head,
        _design(impl, p.head_VD, p.vocab, tokens),
        tokens,
    )
    return run_policy_loss(p, head, policy_terms, segment_sum)


def logprobs(
    hidden_TD: Tensor,
    head_VD: Tensor,
    vocab: Vocab,
    rows_N: Tensor,
    targets_N: Tensor,
    temperature: float,
    softcap: float | None,
    chunk_tokens: int | None,
    impl: str,
) -> tuple[Tensor, Tensor]:
    """log-probs and entropies, [N] float32."""
    tokens = chunk_tokens or rows_N.shape[0]
    design = _design(impl, head_VD, vocab, tokens)
    head = TritonHead(head_VD, vocab, temperature, softcap, False, False, design, tokens)
    return run_logprobs(hidden_TD, head, vocab, rows_N, targets_N, chunk_tokens)


def _design(impl: str, head_VD: Tensor, vocab: Vocab, tokens: int) -> str:
    named = impl.removeprefix("triton_")
    return named if named in DESIGNS else choose_design(head_VD, vocab, tokens)
