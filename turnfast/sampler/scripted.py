"""A sampler that says what it is told, for tests and demonstrations: no model, any order."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING

from .base import Completion, Request

if TYPE_CHECKING:
    import torch

Reply = Callable[[tuple[int, ...]], Sequence[int]]
Score = Callable[[tuple[int, ...], tuple[int, ...]], Sequence[float]]
Pick = Callable[[Sequence[Request]], Sequence[Request]]


def everything(waiting: Sequence[Request]) -> Sequence[Request]:
    return waiting


def oldest(waiting: Sequence[Request]) -> Sequence[Request]:
    return waiting[:1]


def newest(waiting: Sequence[Request]) -> Sequence[Request]:
    return waiting[-1:]


def shuffled(seed: int) -> Pick:
    """One request per step, drawn at random."""
    generator = random.Random(seed)
    return lambda waiting: [generator.choice(waiting)]


def even_odds(prompt_ids: tuple[int, ...], sampled_ids: tuple[int, ...]) -> Sequence[float]:
    return [-0.6931471805599453] * len(sampled_ids)


class ScriptedSampler:
    """Answers each prompt by a function of its ids.

    Args:
        reply: prompt ids -> sampled ids, the end-of-turn id included; cut at `max_new_tokens`.
        score: log-probabilities of the sampled ids; by default each is log 1/2.
        pick: which of the waiting requests (in order of submission) a step completes.
        max_context: prompt and sampled tokens of one request together.
        capacity: requests it claims to run at the same time.

    Example::

        sampler = ScriptedSampler(lambda prompt_ids: [prompt_ids[-1] + 1, 2], pick=newest)
    """

    def __init__(
        self,
        reply: Reply,
        *,
        score: Score = even_odds,
        pick: Pick = everything,
        max_context: int = 1 << 30,
        capacity: int = 1 << 30,
    ) -> None:
        self._reply = reply
        self._score = score
        self._pick = pick
        self._max_context = max_context
        self.capacity = capacity
        self._waiting: dict[int, Request] = {}
        self.num_loads = 0

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
        """Count the call; there is nothing to load."""
        for _ in named_weights:
            pass
        self.num_loads += 1

    def sleep(self) -> None:
        pass

    def wake(self) -> None:
        pass

    def close(self) -> None:
        pass

    def _complete(self, request: Request) -> Completion:
        reply = tuple(self._reply(request.prompt_ids))
        room = min(request.max_new_tokens, self._max_context - len(request.prompt_ids))
        sampled_ids = reply[:room]
        return Completion(
            id=request.id,
            sampled_ids=sampled_ids,
            logprobs=tuple(self._score(request.prompt_ids, sampled_ids)),
            finish="length" if len(reply) > room else "stop",
        )
