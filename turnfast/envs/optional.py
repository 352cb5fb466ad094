"""Import packages that only some environments and rewards need."""

from __future__ import annotations

import importlib
from typing import Any

from ..errors import ConfigError


def import_optional(module: str, *, install: str) -> Any:
    """Import a module; if it is missing, raise ConfigError with `install` as the pip command."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ConfigError(
            f"this recipe needs the package {module.partition('.')[0]} ({error}); "
            f"install it with: pip install '{install}'"
        ) from None
