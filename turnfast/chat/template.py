"""Convert messages to token ids with the model's chat template.

The template renders the conversation, but sampled ids are kept. After a turn, only the text that
the template puts after the assistant's text is tokenised and appended (end of turn, the
environment's messages, the next assistant header)::

    prompt    <|im_start|>user ⏎ Who wrote Ulm?<|im_end|> ⏎ <|im_start|>assistant ⏎
    sampled   <tool>…</tool><|im_end|>                       kept as sampled
    appended   ⏎ <|im_start|>user ⏎ Ida wrote Ulm.<|im_end|> ⏎ <|im_start|>assistant ⏎

Some templates rewrite earlier turns, for instance to drop old reasoning. The new context is then no
extension of the old one, and `Conversation.restart` is set: the next turn begins a new row. Others,
such as Mistral's, accept a tool result only after a turn with `tool_calls` and matching ids: the
turn is rendered in that form, and only the text after it is used.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from jinja2 import TemplateError

from ..errors import ConfigError
from ..tools import ToolCall, parse_calls
from ..types import Message
from .base import Conversation

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

EOM = "<|eom_id|>"
"""Ends a turn with built-in tool calls of Llama 3, instead of its end-of-turn token."""
_MARK = "\ue000{}\ue001"  # private-use characters, which no template inspects


class Chat:
    """`ChatInterface` of a tokenizer's chat template.

    Args:
        tokenizer: a Hugging Face tokenizer with a chat template.
        tools: JSON schemas passed to the template; empty if the environment describes its tools
            itself.
        options: further variables of the template, such as `enable_thinking`.
    Raises:
        ConfigError: there is no template, or its turns do not end with a special token.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        tools: Sequence[dict] = (),
        options: Mapping[str, Any] = MappingProxyType({}),
    ) -> None:
        self.tokenizer = tokenizer
        self._options = {**options, **({"tools": list(tools)} if tools else {})}
        added = tokenizer.added_tokens_decoder.items()
        self._special = {
            *tokenizer.all_special_tokens,
            *(token.content for _, token in added if token.special),
        }
        if not tokenizer.chat_template:
            raise ConfigError(
                f"model.path: the tokenizer of {tokenizer.name_or_path} has no chat template; use "
                "an instruction-tuned model"
            )
        self.end_id = self._find_end_id()
        eos = tokenizer.eos_token_id
        eom = [i for i, token in added if token.content == EOM]
        stop_ids = (self.end_id, *([eos] if isinstance(eos, int) else []), *eom)
        self.stop_ids = tuple(dict.fromkeys(stop_ids))
        self._needs_call_ids = bool(tools) and not self._accepts_plain_turns()

    def open(self, messages: Sequence[Message]) -> Conversation:
        # copied, because an environment may change its messages later
        messages = tuple(dict(message) for message in messages)
        return self._start(messages)

    def extend(
        self, before: Conversation, text: str, closed: bool, messages: Sequence[Message]
    ) -> Conversation:
        messages = tuple(dict(message) for message in messages)
        if self._needs_call_ids and any(message["role"] == "tool" for message in messages):
            return self._extend_with_call_ids(before, text, closed, messages)
        turn: Message = {"role": "assistant", "content": text}
        history = (*before.messages, turn, *messages)
        rendered = self._render(history)
        # a template may strip the assistant's text or put a space before it
        variants = [text, *([text.strip(), f" {text.strip()}"] if text.strip() else [])]
        heads = (before.rendered + variant for variant in variants)
        skip = next((len(head) for head in heads if rendered.startswith(head)), None)
        if skip is None:
            return self._start(history, restart=True)
        ids = self._encode(history, rendered, skip=skip, first=len(before.messages) + 1)
        if closed and ids and ids[0] == self.end_id:
            ids = ids[1:]
        return Conversation(messages=history, rendered=rendered, prompt_ids=ids)

    def _extend_with_call_ids(
        self, before: Conversation, text: str, closed: bool, messages: Sequence[Message]
    ) -> Conversation:
        """As `extend`, for templates that match tool results to calls by id."""
        num_before = len(before.messages)
        turn, replies = _match_calls(text, messages, num_before)
        head = self._render((*before.messages, turn), prompt=False)
        history = (*before.messages, turn, *replies)
        rendered = self._render(history)
        if not (head.startswith(before.rendered) and rendered.startswith(head)):
            return self._start(history, restart=True)
        end = str(self.tokenizer.decode([self.end_id]))
        skip = head.rindex(end) + len(end)
        ids = self._encode(history, rendered, skip=skip, first=num_before + 1)
        if not closed:
            ids = (self.end_id, *ids)
        return Conversation(messages=history, rendered=rendered, prompt_ids=ids)

    def decode_turn(self, ids: Sequence[int]) -> str:
        kept = [token for token in ids if token not in self.stop_ids]
        return str(self.tokenizer.decode(kept, skip_special_tokens=False))

    def encode_turn(self, text: str) -> tuple[int, ...]:
        return (*self._encode_plain(text), self.end_id)

    def _start(self, messages: tuple[Message, ...], *, restart: bool = False) -> Conversation:
        rendered = self._render(messages)
        ids = self._encode(messages, rendered, skip=0, first=0)
        return Conversation(messages=messages, rendered=rendered, prompt_ids=ids, restart=restart)

    def _render(self, messages: Sequence[Message], *, prompt: bool = True) -> str:
        rendered = self.tokenizer.apply_chat_template(
            [dict(message) for message in messages],
            tokenize=False,
            add_generation_prompt=prompt,
            **self._options,
        )
        return str(rendered)

    def _encode(
        self, messages: Sequence[Message], rendered: str, *, skip: int, first: int
    ) -> tuple[int, ...]:
        """Ids of `rendered[skip:]`; special-token strings in the contents of messages[first:] are
        encoded as plain text."""
        contents = [str(message["content"]) for message in messages[first:]]
        if not any(special in content for content in contents for special in self._special):
            return tuple(self._encode_template(rendered[skip:]))
        # render with placeholders for the contents, and tokenise each content separately
        marked = [
            message
            if i < first or not message["content"]
            else {**message, "content": _MARK.format(i - first)}
            for i, message in enumerate(messages)
        ]
        rest = self._render(marked)[skip:]
        ids: list[int] = []
        for i, content in enumerate(contents):
            if not content:
                continue
            literal, mark, rest = rest.partition(_MARK.format(i))
            if not mark:
                raise ConfigError(
                    f"model.path: the chat template of {self.tokenizer.name_or_path} omits or "
                    f"reorders message {first + i}; use another template"
                )
            ids += self._encode_template(literal)
            ids += self._encode_plain(content)
        return (*ids, *self._encode_template(rest))

    def _encode_template(self, text: str) -> list[int]:
        return self.tokenizer.encode(text, add_special_tokens=False)

    def _encode_plain(self, text: str) -> list[int]:
        return self.tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True)

    def _accepts_plain_turns(self) -> bool:
        """Whether a tool result may follow a turn without `tool_calls`."""
        conversation: list[Message] = [
            {"role": "user", "content": "."},
            {"role": "assistant", "content": "."},
            {"role": "tool", "name": "tool", "content": "."},
            {"role": "assistant", "content": "."},
        ]
        try:
            self._render(conversation, prompt=False)
        except TemplateError:
            return False
        return True

    def _find_end_id(self) -> int:
        mark = _MARK.format("end")
        turn = [{"role": "user", "content": "."}, {"role": "assistant", "content": mark}]
        _, _, tail = self._render(turn, prompt=False).partition(mark)
        ids = self._encode_template(tail.lstrip())
        if not ids or self.tokenizer.decode([ids[0]]) not in self._special:
            raise ConfigError(
                f"model.path: the chat template of {self.tokenizer.name_or_path} does not end an "
                "assistant turn with a special token, so the end of a turn could not be trained; "
                "use the template of an instruction-tuned model"
            )
        return ids[0]


def _match_calls(
    text: str, messages: Sequence[Message], num_before: int
) -> tuple[Message, tuple[Message, ...]]:
    """The turn with `tool_calls` and the replies with `tool_call_id`.

    The ids have nine characters, as Mistral's template requires, and are unique in a conversation.
    """
    parsed = iter(parse_calls(text))
    calls: list[dict[str, Any]] = []
    replies: list[Message] = []
    for message in messages:
        if message["role"] != "tool":
            replies.append(message)
            continue
        call_id = f"c{num_before:04d}{len(calls):04d}"
        function = {"name": str(message.get("name", "unknown")), "arguments": {}}
        if isinstance(call := next(parsed, None), ToolCall):
            function = {"name": call.name, "arguments": dict(call.arguments)}
        calls.append({"id": call_id, "type": "function", "function": function})
        replies.append({**message, "tool_call_id": call_id})
    return {"role": "assistant", "content": "", "tool_calls": calls}, tuple(replies)
