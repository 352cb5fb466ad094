"""Means over the tokens of each turn index."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from ..metrics.reduce import Mean
from ..types import Batch


def by_turn(name: str, values: Iterable[Tensor], batches: Sequence[Batch]) -> dict[str, Mean]:
    """Means over the tokens of each turn index: `name/turn_1`, `name/turn_2`, …

    Args:
        values: one [N] per batch; tokens that were not computed are NaN and do not count.
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
    pairs = zip(sums.tolist(), counts.tolist(), strict=True)
    return {f"{name}/turn_{k}": Mean(x, n) for k, (x, n) in enumerate(pairs, 1) if n}


def drawn_kl(drawn_N: Tensor, other_N: Tensor) -> Tensor:
    """Estimate KL(p || q) from tokens drawn from p by k3: exp(x) - 1 - x with x = log q - log p.

    Unbiased and never negative (as in arXiv 2402.03300).
    """
    x = other_N - drawn_N
    return x.expm1() - x


def _grown(x: Tensor, size: int) -> Tensor:
    return torch.cat([x, x.new_zeros(size - len(x))])
