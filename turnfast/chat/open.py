"""Open the chat interface that the recipe asks for."""

from __future__ import annotations

import re
from collections.abc import Mapping
from inspect import signature
from pathlib import Path
from typing import Any

from ..config.schema import ModelConfig
from ..errors import ConfigError
from .base import Bridge, ChatError
from .renderers import RenderedChat
from .template import Chat


def open_chat(config: ModelConfig, tokenizer: Any, folder: Path, schemas: list[Any]) -> Bridge:
    """Messages and ids of a tokenizer from `folder`, for a model that is told of these tools."""
    try:
        if config.renderer == "template":
            _refuse_unread(config.template_options, tokenizer)
            return Chat(tokenizer, schemas, config.template_options)
        return RenderedChat(tokenizer, config.renderer, schemas)
    except ChatError as error:
        raise ConfigError(f"model.path: {folder}: {error}") from None


def _refuse_unread(options: Mapping[str, Any], tokenizer: Any) -> None:
    """Refuse an option of the template that it never reads, or that is the tokenizer's own."""
    taken = {"messages", *signature(tokenizer.apply_chat_template).parameters}
    for name in options:
        template = str(tokenizer.chat_template or name)  # to have none is a fault of its own
        if name in taken or not re.search(rf"\b{re.escape(name)}\b", template):
            raise ConfigError(
                f"model.template_options.{name}: the model's chat template has no such option to "
                "set; leave it out"
            )
