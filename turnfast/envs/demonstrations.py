"""The conversations for supervised tuning, each with its source for error messages.

They are written by the environment, or read from a JSONL file (`sft.data`), one per line:

    {"messages": [{"role": "user", "content": "Who wrote Ulm?"},
                  {"role": "assistant", "content": "<answer>Ida</answer>"}]}

Every assistant message is a target, text and end of turn. A tool call is part of the text of such a
message, in the format that the environment parses.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..errors import ConfigError
from . import Demonstration, Demonstrator, Env
from .search.files import json_objects

ROLES = ("system", "user", "assistant", "tool")


def demonstrations_of(env: Env, data: str, seed: int) -> list[tuple[str, Demonstration]]:
    """Source and content of each demonstration.

    Args:
        data: path of a JSONL file; "" selects the environment's demonstrations.
        seed: seed of the environment's demonstrations.
    Raises:
        ConfigError: there are none, or a line of the file is not a conversation.
    """
    if data:
        return _read(Path(data))
    if not isinstance(env, Demonstrator):
        raise ConfigError(
            f"env.name: {type(env).__name__} has no method demonstrations(seed); add one, set "
            "sft.data to a file of conversations, or start from an instruction-tuned model"
        )
    name = f"{type(env).__name__}.demonstrations({seed})"
    demonstrations = env.demonstrations(seed)
    if not demonstrations:
        raise ConfigError(f"env.name: {name} is empty")
    return [(f"{name}[{i}]", each) for i, each in enumerate(demonstrations)]


def _read(path: Path) -> list[tuple[str, Demonstration]]:
    demonstrations = [
        (f"{path}:{number}", Demonstration(messages=_messages(row, f"{path}:{number}")))
        for number, row in json_objects(path)
    ]
    if not demonstrations:
        raise ConfigError(f"sft.data: {path} contains no conversations")
    return demonstrations


def _messages(row: dict[str, Any], where: str) -> tuple[dict[str, Any], ...]:
    messages = row.get("messages")
    if not isinstance(messages, list):
        raise ConfigError(f"{where}: expected a list of messages as 'messages'")
    for i, message in enumerate(messages):
        if not isinstance(message, dict) or message.get("role") not in ROLES:
            raise ConfigError(
                f"{where}: the 'role' of messages[{i}] must be one of {', '.join(ROLES)}"
            )
        if not isinstance(message.get("content"), str) or message.get("tool_calls"):
            raise ConfigError(
                f"{where}: messages[{i}] needs a text 'content'; write a tool call into it instead "
                "of 'tool_calls'"
            )
    return tuple(messages)
