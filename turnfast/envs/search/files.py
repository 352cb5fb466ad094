"""Questions and passages from JSONL files, with every fault named by file, line and reason.

    questions.jsonl   {"id": "q1", "question": "Who wrote Ulm?", "answers": ["Ida"],
                       "supporting_titles": ["Ulm"]}              the last field may be left out
    corpus.jsonl      {"title": "Ulm", "text": "Ulm was written by Ida."}

Further fields are passed over, and so are blank lines.
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
    """Raises ConfigError: no such file, or a line that is no question, or an id given twice."""
    records: list[Record] = []
    lines: dict[str, int] = {}
    for number, row in json_objects(path):
        where = f"{path}:{number}"
        record = Record(
            id=_text(row, "id", where),
            question=_text(row, "question", where),
            answers=_texts(row, "answers", where),
            supporting_titles=_texts(row, "supporting_titles", where)
            if "supporting_titles" in row
            else (),
        )
        if not record.answers:
            raise ConfigError(f"{where}: 'answers' is empty; give one accepted answer or more")
        if record.id in lines:
            raise ConfigError(f"{where}: id {record.id!r} was given in line {lines[record.id]}")
        lines[record.id] = number
        records.append(record)
    if not records:
        raise ConfigError(f"{path}: the file holds no questions")
    return records


def read_corpus(path: Path) -> list[Passage]:
    """Raises ConfigError: no such file, or a line that is no passage."""
    passages = [
        Passage(
            title=_text(row, "title", f"{path}:{number}", may_be_empty=True),
            text=_text(row, "text", f"{path}:{number}"),
        )
        for number, row in json_objects(path)
    ]
    if not passages:
        raise ConfigError(f"{path}: the file holds no passages")
    return passages


def json_objects(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Line numbers, from 1, and the JSON objects on them. Raises ConfigError, as above."""
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
            raise ConfigError(f"{where}: {_kind(row)} instead of an object")
        yield number, row


def _text(row: dict[str, Any], field: str, where: str, *, may_be_empty: bool = False) -> str:
    if field not in row:
        raise ConfigError(f"{where}: field {field!r} is missing; found: {', '.join(row) or 'none'}")
    return _checked(row[field], field, where, may_be_empty=may_be_empty)


def _texts(row: dict[str, Any], field: str, where: str) -> tuple[str, ...]:
    if field not in row:
        raise ConfigError(f"{where}: field {field!r} is missing; found: {', '.join(row) or 'none'}")
    values = row[field]
    if not isinstance(values, list):
        raise ConfigError(f"{where}: {field!r} is {_kind(values)}, not a list of texts")
    return tuple(
        _checked(value, f"{field}[{i}]", where, may_be_empty=False)
        for i, value in enumerate(values)
    )


def _checked(value: Any, field: str, where: str, *, may_be_empty: bool) -> str:
    if not isinstance(value, str):
        raise ConfigError(f"{where}: {field!r} is {_kind(value)}, not a text")
    if not value.strip() and not may_be_empty:
        raise ConfigError(f"{where}: {field!r} is empty")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        raise ConfigError(f"{where}: {field!r} holds half of a surrogate pair") from None
    return value


def _kind(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "a text", bool: "true or false"}
    names |= {int: "a number", float: "a number", type(None): "null"}
    return names.get(type(value), type(value).__name__)


def split_records(
    records: Sequence[Record], *, share: float, seed: int
) -> dict[Split, tuple[Record, ...]]:
    """Set a share aside, at least one question and not all; a question's side depends on its id,
    the seed and the other ids, not on the order in the file.

    Raises:
        ConfigError: a single question cannot be split.
    """
    if len(records) < 2:
        raise ConfigError(
            "env.options.questions: one question cannot be split into train and eval; "
            "give more, or eval_questions"
        )
    count = min(max(1, round(share * len(records))), len(records) - 1)
    by_hash = sorted(records, key=lambda record: _digest(f"{seed}\0{record.id}"))
    held = {record.id for record in by_hash[:count]}
    return {
        "train": tuple(record for record in records if record.id not in held),
        "eval": tuple(record for record in records if record.id in held),
    }


def _digest(text: str) -> bytes:
    return hashlib.blake2b(text.encode("utf-8", errors="replace"), digest_size=16).digest()
