"""How the families of models write their calls; each as its own chat template writes them.

    hermes   <tool_call>⏎{"name": "search", "arguments": {"query": "Ulm"}}⏎</tool_call>
    llama3   {"name": "search", "parameters": {"query": "Ulm"}}
    mistral  [TOOL_CALLS] [{"name": "search", "arguments": {"query": "Ulm"}, "id": "a1b2c3d4e"}]
    mistral  [TOOL_CALLS]search[ARGS]{"query": "Ulm"}                          (since 2025)

Hermes's is also Qwen's. Llama's is a whole turn, or what follows <|python_tag|>; several calls are
separated by ";". `read_calls` (in parse.py) tells the forms apart: no model has to be named.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NoReturn

CallFormat = Literal["hermes", "llama3", "mistral"]


@dataclass(frozen=True, slots=True, kw_only=True)
class ToolCall:
    """A well-formed call; whether the tool exists and takes these arguments is not yet known."""

    name: str
    arguments: Mapping[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class MalformedCall:
    """An attempt that cannot be read; `reason` is short and meant for the agent."""

    reason: str


Attempt = ToolCall | MalformedCall
_NAMED = re.compile(r"\s*([\w.-]+)\s*(?:\[CALL_ID\]\s*\w+\s*)?\[ARGS\]\s*")
_LLAMA = re.compile(r'\{\s*"(?:name|type|parameters)"\s*:')
PYTHON_TAG = "<|python_tag|>"
TOOL_CALLS = "[TOOL_CALLS]"


def write_calls(calls: Sequence[ToolCall], form: CallFormat) -> str:
    """A turn that makes these calls, as a model of that family is taught to write it."""
    return _WRITERS[form](calls)


def read_llama3(text: str) -> tuple[list[Attempt], str]:
    """Calls of a turn that is JSON from its beginning, or from <|python_tag|> on; and the rest."""
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
            # whatever follows was written before any result was there
            return attempts, (before if tag else "") + body
    if tag and not attempts:
        attempts.append(MalformedCall(reason=f"nothing follows {PYTHON_TAG}"))
    return attempts, before if tag else ""


def read_mistral(text: str) -> tuple[list[Attempt], str]:
    """Calls behind [TOOL_CALLS], as a list or one by one; and the rest."""
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
    """The JSON value at the start and where it ends; raises ValueError, also for NaN."""
    start += len(text[start:]) - len(text[start:].lstrip())
    try:
        return _DECODER.raw_decode(text, start)
    except RecursionError:
        raise ValueError("nested too deeply") from None


def check_shape(value: Any, key: str, also: Mapping[str, Any] | None = None) -> Attempt:
    """One call as a JSON object of `name` and arguments under `key`; `also` are keys that may be
    there, with the value or type that they must have."""
    if not isinstance(value, dict):
        return MalformedCall(reason="not a JSON object")
    rest = dict(value)
    name = rest.pop("name", None)
    if not isinstance(name, str) or not name:
        return MalformedCall(reason='"name" is missing')
    arguments = rest.pop(key, {})
    if not isinstance(arguments, dict):
        return MalformedCall(reason=f'"{key}" is not an object')
    for extra, wanted in (also or {}).items():
        found = rest.get(extra)
        if found == wanted or (isinstance(wanted, type) and isinstance(found, wanted)):
            del rest[extra]
    if rest:
        return MalformedCall(reason=f"unknown key {_shorten(next(iter(rest)))!r}")
    return ToolCall(name=name, arguments=arguments)


def _shorten(word: str) -> str:
    return word if len(word) <= 40 else word[:40] + "…"


def _refuse_constant(word: str) -> NoReturn:
    raise ValueError(f"{word} is not JSON")


_DECODER = json.JSONDecoder(parse_constant=_refuse_constant)


def _hermes(calls: Sequence[ToolCall]) -> str:
    return "\n".join(
        f"<tool_call>\n{_json({'name': c.name, 'arguments': dict(c.arguments)})}\n</tool_call>"
        for c in calls
    )


def _llama3(calls: Sequence[ToolCall]) -> str:
    return "; ".join(_json({"name": c.name, "parameters": dict(c.arguments)}) for c in calls)


def _mistral(calls: Sequence[ToolCall]) -> str:
    written = [
        {"name": c.name, "arguments": dict(c.arguments), "id": _call_id(i, c)}
        for i, c in enumerate(calls)
    ]
    return f"{TOOL_CALLS} {_json(written)}"


def _call_id(place: int, call: ToolCall) -> str:
    """Nine letters and digits, which is what Mistral's templates insist on."""
    text = f"{place} {call.name} {_json(dict(call.arguments))}"
    return hashlib.blake2b(text.encode("utf-8", errors="replace")).hexdigest()[:9]


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)


_WRITERS: Mapping[CallFormat, Callable[[Sequence[ToolCall]], str]] = {
    "hermes": _hermes,
    "llama3": _llama3,
    "mistral": _mistral,
}
