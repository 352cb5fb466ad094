"""Figures of single tokens, gathered by the turn they were sampled in."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from ..types import Batch


def by_turn(name: str, values: Iterable[Tensor], batches: Sequence[Batch]) -> dict[str, float]:
    """Means over the tokens of each turn index, `name/turn_1` and so on.

    Args:
        values: one [N] per batch; NaN for tokens that were not computed, which do not count.
    """
    sums = torch.zeros(0, dtype=torch.float64)
    counts = torch.zeros(0, dtype=torch.int64)
    for values_N, batch in zip(values, batches, strict=True):
        known_N = values_N.isfinite()
        places = batch.places_K[batch.turns_N.long()][known_N].cpu()
        size = max(len(counts), int(places.max()) + 1 if len(places) else 0)
        sums, counts = _grown(sums, size), _grown(counts, size)
        sums.index_add_(0, places, values_N[known_N].double().cpu())
        counts += torch.bincount(places, minlength=size)
    means = (sums / counts).tolist()
    return {f"{name}/turn_{k + 1}": mean for k, mean in enumerate(means) if counts[k]}


def drawn_kl(drawn_N: Tensor, other_N: Tensor) -> Tensor:
    """KL(p || q) from tokens drawn from p, by the estimate k3: exp(x) - 1 - x, x = log q - log p.

    Never negative, and right on average (arXiv 2402.03300 uses it for its reference).
    """
    x = other_N - drawn_N
    return x.expm1() - x


def _grown(x: Tensor, size: int) -> Tensor:
    return torch.cat([x, x.new_zeros(size - len(x))])
