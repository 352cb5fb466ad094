"""Options of a credit rule: the keyword-only parameters of its function."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import fields
from functools import cache
from typing import Any

from pydantic import BaseModel

from turnfast.config.signature import arguments_model, check_arguments, parameters_of
from turnfast.credit.baseline import Norm
from turnfast.credit.frame import Frame


def split_options(
    function: Callable[..., Any], options: Mapping[str, Any]
) -> tuple[Frame, dict[str, Any]]:
    """The frame around a rule and the rule's own arguments, checked for type and range.

    Raises:
        ConfigError: names `credit.options.<name>` and the fix.
    """
    values = check_arguments(_options_model(function), options, field="credit.options")
    frame, norm = _pop(Frame, values), _pop(Norm, values)
    return Frame(**frame), values | ({"norm": Norm(**norm)} if norm else {})


@cache
def _options_model(function: Callable[..., Any]) -> type[BaseModel]:
    """A parameter `norm` stands for the fields of `Norm`."""
    own = {p.name: p for p in parameters_of(function) if p.kind is p.KEYWORD_ONLY}
    norm = parameters_of(Norm) if own.pop("norm", None) else []
    return arguments_model("Options", [*own.values(), *norm, *parameters_of(Frame)])


def _pop(record: type, values: dict[str, Any]) -> dict[str, Any]:
    return {f.name: values.pop(f.name) for f in fields(record) if f.name in values}
