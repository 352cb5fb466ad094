"""Data-parallel ranks and their collectives.

Started by torchrun (or with RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT set), every
process is one rank with the whole model, its own sampler and its own GPU. With one rank no process
group is created, and every method returns at once.

JSON values and arrays are gathered as bytes with gloo, without pickle; gradients on a GPU are
reduced with NCCL. torch's default process group is not used: the inference engine creates it.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.distributed_c10d import PrefixStore, Store
from torch.distributed.rendezvous import rendezvous

from .. import errors
from ..errors import ConfigError, RankError, TurnfastError

T = TypeVar("T")
AGENT_STORE = "TORCHELASTIC_USE_AGENT_STORE"


class Ranks:
    """The ranks of a run, seen from one of them; `ALONE` is a run without torchrun."""

    def __init__(
        self,
        rank: int = 0,
        size: int = 1,
        *,
        store: Store | None = None,
        timeout_s: float = 1800.0,
    ) -> None:
        self.rank, self.size = rank, size
        self._store = store
        self._timeout = timedelta(seconds=timeout_s)
        self._groups: dict[str, Any] = {}
        if size > 1:
            self.all_gather(None)  # wait for all ranks

    @property
    def is_leader(self) -> bool:
        """Whether this rank writes the files and the console output of the run."""
        return self.rank == 0

    def shard(self, items: Sequence[T]) -> Sequence[T]:
        """This rank's part of a sequence that all ranks have."""
        return items[self.rank :: self.size]

    def all_gather(self, value: T) -> list[T]:
        """The value of each rank, in rank order; it must be JSON."""
        if self.size == 1:
            return [value]
        return [json.loads(text) for text in self._all_gather_bytes(json.dumps(value).encode())]

    def all_gather_arrays(self, arrays: Sequence[np.ndarray]) -> list[list[np.ndarray]]:
        """The 1-d arrays of each rank, in rank order; lengths may differ, dtypes may not."""
        if self.size == 1:
            return [list(arrays)]
        data = self._all_gather_bytes(b"".join(array.tobytes() for array in arrays))
        sizes = self.all_gather([array.nbytes for array in arrays])
        return [
            [
                np.frombuffer(part, array.dtype).copy()
                for array, part in zip(arrays, _split(joined, parts), strict=True)
            ]
            for joined, parts in zip(data, sizes, strict=True)
        ]

    def sum(self, values: Sequence[float]) -> list[float]:
        """Each number summed over the ranks, with the same bits on all of them."""
        return [sum(column) for column in zip(*self.all_gather(list(values)), strict=True)]

    def any(self, flag: bool) -> bool:
        """Whether the flag is true on any rank."""
        return any(self.all_gather(flag))

    def all_reduce(self, tensors: Iterable[Tensor]) -> None:
        """Replace each tensor by its sum over the ranks, with the same bits on all of them."""
        if self.size == 1:
            return
        with self._explain_timeout():
            works = [self._group(tensor.device.type).allreduce([tensor]) for tensor in tensors]
            for work in works:
                work.wait()

    @contextmanager
    def share_errors(self) -> Iterator[None]:
        """If the enclosed code fails on one rank, raise on all ranks. It must use no collective.

        A `TurnfastError` is raised with the same type on all ranks. Any other exception is
        re-raised on its own rank and becomes a `RankError` on the others. If several ranks fail,
        other exceptions come before a `TurnfastError`, then lower ranks before higher ones.
        """
        if self.size == 1:
            yield
            return
        error: Exception | None = None
        try:
            yield
        except Exception as caught:  # raised below, after the other ranks know of it
            error = caught
        gathered = self.all_gather(None if error is None else (type(error).__name__, str(error)))
        failed = [(_shared_kind(f[0]), rank, f) for rank, f in enumerate(gathered) if f is not None]
        if not failed:
            return
        kind, rank, (name, text) = min(failed, key=lambda fail: (fail[0] is not None, fail[1]))
        if rank == self.rank and error is not None:
            raise error
        raise (kind or RankError)(f"rank {rank}: {text or name}") from error

    def check_equal_weights(self, parameters: Iterable[Tensor]) -> None:
        """Raise RankError unless the parameters have the same bits on all ranks."""
        if self.size == 1:
            return
        sums = self.all_gather(checksum(parameters))
        if len(set(sums)) > 1:
            raise RankError(
                f"the ranks hold different weights (checksums {sums}): resume from the last "
                "checkpoint; a likely cause is different hardware or versions of torch"
            )

    def close(self) -> None:
        self._groups.clear()

    def _all_gather_bytes(self, data: bytes) -> list[bytes]:
        lengths = [torch.zeros(1, dtype=torch.int64) for _ in range(self.size)]
        self._all_gather_tensors(lengths, torch.tensor([len(data)]))
        longest = max(int(length) for length in lengths)
        padded = torch.frombuffer(bytearray(data.ljust(longest)), dtype=torch.uint8)
        buffers = [torch.zeros(longest, dtype=torch.uint8) for _ in range(self.size)]
        self._all_gather_tensors(buffers, padded)
        return [
            buffer.numpy()[: int(length)].tobytes()
            for buffer, length in zip(buffers, lengths, strict=True)
        ]

    def _all_gather_tensors(self, outputs: list[Tensor], value: Tensor) -> None:
        with self._explain_timeout():
            self._group("cpu").allgather([outputs], [value]).wait()

    def _group(self, device: str) -> Any:
        if device not in self._groups:
            assert self._store is not None
            store = PrefixStore(f"turnfast/{device}", self._store)
            if device == "cuda":
                options = dist.ProcessGroupNCCL.Options()
                options._timeout = self._timeout
                group = dist.ProcessGroupNCCL(store, self.rank, self.size, options)
            else:
                group = dist.ProcessGroupGloo(store, self.rank, self.size, self._timeout)
            self._groups[device] = group
        return self._groups[device]

    @contextmanager
    def _explain_timeout(self) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:  # gloo's and NCCL's
            reason = str(error).strip().partition("\n")[0]
            raise RankError(
                f"rank {self.rank} of {self.size} lost another rank, or timed out waiting for it: "
                f"see the output of that rank ({reason})"
            ) from error


ALONE = Ranks()


def checksum(parameters: Iterable[Tensor]) -> int:
    """A checksum of the bits and the order of parameters."""
    total = 0
    for index, parameter in enumerate(parameters):
        data = parameter.detach().contiguous().view(torch.uint8).flatten()
        aligned = data.numel() // 4 * 4
        words = data[:aligned].view(torch.int32).sum(dtype=torch.int64)
        rest = data[aligned:].sum(dtype=torch.int64)
        total += (index + 1) * (int(words) + int(rest))
    return total


@contextmanager
def open_ranks(
    environment: Mapping[str, str] | None = None, *, timeout_s: float
) -> Iterator[Ranks]:
    """Join the ranks that the environment variables describe, and select this rank's GPU.

    Args:
        timeout_s: how long one rank waits for another.

    Raises:
        ConfigError: a variable is missing or invalid.
        RankError: not all ranks joined in time.
    """
    variables = os.environ if environment is None else environment
    size = _number(variables, "WORLD_SIZE", 1)
    if size == 1:
        yield ALONE
        return
    rank = _number(variables, "RANK")
    for name in ("MASTER_ADDR", "MASTER_PORT"):
        if not variables.get(name):
            raise ConfigError(f"{name}: not set, but WORLD_SIZE = {size}; start with torchrun")
    _select_gpu(_number(variables, "LOCAL_RANK", rank))
    try:
        store, _, _ = next(rendezvous("env://", timeout=timedelta(seconds=timeout_s)))
    except (RuntimeError, ValueError) as error:
        raise RankError(f"rank {rank} of {size} cannot reach the other ranks: {error}") from error
    # with this variable the inference engine would use torchrun's store for its own group
    os.environ.pop(AGENT_STORE, None)
    ranks = Ranks(rank, size, store=store, timeout_s=timeout_s)
    try:
        yield ranks
    finally:
        ranks.close()


def _shared_kind(name: str) -> type[TurnfastError] | None:
    kind = getattr(errors, name, None)
    return kind if isinstance(kind, type) and issubclass(kind, TurnfastError) else None


def _split(data: bytes, sizes: Iterable[int]) -> Iterator[bytes]:
    start = 0
    for size in sizes:
        yield data[start : start + size]
        start += size


def _select_gpu(index: int) -> None:
    # before CUDA is initialised, so that this process and its engine see one GPU
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is None:
        os.environ["CUDA_VISIBLE_DEVICES"] = str(index)
    elif "," in visible:
        gpus = visible.split(",")
        if index >= len(gpus):
            raise ConfigError(
                f"LOCAL_RANK: {index}, but CUDA_VISIBLE_DEVICES = {visible} has {len(gpus)} GPUs; "
                "start as many processes as there are GPUs"
            )
        os.environ["CUDA_VISIBLE_DEVICES"] = gpus[index]


def _number(variables: Mapping[str, str], name: str, default: int | None = None) -> int:
    text = variables.get(name, "" if default is None else str(default))
    if not text.isdecimal():
        raise ConfigError(f"{name}: {text!r} is not a number; start the ranks with torchrun")
    return int(text)
