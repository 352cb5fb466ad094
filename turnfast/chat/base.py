"""The interface between messages and token ids."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

from ..types import Message

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class ChatError(ValueError):
    """A chat template that cannot be used for training; the text says why."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Conversation:
    """Messages so far and how they were rendered.

    `prompt_ids` are the ids to append before the next sample; with `restart` they are the whole
    context instead. `extended` are the conversations that went on from here, by what was said.
    """

    messages: tuple[Message, ...]
    rendered: str
    prompt_ids: tuple[int, ...]
    restart: bool = False
    extended: list[tuple[Any, Conversation]] = field(default_factory=list, repr=False)


class Bridge(Protocol):
    """Messages to ids and back: `Chat` by the model's template, `RenderedChat` by a renderer."""

    tokenizer: PreTrainedTokenizerBase
    end_id: int
    stop_ids: tuple[int, ...]

    def open(self, messages: Sequence[Message]) -> Conversation: ...

    def extend(
        self, before: Conversation, text: str, closed: bool, messages: Sequence[Message]
    ) -> Conversation: ...

    def text(self, ids: Sequence[int]) -> str: ...

    def encode_reply(self, text: str) -> tuple[int, ...]: ...
