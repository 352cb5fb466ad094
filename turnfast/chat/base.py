"""The interface between chat messages and token ids."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from ..types import Message

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True, slots=True, kw_only=True)
class Conversation:
    """The messages so far and their rendered form.

    Attributes:
        rendered: text of the messages and of the next assistant header.
        prompt_ids: ids to append before the next sample; with `restart`, the whole context.
        restart: the template changed earlier turns, so the next turn starts a new row.
    """

    messages: tuple[Message, ...]
    rendered: str
    prompt_ids: tuple[int, ...]
    restart: bool = False


class ChatInterface(Protocol):
    """Encodes conversations and decodes sampled turns.

    Attributes:
        end_id: the id that ends a turn in the rendered form.
        stop_ids: ids that end a turn when sampled. The stop id is part of the turn and is trained.
    """

    tokenizer: PreTrainedTokenizerBase
    end_id: int
    stop_ids: tuple[int, ...]

    def open(self, messages: Sequence[Message]) -> Conversation:
        """The first prompt: the messages and the header of the assistant's turn."""
        ...

    def extend(
        self, before: Conversation, text: str, closed: bool, messages: Sequence[Message]
    ) -> Conversation:
        """The prompt after one sampled turn and the environment's messages.

        Args:
            text: the sampled turn without its stop id.
            closed: whether a stop id was sampled. If not, `prompt_ids` begins with `end_id`, which
                is not trained.
        """
        ...

    def decode_turn(self, ids: Sequence[int]) -> str:
        """Text of a sampled turn, without stop ids."""
        ...

    def encode_turn(self, text: str) -> tuple[int, ...]:
        """Ids of a scripted assistant turn, with `end_id`."""
        ...
