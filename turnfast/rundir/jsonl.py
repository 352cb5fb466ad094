"""Strict JSON, one object per line, appended so that a kill costs at most the lines being written.

A line is whole when it ends in a newline. Readers pass over a last line that does not, and the next
append cuts it off. Files are ASCII whatever the text in them, so lone surrogates and control
characters survive unchanged.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

from ..errors import ConfigError


def append_lines(path: Path, records: Iterable[Mapping[str, Any]]) -> None:
    """Write objects, as `to_strict` makes them, and close the file."""
    lines = b"".join(_line(record) for record in records)
    with path.open("ab+") as file:
        _cut_torn_line(file)
        file.write(lines)


def read_lines(path: Path) -> Iterator[dict[str, Any]]:
    """The objects of a .jsonl file of a run directory, one at a time."""
    try:
        with path.open("rb") as file:
            for number, line in enumerate(file, 1):
                if line.endswith(b"\n"):
                    yield _parse(path, number, line)
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror})") from error


def keep_until(path: Path, step: int) -> int:
    """Drop the lines of later steps; the number of them. A missing file has none."""
    if not path.exists():
        return 0
    dropped = 0
    partial = path.with_name(f".{path.name}.partial")
    with partial.open("wb") as file:
        for line in read_lines(path):
            if line["step"] <= step:
                file.write(_encode(line))
            else:
                dropped += 1
    partial.replace(path)
    return dropped


def to_strict(node: Any) -> tuple[Any, int]:
    """The value as strict JSON takes it, and how many numbers in it were not finite."""
    if node is None or isinstance(node, bool | int | str):
        return node, 0
    if isinstance(node, Mapping):
        pairs = {str(key): to_strict(value) for key, value in node.items()}
        return {key: v for key, (v, _) in pairs.items()}, sum(n for _, n in pairs.values())
    if isinstance(node, list | tuple):
        items = [to_strict(value) for value in node]
        return [value for value, _ in items], sum(count for _, count in items)
    number = float(node)
    return (number, 0) if math.isfinite(number) else (None, 1)


def _parse(path: Path, number: int, line: bytes) -> dict[str, Any]:
    try:
        found = json.loads(line, parse_constant=lambda _: None)
    except ValueError as error:
        raise ConfigError(f"{path}:{number}: not valid JSON: {error}") from None
    if not isinstance(found, dict) or not isinstance(found.get("step"), int):
        raise ConfigError(f"{path}:{number}: expected an object with a whole number as 'step'")
    return found


def _line(record: Mapping[str, Any]) -> bytes:
    try:
        return _encode(record)
    except (TypeError, ValueError):  # what JSON does not take as it is, or has no word for
        return _encode(to_strict(record)[0])


def _encode(record: Mapping[str, Any]) -> bytes:
    return json.dumps(record, allow_nan=False).encode("ascii") + b"\n"


def _cut_torn_line(file: BinaryIO) -> None:
    if file.tell() == 0:
        return
    file.seek(-1, 2)
    if file.read(1) != b"\n":
        file.seek(0)
        file.truncate(file.read().rfind(b"\n") + 1)
