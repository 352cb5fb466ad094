"""The Triton implementation's two entries: the policy loss and the log-probs."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ...segments.triton_segments import segment_sum
from ..driver import head_sum, run_logprobs, run_policy_loss
from ..problem import LogprobsProblem, Outcome, Problem
from . import selftest
from .choice import choose_design
from .head import INTERPRETED, TritonHead
from .policy import policy_terms


@dataclass(frozen=True, slots=True)
class TritonLoss:
    """The entries of one design; an empty design is chosen per shape by measurement, among those
    that passed the self-test, of which the safe one has to be."""

    design: str

    def unavailable(self, device: torch.device, dtype: torch.dtype) -> str:
        """Why a device and dtype cannot be taken; empty if they can."""
        if dtype == torch.float64:
            return "float64 is taken by the reference only"
        if dtype == torch.float16 and self.design == "anchored":
            return "float16 has no range for exponentials anchored at the target"
        if device.type == "cuda":
            if dtype == torch.float32 and self.design == "anchored":
                return "a float32 tile does not fit; the safe design takes float32"
            if torch.cuda.get_device_capability(device) < (8, 0):
                return "it needs compute capability 8.0 or higher"
            return selftest.failure(device, self.design or "safe", dtype)
        if not INTERPRETED:
            return f"it needs a CUDA device, the tensors are on {device.type}"
        return ""

    def policy_loss(self, problem: Problem) -> Outcome:
        """Loss and gradients of a checked problem."""
        p = problem
        # Triton launches on the current device, which need not be that of the tensors.
        with torch.cuda.device_of(p.hidden_TD):
            head = self._head(p, p.need_hidden, head_sum(p))
            return run_policy_loss(p, head, policy_terms, segment_sum)

    def logprobs(self, problem: LogprobsProblem) -> tuple[Tensor, Tensor]:
        """log-probs and entropies, [N] float32."""
        with torch.cuda.device_of(problem.hidden_TD):
            return run_logprobs(problem, self._head(problem, False, None))

    def _head(
        self, p: Problem | LogprobsProblem, need_hidden: bool, d_head_VD: Tensor | None
    ) -> TritonHead:
        tokens = p.chunk_tokens or p.rows_N.shape[0]
        design = self.design or choose_design(p.head_VD, p.vocab, tokens)
        options = (p.temperature, p.softcap, need_hidden, d_head_VD, design, tokens)
        return TritonHead(p.head_VD, p.vocab, *options)


measured, safe, anchored = TritonLoss(""), TritonLoss("safe"), TritonLoss("anchored")
