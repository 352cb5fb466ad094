"""A tool: a typed Python function whose name, description and schema are derived from it.

@tool
def add(a: int, b: int = 1) -> str:
    '''Add two whole numbers.

    Args:
        a: the first number.
    '''
    return str(a + b)

add.name              'add'
add.parameters        {'type': 'object', 'properties': {'a': {'type': 'integer', …}, …}, …}
add.bind({"a": 2})    {'a': 2, 'b': 1}
add.bind({"a": "2"})  raises BadArguments('a: Input should be a valid integer')
add(2, 3)             '5', as the function
"""

from __future__ import annotations

import inspect
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from inspect import Parameter
from typing import Any, overload

from pydantic import BaseModel, ValidationError
from pydantic.json_schema import GenerateJsonSchema

from ..config.signature import arguments_model, parameters_of


class BadArguments(ValueError):
    """Arguments that do not match the tool's signature; the message is written for the agent."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Tool:
    """A function that an agent may call, made by the decorator `tool`.

    Attributes:
        parameters: JSON schema of the arguments.
        function: the plain or `async` function, called with keyword arguments.
        arguments: the pydantic model that checks a call: strict types, no unknown names.
        is_method: True if `self` is not bound yet; access through an instance binds it.
    """

    name: str
    description: str
    parameters: Mapping[str, Any]
    function: Callable[..., Any]
    arguments: type[BaseModel]
    is_method: bool = False

    @property
    def schema(self) -> dict[str, Any]:
        """The schema that Hugging Face chat templates accept in `tools=[…]`."""
        inner = {
            "name": self.name,
            "description": self.description,
            "parameters": dict(self.parameters),
        }
        return {"type": "function", "function": inner}

    def bind(self, arguments: Mapping[str, Any]) -> dict[str, Any]:
        """Check the arguments of a call and fill in the defaults.

        Raises:
            BadArguments: an argument is missing, unknown or of the wrong type.
        """
        try:
            # Validated as JSON: strict mode then accepts a list for a tuple and a string for a
            # date, but not "2" for 2.
            checked = self.arguments.model_validate_json(json.dumps(arguments))
        except ValidationError as error:
            raise BadArguments("; ".join(_explain(item) for item in error.errors()[:3])) from None
        except (TypeError, ValueError, RecursionError) as error:
            raise BadArguments(f"not JSON: {error}") from None
        fields = self.arguments.model_fields
        return {info.alias or key: getattr(checked, key) for key, info in fields.items()}

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.function(*args, **kwargs)

    def __get__(self, instance: Any, owner: type | None = None) -> Tool:
        if instance is None or not self.is_method:
            return self
        bound = self.function.__get__(instance, owner)  # type: ignore[attr-defined]
        return replace(self, function=bound, is_method=False)


@overload
def tool(function: Callable[..., Any], /) -> Tool: ...


@overload
def tool(
    *, name: str | None = None, description: str | None = None
) -> Callable[[Callable[..., Any]], Tool]: ...


def tool(
    function: Callable[..., Any] | None = None,
    /,
    *,
    name: str | None = None,
    description: str | None = None,
) -> Tool | Callable[[Callable[..., Any]], Tool]:
    """Decorate a typed function or method to make it a `Tool`.

    By default, the name is the function's name and the description is the first paragraph of its
    docstring. The lines under `Args:` describe the parameters.

    Raises:
        TypeError: a parameter has no type, is positional-only, or is `*args` or `**kwargs`.

    Example:
        >>> @tool
        ... def search(query: str) -> str:
        ...     '''Find one passage.'''
        ...     return "Ulm was written by Ida."
        >>> search.parameters
        {'properties': {'query': {'type': 'string'}}, 'required': ['query'], 'type': 'object', \
'additionalProperties': False}
    """
    if function is None:
        return lambda inner: _make_tool(inner, name, description)
    return _make_tool(function, name, description)


def _check_parameters(parameters: Sequence[Parameter], label: str) -> None:
    for parameter in parameters:
        if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
            raise TypeError(f"{label}: *{parameter.name} has no schema; name each parameter")
        if parameter.kind is parameter.POSITIONAL_ONLY:
            raise TypeError(
                f"{label}: {parameter.name!r} is positional-only; tools are called by keyword"
            )
        if parameter.annotation is parameter.empty:
            raise TypeError(f"{label}: parameter {parameter.name!r} has no type")


def _make_tool(function: Callable[..., Any], name: str | None, description: str | None) -> Tool:
    label = name or getattr(function, "__name__", "")
    if not re.fullmatch(r"\w[\w.-]{0,63}", label):
        raise TypeError(
            f"tool {label!r}: the name may contain only letters, digits, '_', '.' and '-'"
        )
    summary, described = _read_docstring(inspect.getdoc(function) or "")
    parameters = parameters_of(function)
    is_method = bool(parameters) and parameters[0].name == "self"
    parameters = parameters[is_method:]
    _check_parameters(parameters, label)
    model = arguments_model(label, parameters, descriptions=described, arbitrary_types=False)
    schema = model.model_json_schema(schema_generator=_PlainSchema)
    schema.pop("title", None)
    schema.setdefault("properties", {})
    return Tool(
        name=label,
        description=description or summary,
        parameters=schema,
        function=function,
        arguments=model,
        is_method=is_method,
    )


class _PlainSchema(GenerateJsonSchema):
    """Omits the titles that pydantic derives from names, to save prompt tokens."""

    def field_title_should_be_set(self, schema: Any) -> bool:
        return False


def _read_docstring(text: str) -> tuple[str, dict[str, str]]:
    """Return the first paragraph and the descriptions of the parameters under `Args:`."""
    summary = " ".join(text.split("\n\n", 1)[0].split())
    section = re.search(r"^Args:\n((?:[ \t]+.*\n?|\n)+)", text, flags=re.MULTILINE)
    entry = re.compile(r"^ {4}(\w+)(?: \([^)]*\))?: *(.*\n?(?: {5,}.*\n?)*)", flags=re.MULTILINE)
    entries = entry.findall(section[1]) if section else []
    return summary, {name: " ".join(description.split()) for name, description in entries}


def _explain(item: Any) -> str:
    where = ".".join(str(part) for part in item["loc"])
    if item["type"] == "extra_forbidden":
        return f"{where}: no such argument"
    if item["type"] == "missing":
        return f"{where}: missing"
    return f"{where}: {item['msg']}" if where else str(item["msg"])
