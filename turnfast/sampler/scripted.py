"""A sampler whose completions are computed by a function, for tests and demonstrations."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING

from .base import Completion, Request

if TYPE_CHECKING:
    import torch

Reply = Callable[[Request], Sequence[int]]
Score = Callable[[Request, tuple[int, ...]], Sequence[float]]
Pick = Callable[[Sequence[Request]], Sequence[Request]]


def everything(waiting: Sequence[Request]) -> Sequence[Request]:
    return waiting


def shuffled(seed: int) -> Pick:
    """One random request per step."""
    generator = random.Random(seed)
    return lambda waiting: [generator.choice(waiting)]


def log_half(request: Request, sampled_ids: tuple[int, ...]) -> Sequence[float]:
    return [math.log(0.5)] * len(sampled_ids)


class ScriptedSampler:
    """Completes each request by a function of it.

    Args:
        reply: sampled ids of a request, with the end-of-turn id; cut at `max_new_tokens`.
        score: log-probabilities of the sampled ids; log 1/2 each by default.
        pick: the requests that a step completes, out of those waiting in order of submission.
        capacity: what it reports as `capacity`.

    Example::

        sampler = ScriptedSampler(lambda request: [request.prompt_ids[-1] + 1, 2], pick=shuffled(0))
    """

    def __init__(
        self,
        reply: Reply,
        *,
        score: Score = log_half,
        pick: Pick = everything,
        capacity: int = 1 << 30,
    ) -> None:
        self._reply = reply
        self._score = score
        self._pick = pick
        self.capacity = capacity
        self._waiting: dict[int, Request] = {}

    @property
    def num_pending(self) -> int:
        return len(self._waiting)

    @property
    def asleep(self) -> bool:
        return False

    def submit(self, request: Request) -> None:
        if request.id in self._waiting:
            raise ValueError(f"request {request.id} is in flight already")
        self._waiting[request.id] = request

    def abort(self, ids: Sequence[int]) -> None:
        for request_id in ids:
            self._waiting.pop(request_id, None)

    def step(self) -> list[Completion]:
        if not self._waiting:
            return []
        picked = list(self._pick(list(self._waiting.values())))
        for request in picked:
            del self._waiting[request.id]
        return [self._complete(request) for request in picked]

    def shares(self, model: torch.nn.Module) -> bool:
        return False

    def load_weights(self, named_weights: Iterable[tuple[str, torch.Tensor]]) -> None:
        """Do nothing: it has no weights."""

    def sleep(self) -> None:
        pass

    def close(self) -> None:
        pass

    def _complete(self, request: Request) -> Completion:
        reply = tuple(self._reply(request))
        sampled_ids = reply[: request.max_new_tokens]
        return Completion(
            id=request.id,
            sampled_ids=sampled_ids,
            logprobs=tuple(self._score(request, sampled_ids)),
            finish="stop" if sampled_ids == reply else "length",
        )
