"""Checks of tensor values: indices in range, finite numbers, contiguous turns."""

from __future__ import annotations

import torch
from torch import Tensor

from .problem import LogprobsProblem, Problem, compute_dtype


def check_indices(p: LogprobsProblem) -> None:
    """Raise ValueError naming rows, targets or hidden and the first token that is not valid."""
    T, V = p.hidden_TD.shape[0], p.vocab.total
    _raise_first(
        [
            ("rows", _out_of_range(p.rows_N, T), f"expected 0 <= row < {T}", p.rows_N),
            ("targets", _out_of_range(p.targets_N, V), f"expected 0 <= target < {V}", p.targets_N),
        ]
    )
    # A value that is not finite makes the sum not finite, which needs no [T, D] mask. The mask
    # decides, because large finite values may overflow, and rows that no token uses may contain
    # any value.
    if not p.hidden_TD.sum(dtype=compute_dtype(p.hidden_TD.dtype)).isfinite():
        bad_N = ~p.hidden_TD.isfinite().all(dim=1)[p.rows_N]
        _raise_first([("hidden", bad_N, "expected finite values in its row", p.rows_N)])


def check_values(p: Problem) -> None:
    """Raise ValueError naming the first argument with a bad value, and the index of that value."""
    check_indices(p)
    K, turns_N = p.advantages_K.shape[0], p.turns_N
    _raise_first([("turns", _out_of_range(turns_N, K), f"expected 0 <= turn < {K}", turns_N)])
    tests = [
        ("advantages", ~p.advantages_K.isfinite(), "expected finite values", p.advantages_K),
        ("weights", ~p.weights_N.isfinite(), "expected finite values", p.weights_N),
        ("weights", p.weights_N < 0, "expected values >= 0", p.weights_N),
        ("turns", _restarts_a_turn(turns_N, K), "expected contiguous turns", turns_N),
    ]
    for name, values in (
        ("old_logprobs", p.old_N),
        ("ref_logprobs", p.ref_N),
        ("sampler_logprobs", p.sampler_N),
    ):
        if values is not None:
            # The log-prob of a masked token is never read, so it may be any value.
            tests.append((name, ~values.isfinite() & (p.weights_N != 0), "expected finite", values))
    if p.sequences_K is not None:
        tests.append(("sequences", p.sequences_K < 0, "expected ids >= 0", p.sequences_K))
    _raise_first(tests)


def _out_of_range(index_N: Tensor, end: int) -> Tensor:
    return (index_N < 0) | (index_N >= end)


def _restarts_a_turn(turns_N: Tensor, K: int) -> Tensor:
    """Return true at each token that starts a second run of tokens of its turn."""
    n = turns_N.shape[0]
    if n == 0:
        return torch.zeros(0, dtype=torch.bool, device=turns_N.device)
    starts_N = torch.ones_like(turns_N, dtype=torch.bool)
    starts_N[1:] = turns_N[1:] != turns_N[:-1]
    index_N = torch.arange(n, device=turns_N.device)
    first_K = torch.full((K,), n, device=turns_N.device)
    first_K = first_K.scatter_reduce(0, turns_N, index_N, reduce="amin")
    return starts_N & (first_K[turns_N] != index_N)


def _raise_first(tests: list[tuple[str, Tensor, str, Tensor]]) -> None:
    # One device-to-host copy for all tests; the index is looked up only on failure.
    flags = torch.stack([bad.any() for _, bad, _, _ in tests]).tolist()
    for (name, bad, expected, values), failed in zip(tests, flags, strict=True):
        if failed:
            index = int(bad.nonzero()[0])
            raise ValueError(f"{name}: {expected}, got {values[index].item()} at index {index}")
