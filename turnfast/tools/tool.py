"""A tool: a typed Python function, with the name, the description and the schema derived from it.

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
add(2, 3)             '5', the function itself
"""

from __future__ import annotations

import inspect
import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from inspect import Parameter
from typing import Any, overload

from pydantic import BaseModel, ValidationError
from pydantic.json_schema import GenerateJsonSchema

from ..config.signature import arguments_model, parameters_of
from .deadline import is_async


class BadArguments(ValueError):
    """Arguments that do not fit the tool's signature; the text is meant for the agent."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Tool:
    """A function that an agent may call, made by the decorator `tool`.

    Attributes:
        parameters: JSON schema of the arguments, as chat templates and other programs take it.
        function: what is called, with keyword arguments; plain or `async`.
        arguments: the pydantic model that checks a call: strict types, no unknown names.
        is_method: True in a class body; read from an instance, the tool has `self` bound.
        inline: a call runs between two steps of the sampler, not in a thread beside them.
    """

    name: str
    description: str
    parameters: Mapping[str, Any]
    function: Callable[..., Any]
    arguments: type[BaseModel]
    is_method: bool = False
    inline: bool = False

    @property
    def schema(self) -> dict[str, Any]:
        """The form that Hugging Face chat templates take in `tools=[…]`."""
        inner = {
            "name": self.name,
            "description": self.description,
            "parameters": dict(self.parameters),
        }
        return {"type": "function", "function": inner}

    def bind(self, arguments: Mapping[str, Any]) -> dict[str, Any]:
        """Check the arguments of a call and fill in the defaults.

        Raises:
            BadArguments: a missing, unknown or ill-typed argument.
        """
        try:
            # through JSON, because that is where the arguments come from: strict mode then takes
            # a list for a tuple and a string for a date, but never "2" for 2
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
    *, name: str | None = None, description: str | None = None, inline: bool = False
) -> Callable[[Callable[..., Any]], Tool]: ...


def tool(
    function: Callable[..., Any] | None = None,
    /,
    *,
    name: str | None = None,
    description: str | None = None,
    inline: bool = False,
) -> Tool | Callable[[Callable[..., Any]], Tool]:
    """Make a `Tool` of a typed function; with or without arguments, on functions and methods.

    The name is the function's, the description the first paragraph of its docstring, and the lines
    under `Args:` describe the parameters.

    Args:
        inline: the function computes for less than about a millisecond and never waits, so a thread
            would cost more than it does. Its deadline cannot interrupt it.
    Raises:
        TypeError: a parameter without a type, or `*args`/`**kwargs`, which have no schema; an
            `async` function that is to be inline.

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
        return lambda inner: _make_tool(inner, name, description, inline)
    return _make_tool(function, name, description, inline)


def _tool_parameters(function: Callable[..., Any], label: str) -> tuple[list[Parameter], bool]:
    """The parameters of a tool without `self`, and whether there was one.

    Raises:
        TypeError: a parameter without a type, or one that a call by name cannot give.
    """
    parameters = parameters_of(function)
    is_method = bool(parameters) and parameters[0].name == "self"
    for parameter in parameters[is_method:]:
        if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
            raise TypeError(f"{label}: *{parameter.name} has no schema; name each parameter")
        if parameter.kind is parameter.POSITIONAL_ONLY:
            raise TypeError(f"{label}: {parameter.name!r} is positional-only, calls are by name")
        if parameter.annotation is parameter.empty:
            raise TypeError(f"{label}: parameter {parameter.name!r} has no type")
    return parameters[is_method:], is_method


def _make_tool(
    function: Callable[..., Any], name: str | None, description: str | None, inline: bool
) -> Tool:
    label = name or getattr(function, "__name__", "")
    if inline and is_async(function):
        raise TypeError(f"tool {label!r}: an async function may wait, so it cannot be inline")
    if not re.fullmatch(r"\w[\w.-]{0,63}", label):
        raise TypeError(f"tool {label!r}: needs a name of letters, digits, '_', '.' or '-'")
    summary, described = _read_docstring(inspect.getdoc(function) or "")
    parameters, is_method = _tool_parameters(function, label)
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
        inline=inline,
    )


class _PlainSchema(GenerateJsonSchema):
    """Without the titles that pydantic derives from names: they cost prompt tokens, say nothing."""

    def field_title_should_be_set(self, schema: Any) -> bool:
        return False


def _read_docstring(text: str) -> tuple[str, dict[str, str]]:
    """First paragraph, and the descriptions under `Args:`."""
    summary = " ".join(text.split("\n\n", 1)[0].split())
    described: dict[str, str] = {}
    section = re.search(r"^Args:\n((?:[ \t]+.*\n?|\n)+)", text, flags=re.MULTILINE)
    if section:
        for name, first, rest in re.findall(
            r"^ {4}(\w+)(?: \([^)]*\))?: *(.*)\n?((?: {5,}.*\n?)*)", section[1], flags=re.MULTILINE
        ):
            described[name] = " ".join(f"{first} {rest}".split())
    return summary, described


def _explain(item: Any) -> str:
    where = ".".join(str(part) for part in item["loc"])
    if item["type"] == "extra_forbidden":
        return f"{where}: no such argument"
    if item["type"] == "missing":
        return f"{where}: missing"
    return f"{where}: {item['msg']}" if where else str(item["msg"])
