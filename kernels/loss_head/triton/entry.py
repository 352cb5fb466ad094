"""The Triton loss head: which design runs on which GPU, and its two entry points."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ...segments.triton_segments import segment_sum
from ..driver import run_logprobs, run_policy_loss
from ..problem import LogprobsProblem, Outcome, Problem
from .head import INTERPRETED, Design, TritonHead
from .policy import policy_terms

MIN_CAPABILITY = (8, 0)


def choose_design(dtype: torch.dtype, capability: tuple[int, int]) -> Design:
    """Return the design for a model dtype on a GPU of a compute capability.

    "anchored" for bfloat16 on Hopper (9.x), "safe" otherwise. "safe" moves 10 bytes per logit more
    than its library product. On Hopper the anchored kernel loses less than that to the library, by
    estimate: about the same at D = 3584, a quarter faster at D = 1024. Other architectures have no
    tuned tiles. float16 cannot hold exponentials anchored at the target, and a float32 tile does
    not fit. Change this only with a recorded benchmark (bench/loss_head.py times both designs).
    """
    return "anchored" if dtype == torch.bfloat16 and capability[0] == 9 else "safe"


@dataclass(frozen=True, slots=True)
class TritonLoss:
    """Entry points of one design; None means the one that `choose_design` returns."""

    design: Design | None = None

    def unavailable(self, device: torch.device, dtype: torch.dtype, sharded: bool) -> str:
        """Return why this device and dtype are not supported, or an empty string."""
        if dtype == torch.float64:
            return "only the reference supports float64"
        if self.design == "anchored" and dtype == torch.float16:
            return "float16 cannot hold exponentials anchored at the target"
        if device.type != "cuda":
            return "" if INTERPRETED else f"it needs a CUDA device, the tensors are on {device}"
        if self.design == "anchored" and dtype == torch.float32:
            return "a float32 tile does not fit; use the safe design"
        if torch.cuda.get_device_capability(device) < MIN_CAPABILITY:
            return "it needs compute capability 8.0 or higher"
        return ""

    def policy_loss(self, problem: Problem) -> Outcome:
        """Compute loss and gradients of a checked problem."""
        # Triton launches on the current device, which may differ from the tensors' device.
        with torch.cuda.device_of(problem.hidden_TD):
            return run_policy_loss(problem, self._head(problem), policy_terms, segment_sum)

    def logprobs(self, problem: LogprobsProblem) -> tuple[Tensor, Tensor]:
        """Compute log-probs and entropies, [N] float32."""
        with torch.cuda.device_of(problem.hidden_TD):
            return run_logprobs(problem, self._head(problem))

    def _head(self, p: LogprobsProblem) -> TritonHead:
        design = self.design
        if design is None:
            cuda = p.head_VD.is_cuda
            capability = torch.cuda.get_device_capability(p.head_VD.device) if cuda else (0, 0)
            design = choose_design(p.head_VD.dtype, capability)
        return TritonHead(p, design, tokens=p.chunk_tokens or p.rows_N.shape[0])


automatic, safe, anchored = TritonLoss(), TritonLoss("safe"), TritonLoss("anchored")
