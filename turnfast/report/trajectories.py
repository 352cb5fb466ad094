"""The lines of rollouts.jsonl in the form that the page shows.

All text is untrusted. Every string is passed to `visible` and `clip`; page.py and browser.js make
sure that it is never parsed as markup.
"""

from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..rundir.jsonl import read_lines

TEXT_LIMIT = 20_000
"""Characters shown of one text."""
PAGE_LIMIT = 4_000_000
"""Characters of all rollouts of a page, so that browsers open it quickly."""

# control characters except tab and newline, bidirectional marks, lone surrogates
_INVISIBLE = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200b-\u200f\u2028-\u202e\u2060-\u206f\ufeff\ud800-\udfff]"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Logged:
    """The groups that the page shows, and the numbers of steps shown and logged."""

    groups: tuple[Mapping[str, Any], ...]
    steps_shown: int
    steps_logged: int


def read_rollouts(path: Path) -> Logged:
    """Read the groups of a rollouts.jsonl; without the file there are none.

    If they do not fit the page, those of evenly spaced steps, including the first and the last.
    """
    if not path.exists():
        return Logged(groups=(), steps_shown=0, steps_logged=0)
    sizes: defaultdict[int, int] = defaultdict(int)
    for line in read_lines(path):
        sizes[line["step"]] += len(json.dumps(_shown(line)))
    chosen = _evenly_spaced(sorted(sizes), sum(sizes.values()))
    groups = tuple(_shown(line) for line in read_lines(path) if line["step"] in chosen)
    return Logged(groups=groups, steps_shown=len(chosen), steps_logged=len(sizes))


def visible(text: str) -> str:
    """Replace invisible characters and those that reorder text by their code.

    >>> visible("a\\x00b\\u202ec")
    'a⟨U+0000⟩b⟨U+202E⟩c'
    """
    return _INVISIBLE.sub(lambda found: f"⟨U+{ord(found[0]):04X}⟩", text.replace("\r\n", "\n"))


def clip(text: str, limit: int = TEXT_LIMIT) -> str:
    """Cut the middle out of a long text."""
    if len(text) <= limit:
        return text
    tail = limit // 4
    num_cut = len(text) - limit
    return f"{text[: limit - tail]}\n… {num_cut:,} characters left out …\n{text[-tail:]}"


def _evenly_spaced(steps: Sequence[int], size: int) -> set[int]:
    if size <= PAGE_LIMIT:
        return set(steps)
    count = max(2, len(steps) * PAGE_LIMIT // size)
    last = len(steps) - 1
    return {steps[round(index * last / (count - 1))] for index in range(count)}


def _shown(value: Any) -> Any:
    """Make all texts safe and short and round all numbers of a JSON value."""
    if isinstance(value, str):
        return visible(clip(value))
    if isinstance(value, float):
        return float(f"{value:.5g}")
    if isinstance(value, list):
        return [_shown(item) for item in value]
    if isinstance(value, dict):
        return {_shown(name): _shown(item) for name, item in value.items()}
    return value
