"""Messages to token ids, append-only: a prompt only ever grows, token for token.

A conversation is rendered by the model's own chat template, but ids that were sampled are never
rendered again. After a turn only the *difference* is tokenised: what the template puts after the
assistant's text (end of turn, the environment's messages, the next assistant header)::

    prompt    <|im_start|>user ⏎ Who wrote Ulm?<|im_end|> ⏎ <|im_start|>assistant ⏎
    sampled   <tool>…</tool><|im_end|>                       kept as the ids that were drawn
    appended   ⏎ <|im_start|>user ⏎ Ida wrote Ulm.<|im_end|> ⏎ <|im_start|>assistant ⏎

Some templates rewrite earlier turns (they drop old reasoning, say). Then no appended text can
reproduce the context, and `Conversation.restart` says that the next turn begins a new row. Others,
Mistral's for one, take a tool's result only after a turn with `tool_calls` and ids that match: the
turn is shown to them in that form, and only what they put after it is used.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from jinja2 import TemplateError

from ..tools import ToolCall, parse_calls
from ..types import Message
from .base import ChatError, Conversation
from .codec import Codec

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

MAX_CACHED_TEXTS = 1024

_EOM = "<|eom_id|>"
_PLACE = "\ue000{}\ue001"  # private-use characters, which no template inspects


class Chat:
    """The chat template of one tokenizer.

    Args:
        tokenizer: a Hugging Face tokenizer with a chat template.
        tools: JSON schemas offered through the template; empty when the environment describes its
            tools itself.
        options: what else the template is told, such as `enable_thinking`.
    Attributes:
        end_id: ends a turn in the template.
        stop_ids: end a turn when drawn; the one that was is part of the sample and is trained.
    Raises:
        ChatError: no template, or a turn that does not end in one special token.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        tools: Sequence[dict] = (),
        options: Mapping[str, Any] = MappingProxyType({}),
    ) -> None:
        self.tokenizer = tokenizer
        self._tools = list(tools) or None
        self._options = dict(options)
        self._special = tuple(sorted(set(tokenizer.all_special_tokens), key=len, reverse=True))
        self._special += tuple(
            token.content
            for token in tokenizer.added_tokens_decoder.values()
            if token.special and token.content not in self._special
        )
        if not tokenizer.chat_template:
            raise ChatError("the tokenizer has no chat template; use an instruction-tuned model")
        self.end_id = self._find_end_of_turn()
        self.stop_ids = self._find_stop_ids()
        self._stops = frozenset(self.stop_ids)
        self._opened: Conversation | None = None
        # the rollouts of a group are told much the same
        self._ids = functools.lru_cache(maxsize=MAX_CACHED_TEXTS)(self._ids_of)
        self._codec = Codec(tokenizer)
        self._wants_structure = self._tools is not None and not self._takes_plain_turns()

    def open(self, messages: Sequence[Message]) -> Conversation:
        """The first prompt: messages, then the header of the assistant's turn."""
        # the rollouts of a group open alike, one after the other; copies, so that an environment
        # that writes into its own messages is noticed
        asked = tuple(dict(message) for message in messages)
        opened = self._opened
        if opened is None or opened.messages != asked:
            rendered = self._render(asked)
            ids = self._encode(asked, rendered, skip=0, first=0)
            opened = Conversation(messages=asked, rendered=rendered, prompt_ids=ids)
            self._opened = opened
        return opened

    def extend(
        self, before: Conversation, text: str, closed: bool, messages: Sequence[Message]
    ) -> Conversation:
        """The prompt after one sampled turn and the environment's reply to it.

        Args:
            text: what was sampled, without the end-of-turn token.
            closed: whether the end-of-turn token was sampled; if the turn was cut off, the
                environment supplies it, and it is not trained.
        """
        turn = (text, closed, tuple(dict(message) for message in messages))
        # rollouts that opened alike share their conversation, and some of them go on alike
        known = next((extended for asked, extended in before.extended if asked == turn), None)
        if known is None:
            known = self._extend(before, *turn)
            before.extended.append((turn, known))
        return known

    def _extend(
        self, before: Conversation, text: str, closed: bool, messages: tuple[Message, ...]
    ) -> Conversation:
        if self._wants_structure and any(message["role"] == "tool" for message in messages):
            return self._extend_structured(before, text, closed, messages)
        said: Message = {"role": "assistant", "content": text}
        history = (*before.messages, said, *messages)
        rendered = self._render(history)
        # a template may trim the assistant's text, or put a space before it; the context it stands
        # in must be the same
        spellings = [text, *([text.strip(), f" {text.strip()}"] if text.strip() else [])]
        fitting = (before.rendered + spelt for spelt in spellings)
        skip = next((len(known) for known in fitting if rendered.startswith(known)), -1)
        if skip < 0:
            ids = self._encode(history, rendered, skip=0, first=0)
            return Conversation(messages=history, rendered=rendered, prompt_ids=ids, restart=True)
        ids = self._encode(history, rendered, skip=skip, first=len(before.messages) + 1)
        if closed and ids and ids[0] == self.end_id:
            ids = ids[1:]
        return Conversation(messages=history, rendered=rendered, prompt_ids=ids)

    def _extend_structured(
        self, before: Conversation, text: str, closed: bool, messages: Sequence[Message]
    ) -> Conversation:
        """As `extend`, for templates that want calls and results matched by ids."""
        place = len(before.messages)
        said, replies = _match(text, messages, place)
        rendered = self._render((*before.messages, said), prompt=False)
        history = (*before.messages, said, *replies)
        whole = self._render(history)
        if not (rendered.startswith(before.rendered) and whole.startswith(rendered)):
            ids = self._encode(history, whole, skip=0, first=0)
            return Conversation(messages=history, rendered=whole, prompt_ids=ids, restart=True)
        end = str(self.tokenizer.decode([self.end_id]))
        skip = rendered.rindex(end) + len(end)
        ids = self._encode(history, whole, skip=skip, first=place + 1)
        if not closed:
            ids = (self.end_id, *ids)
        return Conversation(messages=history, rendered=whole, prompt_ids=ids)

    def text(self, ids: Sequence[int]) -> str:
        """Sampled ids as text, without the end-of-turn token."""
        kept = ids[:-1] if ids and ids[-1] in self._stops else ids
        if not self._stops.isdisjoint(kept):
            kept = [token for token in kept if token not in self._stops]
        return self._codec.decode(kept)

    def encode_reply(self, text: str) -> tuple[int, ...]:
        """A scripted assistant turn as ids, end of turn included: targets of supervised tuning."""
        return (*self._plain(text), self.end_id)

    def _render(self, messages: Sequence[Message], *, prompt: bool = True) -> str:
        kwargs: dict[str, Any] = self._options | ({"tools": self._tools} if self._tools else {})
        rendered = self.tokenizer.apply_chat_template(
            [dict(message) for message in messages],
            tokenize=False,
            add_generation_prompt=prompt,
            **kwargs,
        )
        return str(rendered)

    def _encode(
        self, messages: Sequence[Message], rendered: str, *, skip: int, first: int
    ) -> tuple[int, ...]:
        """Ids of `rendered[skip:]`, in which the contents of messages[first:] are mere text."""
        contents = [str(message["content"]) for message in messages[first:]]
        if not any(special in content for content in contents for special in self._special):
            return self._ids(rendered[skip:])
        # A content that spells a special token must not become one: the template is rendered with
        # placeholders, and each content is tokenised by itself.
        placed = [
            message
            if i < first or not message["content"]
            else {**message, "content": _PLACE.format(i - first)}
            for i, message in enumerate(messages)
        ]
        rest = self._render(placed)[skip:]
        ids: list[int] = []
        for i, content in enumerate(contents):
            if not content:
                continue
            literal, found, rest = rest.partition(_PLACE.format(i))
            if not found:
                raise ChatError(f"the chat template leaves out or reorders message {first + i}")
            ids += self._codec.encode(literal)
            ids += self._plain(content)
        return (*ids, *self._codec.encode(rest))

    def _ids_of(self, text: str) -> tuple[int, ...]:
        return tuple(self._codec.encode(text))

    def _plain(self, text: str) -> list[int]:
        return self.tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True)

    def _takes_plain_turns(self) -> bool:
        """Whether a tool's result may follow a turn that is text alone, and a turn follow that."""
        talk: list[Message] = [
            {"role": "user", "content": "."},
            {"role": "assistant", "content": "."},
            {"role": "tool", "name": "tool", "content": "."},
            {"role": "assistant", "content": "."},
        ]
        try:
            self._render(talk, prompt=False)
        except TemplateError:
            return False
        return True

    def _find_stop_ids(self) -> tuple[int, ...]:
        eos = self.tokenizer.eos_token_id
        # Llama 3 ends some calls with a token of their own
        calls = [i for i, t in self.tokenizer.added_tokens_decoder.items() if t.content == _EOM]
        ids = (self.end_id, *([eos] if isinstance(eos, int) else []), *calls)
        return tuple(dict.fromkeys(ids))

    def _find_end_of_turn(self) -> int:
        mark = _PLACE.format("end")
        said = [{"role": "user", "content": "."}, {"role": "assistant", "content": mark}]
        _, found, tail = self._render(said, prompt=False).partition(mark)
        ids = self.tokenizer.encode(tail.lstrip(), add_special_tokens=False) if found else []
        if not ids or self.tokenizer.decode([ids[0]]) not in self._special:
            raise ChatError(
                "the chat template does not close an assistant turn with a special token, so the "
                "end of a turn could not be trained; use an instruction-tuned model's template"
            )
        return ids[0]


def _match(
    text: str, messages: Sequence[Message], place: int
) -> tuple[Message, tuple[Message, ...]]:
    """The turn with its calls spelt out, and the replies, matched by ids of nine characters."""
    attempts = iter(parse_calls(text))
    calls: list[dict[str, Any]] = []
    replies: list[Message] = []
    for message in messages:
        if message["role"] != "tool":
            replies.append(message)
            continue
        call, call_id = next(attempts, None), f"c{place:04d}{len(calls):04d}"
        known = isinstance(call, ToolCall)
        function = {
            "name": call.name if known else str(message.get("name", "unknown")),
            "arguments": dict(call.arguments) if known else {},
        }
        calls.append({"id": call_id, "type": "function", "function": function})
        replies.append({**message, "tool_call_id": call_id})
    return {"role": "assistant", "content": "", "tool_calls": calls}, tuple(replies)
