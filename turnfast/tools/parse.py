"""From an agent's text to its tool calls. Anything can stand in the text; nothing raises.

Two forms are read, alone or mixed, that are JSON between tags::

    <tool>{"name": "search", "args": {"query": "Ulm"}}</tool>                  arXiv 2505.11821
    <tool_call>{"name": "search", "arguments": {"query": "Ulm"}}</tool_call>   Qwen, Hermes

and, in a turn without such tags, those of Llama 3 and Mistral (formats.py).

What stands inside <reasoning> or <think> is thought, not action, and is passed over.
"""

from __future__ import annotations

import re
from typing import Any

from .formats import (
    TOOL_CALLS,
    Attempt,
    MalformedCall,
    check_shape,
    decode,
    read_llama3,
    read_mistral,
)

_THOUGHT = re.compile(r"<(reasoning|think)>.*?</\1>", flags=re.DOTALL)
_OPEN = re.compile(r"<(tool_call|tool)>\s*")
_CLOSE = {tag: re.compile(rf"\s*</{tag}>") for tag in ("tool_call", "tool")}
_TRACE = re.compile(r"</?\s*(?:tool_call|tool)\b", flags=re.IGNORECASE)


def parse_calls(text: str) -> tuple[Attempt, ...]:
    """Every attempted call of one turn, in order; empty when the agent did not try.

    Example:
        >>> parse_calls('<tool>{"name": "search", "args": {"query": "Ulm"}}</tool>')
        (ToolCall(name='search', arguments={'query': 'Ulm'}),)
        >>> parse_calls('<tool>{"name": "search"</tool> and no more')
        (MalformedCall(reason='not valid JSON'),)
        >>> parse_calls("Ulm was written by Ida.")
        ()
    """
    return read_calls(text)[0]


def read_calls(text: str) -> tuple[tuple[Attempt, ...], str]:
    """Every attempted call of one turn, and what else the turn says outside of its thoughts."""
    text = without_thoughts(text)
    calls: list[Attempt] = []
    rest, position = "", 0
    while opening := _OPEN.search(text, position):
        rest += text[position : opening.start()]
        call, position = _read_call(text, opening)
        calls.append(call)
    rest += text[position:]
    if calls:
        return tuple(calls), rest
    if _TRACE.search(text):
        # '<tool {"name": …' or a lone '</tool>': the agent tried, and should hear what is wrong
        return (MalformedCall(reason="no <tool> or <tool_call> tag is well formed"),), text
    read = read_mistral if TOOL_CALLS in text else read_llama3
    calls, rest = read(text)
    return tuple(calls), rest


def parse_call(text: str) -> Attempt | None:
    """The first attempted call of one turn, or None."""
    calls = parse_calls(text)
    return calls[0] if calls else None


def without_thoughts(text: str) -> str:
    """The text with closed <reasoning> and <think> blocks taken out."""
    return _THOUGHT.sub("", text)


def _read_call(text: str, opening: re.Match[str]) -> tuple[Attempt, int]:
    """The call behind an opening tag, and where to look on."""
    closing = f"</{opening[1]}>"
    try:
        # decoding first: a JSON string may itself hold the closing tag
        value, end = decode(text, opening.end())
    except ValueError:
        end = text.find(closing, opening.end())
        if end < 0:
            return MalformedCall(reason=f"no closing {closing}"), opening.end()
        return MalformedCall(reason="not valid JSON"), end + len(closing)
    rest = _CLOSE[opening[1]].match(text, end)
    if rest:
        return _check_shape(value), rest.end()
    later = text.find(closing, end)
    if later < 0:
        return MalformedCall(reason=f"no closing {closing}"), end
    return MalformedCall(reason="more than one JSON object"), later + len(closing)


def _check_shape(value: Any) -> Attempt:
    return check_shape(
        value, "args" if isinstance(value, dict) and "args" in value else "arguments"
    )
