"""Messages to token ids by Prime Intellect's renderers, which know model families in Python.

They do on ids what `Chat` does with the template's text: a prompt only ever grows, what was sampled
stays as it was drawn, and where the family's form rewrites earlier turns the next one begins a new
row. They know more of each family: which thoughts outlive a turn, how one that was cut off inside
a thought is closed.
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

ASKED: list[Message] = [
    {"role": "system", "content": "."},
    {"role": "user", "content": "."},
    {"role": "assistant", "content": "."},
]
REPLIES: dict[bool, Message] = {
    False: {"role": "user", "content": "."},
    True: {"role": "tool", "name": "tool", "content": "."},
}
"""What may follow a turn, by whether tools are offered through the renderer."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RenderedConversation(Conversation):
    """A conversation with the whole prompt that its `prompt_ids` complete. The sampled turns in it
    are encoded again, as only marks in them are looked at; what is trained is what was drawn."""

    context_ids: tuple[int, ...]


class RenderedChat:
    """A renderer in the place of a chat template; see `Chat` for what is alike.

    Args:
        tokenizer: has a chat template too, which says how a turn ends.
        name: a renderer such as `qwen3`; `auto` for the one of the tokenizer's hub name.
        tools: JSON schemas offered to the model.
    Raises:
        ConfigError: no such renderer, or it does not fit the tokenizer.
        ChatError: see `Chat`.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, name: str, tools: Sequence[dict] = ()
    ) -> None:
        self.tokenizer = tokenizer
        self._template = Chat(tokenizer, tools)
        self._tools = list(tools) or None
        self._renderer = _open(tokenizer, name, self._tools)
        self.end_id = self._template.end_id
        stops = (*self._template.stop_ids, *self._renderer.get_stop_token_ids())
        self.stop_ids = tuple(dict.fromkeys(stops))

    def open(self, messages: Sequence[Message]) -> RenderedConversation:
        return self._whole(tuple(dict(message) for message in messages))

    def extend(
        self, before: Conversation, text: str, closed: bool, messages: Sequence[Message]
    ) -> RenderedConversation:
        assert isinstance(before, RenderedConversation)
        said: Message = {"role": "assistant", "content": text}
        history = (*before.messages, said, *messages)
        sampled = self.tokenizer.encode(text, add_special_tokens=False)
        sampled += [self.end_id] if closed else []
        known = [*before.context_ids, *sampled]
        bridged = self._renderer.bridge_to_next_turn(
            list(before.context_ids), sampled, list(messages), tools=self._tools
        )
        # no bridge where the form may rewrite earlier turns; it need not have done so
        ids = bridged.token_ids if bridged else _prompt(self._renderer, history, self._tools)
        if ids[: len(known)] != known:
            return self._whole(history, restart=True)
        return RenderedConversation(
            messages=history,
            rendered="",
            prompt_ids=tuple(ids[len(known) :]),
            context_ids=tuple(ids),
        )

    def text(self, ids: Sequence[int]) -> str:
        kept = [token for token in ids if token not in self.stop_ids]
        return self._template.text(kept)

    def encode_reply(self, text: str) -> tuple[int, ...]:
        return self._template.encode_reply(text)

    def _whole(
        self, messages: tuple[Message, ...], *, restart: bool = False
    ) -> RenderedConversation:
        ids = tuple(_prompt(self._renderer, messages, self._tools))
        return RenderedConversation(
            messages=messages, rendered="", prompt_ids=ids, context_ids=ids, restart=restart
        )


class _Literal:
    """The tokenizer, for which no text spells a special token: a tool's result ends no turn."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer

    def __getattr__(self, name: str) -> Any:
        return getattr(self._tokenizer, name)

    def __call__(self, text: Any, **kwargs: Any) -> Any:
        return self._tokenizer(text, split_special_tokens=True, **kwargs)

    def encode(self, text: str, **kwargs: Any) -> list[int]:
        return self._tokenizer.encode(text, split_special_tokens=True, **kwargs)


def _open(tokenizer: Any, name: str, tools: list[dict] | None) -> Any:
    if importlib.util.find_spec("renderers") is None:
        raise ConfigError(
            f"model.renderer: {name!r} is one of the package renderers; install "
            "turnfast[renderers], or leave it at 'template'"
        )
    import renderers
    from renderers.base import MODEL_RENDERER_MAP

    known = sorted(set(MODEL_RENDERER_MAP.values()))
    if name == "auto":
        # its own choice for a model it does not know would never bridge two turns
        name = MODEL_RENDERER_MAP.get(str(tokenizer.name_or_path), "")
        if not name:
            raise ConfigError(
                f"model.renderer: renderers has none for {tokenizer.name_or_path} by its name; "
                f"name one of {', '.join(known)}, or leave it at 'template'"
            )
    if name not in known:
        raise ConfigError(
            f"model.renderer: no such renderer {name!r}; there are {', '.join(known)}, 'auto' "
            "and 'template'"
        )
    try:
        form: Any = renderers.config_from_name(name)  # declared as the base, taken as a union
        literal = renderers.create_renderer(_Literal(tokenizer), form)
        plain = renderers.create_renderer(tokenizer, form)
        talk = [*ASKED, REPLIES[tools is not None]]
        alike = _prompt(literal, talk, tools) == _prompt(plain, talk, tools)
    except Exception as error:  # each family has its own: asserts, lookups, a missing vocabulary
        raise ConfigError(
            f"model.renderer: {name!r} does not fit the tokenizer of {tokenizer.name_or_path}: "
            f"{error}"
        ) from None
    if not alike:
        raise ConfigError(
            f"model.renderer: {name!r} writes special tokens as text, so a tool's result could "
            "write them too; leave it at 'template'"
        )
    return literal


def _prompt(renderer: Any, messages: Sequence[Message], tools: list[dict] | None) -> list[int]:
    asked = [dict(message) for message in messages]
    return renderer.render_ids(asked, tools=tools, add_generation_prompt=True)
