"""The records of one call: vocabulary shard, problem, outcome."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from .records import PolicyRule


@dataclass(frozen=True, slots=True, kw_only=True)
class Vocab:
    """The vocabulary columns [start, start + size) of this rank's head, and the group of all."""

    start: int
    size: int
    total: int
    group: dist.ProcessGroup | None

    @classmethod
    def of(cls, head_VD: Tensor, start: int = 0, group_name: str = "") -> Vocab:
        """Describe this rank's shard; with a group, check that the shards tile the vocabulary.

        One collective of two integers per rank. Raises ValueError naming vocab_start.
        """
        size = head_VD.shape[0]
        if not group_name:
            if start:
                raise ValueError(f"vocab_start: expected 0 without a process group, got {start}")
            return cls(start=0, size=size, total=size, group=None)
        # An operator's schema can carry a name only; torch's own collectives resolve it like this.
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
        """Return the columns in this shard, 0 for other targets, and which targets it owns."""
        column_C = targets_C - self.start
        owned_C = (column_C >= 0) & (column_C < self.size)
        return column_C.where(owned_C, 0), owned_C

    def least(self, value: int, device: torch.device) -> int:
        """Return the smallest value of all ranks, for choices that must agree."""
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
class LogprobsProblem:
    """The arguments of one linear_logprobs with checked shapes and dtypes; indices are int64.

    The last three fields are only set in a Problem.
    """

    hidden_TD: Tensor
    head_VD: Tensor
    vocab: Vocab
    rows_N: Tensor
    targets_N: Tensor
    temperature: float
    softcap: float | None
    chunk_tokens: int | None
    need_hidden: bool = False
    need_head: bool = False
    head_grad_VD: Tensor | None = None

    def head_gradient(self) -> Tensor | None:
        """Return the buffer to add the head's gradient to: the caller's or zeros; None: unused."""
        if not self.need_head or self.head_grad_VD is not None:
            return self.head_grad_VD
        return torch.zeros_like(
            self.head_VD,
            dtype=compute_dtype(self.head_VD.dtype),
            memory_format=torch.contiguous_format,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Problem(LogprobsProblem):
    """The arguments of one turn_policy_loss with checked shapes and dtypes.

    Integer tensors are int64. The floats per token and per turn, and head_grad_VD, have the compute
    dtype: float32, or float64 for float64 hidden states.
    """

    turns_N: Tensor
    sequences_K: Tensor | None
    advantages_K: Tensor
    weights_N: Tensor
    old_N: Tensor | None
    ref_N: Tensor | None
    sampler_N: Tensor | None
    rule: PolicyRule


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """The result of an implementation.

    logprobs_N, entropies_N: NaN for tokens that were not computed. stats: one vector in the order
    of PolicyStats. d_hidden_TD, d_head_VD: compute dtype or model dtype, empty where not needed;
    d_head_VD has no meaning where the gradient was added to the caller's buffer.
    """

    loss: Tensor
    logprobs_N: Tensor
    entropies_N: Tensor
    turn_logprobs_K: Tensor
    stats: Tensor
    d_hidden_TD: Tensor
    d_head_VD: Tensor


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32
