"""From an agent's text to its tool calls. Anything can stand in the text; nothing raises.

Two forms are read, alone or mixed, and both are JSON between tags::

    <tool>{"name": "search", "args": {"query": "Ulm"}}</tool>                  arXiv 2505.11821
    <tool_call>{"name": "search", "arguments": {"query": "Ulm"}}</tool_call>   Qwen, Hermes

What stands inside <reasoning> or <think> is thought, not action, and is passed over.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NoReturn

_THOUGHT = re.compile(r"<(reasoning|think)>.*?</\1>", flags=re.DOTALL)
_OPEN = re.compile(r"<(tool_call|tool)>\s*")
_TRACE = re.compile(r"</?\s*(?:tool_call|tool)\b", flags=re.IGNORECASE)


@dataclass(frozen=True, slots=True, kw_only=True)
class ToolCall:
    """A well-formed call; whether the tool exists and takes these arguments is not yet known."""

    name: str
    arguments: Mapping[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class MalformedCall:
    """An attempt that cannot be read; `reason` is short and meant for the agent."""

    reason: str


def parse_calls(text: str) -> tuple[ToolCall | MalformedCall, ...]:
    """Every attempted call of one turn, in order; empty when the agent did not try.

    Example:
        >>> parse_calls('<tool>{"name": "search", "args": {"query": "Ulm"}}</tool>')
        (ToolCall(name='search', arguments={'query': 'Ulm'}),)
        >>> parse_calls('<tool>{"name": "search"</tool> and no more')
        (MalformedCall(reason='not valid JSON'),)
        >>> parse_calls("Ulm was written by Ida.")
        ()
    """
    text = without_thoughts(text)
    calls: list[ToolCall | MalformedCall] = []
    position = 0
    while opening := _OPEN.search(text, position):
        call, position = _read_call(text, opening)
        calls.append(call)
    if not calls and _TRACE.search(text):
        # '<tool {"name": …' or a lone '</tool>': the agent tried, and should hear what is wrong
        calls.append(MalformedCall(reason="no <tool> or <tool_call> tag is well formed"))
    return tuple(calls)


def parse_call(text: str) -> ToolCall | MalformedCall | None:
    """The first attempted call of one turn, or None."""
    calls = parse_calls(text)
    return calls[0] if calls else None


def without_thoughts(text: str) -> str:
    """The text with closed <reasoning> and <think> blocks taken out."""
    return _THOUGHT.sub("", text)


def _read_call(text: str, opening: re.Match[str]) -> tuple[ToolCall | MalformedCall, int]:
    """The call behind an opening tag, and where to look on."""
    closing = f"</{opening[1]}>"
    try:
        # decoding first: a JSON string may itself hold the closing tag
        value, end = _DECODER.raw_decode(text, opening.end())
    except (ValueError, RecursionError):
        end = text.find(closing, opening.end())
        if end < 0:
            return MalformedCall(reason=f"no closing {closing}"), opening.end()
        return MalformedCall(reason="not valid JSON"), end + len(closing)
    rest = re.compile(r"\s*" + re.escape(closing)).match(text, end)
    if rest:
        return _check_shape(value), rest.end()
    later = text.find(closing, end)
    if later < 0:
        return MalformedCall(reason=f"no closing {closing}"), end
    return MalformedCall(reason="more than one JSON object"), later + len(closing)


def _check_shape(value: Any) -> ToolCall | MalformedCall:
    if not isinstance(value, dict):
        return MalformedCall(reason="not a JSON object")
    rest = dict(value)
    name = rest.pop("name", None)
    if not isinstance(name, str) or not name:
        return MalformedCall(reason='"name" is missing')
    key = "args" if "args" in rest else "arguments"
    arguments = rest.pop(key, {})
    if not isinstance(arguments, dict):
        return MalformedCall(reason=f'"{key}" is not an object')
    if rest:
        return MalformedCall(reason=f"unknown key {_shorten(next(iter(rest)))!r}")
    return ToolCall(name=name, arguments=arguments)


def _shorten(word: str) -> str:
    return word if len(word) <= 40 else word[:40] + "…"


def _refuse_constant(word: str) -> NoReturn:
    raise ValueError(f"{word} is not JSON")


_DECODER = json.JSONDecoder(parse_constant=_refuse_constant)
