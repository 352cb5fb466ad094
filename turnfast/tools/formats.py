"""Tool-call formats of the model families, as their chat templates write them.

    hermes   <tool_call>⏎{"name": "search", "arguments": {"query": "Ulm"}}⏎</tool_call>
    llama3   {"name": "search", "parameters": {"query": "Ulm"}}
    mistral  [TOOL_CALLS] [{"name": "search", "arguments": {"query": "Ulm"}, "id": "a1b2c3d4e"}]
    mistral  [TOOL_CALLS]search[ARGS]{"query": "Ulm"}                          (since 2025)

Qwen uses the Hermes format. In the Llama 3 format, the calls are the whole turn or follow
<|python_tag|>, and several calls are separated by ";". `read_calls` in parse.py detects the format.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NoReturn


@dataclass(frozen=True, slots=True, kw_only=True)
class ToolCall:
    """A well-formed call; its tool and arguments are not checked yet."""

    name: str
    arguments: Mapping[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class MalformedCall:
    """An attempted call that cannot be parsed; `reason` is short and written for the agent."""

    reason: str


Attempt = ToolCall | MalformedCall
_NAMED = re.compile(r"\s*([\w.-]+)\s*(?:\[CALL_ID\]\s*\w+\s*)?\[ARGS\]\s*")
_LLAMA = re.compile(r'\{\s*"(?:name|type|parameters)"\s*:')
PYTHON_TAG = "<|python_tag|>"
TOOL_CALLS = "[TOOL_CALLS]"


def read_llama3(text: str) -> tuple[list[Attempt], str]:
    """Return the calls in the Llama 3 format, and the text outside of them."""
    before, tag, marked = text.partition(PYTHON_TAG)
    body = marked if tag else text
    if not tag and not _LLAMA.match(text.lstrip()):
        return [], text
    attempts: list[Attempt] = []
    while body.strip():
        try:
            value, end = decode(body)
        except ValueError:
            attempts.append(MalformedCall(reason="not valid JSON"))
            break
        values = value if isinstance(value, list) and value else [value]
        attempts += [check_shape(item, "parameters", {"type": "function"}) for item in values]
        body = body[end:].lstrip().removeprefix(";")
        if body.strip() and not body.lstrip().startswith(("{", "[")):
            return attempts, (before if tag else "") + body
    if tag and not attempts:
        attempts.append(MalformedCall(reason=f"nothing follows {PYTHON_TAG}"))
    return attempts, before if tag else ""


def read_mistral(text: str) -> tuple[list[Attempt], str]:
    """Return the calls in both Mistral formats, and the text outside of them."""
    rest, *pieces = text.split(TOOL_CALLS)
    attempts: list[Attempt] = []
    for piece in pieces:
        named = _NAMED.match(piece)
        try:
            value, end = decode(piece, named.end() if named else 0)
        except ValueError:
            attempts.append(MalformedCall(reason=f"no valid JSON after {TOOL_CALLS}"))
            continue
        rest += piece[end:]
        if named and isinstance(value, dict):
            attempts.append(ToolCall(name=named[1], arguments=value))
        elif named:
            attempts.append(MalformedCall(reason='"arguments" is not an object'))
        elif isinstance(value, list) and value:
            attempts += [check_shape(item, "arguments", {"id": str}) for item in value]
        else:
            attempts.append(MalformedCall(reason=f"{TOOL_CALLS} needs a list of calls"))
    return attempts, rest


def decode(text: str, start: int = 0) -> tuple[Any, int]:
    """Return the JSON value at `start` and its end; raise ValueError if there is none.

    NaN and Infinity are not JSON.
    """
    start += len(text[start:]) - len(text[start:].lstrip())
    try:
        return _DECODER.raw_decode(text, start)
    except RecursionError:
        raise ValueError("nested too deeply") from None


def check_shape(value: Any, key: str, optional: Mapping[str, Any] | None = None) -> Attempt:
    """Check that a JSON value is a call: an object with `name` and with arguments under `key`.

    Args:
        optional: other keys that are allowed, each with the value or the type that it must have.
    """
    if not isinstance(value, dict):
        return MalformedCall(reason="not a JSON object")
    rest = dict(value)
    name = rest.pop("name", None)
    if not isinstance(name, str) or not name:
        return MalformedCall(reason='"name" is missing')
    arguments = rest.pop(key, {})
    if not isinstance(arguments, dict):
        return MalformedCall(reason=f'"{key}" is not an object')
    for other, expected in (optional or {}).items():
        actual = rest.get(other)
        if actual == expected or (isinstance(expected, type) and isinstance(actual, expected)):
            del rest[other]
    if rest:
        unknown = next(iter(rest))
        shown = unknown if len(unknown) <= 40 else unknown[:40] + "…"
        return MalformedCall(reason=f"unknown key {shown!r}")
    return ToolCall(name=name, arguments=arguments)


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")


_DECODER = json.JSONDecoder(parse_constant=_refuse_constant)
