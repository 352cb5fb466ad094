"""Does each Triton design agree with the reference on this GPU? Asked once per GPU and version.

A wrong kernel trains a wrong model without a word, and compilers and drivers do break kernels; the
answer costs less than a second once the kernels are compiled.
"""

from __future__ import annotations

import warnings

import torch
from torch import Tensor

from . import memory, reference
from .driver import run_policy_loss, whole_vocab
from .problem import Outcome, Problem
from .records import PolicyRule
from .triton_head import DESIGNS, TritonHead
from .triton_policy import policy_terms

LOGPROB_BOUND, GRADIENT_BOUND = 1e-3, 1e-2


def failure(device: torch.device) -> str:
    """Why the Triton kernels are off on this device; empty if they passed."""
    key = f"selftest/{memory.device_key(device)}"
    known = memory.recall(key)
    if known is None:
        known = run(device)
        # A failure may be passing, such as a full device: the next process asks again.
        memory.remember(key, known, lasting=not known)
    if known:
        warnings.warn(
            f"turnfast: the Triton loss head is OFF on {torch.cuda.get_device_name(device)}: "
            f"{known}. The slower reference takes its place; please report this.",
            RuntimeWarning,
            stacklevel=3,
        )
    return known


def run(device: torch.device, tokens: int = 200, width: int = 256, vocab: int = 1500) -> str:
    """Compare every design with the reference on a small problem; the first mismatch in words."""
    for rule in (PolicyRule(), PolicyRule(ratio="turn", entropy_coef=0.01)):
        problem = _problem(device, rule, tokens, width, vocab)
        expected = reference.policy_loss(problem)
        for design in DESIGNS:
            p = problem
            head = TritonHead(p.head_VD, p.vocab, 1.0, None, True, True, design, 256)
            try:
                found = run_policy_loss(p, head, policy_terms)
            except Exception as error:  # a compiler or driver fault is what this test looks for
                return f"{design} kernels failed with {type(error).__name__}: {error}"
            reason = _mismatch(found, expected)
            if reason:
                return f"{design} kernels with ratio={rule.ratio!r}: {reason}"
    return ""


def _problem(device: torch.device, rule: PolicyRule, N: int, D: int, V: int) -> Problem:
    K = 8
    seed = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=seed).to(device)

    head_VD = (normal(V, D) * 0.1).bfloat16()
    hidden_TD = normal(N, D).bfloat16()
    # One row far from its target: the path that redoes rows has to run as well.
    hidden_TD[0] *= 40
    return Problem(
        hidden_TD=hidden_TD,
        head_VD=head_VD,
        vocab=whole_vocab(head_VD),
        rows_N=torch.arange(N, device=device),
        targets_N=torch.randint(V, (N,), generator=seed).to(device),
        turns_N=torch.arange(N, device=device) * K // N,
        sequences_K=None,
        advantages_K=normal(K),
        weights_N=torch.full((N,), 1.0 / N, device=device),
        old_N=None,
        ref_N=None,
        sampler_N=None,
        rule=rule,
        temperature=1.0,
        softcap=None,
        chunk_tokens=max(1, N // 2 - 4),
        need_hidden=True,
        need_head=True,
    )


def _mismatch(found: Outcome, expected: Outcome) -> str:
    checks = [
        ("log-probs", found.logprobs_N, expected.logprobs_N, LOGPROB_BOUND),
        ("hidden gradient", found.d_hidden_TD, expected.d_hidden_TD, GRADIENT_BOUND),
        ("head gradient", found.d_head_VD, expected.d_head_VD, GRADIENT_BOUND),
    ]
    for name, a, b, bound in checks:
        error = float((a - b).norm() / b.norm())
        if not error <= bound:
            return f"{name} off by {error:.1e} relative to the reference (bound {bound:.0e})"
    return ""
