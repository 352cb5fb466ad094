"""Which Triton design is fastest for a shape on this GPU: measured once, remembered per machine."""

from __future__ import annotations

import torch
from torch import Tensor

from ..driver import whole_vocab
from ..problem import Vocab
from . import memory, selftest
from .head import DESIGNS, TritonHead

# Below this many tokens a product does not fill the device and the difference is noise.
MEASURED_TOKENS = 4096
TRIALS = 5


_chosen: dict[tuple[torch.device, int, int, int], str] = {}


def choose_design(head_VD: Tensor, vocab: Vocab, tokens: int) -> str:
    """ "safe" or "anchored"; every rank of the vocabulary's group gets the same answer.

    Only bf16 can be anchored: float16 has no range for its exponentials, and float32 products
    belong to the library.
    """
    if head_VD.dtype != torch.bfloat16 or not head_VD.is_cuda:
        return "safe"
    bucket = min(MEASURED_TOKENS, 1 << max(7, (tokens - 1).bit_length()))
    shape = (head_VD.device, head_VD.shape[0], head_VD.shape[1], bucket)
    if shape not in _chosen:
        _chosen[shape] = _fastest(head_VD, bucket)
    # Ranks cut chunks by their design, so they have to agree before the first collective.
    return ("safe", "anchored")[vocab.least(int(_chosen[shape] == "anchored"), head_VD.device)]


def _fastest(head_VD: Tensor, tokens: int) -> str:
    if selftest.failure(head_VD.device, "anchored", head_VD.dtype):
        return "safe"
    V, D = head_VD.shape
    key = f"design/{memory.device_key(head_VD.device)}/V{V}/D{D}/C{tokens}"
    known = memory.recall(key)
    if known not in DESIGNS:
        known = _measure(head_VD, tokens)
        memory.remember(key, known)
    return known


def _measure(head_VD: Tensor, tokens: int) -> str:
    V, D = head_VD.shape
    x_CD = torch.randn(tokens, D, device=head_VD.device).to(head_VD.dtype)
    targets_C = torch.randint(V, (tokens,), device=head_VD.device)
    times_ms: dict[str, list[float]] = {design: [] for design in DESIGNS}
    heads = {
        design: TritonHead(head_VD, whole_vocab(head_VD), 1.0, None, False, None, design, tokens)
        for design in DESIGNS
    }
    for trial in range(TRIALS + 1):
        for design, head in heads.items():
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            head.forward(x_CD, targets_C, keep=True)
            end.record()
            end.synchronize()
            if trial:
                times_ms[design].append(begin.elapsed_time(end))
    return min(DESIGNS, key=lambda design: sorted(times_ms[design])[TRIALS // 2])
