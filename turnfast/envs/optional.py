"""Import packages that only some environments and rewards need."""

from __future__ import annotations

import importlib
from typing import Any

from ..errors import ConfigError


def import_optional(module: str, *, install: str) -> Any:
    """Import a module; raise ConfigError with the argument for `pip install` if it is missing."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ConfigError(
            f"this recipe needs the package {module.partition('.')[0]} ({error}); "
            f"install it with: pip install '{install}'"
        ) from None
