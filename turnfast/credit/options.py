"""Options of a rule, read off its signature: the signature is the one place that declares them."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable, Iterable, Mapping
from dataclasses import fields
from functools import cache
from typing import Any, get_type_hints

from pydantic import ConfigDict, TypeAdapter, ValidationError

from turnfast.credit.baseline import Norm
from turnfast.credit.frame import Frame
from turnfast.errors import ConfigError


@cache
def option_types(function: Callable[..., Any]) -> dict[str, Any]:
    """Name and type of each option; a parameter `norm` stands for the fields of `Norm`."""
    hints = get_type_hints(function, include_extras=True)
    parameters = inspect.signature(function).parameters.values()
    options = {p.name: hints[p.name] for p in parameters if p.kind is p.KEYWORD_ONLY}
    norm = get_type_hints(Norm, include_extras=True) if options.pop("norm", None) else {}
    return options | norm | get_type_hints(Frame, include_extras=True)


def split_options(
    rule: str, function: Callable[..., Any], options: Mapping[str, Any]
) -> tuple[Frame, dict[str, Any]]:
    """The frame around the rule and the rule's own arguments, each checked for type and range.

    Raises:
        ConfigError: names `credit.options.<name>` and the way out.
    """
    types = option_types(function)
    values: dict[str, Any] = {}
    for name, value in options.items():
        if name not in types:
            raise ConfigError(
                f"credit.options.{name}: rule {rule!r} has no such option{suggest(name, types)}"
            )
        try:
            values[name] = _adapter(types[name]).validate_python(value, strict=True)
        except ValidationError as error:
            raise ConfigError(
                f"credit.options.{name}: {error.errors()[0]['msg']} (got {value!r})"
            ) from None
    frame, norm = _pop(Frame, values), _pop(Norm, values)
    return Frame(**frame), values | ({"norm": Norm(**norm)} if norm else {})


def suggest(word: str, known: Iterable[str]) -> str:
    names = sorted(known)
    near = difflib.get_close_matches(word, names, n=1, cutoff=0.5)
    return f"; did you mean {near[0]!r}?" if near else f"; known: {', '.join(names)}"


def _pop(record: type, values: dict[str, Any]) -> dict[str, Any]:
    return {f.name: values.pop(f.name) for f in fields(record) if f.name in values}


@cache
def _adapter(hint: Any) -> TypeAdapter[Any]:
    return TypeAdapter(hint, config=ConfigDict(allow_inf_nan=False))
