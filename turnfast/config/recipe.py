"""Recipes: a `Config` from a TOML file and dotted flags, and back.

    config = load_config("search.toml", ["--loss.clip-high", "0.28"])

Errors are a `ConfigError` that names the field, the file or flag it comes from, and the fix.
"""

from __future__ import annotations

import tomllib
from collections.abc import Collection, Iterator, Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import tomli_w
from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

from ..errors import ConfigError
from .conflicts import find_conflicts
from .schema import Config, RewardConfig
from .signature import suggest


def recipe_path(name: str) -> Path:
    """The file of a recipe, from its path or the name of a shipped one (`demo` for `demo.toml`)."""
    shipped = shipped_recipes()
    if Path(name).is_file():
        return Path(name)
    if name not in shipped:
        raise ConfigError(f"{name}: no such recipe{suggest(name, shipped)}")
    return shipped[name]


def shipped_recipes() -> dict[str, Path]:
    """The recipes of the package by name."""
    folder = Path(str(resources.files("turnfast") / "recipes"))
    return {path.stem: path for path in sorted(folder.glob("*.toml"))}


def load_config(recipe: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Read a recipe and override fields with dotted flags.

    Args:
        recipe: path of a TOML file, or the name of a shipped recipe.
        overrides: `["--loss.clip-high", "0.28", "--env.options.hops=2", …]`; a value is parsed
            as TOML or, if that fails, used as a string.
    Raises:
        ConfigError: unknown field, wrong type, conflict of fields, unreadable file.
    """
    path = recipe_path(str(recipe))
    try:
        tree = tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: not valid TOML: {error}") from None
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror})") from None
    flags = _parse_flags(overrides)
    for dotted, value in flags.items():
        _set(tree, dotted, value)
    return build_config(tree, source=str(path), flags=flags)


def build_config(
    tree: Mapping[str, Any], *, source: str = "config", flags: Collection[str] = ()
) -> Config:
    """Make a `Config` from nested mappings; checks every field, then conflicts between fields.

    Raises:
        ConfigError: one line per mistake, with `source` or the flag that set the field.
    """
    try:
        config = Config.model_validate(_lists_to_tuples(tree))
        mistakes = list(find_conflicts(config))
        if not mistakes:
            return config
    except ValidationError as error:
        mistakes = [_explain(item) for item in error.errors()]
    raise ConfigError("\n".join(_with_source(line, source, flags) for line in mistakes))


def _with_source(line: str, source: str, flags: Collection[str]) -> str:
    flag = next((flag for flag in flags if line.startswith((f"{flag}:", f"{flag}."))), None)
    return f"{source}: {line}" if flag is None else f"--{line}"


def to_toml(config: Config) -> str:
    """Write the whole recipe as TOML; fields that are None are left out."""
    return tomli_w.dumps(config.model_dump(exclude_none=True)).rstrip("\n")


def field_names() -> list[str]:
    """All dotted names, `model.path` … `sft.batch_tokens`."""
    return [name for name, _ in _fields(Config)]


def describe_fields() -> list[str]:
    """One line per field: dotted flag, default, choices and description."""
    lines: list[str] = []
    for name, info in _fields(Config):
        default = info.get_default(call_default_factory=True)
        flag = f"--{name}".replace("_", "-")
        about = "; ".join(filter(None, [_choices(info.annotation), info.description]))
        lines.append(f"{flag:<34} {default!s:<14} {about}".rstrip())
    return lines


def _fields(model: type[BaseModel], prefix: str = "") -> Iterator[tuple[str, FieldInfo]]:
    for name, info in model.model_fields.items():
        section = info.annotation
        if isinstance(section, type) and issubclass(section, BaseModel):
            yield from _fields(section, f"{prefix}{name}.")
        else:
            yield prefix + name, info


def _choices(annotation: Any) -> str:
    """`token | turn | sequence` for a field with several choices."""
    parts = (annotation, *get_args(annotation))
    choices = [str(x) for part in parts if get_origin(part) is Literal for x in get_args(part)]
    return " | ".join(choices) if len(choices) > 1 else ""


def _explain(item: Any) -> str:
    dotted = ".".join(str(part) for part in item["loc"])
    if item["type"] == "extra_forbidden":
        return f"{dotted}: no such field{suggest_field(dotted)}"
    if item["type"] in ("tuple_type", "model_type", "dict_type"):
        wanted = "a list, [a, b]" if item["type"] == "tuple_type" else f"a section, [{dotted}]"
        return f"{dotted}: expected {wanted} (got {item['input']!r})"
    return f"{dotted}: {item['msg']} (got {item['input']!r})"


def suggest_field(dotted: str) -> str:
    """End of a message about an unknown field: fields of the same last name, or the nearest."""
    leaf = dotted.rpartition(".")[2].replace("-", "_")
    if dotted.startswith("env.rewards."):
        return suggest(leaf, RewardConfig.model_fields)
    same = [repr(name) for name in field_names() if name.rpartition(".")[2] == leaf]
    if same:
        return f"; did you mean {' or '.join(same)}?"
    return suggest(dotted, field_names() if "." in dotted else Config.model_fields)


def _parse_flags(words: Sequence[str]) -> dict[str, Any]:
    flags: dict[str, Any] = {}
    queue = list(words)
    while queue:
        word = queue.pop(0)
        if not word.startswith("--"):
            raise ConfigError(f"{word}: expected a dotted flag such as --loss.clip-high 0.28")
        name, equals, text = word[2:].partition("=")
        if not all(name.split(".")):
            raise ConfigError(f"--{name}: expected a section and a field, --loss.clip-high 0.28")
        if not equals:
            if not queue:
                raise ConfigError(f"--{name}: a value is missing")
            text = queue.pop(0)
        flags[name.replace("-", "_")] = _toml_value(text)
    return flags


def _toml_value(text: str) -> Any:
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text


def _set(tree: dict[str, Any], dotted: str, value: Any) -> None:
    *parents, leaf = dotted.split(".")
    node = tree
    for parent in parents:
        node = node.setdefault(parent, {})
        if not isinstance(node, dict):
            raise ConfigError(f"--{dotted}: {parent!r} is a value, not a section")
    node[leaf] = value


def _lists_to_tuples(node: Any, depth: int = 0) -> Any:
    # TOML has lists only, and strict validation accepts none for a tuple; free options keep theirs
    if isinstance(node, Mapping):
        return {
            key: value if depth == 1 and key == "options" else _lists_to_tuples(value, depth + 1)
            for key, value in node.items()
        }
    return tuple(node) if isinstance(node, list) else node
