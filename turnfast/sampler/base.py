"""What a sampler is: requests of token ids in, completions of token ids and log-probs out.

It is stepped by hand so that trajectories advance independently: while one waits for its tool,
`step` keeps generating for the others.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from ..types import Finish

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """One turn to sample. `temperature` 0 is greedy. The same seed and prompt give the same ids,
    whatever else is in flight."""

    id: int
    prompt_ids: tuple[int, ...]
    max_new_tokens: int
    temperature: float
    seed: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Completion:
    """Sampled ids (end-of-turn token included when drawn) and their log-probs under the sampling
    distribution: temperature applied, natural log. Greedy ids have those of temperature 1."""

    id: int
    sampled_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    finish: Finish
    cached_tokens: int = 0


class Sampler(Protocol):
    """An engine with weights of its own. Not thread-safe; one owner steps it."""

    def submit(self, request: Request) -> None: ...

    def abort(self, ids: Sequence[int]) -> None: ...

    def step(self) -> list[Completion]:
        """Advance every running request by at least one token; the finished ones are returned."""
        ...

    @property
    def num_pending(self) -> int: ...

    @property
    def capacity(self) -> int:
        """Requests that can run at the same time; more wait."""
        ...

    @property
    def asleep(self) -> bool:
        """True between `sleep` and the next `load_weights`, where sleeping does anything."""
        ...

    def shares(self, model: torch.nn.Module) -> bool:
        """Whether it samples with this very module, so that its weights cannot be others."""
        ...

    def load_weights(self, named_weights: Iterable[tuple[str, torch.Tensor]]) -> None:
        """Replace the weights in place, by Hugging Face parameter name, and drop every cache that
        was computed with the old ones."""
        ...

    def sleep(self) -> None:
        """Free what the trainer could use meanwhile; nothing on CPU."""
        ...

    def wake(self) -> None:
        """Undo `sleep`; weights are undefined until `load_weights`."""
        ...

    def close(self) -> None: ...
