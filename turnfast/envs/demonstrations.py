"""The conversations of supervised tuning, each with the place that an error names.

They are the environment's own, or those of a JSONL file (`sft.data`), one conversation per line:

    {"messages": [{"role": "user", "content": "Who wrote Ulm?"},
                  {"role": "assistant", "content": "<answer>Ida</answer>"}]}

Every assistant message is a target, text and end of turn. A tool call is text of such a message, in
the form that the environment reads.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..errors import ConfigError
from . import Demonstration, Demonstrator, Env
from .search.files import json_objects

ROLES = ("system", "user", "assistant", "tool")


def demonstrations_of(env: Env, data: str, seed: int) -> list[tuple[str, Demonstration]]:
    """Where each demonstration comes from, and the demonstration.

    Args:
        data: path of a JSONL file; empty for those of the environment.
        seed: draws those of the environment.
    Raises:
        ConfigError: there are none, or a line of the file is no conversation.
    """
    if data:
        return _read(Path(data))
    if not isinstance(env, Demonstrator):
        raise ConfigError(
            f"env.name: {type(env).__name__} has no demonstrations(seed) to tune on; add one, name "
            "a file of conversations with sft.data, or start from a model that already follows "
            "instructions"
        )
    name = f"{type(env).__name__}.demonstrations({seed})"
    shown = env.demonstrations(seed)
    if not shown:
        raise ConfigError(f"env.name: {name} is empty")
    return [(f"{name}[{i}]", each) for i, each in enumerate(shown)]


def _read(path: Path) -> list[tuple[str, Demonstration]]:
    found = [
        (f"{path}:{number}", Demonstration(messages=_messages(row, f"{path}:{number}")))
        for number, row in json_objects(path)
    ]
    if not found:
        raise ConfigError(f"sft.data: {path} holds no conversations")
    return found


def _messages(row: dict[str, Any], where: str) -> tuple[dict[str, Any], ...]:
    messages = row.get("messages")
    if not isinstance(messages, list):
        raise ConfigError(f"{where}: expected a list of messages as 'messages'")
    for i, message in enumerate(messages):
        if not isinstance(message, dict) or message.get("role") not in ROLES:
            raise ConfigError(f"{where}: messages[{i}] has no 'role' out of {', '.join(ROLES)}")
        if not isinstance(message.get("content"), str) or message.get("tool_calls"):
            raise ConfigError(
                f"{where}: messages[{i}] needs its text as 'content', with a tool call as the text "
                "that the environment reads; 'tool_calls' are not"
            )
    return tuple(messages)
