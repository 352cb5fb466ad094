"""Data-parallel ranks: who they are, and the few things they tell each other.

Started by torchrun (or with RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT in the
environment), every process is one rank with the whole model, a sampler and a GPU of its own. Alone,
every method answers at once, and no process group is made.

Texts go through gloo as JSON and vectors as their bytes, nothing pickled; gradients through NCCL
where they are on a GPU. The groups are the ranks' own, not torch's default one: that is left to the
inference engine, which makes one of a single process.
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

from ..errors import ConfigError, RankError

T = TypeVar("T")
AGENT_STORE = "TORCHELASTIC_USE_AGENT_STORE"


class Ranks:
    """The ranks of a run; `ALONE` is the only one there is without torchrun.

    Args:
        told: exceptions that, raised by one rank within `together`, are raised by all.
    """

    def __init__(
        self,
        rank: int = 0,
        size: int = 1,
        *,
        store: Store | None = None,
        timeout_s: float = 1800.0,
        told: Sequence[type[Exception]] = (),
    ) -> None:
        self.rank, self.size = rank, size
        self._store = store
        self._timeout = timedelta(seconds=timeout_s)
        self._told = {kind.__name__: kind for kind in told}
        self._groups: dict[str, Any] = {}
        if size > 1:
            self.gather(None)  # all are there

    @property
    def leads(self) -> bool:
        """Whether this rank writes what a run writes."""
        return self.rank == 0

    def share(self, items: Sequence[T]) -> Sequence[T]:
        """This rank's part of what all have."""
        return items[self.rank :: self.size]

    def gather(self, value: T) -> list[T]:
        """What each rank has, in the order of the ranks; values of JSON."""
        if self.size == 1:
            return [value]
        return [json.loads(text) for text in self._gather_bytes(json.dumps(value).encode())]

    def gather_arrays(self, arrays: Sequence[np.ndarray]) -> list[list[np.ndarray]]:
        """The vectors of each rank, in the order of the ranks. They may differ in length, not in
        dtype."""
        if self.size == 1:
            return [list(arrays)]
        everyone = self._gather_bytes(b"".join(array.tobytes() for array in arrays))
        sizes = self.gather([array.nbytes for array in arrays])
        return [
            [
                np.frombuffer(part, array.dtype).copy()
                for array, part in zip(arrays, _split(whole, theirs), strict=True)
            ]
            for whole, theirs in zip(everyone, sizes, strict=True)
        ]

    def sum(self, values: Sequence[float]) -> list[float]:
        """Each number, added up over the ranks; the same on all of them."""
        return [sum(column) for column in zip(*self.gather(list(values)), strict=True)]

    def any(self, flag: bool) -> bool:
        return any(self.gather(flag))

    def add_up(self, tensors: Iterable[Tensor]) -> None:
        """Replace each tensor by its sum over the ranks, the same bits on all of them."""
        if self.size == 1:
            return
        with self._alarm():
            works = [self._group(tensor.device.type).allreduce([tensor]) for tensor in tensors]
            for work in works:
                work.wait()

    @contextmanager
    def together(self) -> Iterator[None]:
        """Around work without any word between ranks: if it fails on one, it fails on all.

        The lowest rank that failed decides. What it raised is raised by all if they were `told` of
        it; otherwise by itself, and a `RankError` with its text by the others.
        """
        if self.size == 1:
            yield
            return
        fault: Exception | None = None
        try:
            yield
        except Exception as error:  # told to the others first
            fault = error
        ends = self.gather(None if fault is None else (type(fault).__name__, str(fault)))
        failed = [(rank, *end) for rank, end in enumerate(ends) if end is not None]
        # what only one rank knows how to raise weighs more
        failed.sort(key=lambda end: (end[1] in self._told, end[0]))
        if not failed:
            return
        rank, name, text = failed[0]
        if rank == self.rank and fault is not None:
            raise fault
        raise self._told.get(name, RankError)(f"rank {rank}: {text or name}") from fault

    def refuse_difference(self, parameters: Iterable[Tensor]) -> None:
        """Raises RankError unless all ranks hold the same bits."""
        if self.size == 1:
            return
        sums = self.gather(fingerprint(parameters))
        if len(set(sums)) > 1:
            raise RankError(
                f"the ranks no longer hold the same weights (checksums {sums}): resume from the "
                "last checkpoint; likely their machines or versions of torch differ"
            )

    def close(self) -> None:
        self._groups.clear()

    def _gather_bytes(self, text: bytes) -> list[bytes]:
        lengths = [torch.zeros(1, dtype=torch.int64) for _ in range(self.size)]
        self._all_gather(lengths, torch.tensor([len(text)]))
        most = max(int(length) for length in lengths)
        texts = [torch.zeros(most, dtype=torch.uint8) for _ in range(self.size)]
        self._all_gather(texts, torch.frombuffer(bytearray(text.ljust(most)), dtype=torch.uint8))
        return [
            each.numpy()[: int(length)].tobytes()
            for each, length in zip(texts, lengths, strict=True)
        ]

    def _all_gather(self, into: list[Tensor], value: Tensor) -> None:
        with self._alarm():
            self._group("cpu").allgather([into], [value]).wait()

    def _group(self, device: str) -> Any:
        if device not in self._groups:
            assert self._store is not None
            store = PrefixStore(f"turnfast/{device}", self._store)
            if device == "cuda":
                options = dist.ProcessGroupNCCL.Options()
                options._timeout = self._timeout
                made = dist.ProcessGroupNCCL(store, self.rank, self.size, options)
            else:
                made = dist.ProcessGroupGloo(store, self.rank, self.size, self._timeout)
            self._groups[device] = made
        return self._groups[device]

    @contextmanager
    def _alarm(self) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:
            reason = str(error).strip().partition("\n")[0]
            raise RankError(
                f"rank {self.rank} of {self.size} waits in vain for another one, which has "
                f"stopped: see what that one said ({reason})"
            ) from error


ALONE = Ranks()


def fingerprint(parameters: Iterable[Tensor]) -> int:
    """A checksum of the bits of all parameters, and of which of them has which."""
    total = 0
    for index, parameter in enumerate(parameters):
        bits = parameter.detach().contiguous().view(torch.uint8).flatten()
        whole = bits[: bits.numel() // 4 * 4].view(torch.int32).sum(dtype=torch.int64)
        rest = bits[bits.numel() // 4 * 4 :].sum(dtype=torch.int64)
        total += (index + 1) * (int(whole) + int(rest))
    return total


@contextmanager
def open_ranks(
    environment: Mapping[str, str] | None = None,
    *,
    timeout_s: float,
    told: Sequence[type[Exception]] = (),
) -> Iterator[Ranks]:
    """The ranks that the environment speaks of; this one takes the GPU of its place.

    Args:
        timeout_s: how long one rank may wait for another.
    Raises:
        ConfigError: a variable is missing or wrong.
        RankError: not all ranks came.
    """
    variables = os.environ if environment is None else environment
    size = _number(variables, "WORLD_SIZE", 1)
    if size == 1:
        yield ALONE
        return
    rank = _number(variables, "RANK")
    for name in ("MASTER_ADDR", "MASTER_PORT"):
        if not variables.get(name):
            raise ConfigError(f"{name}: not set beside WORLD_SIZE = {size}; start with torchrun")
    _take_gpu(_number(variables, "LOCAL_RANK", rank))
    try:
        store, _, _ = next(rendezvous("env://", timeout=timedelta(seconds=timeout_s)))
    except (RuntimeError, ValueError) as error:
        raise RankError(f"rank {rank} of {size} found no meeting place: {error}") from error
    # else the engine would look for its own group's meeting place at torchrun's
    os.environ.pop(AGENT_STORE, None)
    ranks = Ranks(rank, size, store=store, timeout_s=timeout_s, told=told)
    try:
        yield ranks
    finally:
        ranks.close()


def _split(whole: bytes, sizes: Iterable[int]) -> Iterator[bytes]:
    start = 0
    for size in sizes:
        yield whole[start : start + size]
        start += size


def _take_gpu(place: int) -> None:
    # by what it can see, before CUDA looks: every room, and the engine, then have one GPU
    seen = os.environ.get("CUDA_VISIBLE_DEVICES")
    if seen is None:
        os.environ["CUDA_VISIBLE_DEVICES"] = str(place)
    elif "," in seen:
        gpus = seen.split(",")
        if place >= len(gpus):
            raise ConfigError(
                f"LOCAL_RANK: {place}, but CUDA_VISIBLE_DEVICES = {seen} has {len(gpus)} GPUs; "
                "start as many processes as there are GPUs"
            )
        os.environ["CUDA_VISIBLE_DEVICES"] = gpus[place]


def _number(variables: Mapping[str, str], name: str, default: int | None = None) -> int:
    text = variables.get(name, "" if default is None else str(default))
    if not text.isdecimal():
        raise ConfigError(f"{name}: {text!r} is no number; start the ranks with torchrun")
    return int(text)
