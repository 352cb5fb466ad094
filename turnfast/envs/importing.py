"""From `module:attribute` in a recipe to the class or function of that name."""

from __future__ import annotations

import importlib
import os
import re
import sys
from collections.abc import Callable
from typing import Any

from ..config.signature import suggest
from ..errors import ConfigError


def import_named(name: str, *, field: str, form: str) -> Callable[..., Any]:
    """Import what a recipe names.

    Args:
        name: `module` is a file in the current directory or anything that can be imported.
        field: what the name is called in the recipe. form: how it should read, for the refusals.
    Raises:
        ConfigError: no such module or attribute, or a module that cannot be imported.
    """
    if not re.fullmatch(r"\w+(\.\w+)*:\w+", name):
        raise ConfigError(f"{field}: {name!r} is not of the form {form}")
    module_name, _, attribute = name.partition(":")
    folder = os.getcwd()
    if folder not in sys.path:
        # last, so that no file in the user's folder can take the place of an installed package
        sys.path.append(folder)
    importlib.invalidate_caches()
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name and not f"{module_name}.".startswith(f"{error.name}."):
            raise ConfigError(f"{field}: {module_name} needs {error.name!r}: {error}") from error
        raise ConfigError(
            f"{field}: no module {module_name!r} in {folder} or among the installed packages"
        ) from None
    except (Exception, SystemExit) as error:
        raise ConfigError(
            f"{field}: importing {module_name!r} failed: {type(error).__name__}: {error}"
        ) from error
    if getattr(module, "__file__", None) is None:  # a folder without Python code
        raise ConfigError(f"{field}: {module_name!r} is no Python module")
    found = getattr(module, attribute, None)
    if not callable(found):
        own = [
            key
            for key, value in vars(module).items()
            if (isinstance(value, type) if form == "module:Class" else callable(value))
        ]
        raise ConfigError(
            f"{field}: {module.__file__} has no {attribute!r}{suggest(attribute, own)}"
        )
    return found
