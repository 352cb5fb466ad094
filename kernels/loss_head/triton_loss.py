"""The Triton implementation's two entries: the policy loss and the log-probs."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..segments.triton_segments import segment_sum
from . import selftest
from .choice import choose_design
from .driver import run_logprobs, run_policy_loss
from .problem import Outcome, Problem, Vocab
from .triton_head import INTERPRETED, TritonHead
from .triton_policy import policy_terms


@dataclass(frozen=True, slots=True)
class TritonLoss:
    """The entries of one design; an empty design is chosen per shape by measurement."""

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
            return selftest.failure(device)
        if not INTERPRETED:
            return f"it needs a CUDA device, the tensors are on {device.type}"
        return ""

    def policy_loss(self, problem: Problem) -> Outcome:
        """Loss and gradients of a checked problem."""
        p = problem
        tokens = p.chunk_tokens or p.rows_N.shape[0]
        # Triton launches on the current device, which need not be that of the tensors.
        with torch.cuda.device_of(p.hidden_TD):
            design = self.design or choose_design(p.head_VD, p.vocab, tokens)
            head = TritonHead(
                p.head_VD,
                p.vocab,
                p.temperature,
                p.softcap,
                p.need_hidden,
                p.need_head,
                design,
                tokens,
            )
            return run_policy_loss(p, head, policy_terms, segment_sum)

    def logprobs(
        self,
        hidden_TD: Tensor,
        head_VD: Tensor,
        vocab: Vocab,
        rows_N: Tensor,
        targets_N: Tensor,
        temperature: float,
        softcap: float | None,
        chunk_tokens: int | None,
    ) -> tuple[Tensor, Tensor]:
        """log-probs and entropies, [N] float32."""
        tokens = chunk_tokens or rows_N.shape[0]
        with torch.cuda.device_of(hidden_TD):
            design = self.design or choose_design(head_VD, vocab, tokens)
            head = TritonHead(head_VD, vocab, temperature, softcap, False, False, design, tokens)
            return run_logprobs(hidden_TD, head, rows_N, targets_N, chunk_tokens)


measured, safe, anchored = TritonLoss(""), TritonLoss("safe"), TritonLoss("anchored")
