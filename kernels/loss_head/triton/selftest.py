"""Does a Triton design agree with the reference on this GPU? Asked once per GPU and version.

A wrong kernel trains a wrong model without a word, and compilers and drivers do break kernels. The
problems are small, but divisible as real ones are, so that what is compiled and tested here is the
code that a model runs.
"""

from __future__ import annotations

import functools
import warnings
from dataclasses import replace

import torch
from torch import Tensor

from ...segments import triton_segments
from .. import reference
from ..driver import Head, head_sum, run_logprobs, run_policy_loss, whole_vocab
from ..problem import Problem
from ..records import PolicyRule
from ..reference import ReferenceHead
from . import memory
from . import policy as triton_policy
from .head import INTERPRETED, TritonHead

PASSED = "passed"
# Largest error of a token, in units of 1 + |value|; of a gradient's row, in units of its length or
# of the median row's. bf16 rounds to 2e-3 of a row, a wrong tile is off by its own size.
TOKEN_BOUND, GRADIENT_BOUND = 1e-3, 2e-2
# N, D, V: more than one chunk, and a last tile that is not full in any of them.
SIZES = (20, 32, 80) if INTERPRETED else (200, 256, 1520)
# A logit this far above its target's overflows what is anchored there.
FAR = 120.0
# Coefficients so large that a wrong gradient of any one term shows.
RULES = (
    PolicyRule(),
    PolicyRule(ratio="turn", dual_clip=3.0, kl_coef=0.5, entropy_coef=0.5, is_cap=2.0),
    PolicyRule(ratio="sequence", kind="cispo"),
)


@functools.cache
def failure(device: torch.device, design: str, dtype: torch.dtype) -> str:
    """Why a Triton design is off for a device and dtype; empty if it passed.

    A pass is remembered for the processes to come. A failure may be passing, such as a full device:
    it holds for this process, with a warning, and the next one asks again.
    """
    key = f"selftest/{design}-{str(dtype).removeprefix('torch.')}/{memory.device_key(device)}"
    if memory.recall(key) == PASSED:
        return ""
    found = run(device, design, dtype)
    if not found:
        memory.remember(key, PASSED)
        return ""
    found = f"its self-test failed {found}"
    instead = "safe design" if design == "anchored" else "reference"
    warnings.warn(
        f"turnfast: the {design} Triton loss head is OFF on {memory.hardware(device)}: {found}. "
        f"The slower {instead} takes its place; please report this.",
        RuntimeWarning,
        stacklevel=2,
    )
    return found


def run(device: torch.device, design: str, dtype: torch.dtype) -> str:
    """Compare a design with the reference on small problems; the first mismatch in words."""
    with torch.autocast(device.type, enabled=False):  # a caller's would round the reference
        for rule in RULES:
            problem = _problem(device, rule, dtype)
            expected = _answers(problem, "")
            try:
                reason = _mismatch(_answers(problem, design), expected)
            except Exception as error:  # a compiler or driver fault is what this test looks for
                reason = f"{type(error).__name__}: {error}"
            if reason:
                return f"with ratio={rule.ratio!r}, kind={rule.kind!r}: {reason}"
    return ""


def _answers(p: Problem, design: str) -> dict[str, Tensor]:
    """All that training takes from a design, or from the reference where it is empty."""

    def head(need: bool) -> Head:
        given = (p.head_VD, p.vocab, p.temperature, p.softcap, need)
        given += (head_sum(p) if need else None,)
        return TritonHead(*given, design, p.rows_N.shape[0]) if design else ReferenceHead(*given)

    # Triton launches on the current device, which need not be that of the tensors.
    with torch.cuda.device_of(p.hidden_TD):
        if design:
            sums = triton_segments.segment_sum
            out = run_policy_loss(p, head(True), triton_policy.policy_terms, sums)
        else:
            out = run_policy_loss(p, head(True))
        alone = run_logprobs(p.without_loss(), head(False))
    return {
        "loss": out.loss,
        "log-probs": out.logprobs_N,
        "entropies": out.entropies_N,
        "log-probs of turns": out.turn_logprobs_K,
        "log-probs alone": alone[0],
        "entropies alone": alone[1],
        "hidden gradient": out.d_hidden_TD,
        "head gradient": out.d_head_VD,
    }


def _problem(device: torch.device, rule: PolicyRule, dtype: torch.dtype) -> Problem:
    (N, D, V), K = SIZES, 8
    seed = torch.Generator().manual_seed(0)

    # Said in full: a caller may have set another default device or dtype.
    def normal(*shape: int) -> Tensor:
        x = torch.randn(*shape, generator=seed, device="cpu", dtype=torch.float32)
        return x.to(device)

    head_VD = (normal(V, D) * 0.1).to(dtype)
    hidden_TD = normal(N, D).to(dtype)
    # The target is below the last token: row 0 has that one FAR above, and has to be redone.
    targets_N = torch.randint(V - 1, (N,), generator=seed, device="cpu").to(device)
    hidden_TD[0] = head_VD[-1] * (FAR / head_VD[-1].float().square().sum())
    rows_N = torch.arange(N, device=device)
    problem = Problem(
        hidden_TD=hidden_TD,
        head_VD=head_VD,
        vocab=whole_vocab(head_VD),
        rows_N=rows_N,
        targets_N=targets_N,
        turns_N=rows_N * K // N,
        sequences_K=torch.arange(K, device=device) // 2,
        advantages_K=normal(K),
        weights_N=torch.full((N,), 1.0 / N, device=device, dtype=torch.float32),
        old_N=None,
        ref_N=None,
        sampler_N=None,
        rule=rule,
        temperature=1.0,
        softcap=None,
        chunk_tokens=N // 2 + 4,
        need_hidden=True,
        need_head=True,
    )
    known_N, _ = reference.logprobs(problem.without_loss())
    old_N, ref_N, sampler_N = (known_N + 0.2 * normal(N) for _ in range(3))
    return replace(problem, old_N=old_N, ref_N=ref_N, sampler_N=sampler_N)


def _mismatch(found: dict[str, Tensor], expected: dict[str, Tensor]) -> str:
    for name, b in expected.items():
        a = found[name]
        if b.ndim < 2:
            bound, error = TOKEN_BOUND, ((a - b).abs() / (1 + b.abs())).max()
        else:
            lengths = b.norm(dim=1)
            bound = GRADIENT_BOUND
            error = ((a - b).norm(dim=1) / lengths.clamp(min=lengths.median())).max()
        if not float(error) <= bound:
            return f"{name} off by {float(error):.1e} from the reference (bound {bound:.0e})"
    return ""
