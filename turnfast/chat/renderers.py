"""Convert messages to token ids with Prime Intellect's package `renderers`.

As with `Chat`, ids are only appended to a prompt, sampled ids are kept, and if the model's format
rewrites earlier turns, the next turn begins a new row. A renderer is written for one family of
models. It also knows which reasoning is kept, and how to close a turn that was cut inside its
reasoning.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..errors import ConfigError
from ..types import Message
from .base import Conversation
from .template import Chat

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

EXAMPLE: list[Message] = [
    {"role": "system", "content": "."},
    {"role": "user", "content": "."},
    {"role": "assistant", "content": "."},
]
USER_REPLY: Message = {"role": "user", "content": "."}
TOOL_REPLY: Message = {"role": "tool", "name": "tool", "content": "."}


@dataclass(frozen=True, slots=True, kw_only=True)
class RenderedConversation(Conversation):
    """A conversation with all its ids.

    In `context_ids` the sampled turns are encoded again: the renderer reads only their delimiters,
    and these ids are never trained.
    """

    context_ids: tuple[int, ...]


class RenderedChat:
    """`ChatInterface` of a renderer.

    Args:
        tokenizer: must also have a chat template, which defines how a turn ends.
        name: a renderer such as `qwen3`; `auto` selects it by the tokenizer's hub name.
        tools: JSON schemas that are offered to the model.
    Raises:
        ConfigError: there is no such renderer, or it does not fit the tokenizer.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, name: str, tools: Sequence[dict] = ()
    ) -> None:
        self.tokenizer = tokenizer
        self._template = Chat(tokenizer, tools)
        self._tools = list(tools) or None
        self._renderer = _open_renderer(tokenizer, name, self._tools)
        self.end_id = self._template.end_id
        stop_ids = (*self._template.stop_ids, *self._renderer.get_stop_token_ids())
        self.stop_ids = tuple(dict.fromkeys(stop_ids))

    def open(self, messages: Sequence[Message]) -> RenderedConversation:
        return self._start(tuple(dict(message) for message in messages))

    def extend(
        self, before: Conversation, text: str, closed: bool, messages: Sequence[Message]
    ) -> RenderedConversation:
        assert isinstance(before, RenderedConversation)
        turn: Message = {"role": "assistant", "content": text}
        history = (*before.messages, turn, *messages)
        sampled = self.tokenizer.encode(text, add_special_tokens=False)
        sampled += [self.end_id] if closed else []
        head = [*before.context_ids, *sampled]
        bridged = self._renderer.bridge_to_next_turn(
            list(before.context_ids), sampled, list(messages), tools=self._tools
        )
        # None if the format may rewrite earlier turns; the ids show whether it did
        ids = bridged.token_ids if bridged else _render_ids(self._renderer, history, self._tools)
        if ids[: len(head)] != head:
            return self._start(history, restart=True)
        return RenderedConversation(
            messages=history,
            rendered="",
            prompt_ids=tuple(ids[len(head) :]),
            context_ids=tuple(ids),
        )

    def decode_turn(self, ids: Sequence[int]) -> str:
        return self._template.decode_turn([token for token in ids if token not in self.stop_ids])

    def encode_turn(self, text: str) -> tuple[int, ...]:
        return self._template.encode_turn(text)

    def _start(
        self, messages: tuple[Message, ...], *, restart: bool = False
    ) -> RenderedConversation:
        ids = tuple(_render_ids(self._renderer, messages, self._tools))
        return RenderedConversation(
            messages=messages, rendered="", prompt_ids=ids, context_ids=ids, restart=restart
        )


class _PlainTextTokenizer:
    """A tokenizer that encodes special-token strings as plain text."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer

    def __getattr__(self, name: str) -> Any:
        return getattr(self._tokenizer, name)

    def __call__(self, text: Any, **kwargs: Any) -> Any:
        return self._tokenizer(text, split_special_tokens=True, **kwargs)

    def encode(self, text: str, **kwargs: Any) -> list[int]:
        return self._tokenizer.encode(text, split_special_tokens=True, **kwargs)


def _open_renderer(tokenizer: Any, name: str, tools: list[dict] | None) -> Any:
    if importlib.util.find_spec("renderers") is None:
        raise ConfigError(
            f"model.renderer: {name!r} needs the package renderers; install turnfast[renderers], "
            "or set it to 'template'"
        )
    import renderers
    from renderers.base import MODEL_RENDERER_MAP

    names = sorted(set(MODEL_RENDERER_MAP.values()))
    if name == "auto":
        # the package's own default for an unknown model cannot bridge turns
        name = MODEL_RENDERER_MAP.get(str(tokenizer.name_or_path), "")
        if not name:
            raise ConfigError(
                f"model.renderer: 'auto' finds no renderer for {tokenizer.name_or_path}; set it to "
                f"one of {', '.join(names)}, or to 'template'"
            )
    if name not in names:
        raise ConfigError(
            f"model.renderer: no such renderer {name!r}; set it to one of {', '.join(names)}, "
            "'auto' or 'template'"
        )
    config: Any = renderers.config_from_name(name)  # declared as the base class, not as the union
    try:
        plain_text = renderers.create_renderer(_PlainTextTokenizer(tokenizer), config)
        usual = renderers.create_renderer(tokenizer, config)
        example = [*EXAMPLE, USER_REPLY if tools is None else TOOL_REPLY]
        same = _render_ids(plain_text, example, tools) == _render_ids(usual, example, tools)
    except Exception as error:  # each renderer checks the tokenizer in its own way
        raise ConfigError(
            f"model.renderer: {name!r} does not fit the tokenizer of {tokenizer.name_or_path}: "
            f"{error}"
        ) from None
    if not same:
        raise ConfigError(
            f"model.renderer: {name!r} writes special tokens as text, so a tool result could write "
            "them too; set it to 'template'"
        )
    return plain_text


def _render_ids(renderer: Any, messages: Sequence[Message], tools: list[dict] | None) -> list[int]:
    messages = [dict(message) for message in messages]
    return renderer.render_ids(messages, tools=tools, add_generation_prompt=True)
