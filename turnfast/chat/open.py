"""Open the chat interface that the recipe asks for."""

from __future__ import annotations

import re
from collections.abc import Mapping
from inspect import signature
from typing import Any

from ..config.schema import ModelConfig
from ..errors import ConfigError
from .base import ChatInterface
from .renderers import RenderedChat
from .template import Chat


def open_chat(config: ModelConfig, tokenizer: Any, schemas: list[dict]) -> ChatInterface:
    """The chat interface of a tokenizer.

    Args:
        schemas: JSON schemas of the tools that are offered to the model.
    Raises:
        ConfigError: the template or renderer cannot be used for training.
    """
    if config.renderer != "template":
        return RenderedChat(tokenizer, config.renderer, schemas)
    _check_options(config.template_options, tokenizer)
    return Chat(tokenizer, schemas, config.template_options)


def _check_options(options: Mapping[str, Any], tokenizer: Any) -> None:
    """Refuse options that the template does not read or that transformers sets itself."""
    reserved = {"messages", *signature(tokenizer.apply_chat_template).parameters}
    for name in options:
        template = str(tokenizer.chat_template or name)  # a missing template is reported by `Chat`
        if name in reserved or not re.search(rf"\b{re.escape(name)}\b", template):
            raise ConfigError(
                f"model.template_options.{name}: the model's chat template has no such option; "
                "remove it"
            )
