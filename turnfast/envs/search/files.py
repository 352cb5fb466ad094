"""Read questions and passages from JSONL files; errors name the file, the line and the reason.

    questions.jsonl   {"id": "q1", "question": "Who wrote Ulm?", "answers": ["Ida"],
                       "supporting_titles": ["Ulm"]}              supporting_titles is optional
    corpus.jsonl      {"title": "Ulm", "text": "Ulm was written by Ida."}

Other fields and blank lines are ignored.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...errors import ConfigError
from ...tools import Passage
from ..base import Split


@dataclass(frozen=True, slots=True, kw_only=True)
class Record:
    """One question with its accepted answers and the titles of the passages that support them."""

    id: str
    question: str
    answers: tuple[str, ...]
    supporting_titles: tuple[str, ...] = ()


def read_questions(path: Path) -> list[Record]:
    """Read a file of questions.

    Raises:
        ConfigError: the file is missing or empty, a line is malformed or an id occurs twice.
    """
    records: list[Record] = []
    lines: dict[str, int] = {}
    for number, row in json_objects(path):
        where = f"{path}:{number}"
        record = Record(
            id=_text(row, "id", where),
            question=_text(row, "question", where),
            answers=_texts(row, "answers", where),
            supporting_titles=_texts({"supporting_titles": [], **row}, "supporting_titles", where),
        )
        if not record.answers:
            raise ConfigError(f"{where}: 'answers' is empty; give at least one accepted answer")
        if record.id in lines:
            raise ConfigError(f"{where}: duplicate id {record.id!r}, see line {lines[record.id]}")
        lines[record.id] = number
        records.append(record)
    if not records:
        raise ConfigError(f"{path}: the file contains no questions")
    return records


def read_corpus(path: Path) -> list[Passage]:
    """Read a file of passages; raise ConfigError if it is missing, empty or malformed."""
    passages = [
        Passage(
            title=_text(row, "title", f"{path}:{number}", allow_empty=True),
            text=_text(row, "text", f"{path}:{number}"),
        )
        for number, row in json_objects(path)
    ]
    if not passages:
        raise ConfigError(f"{path}: the file contains no passages")
    return passages


def json_objects(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield the number (from 1) and the JSON object of each line; skip blank lines.

    Raises:
        ConfigError: the file cannot be read, or a line is not a JSON object in UTF-8.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror or error}") from None
    for number, line in enumerate(content.removeprefix(b"\xef\xbb\xbf").split(b"\n"), start=1):
        if not line.strip():
            continue
        where = f"{path}:{number}"
        try:
            row = json.loads(line.decode("utf-8"))
        except UnicodeDecodeError as error:
            raise ConfigError(f"{where}: not UTF-8 (byte {error.start + 1} of the line)") from None
        except json.JSONDecodeError as error:
            raise ConfigError(f"{where}: not JSON: {error.msg}, column {error.colno}") from None
        except (ValueError, RecursionError) as error:
            raise ConfigError(f"{where}: not JSON: {error}") from None
        if not isinstance(row, dict):
            raise ConfigError(f"{where}: expected an object, got {_type_name(row)}")
        yield number, row


def _text(row: dict[str, Any], field: str, where: str, *, allow_empty: bool = False) -> str:
    return _check_text(_value(row, field, where), field, where, allow_empty=allow_empty)


def _texts(row: dict[str, Any], field: str, where: str) -> tuple[str, ...]:
    values = _value(row, field, where)
    if not isinstance(values, list):
        raise ConfigError(f"{where}: {field!r} is {_type_name(values)}, expected a list of strings")
    return tuple(_check_text(value, f"{field}[{i}]", where) for i, value in enumerate(values))


def _value(row: dict[str, Any], field: str, where: str) -> Any:
    if field not in row:
        raise ConfigError(f"{where}: field {field!r} is missing; found: {', '.join(row) or 'none'}")
    return row[field]


def _check_text(value: Any, field: str, where: str, *, allow_empty: bool = False) -> str:
    if not isinstance(value, str):
        raise ConfigError(f"{where}: {field!r} is {_type_name(value)}, expected a string")
    if not value.strip() and not allow_empty:
        raise ConfigError(f"{where}: {field!r} is empty")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        raise ConfigError(f"{where}: {field!r} contains a lone surrogate") from None
    return value


def _type_name(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "a string", bool: "a boolean"}
    return "null" if value is None else names.get(type(value), "a number")


def split_records(
    records: Sequence[Record], *, share: float, seed: int
) -> dict[Split, tuple[Record, ...]]:
    """Hold out a share of the questions for evaluation, at least one question and never all.

    The split depends on the seed and on the set of ids, not on the order of the file.

    Raises:
        ConfigError: there is only one question.
    """
    if len(records) < 2:
        raise ConfigError(
            "env.options.questions: one question cannot be split into train and eval; "
            "add questions, or set eval_questions"
        )
    count = min(max(1, round(share * len(records))), len(records) - 1)

    def digest(record: Record) -> bytes:
        text = f"{seed}\0{record.id}".encode("utf-8", errors="replace")
        return hashlib.blake2b(text, digest_size=16).digest()

    held_out = {record.id for record in sorted(records, key=digest)[:count]}
    return {
        "train": tuple(record for record in records if record.id not in held_out),
        "eval": tuple(record for record in records if record.id in held_out),
    }
