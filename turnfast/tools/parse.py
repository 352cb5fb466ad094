"""Parse the tool calls in the text of a turn; any text is accepted.

Two formats put JSON between tags. Both are recognised anywhere in a turn, even in the same turn::

    <tool>{"name": "search", "args": {"query": "Ulm"}}</tool>                  arXiv 2505.11821
    <tool_call>{"name": "search", "arguments": {"query": "Ulm"}}</tool_call>   Qwen, Hermes

A turn without such tags is parsed in the formats of Llama 3 and Mistral (formats.py). Text inside
closed <reasoning> or <think> blocks is ignored.
"""

from __future__ import annotations

import re

from .formats import (
    TOOL_CALLS,
    Attempt,
    MalformedCall,
    check_shape,
    decode,
    read_llama3,
    read_mistral,
)

_REASONING = re.compile(r"<(reasoning|think)>.*?</\1>", flags=re.DOTALL)
_OPEN = re.compile(r"<(tool_call|tool)>\s*")
_CLOSE = {tag: re.compile(rf"\s*</{tag}>") for tag in ("tool_call", "tool")}
_PARTIAL_TAG = re.compile(r"</?\s*(?:tool_call|tool)\b", flags=re.IGNORECASE)


def parse_calls(text: str) -> tuple[Attempt, ...]:
    """Return every attempted call of a turn, in order.

    Example:
        >>> parse_calls('<tool>{"name": "search", "args": {"query": "Ulm"}}</tool>')
        (ToolCall(name='search', arguments={'query': 'Ulm'}),)
        >>> parse_calls('<tool>{"name": "search"</tool>')
        (MalformedCall(reason='not valid JSON'),)
        >>> parse_calls("Ulm was written by Ida.")
        ()
    """
    return read_calls(text)[0]


def read_calls(text: str) -> tuple[tuple[Attempt, ...], str]:
    """Return every attempted call of a turn, and the text outside of calls and reasoning."""
    text = strip_reasoning(text)
    calls: list[Attempt] = []
    rest, position = "", 0
    while opening := _OPEN.search(text, position):
        rest += text[position : opening.start()]
        call, position = _read_call(text, opening)
        calls.append(call)
    rest += text[position:]
    if calls:
        return tuple(calls), rest
    if _PARTIAL_TAG.search(text):
        # For example '<tool {"name": …' or a lone '</tool>': report it to the agent.
        return (MalformedCall(reason="no <tool> or <tool_call> tag is well formed"),), text
    read = read_mistral if TOOL_CALLS in text else read_llama3
    calls, rest = read(text)
    return tuple(calls), rest


def strip_reasoning(text: str) -> str:
    """Remove closed <reasoning> and <think> blocks."""
    return _REASONING.sub("", text)


def _read_call(text: str, opening: re.Match[str]) -> tuple[Attempt, int]:
    """Return the call after an opening tag, and the position where parsing continues."""
    closing = f"</{opening[1]}>"
    try:
        # Decode before searching for the closing tag, because a JSON string may contain the tag.
        value, end = decode(text, opening.end())
    except ValueError:
        end = text.find(closing, opening.end())
        if end < 0:
            return MalformedCall(reason=f"no closing {closing}"), opening.end()
        return MalformedCall(reason="not valid JSON"), end + len(closing)
    close = _CLOSE[opening[1]].match(text, end)
    if close:
        key = "args" if isinstance(value, dict) and "args" in value else "arguments"
        return check_shape(value, key), close.end()
    later = text.find(closing, end)
    if later < 0:
        return MalformedCall(reason=f"no closing {closing}"), end
    return MalformedCall(reason="more than one JSON object"), later + len(closing)
