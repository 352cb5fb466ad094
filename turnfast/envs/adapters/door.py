"""The one door through which optional packages come in."""

from __future__ import annotations

import importlib
from typing import Any

from ...errors import ConfigError


def require(module: str, *, env: str, install: str = "turnfast[adapters]") -> Any:
    """Import a package that only this environment needs; raises ConfigError if it is missing."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        package = module.partition(".")[0]
        raise ConfigError(
            f"env.name: {env!r} needs the package {package} ({error}); install it with: "
            f"pip install '{install}'"
        ) from None
