"""From `env.name` and `env.options` to an environment."""

from __future__ import annotations

import importlib
import os
import re
import sys
from collections.abc import Callable, Mapping
from typing import Any, cast

from ..config import ConfigError
from .base import Env
from .lookup import LookupEnv
from .options import check_options, suggest
from .search import SearchEnv
from .tool_env import ToolEnv

BUILT_IN: Mapping[str, Callable[..., Env]] = {"lookup": LookupEnv, "search": SearchEnv}


def load_env(
    name: str, options: Mapping[str, Any], *, max_turns: int = 4, tool_timeout_s: float = 10.0
) -> Env:
    """Make the environment of a run.

    Args:
        name: "lookup", "search", or "module:Class" of the user's own, where `module` is a file in
            the current directory (`capitals` for capitals.py) or anything that can be imported.
        options: arguments of the class, checked against its signature.
        max_turns, tool_timeout_s: `env.max_turns` and `env.tool_timeout_s`, in turns and seconds;
            taken by environments that are a `ToolEnv`.
    Raises:
        ConfigError: names `env.name` or `env.options.<option>`, and what would do instead.

    Example:
        >>> env = load_env("lookup", {"hops": 2}, max_turns=4)
        >>> env.tasks("train")[0].question
        'Who is the teacher of the author of Sorime?'
    """
    make = BUILT_IN.get(name) or _find(name)
    check_options(make, options)
    try:
        env = make(**options)
    except ConfigError:
        raise
    except (OSError, ValueError, TypeError) as error:
        raise ConfigError(f"env.options: {name} refuses them: {error}") from error
    missing = [
        attribute
        for attribute in ("tasks", "episode", "tools", "native_calls")
        if not hasattr(env, attribute)
    ]
    if missing:
        hint = "; does __init__ call super().__init__(**options)?" if "tools" in missing else ""
        raise ConfigError(f"env.name: {name} is no environment, it lacks {missing}{hint}")
    if isinstance(env, ToolEnv):
        if type(env).tasks is ToolEnv.tasks:
            raise ConfigError(f"env.name: {name} must define tasks(self, split)")
        env.set_limits(max_turns=max_turns, tool_timeout_s=tool_timeout_s)
    return env


def _find(name: str) -> Callable[..., Env]:
    module_name, colon, class_name = name.partition(":")
    if not colon:
        hint = suggest(name, BUILT_IN)
        raise ConfigError(
            f"env.name: no environment is called {name!r}{hint} (your own is given as module:Class)"
        )
    if not re.fullmatch(r"\w+(\.\w+)*:\w+", name):
        raise ConfigError(f"env.name: {name!r} is not of the form module:Class")
    folder = os.getcwd()
    if folder not in sys.path:
        # last, so that no file in the user's folder can take the place of an installed package
        sys.path.append(folder)
    importlib.invalidate_caches()
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name and not f"{module_name}.".startswith(f"{error.name}."):
            raise ConfigError(f"env.name: {module_name} needs {error.name!r}: {error}") from error
        raise ConfigError(
            f"env.name: no module {module_name!r} in {folder} or among the installed packages"
        ) from None
    except Exception as error:
        raise ConfigError(
            f"env.name: importing {module_name!r} failed: {type(error).__name__}: {error}"
        ) from error
    if getattr(module, "__file__", None) is None:  # a folder without Python code
        raise ConfigError(f"env.name: {module_name!r} is no Python module")
    found = getattr(module, class_name, None)
    if not callable(found):
        classes = [key for key, value in vars(module).items() if isinstance(value, type)]
        hint = suggest(class_name, classes)
        raise ConfigError(f"env.name: {module.__file__} has no {class_name!r}{hint}")
    return cast("Callable[..., Env]", found)
