"""BM25 search over passages with SQLite's FTS5 full-text index, held in memory.

Any text is a valid query: it is split into words here and every word is quoted, so no part of it is
read as FTS5 query syntax. Stop words are dropped, because they match almost every passage.
"""

from __future__ import annotations

import functools
import re
import sqlite3
import threading
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

MAX_QUERY_WORDS = 64
MAX_CACHED_QUERIES = 2048
MAX_CACHED_WORDS = 1 << 16
RARE = 100
"""A word in at most so many passages is rare."""

_STOP_TEXT = """
a about after all also an and any are as at be because been before being between both but by can
could did do does for from had has have he her his how i if in into is it its me more most my no nor
not of on or other our out over own same she should so some such than that the their them then there
these they this those through to too under until up was we were what when where which while who whom
whose why will with would you your
"""
STOP_WORDS = frozenset(_STOP_TEXT.split())

# A letter or digit may be followed by combining accents.
_WORD = re.compile(r"(?:[^\W_][\u0300-\u036f]*)+")


@dataclass(frozen=True, slots=True, kw_only=True)
class Passage:
    title: str
    text: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Hit:
    """`row` is the passage's index in the corpus, from 0; a higher score is a better match."""

    row: int
    title: str
    text: str
    score: float


class SearchIndex:
    """A read-only BM25 index; safe to search from several threads.

    Args:
        passages: the passages to index.
        title_weight: weight of a match in the title relative to one in the text.
        stem: index English words by their stem, so that "rivers" matches "river".
    Raises:
        ValueError: a passage is not valid UTF-8.

    Example:
        >>> index = SearchIndex([Passage(title="Ulm", text="Ulm was written by Ida.")])
        >>> index.search("who wrote 'Ulm'?")[0].text
        'Ulm was written by Ida.'
    """

    def __init__(
        self, passages: Iterable[Passage], *, title_weight: float = 1.0, stem: bool = False
    ) -> None:
        self._lock = threading.Lock()
        self._title_weight = float(title_weight)
        self._connection = sqlite3.connect(":memory:", check_same_thread=False)
        stemmer = "porter " if stem else ""
        self._connection.execute(
            "CREATE VIRTUAL TABLE passages USING"
            f" fts5(title, text, tokenize = '{stemmer}unicode61 remove_diacritics 2')"
        )
        rows = ((passage.title, passage.text) for passage in passages)
        try:
            with self._connection:
                self._connection.executemany("INSERT INTO passages VALUES (?, ?)", rows)
        except UnicodeEncodeError as error:
            raise ValueError(f"a passage is not valid UTF-8: {error}") from None
        self._connection.execute("PRAGMA query_only = ON")
        (self.num_passages,) = self._connection.execute("SELECT count(*) FROM passages").fetchone()
        # the rollouts of a group often send the same query, and only one query runs at a time
        self._count = functools.lru_cache(maxsize=MAX_CACHED_WORDS)(self._count_passages)
        self._cached = functools.lru_cache(maxsize=MAX_CACHED_QUERIES)(self._look_up)

    def search(self, query: str, k: int = 1) -> list[Hit]:
        """Return the `k` best passages, best first, ties in corpus order; [] without a match."""
        words = _query_words(query)
        return list(self._cached(words, k)) if words and k > 0 else []

    def _look_up(self, words: tuple[str, ...], k: int) -> tuple[Hit, ...]:
        with self._lock:
            match = self._match(words)
            rows = self._connection.execute(
                "SELECT rowid, title, text, bm25(passages, ?, 1.0) AS score FROM passages"
                " WHERE passages MATCH ? ORDER BY score, rowid LIMIT ?",
                (self._title_weight, match, k),
            ).fetchall()
        # FTS5 returns negated scores and counts rows from 1.
        return tuple(
            Hit(row=row - 1, title=title, text=text, score=-score)
            for row, title, text, score in rows
        )

    def _match(self, words: Sequence[str]) -> str:
        """The FTS5 query. Only passages with a rare word, or with the rarest, are scored.

        A common word matches thousands of passages, and scoring them takes most of the time.
        """
        counts = {word: count for word in words if (count := self._count(word))}
        limit = max(RARE, min(counts.values(), default=0))
        rare = _any_of([word for word, count in counts.items() if count <= limit])
        common = _any_of([word for word, count in counts.items() if count > limit])
        return f"({rare}) AND ({rare} OR {common})" if common else rare or _any_of(words)

    def _count_passages(self, word: str) -> int:
        query = "SELECT count(*) FROM passages WHERE passages MATCH ?"
        return self._connection.execute(query, (_any_of([word]),)).fetchone()[0]


def _any_of(words: Sequence[str]) -> str:
    return " OR ".join(f'"{word}"' for word in words)


def _query_words(query: str) -> tuple[str, ...]:
    """Return at most `MAX_QUERY_WORDS` different words, stop words only if there are no others."""
    # FTS5 folds case and accents itself, the same way in queries and in passages.
    words = {word.lower(): word for word in _WORD.findall(query)}
    content = [word for key, word in words.items() if key not in STOP_WORDS]
    return tuple(content or words.values())[:MAX_QUERY_WORDS]
