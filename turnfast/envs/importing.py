"""Import the class or function that a recipe names as `module:attribute`."""

from __future__ import annotations

import importlib
import inspect
import os
import re
import sys
from collections.abc import Callable
from typing import Any

from ..config.signature import suggest
from ..errors import ConfigError


def import_named(name: str, *, field: str, form: str) -> Callable[..., Any]:
    """Import a class or function by the name in a recipe.

    Args:
        name: `module` is a file in the current directory or an importable module.
        field: the recipe field with the name. form: the expected form, for the errors.
    Raises:
        ConfigError: there is no such module or attribute.
        Exception: raised by the module when it is imported.
    """
    if not re.fullmatch(r"\w+(\.\w+)*:\w+", name):
        raise ConfigError(f"{field}: {name!r} is not of the form {form}")
    module_name, _, attribute = name.partition(":")
    folder = os.getcwd()
    if folder not in sys.path:
        # last, so that no file in the user's folder can replace an installed package
        sys.path.append(folder)
    importlib.invalidate_caches()
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if f"{module_name}.".startswith(f"{error.name}."):
            raise ConfigError(
                f"{field}: no module {module_name!r} in {folder} or among the installed packages"
            ) from None
        raise  # the module exists, but imports one that does not
    except SystemExit as error:  # a script; it would end the run without a message
        raise ConfigError(f"{field}: {module_name!r} exits when imported, with {error}") from None
    if getattr(module, "__file__", None) is None:  # a folder without Python code
        raise ConfigError(f"{field}: {module_name!r} is not a Python module")
    value = getattr(module, attribute, None)
    if not callable(value):
        is_candidate = inspect.isclass if form == "module:Class" else callable
        candidates = [name for name, other in vars(module).items() if is_candidate(other)]
        raise ConfigError(
            f"{field}: {module.__file__} has no {attribute!r}{suggest(attribute, candidates)}"
        )
    return value
