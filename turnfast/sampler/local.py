"""The sampler in plain torch: a Hugging Face causal model with continuous batching.

It samples with the trainer's module, so there is no second copy of the weights. Each step is one
forward over the prompts of newly admitted requests and one token of every running request.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from ..errors import ConfigError, SyncError
from ..model.lora import adapted_layers
from ..types import Finish
from .base import Completion, Request
from .cache import KVCache
from .ragged import ATTENTION_NAME, Copy, Segment, StepPlan, ragged_attention
from .slots import SlotTable

ALL_ATTENTION_FUNCTIONS.register(ATTENTION_NAME, ragged_attention)

MAX_PROMPT_TOKENS = 16384
"""Prompt tokens per forward; the first request is admitted whatever its length."""


@dataclass(slots=True)
class _Running:
    request: Request
    slot: int
    cached: int
    generator: torch.Generator | None
    sampled_ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)


class LocalSampler:
    """Continuous batching over a fixed number of cache slots.

    A waiting request takes the slot of a finished one in the next step. Keys and values of a shared
    prefix are reused, within a trajectory and between the rollouts of one prompt.

    Args:
        model: usually the trainer's; a step leaves it in eval mode.
        stop_ids: a request ends when it draws one of these; the id stays in `sampled_ids`.
        num_slots: requests that run at the same time.
        max_context: prompt and sampled tokens of one request together.
    Raises:
        ConfigError: the model does not use transformers' attention interface.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        *,
        stop_ids: Sequence[int],
        num_slots: int,
        max_context: int,
    ) -> None:
        if not getattr(model, "_supports_attention_backend", False):
            raise ConfigError(
                f"sampler.backend: {type(model).__name__} does not use transformers' attention "
                "interface, which the local sampler needs; set it to 'vllm'"
            )
        self._model: Any = model
        self._device = next(model.parameters()).device
        self._stop_ids = frozenset(stop_ids)
        self._max_context = max_context
        self.capacity = num_slots
        self._slots = SlotTable(num_slots, max_context)
        self._cache = KVCache(num_slots, max_context)
        self._waiting: deque[Request] = deque()
        self._running: list[_Running] = []

    @property
    def num_pending(self) -> int:
        return len(self._waiting) + len(self._running)

    @property
    def asleep(self) -> bool:
        return False

    def submit(self, request: Request) -> None:
        if not 0 < len(request.prompt_ids) < self._max_context:
            raise ValueError(
                f"request {request.id}: a prompt of {len(request.prompt_ids)} tokens; it must have "
                f"1 to {self._max_context - 1}"
            )
        self._waiting.append(request)

    def abort(self, ids: Sequence[int]) -> None:
        aborted = set(ids)
        self._waiting = deque(r for r in self._waiting if r.id not in aborted)
        for row in self._running:
            if row.request.id in aborted:
                self._slots.release(row.slot)
        self._running = [row for row in self._running if row.request.id not in aborted]

    @torch.no_grad()
    def step(self) -> list[Completion]:
        decoding = [(self._feed_last_token(row), row) for row in self._running]
        admitted, copies = self._admit()
        # `StepPlan` needs segments of one token first, by slot
        fed = sorted(decoding + admitted, key=lambda pair: (pair[0].size > 1, pair[0].slot))
        if not fed:
            return []
        segments, rows = zip(*fed, strict=True)
        tokens = [self._slots.tokens(s.slot)[s.start : s.stop] for s in segments]
        plan = StepPlan(self._cache, segments, copies, self._device)
        with _sampling_mode(self._model):
            logits_RV = self._model(
                input_ids=torch.tensor(
                    np.concatenate(tokens, dtype=np.int64)[None], device=self._device
                ),
                position_ids=plan.positions_T[None],
                use_cache=False,
                logits_to_keep=plan.last_tokens,
                step_plan=plan,
            ).logits[0]
        self._slots.unpin()
        ids, logprobs = draw(
            logits_RV, [row.request.temperature for row in rows], [row.generator for row in rows]
        )
        return self._record(rows, ids, logprobs)

    def shares(self, model: torch.nn.Module) -> bool:
        return self._model is model

    def load_weights(self, named_weights: Iterable[tuple[str, torch.Tensor]]) -> None:
        """Copy the tensors that are not the model's own, and discard the cache."""
        if self.num_pending:
            raise SyncError(f"{self.num_pending} requests are in flight while weights change")
        self._slots.clear()
        if adapted_layers(self._model):
            return  # only the trainer's module has an adapter, and it is sampled with directly
        own = dict(self._model.named_parameters(remove_duplicate=False))
        loaded: set[int] = set()
        with torch.no_grad():
            for name, tensor in named_weights:
                if name not in own:
                    raise SyncError(f"the sampler's model has no parameter {name!r}")
                loaded.add(own[name].data_ptr())
                if own[name].data_ptr() != tensor.data_ptr():
                    own[name].copy_(tensor)
        missing = [name for name, tensor in own.items() if tensor.data_ptr() not in loaded]
        if missing:
            raise SyncError(
                f"the sampler got no values for {len(missing)} parameters: {', '.join(missing[:4])}"
            )

    def sleep(self) -> None:
        if self._device.type == "cuda":
            self.close()

    def close(self) -> None:
        self._cache.layers.clear()
        self._slots.clear()

    def _feed_last_token(self, row: _Running) -> Segment:
        position = self._slots.length(row.slot)
        self._slots.append(row.slot, row.sampled_ids[-1])
        return Segment(slot=row.slot, start=position, stop=position + 1)

    def _admit(self) -> tuple[list[tuple[Segment, _Running]], list[Copy]]:
        admitted: list[tuple[Segment, _Running]] = []
        copies: dict[tuple[int, int], list[int]] = {}
        num_tokens = 0
        while self._waiting and num_tokens < MAX_PROMPT_TOKENS:
            request = self._waiting[0]
            placement = self._slots.place(request.prompt_ids)
            if placement is None:
                break
            self._waiting.popleft()
            if placement.source is not None:
                key = (placement.source, placement.cached)
                copies.setdefault(key, []).append(placement.slot)
            row = _Running(request, placement.slot, placement.cached, _generator(request))
            self._running.append(row)
            stop = len(request.prompt_ids)
            admitted.append((Segment(slot=row.slot, start=row.cached, stop=stop), row))
            num_tokens += stop - row.cached
        return admitted, [
            Copy(source=source, length=length, targets=tuple(targets))
            for (source, length), targets in copies.items()
        ]

    def _record(
        self, rows: Sequence[_Running], ids: Sequence[int], logprobs: Sequence[float]
    ) -> list[Completion]:
        done: list[Completion] = []
        for row, token_id, logprob in zip(rows, ids, logprobs, strict=True):
            row.sampled_ids.append(token_id)
            row.logprobs.append(logprob)
            finish = self._finish(row)
            if finish is not None:
                self._slots.release(row.slot)
                completion = Completion(
                    id=row.request.id,
                    sampled_ids=tuple(row.sampled_ids),
                    logprobs=tuple(row.logprobs),
                    finish=finish,
                    cached_tokens=row.cached,
                )
                done.append(completion)
        finished = {completion.id for completion in done}
        self._running = [row for row in self._running if row.request.id not in finished]
        return done

    def _finish(self, row: _Running) -> Finish | None:
        if row.sampled_ids[-1] in self._stop_ids:
            return "stop"
        num_sampled = len(row.sampled_ids)
        context_full = len(row.request.prompt_ids) + num_sampled >= self._max_context
        return "length" if context_full or num_sampled >= row.request.max_new_tokens else None


def draw(
    logits_RV: torch.Tensor,
    temperatures: Sequence[float],
    generators: Sequence[torch.Generator | None],
) -> tuple[list[int], list[float]]:
    """Sample one token per row by the exponential race, argmax(p / Exp(1)).

    The noise of a row depends on its own generator only. The winner's margin does not shrink with
    the size of the vocabulary, so rounding differences between batches do not change the sample. A
    row without a generator is greedy and reports the log-probability of temperature 1.

    Returns:
        The ids and their log-probabilities.
    """
    divisors = [1.0 if g is None else t for t, g in zip(temperatures, generators, strict=True)]
    logits = logits_RV.float()
    if any(d != 1.0 for d in divisors):
        logits = logits / torch.tensor(divisors, device=logits.device)[:, None]
    logprobs_RV = torch.log_softmax(logits, dim=-1)
    noise_RV = torch.ones(logprobs_RV.shape, dtype=torch.float32)
    for row, generator in zip(noise_RV, generators, strict=True):
        if generator is not None:
            row.exponential_(generator=generator)
    scores = logprobs_RV - noise_RV.to(logprobs_RV.device).log_()
    ids = scores.argmax(dim=-1)
    return ids.tolist(), logprobs_RV.gather(1, ids[:, None]).squeeze(1).tolist()


def _generator(request: Request) -> torch.Generator | None:
    if request.temperature == 0.0:
        return None
    return torch.Generator().manual_seed(request.seed)


@contextmanager
def _sampling_mode(model: Any) -> Iterator[None]:
    # `update` restores the training mode: switching it here after every forward would cost a walk
    # over all modules
    attention = model.config._attn_implementation
    model.config._attn_implementation = ATTENTION_NAME
    if model.training:
        model.eval()
    try:
        yield
    finally:
        model.config._attn_implementation = attention
