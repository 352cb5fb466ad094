"""One call of the loss head as a record, and the checks that need the values of its tensors."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from .records import PolicyRule


@dataclass(frozen=True, slots=True, kw_only=True)
class Vocab:
    """The columns of the vocabulary that this rank's head holds, and the group that holds the
    rest."""

    start: int
    size: int
    total: int
    group: dist.ProcessGroup | None

    @classmethod
    def of(cls, head_VD: Tensor, start: int, group_name: str) -> Vocab:
        """The shard's place; with a group, checks that the shards tile the vocabulary.

        One collective of two integers per rank. Raises ValueError naming vocab_start.
        """
        size = head_VD.shape[0]
        if not group_name:
            if start:
                raise ValueError(f"vocab_start: expected 0 without a process group, got {start}")
            return cls(start=0, size=size, total=size, group=None)
        # The name is what an operator's schema can carry; torch's own collectives resolve it so.
        group = dist.distributed_c10d._resolve_process_group(group_name)  # pyright: ignore
        mine = torch.tensor([start, size], dtype=torch.int64, device=head_VD.device)
        parts = [torch.empty_like(mine) for _ in range(dist.get_world_size(group))]
        dist.all_gather(parts, mine, group=group)
        shards = sorted(tuple(part.tolist()) for part in parts)
        total = 0
        for first, length in shards:
            if first != total:
                raise ValueError(
                    f"vocab_start: expected shards that tile the vocabulary, got {shards}"
                )
            total += length
        return cls(start=start, size=size, total=total, group=group)

    def local(self, targets_C: Tensor) -> tuple[Tensor, Tensor]:
        """(column in this shard, clamped to 0; whether the target lies in this shard)."""
        column_C = targets_C - self.start
        owned_C = (column_C >= 0) & (column_C < self.size)
        return column_C.where(owned_C, 0), owned_C

    def least(self, value: int, device: torch.device) -> int:
        """The smallest value of all ranks, so that they cut the same chunks."""
        if self.group is None:
            return value
        x = torch.tensor(value, device=device)
        dist.all_reduce(x, op=dist.ReduceOp.MIN, group=self.group)
        return int(x)

    def sum(self, x: Tensor) -> Tensor:
        if self.group is not None:
            dist.all_reduce(x, group=self.group)
        return x

    def max(self, x: Tensor) -> Tensor:
        if self.group is not None:
            dist.all_reduce(x, op=dist.ReduceOp.MAX, group=self.group)
        return x


@dataclass(frozen=True, slots=True, kw_only=True)
class Problem:
    """All arguments of one turn_policy_loss, shapes and dtypes already checked.

    Integer tensors are int64; the per-token and per-turn floats have the compute dtype (float32, or
    float64 for float64 hidden states), as head_grad_VD has, to which the head's gradient is added
    where it is given. N tokens, K turns, T rows of hidden.
    """

    hidden_TD: Tensor
    head_VD: Tensor
    vocab: Vocab
    rows_N: Tensor
    targets_N: Tensor
    turns_N: Tensor
    sequences_K: Tensor | None
    advantages_K: Tensor
    weights_N: Tensor
    old_N: Tensor | None
    ref_N: Tensor | None
    sampler_N: Tensor | None
    rule: PolicyRule
    temperature: float
    softcap: float | None
    chunk_tokens: int | None
    need_hidden: bool
    need_head: bool
    head_grad_VD: Tensor | None = None

    def without_loss(self) -> LogprobsProblem:
        """The same tokens, of which only the log-probs are wanted."""
        return LogprobsProblem(
            hidden_TD=self.hidden_TD,
            head_VD=self.head_VD,
            vocab=self.vocab,
            rows_N=self.rows_N,
            targets_N=self.targets_N,
            temperature=self.temperature,
            softcap=self.softcap,
            chunk_tokens=self.chunk_tokens,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class LogprobsProblem:
    """All arguments of one linear_logprobs, shapes, dtypes and indices already checked.

    rows_N and targets_N are int64.
    """

    hidden_TD: Tensor
    head_VD: Tensor
    vocab: Vocab
    rows_N: Tensor
    targets_N: Tensor
    temperature: float
    softcap: float | None
    chunk_tokens: int | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What an implementation gives back: loss 0-d, [N] vectors with NaN where nothing was computed,
    the statistics as one vector in the order of PolicyStats, and the gradients in the compute dtype
    or the model's own (empty when not asked for; the head's means nothing where it was added to a
    sum of the caller's)."""

    loss: Tensor
    logprobs_N: Tensor
    entropies_N: Tensor
    turn_logprobs_K: Tensor
    stats: Tensor
    d_hidden_TD: Tensor
    d_head_VD: Tensor


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def check_indices(hidden_TD: Tensor, vocab: Vocab, rows_N: Tensor, targets_N: Tensor) -> None:
    """ValueError naming rows, targets or hidden and the first token that does not fit."""
    T = hidden_TD.shape[0]
    if rows_N.numel() and _hold(
        _within(rows_N, T), _within(targets_N, vocab.total), [_all_finite(hidden_TD)]
    ):
        return
    _refuse(
        [
            ("rows", (rows_N < 0) | (rows_N >= T), f"expected 0 <= row < {T}", rows_N),
            (
                "targets",
                (targets_N < 0) | (targets_N >= vocab.total),
                f"expected 0 <= target < {vocab.total}",
                targets_N,
            ),
        ]
    )
    # Rows that no token uses may hold anything (poisoned padding), so only used rows are looked at.
    finite_T = hidden_TD.isfinite().all(dim=1)
    _refuse([("hidden", ~finite_T[rows_N], "expected finite values in its row", rows_N)])


def check_values(problem: Problem) -> None:
    """ValueError naming the first argument whose values do not fit, with the offending index."""
    p = problem
    check_indices(p.hidden_TD, p.vocab, p.rows_N, p.targets_N)
    K = p.advantages_K.shape[0]
    if _looks_right(p, K):
        return
    _refuse([("turns", (p.turns_N < 0) | (p.turns_N >= K), f"expected 0 <= turn < {K}", p.turns_N)])
    tests = [
        ("advantages", ~p.advantages_K.isfinite(), "expected finite values", p.advantages_K),
        ("weights", ~p.weights_N.isfinite(), "expected finite values", p.weights_N),
        ("weights", p.weights_N < 0, "expected values >= 0", p.weights_N),
        ("turns", _returns_to_earlier(p.turns_N, K), "expected contiguous turns", p.turns_N),
    ]
    for name, values in (
        ("old_logprobs", p.old_N),
        ("ref_logprobs", p.ref_N),
        ("sampler_logprobs", p.sampler_N),
    ):
        if values is not None:
            # A masked token may carry anything: its log-prob is never read.
            tests.append((name, ~values.isfinite() & (p.weights_N != 0), "expected finite", values))
    if p.sequences_K is not None:
        tests.append(("sequences", p.sequences_K < 0, "expected ids >= 0", p.sequences_K))
    _refuse(tests)


def _looks_right(p: Problem, K: int) -> bool:
    """True if all is well; false where only the exact tests can tell. A few sums and extremes
    instead of a mask per test: for a small vocabulary those cost as much as the products."""
    if not p.turns_N.numel():
        return False
    floats = [p.advantages_K, p.weights_N, p.old_N, p.ref_N, p.sampler_N]
    tests = [_all_finite(values) for values in floats if values is not None]
    rising = (p.turns_N[1:] >= p.turns_N[:-1]).all()
    ids = [] if p.sequences_K is None else [p.sequences_K.amin() >= 0]
    return _hold(_within(p.turns_N, K), tests, [rising, p.weights_N.amin() >= 0, *ids])


def _within(index_N: Tensor, end: int) -> list[Tensor]:
    low, high = index_N.aminmax()
    return [low >= 0, high < end]


def _all_finite(x: Tensor) -> Tensor:
    # One value that is not finite makes the sum so. A sum of large finite values may overflow,
    # too: false is no proof.
    return x.sum(dtype=compute_dtype(x.dtype)).isfinite()


def _hold(*tests: list[Tensor]) -> bool:
    # One read-back for all.
    return bool(torch.stack([test for some in tests for test in some]).all())


def _returns_to_earlier(turns_N: Tensor, K: int) -> Tensor:
    """True at each token that starts a run of a turn which already had one."""
    n = turns_N.shape[0]
    if n == 0:
        return torch.zeros(0, dtype=torch.bool, device=turns_N.device)
    starts_N = torch.ones_like(turns_N, dtype=torch.bool)
    starts_N[1:] = turns_N[1:] != turns_N[:-1]
    index_N = torch.arange(n, device=turns_N.device)
    first_K = torch.full((K,), n, device=turns_N.device)
    first_K = first_K.scatter_reduce(0, turns_N, index_N, reduce="amin")
    return starts_N & (first_K[turns_N] != index_N)


def _refuse(tests: list[tuple[str, Tensor, str, Tensor]]) -> None:
    # One read-back for all tests of a list; the index is looked up only on failure.
    flags = torch.stack([bad.any() for _, bad, _, _ in tests]).tolist()
    for (name, bad, expected, values), failed in zip(tests, flags, strict=True):
        if failed:
            index = int(bad.nonzero()[0])
            raise ValueError(f"{name}: {expected}, got {values[index].item()} at index {index}")
