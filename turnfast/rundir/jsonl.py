"""Strict JSON, one object per line.

A line is complete if it ends with a newline. Readers skip an incomplete last line, and the next
append removes it, so a kill loses at most the lines being written. Files are ASCII, so that lone
surrogates and control characters in texts survive.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

from ..errors import ConfigError


def append_lines(path: Path, records: Iterable[Mapping[str, Any]]) -> None:
    """Append objects to a file; NaN and infinity are written as null."""
    lines = b"".join(_encode(to_strict(record)[0]) for record in records)
    with path.open("ab+") as file:
        _remove_incomplete_line(file)
        file.write(lines)


def read_lines(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the objects of a .jsonl file of a run directory.

    Raises:
        ConfigError: the file cannot be read, or a line is not an object with a `step`.
    """
    try:
        with path.open("rb") as file:
            for number, line in enumerate(file, 1):
                if line.endswith(b"\n"):
                    yield _parse(path, number, line)
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror})") from error


def keep_until(path: Path, step: int) -> int:
    """Remove the lines of later steps from a file, if it exists, and return their number."""
    if not path.exists():
        return 0
    removed = 0
    partial = path.with_name(f".{path.name}.partial")
    with partial.open("wb") as file:
        for line in read_lines(path):
            if line["step"] <= step:
                file.write(_encode(line))
            else:
                removed += 1
    partial.replace(path)
    return removed


def to_strict(value: Any) -> tuple[Any, int]:
    """Return the value as strict JSON, and how many NaN or infinite numbers became null."""
    if value is None or isinstance(value, bool | int | str):
        return value, 0
    if isinstance(value, Mapping):
        pairs = {str(key): to_strict(item) for key, item in value.items()}
        return {key: v for key, (v, _) in pairs.items()}, sum(n for _, n in pairs.values())
    if isinstance(value, list | tuple):
        items = [to_strict(item) for item in value]
        return [v for v, _ in items], sum(n for _, n in items)
    number = float(value)
    return (number, 0) if math.isfinite(number) else (None, 1)


def _parse(path: Path, number: int, line: bytes) -> dict[str, Any]:
    try:
        record = json.loads(line, parse_constant=lambda _: None)
    except ValueError as error:
        raise ConfigError(f"{path}:{number}: not valid JSON: {error}") from None
    if not isinstance(record, dict) or not isinstance(record.get("step"), int):
        raise ConfigError(f"{path}:{number}: expected an object with an integer 'step'")
    return record


def _encode(record: Mapping[str, Any]) -> bytes:
    return json.dumps(record, allow_nan=False).encode("ascii") + b"\n"


def _remove_incomplete_line(file: BinaryIO) -> None:
    if file.tell() == 0:
        return
    file.seek(-1, 2)
    if file.read(1) != b"\n":
        file.seek(0)
        file.truncate(file.read().rfind(b"\n") + 1)
