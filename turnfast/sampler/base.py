"""The interface of a sampler: requests of token ids in, completions with log-probabilities out.

The rollout steps it by hand, so trajectories advance independently: while one waits for its tool,
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
    """One turn to sample; `temperature` 0 is greedy. The samples depend only on the prompt, the
    limits and the seed, not on other requests."""

    id: int
    prompt_ids: tuple[int, ...]
    max_new_tokens: int
    temperature: float
    seed: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Completion:
    """A finished request.

    Attributes:
        sampled_ids: with the stop id, if one was drawn.
        logprobs: natural log, under the sampling distribution with its temperature; greedy samples
            have those of temperature 1.
        cached_tokens: prompt tokens whose keys and values were reused.
    """

    id: int
    sampled_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    finish: Finish
    cached_tokens: int = 0


class Sampler(Protocol):
    """An engine with model weights. It is not thread-safe."""

    def submit(self, request: Request) -> None: ...

    def abort(self, ids: Sequence[int]) -> None: ...

    def step(self) -> list[Completion]:
        """Advance every running request by at least one token and return the finished ones."""
        ...

    @property
    def num_pending(self) -> int:
        """Requests that are running or waiting."""
        ...

    @property
    def capacity(self) -> int:
        """Requests that can run at the same time; more wait."""
        ...

    @property
    def asleep(self) -> bool:
        """True between `sleep` and the next `load_weights`, if the engine can sleep."""
        ...

    def shares(self, model: torch.nn.Module) -> bool:
        """Whether it samples with this very module and not with a copy of its weights."""
        ...

    def load_weights(self, named_weights: Iterable[tuple[str, torch.Tensor]]) -> None:
        """Replace all weights in place, by Hugging Face parameter name, and drop every cache that
        was computed with the old ones. Ends sleep.

        Raises:
            SyncError: requests are in flight, or the names are not those of the model.
        """
        ...

    def sleep(self) -> None:
        """Free device memory for the trainer until `load_weights`; does nothing on a CPU."""
        ...

    def close(self) -> None: ...
