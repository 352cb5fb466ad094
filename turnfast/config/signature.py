"""Read the signatures of tools, environments, rewards and credit rules, and check arguments.

A signature is the only declaration of its options: names, types, ranges and defaults.
"""

from __future__ import annotations

import difflib
import inspect
import typing
from collections.abc import Callable, Iterable, Mapping
from inspect import Parameter
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError, create_model

from ..errors import ConfigError


def parameters_of(make: Callable[..., Any]) -> list[Parameter]:
    """The parameters of a function or constructor, without `self`, with resolved annotations.

    If a constructor accepts `**options`, the parameters of the base class's constructor are added,
    and so on. If the last base class accepts `**options` too, they are the last parameter, and any
    name is accepted.
    """
    if not isinstance(make, type):
        return _resolved(make if inspect.isroutine(make) else make.__call__)
    by_name: dict[str, Parameter] = {}
    open_ended: list[Parameter] = []
    for cls in inspect.getmro(make):
        init = vars(cls).get("__init__")
        if init is None or init is object.__init__:
            continue
        open_ended = []
        for parameter in _resolved(init)[1:]:
            if parameter.kind is parameter.VAR_KEYWORD:
                open_ended = [parameter]
            elif parameter.kind is not parameter.VAR_POSITIONAL:
                by_name.setdefault(parameter.name, parameter)
        if not open_ended:
            break
    return [*by_name.values(), *open_ended]


def arguments_model(
    label: str,
    parameters: Iterable[Parameter],
    *,
    descriptions: Mapping[str, str] | None = None,
    arbitrary_types: bool = True,
) -> type[BaseModel]:
    """A strict pydantic model with one field per parameter.

    Fields are aliased, so that a parameter may have any name, such as `json` or `_x`.

    Args:
        descriptions: texts for the JSON schema, by parameter name.
        arbitrary_types: accept annotations that pydantic has no schema for.
    """
    fields: dict[str, Any] = {}
    extra: typing.Literal["allow", "forbid"] = "forbid"
    for parameter in parameters:
        if parameter.kind is parameter.VAR_KEYWORD:
            extra = "allow"
        if parameter.kind in (parameter.VAR_KEYWORD, parameter.VAR_POSITIONAL):
            continue
        annotation = Any if parameter.annotation is parameter.empty else parameter.annotation
        default = ... if parameter.default is parameter.empty else parameter.default
        description = (descriptions or {}).get(parameter.name)
        info = Field(default, alias=parameter.name, description=description)
        fields[f"p{len(fields)}"] = (annotation, info)
    config = ConfigDict(
        extra=extra,
        strict=True,
        arbitrary_types_allowed=arbitrary_types,
        allow_inf_nan=False,
    )
    return create_model(label, __config__=config, **fields)


def check_arguments(
    model: type[BaseModel], arguments: Mapping[str, Any], *, field: str
) -> dict[str, Any]:
    """Validate arguments against a model of `arguments_model`.

    Args:
        field: the recipe field with the arguments.
    Returns:
        The arguments, with nested records constructed; defaults are not added.
    Raises:
        ConfigError: one line per unknown, missing or invalid argument.
    """
    try:
        checked = model.model_validate(dict(arguments))
    except ValidationError as error:
        lines = dict.fromkeys(_explain(item, model, field) for item in error.errors())
        raise ConfigError("\n".join(lines)) from None
    declared = {
        str(info.alias): getattr(checked, key)
        for key, info in model.model_fields.items()
        if key in checked.model_fields_set
    }
    return declared | (checked.model_extra or {})


def check_options(
    make: Callable[..., Any], options: Mapping[str, Any], *, field: str, skip: int = 0
) -> dict[str, Any]:
    """Validate options against the signature of the function or constructor that accepts them.

    Args:
        skip: number of leading parameters that are not options.
    Returns, Raises:
        As `check_arguments`.
    """
    model = arguments_model("Options", parameters_of(make)[skip:])
    return check_arguments(model, options, field=field)


def suggest(name: str, known: Iterable[str]) -> str:
    """The end of a message about an unknown name: the nearest known name, or all of them.

    If names have sections, as `env.name`, only those of the same section are listed, if any.
    """
    names = list(known)
    nearest = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    if nearest:
        return f"; did you mean {nearest[0]!r}?"
    section = [other for other in names if other.split(".")[0] == name.split(".")[0]]
    return f"; known: {', '.join(section or names) or 'none'}"


def _resolved(function: Callable[..., Any]) -> list[Parameter]:
    hints = typing.get_type_hints(function, include_extras=True)
    return [
        parameter.replace(annotation=hints.get(parameter.name, parameter.empty))
        for parameter in inspect.signature(function).parameters.values()
    ]


def _explain(item: Any, model: type[BaseModel], field: str) -> str:
    names = [str(part) for part in item["loc"]]
    fields: Mapping[str, Any] = {}
    dotted, nested = field, model
    # follow the path through nested records; the rest of it names members of a union
    while nested is not None and names:
        fields = {info.alias or key: info.annotation for key, info in nested.model_fields.items()}
        inner = fields.get(names[0])
        dotted = f"{dotted}.{names.pop(0)}"
        nested = inner if isinstance(inner, type) and issubclass(inner, BaseModel) else None
    if item["type"] == "extra_forbidden":
        return f"{dotted}: no such option{suggest(dotted.rpartition('.')[2], fields)}"
    if item["type"] == "missing":
        return f"{dotted}: this option is required"
    if item["type"] == "model_type":
        return f"{dotted}: expected a section, [{dotted}] (got {item['input']!r})"
    return f"{dotted}: {item['msg']} (got {item['input']!r})"
