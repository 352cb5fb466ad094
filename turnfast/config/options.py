"""Checks of `env.options` against the constructor that takes them."""

from __future__ import annotations

import difflib
import inspect
import typing
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import islice
from typing import Any

from pydantic import ConfigDict, Field, ValidationError, create_model

from ..errors import ConfigError


def check_options(
    make: Callable[..., Any],
    options: Mapping[str, Any],
    *,
    field: str = "env.options",
    given: int = 0,
) -> None:
    """Refuse options that the constructor would not take: unknown, missing, or of the wrong type.

    Args:
        field: what the options are called in the recipe.
        given: leading parameters that are no options, since the caller passes them.

    Where a constructor hands `**options` on to its base class, the base's arguments count as well.

    Raises:
        ConfigError: names `<field>.<option>` and what would do instead.
    """
    fields: dict[str, Any] = {}
    known: list[str] = []
    open_ended = False
    for parameter, hint in islice(_parameters(make), given, None):
        open_ended = parameter.kind is parameter.VAR_KEYWORD
        if open_ended or parameter.kind is parameter.VAR_POSITIONAL or parameter.name in known:
            continue
        default = ... if parameter.default is parameter.empty else parameter.default
        # aliased, so that an option may be called `json` or `_x` as freely as in Python
        fields[f"p{len(known)}"] = (hint, Field(default, alias=parameter.name))
        known.append(parameter.name)
    config = ConfigDict(
        extra="allow" if open_ended else "forbid", strict=True, arbitrary_types_allowed=True
    )
    try:
        create_model("Options", __config__=config, **fields).model_validate(dict(options))
    except ValidationError as error:
        lines = dict.fromkeys(_explain(item, known, field) for item in error.errors())
        raise ConfigError("\n".join(lines)) from None


def suggest(word: str, known: Iterable[str]) -> str:
    """The end of a message about an unknown name: the nearest known one, or all of them."""
    names = sorted(known)
    near = difflib.get_close_matches(word, names, n=1, cutoff=0.5)
    if near:
        return f"; did you mean {near[0]!r}?"
    return f"; known: {', '.join(names) or 'none'}"


def _parameters(make: Callable[..., Any]) -> Iterator[tuple[inspect.Parameter, Any]]:
    """The parameters of a function, or of a class and those bases that it hands `**options` to."""
    inits = (
        [vars(cls)["__init__"] for cls in inspect.getmro(make) if "__init__" in vars(cls)]
        if (isinstance(make, type))
        else [make]
    )
    for init in inits:
        if init is object.__init__:
            return
        hints = typing.get_type_hints(init, include_extras=True)
        parameters = list(inspect.signature(init).parameters.values())[isinstance(make, type) :]
        for parameter in parameters:
            yield parameter, hints.get(parameter.name, Any)
        if all(parameter.kind is not parameter.VAR_KEYWORD for parameter in parameters):
            return


def _explain(item: Any, known: list[str], field: str) -> str:
    where = ".".join(str(part) for part in item["loc"])
    option = str(item["loc"][0]) if item["loc"] else ""
    if item["type"] == "extra_forbidden":
        return f"{field}.{where}: no such option{suggest(option, known)}"
    if item["type"] == "missing":
        return f"{field}.{where}: this option must be given"
    return f"{field}.{option}: {item['msg']} (got {item['input']!r})"
