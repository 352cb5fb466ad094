"""BM25 search over passages, in SQLite's own full-text index: no server, no extra package.

Any text is a valid query: it is cut into words here, each word is quoted, and so nothing in it can
reach the query language of the index. Words that say nothing are dropped, because each of them
would make the index score nearly every passage.

A score is a sum over the words of the query, and a common word adds little. So the passages with
the rarest words are scored first, and the others only if what the remaining words could give them
is as much as the best have already. Where few are to be scored, what a word adds to each of its
passages is held in memory: the index would go through all of them again for every query. A corpus
of few words has that of all of them asked for when it is opened, which takes it less than a second.
The hits are those of scoring everything.
"""

from __future__ import annotations

import functools
import math
import os
import re
import sqlite3
import threading
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

MAX_QUERY_WORDS = 64
MAX_CACHED_QUERIES = 2048
MAX_CACHED_WORDS = 65536
MAX_CACHED_PASSAGES = 4096

FEW_PASSAGES = 128
MAX_HELD_WORDS = 128
MAX_HELD_PASSAGES = 4096
"""Of one word; a word that is in more is left to the index."""
MAX_KNOWN_WORDS = 8192
MAX_KNOWN_PLACES = 500_000
"""Words of a corpus, and passages summed over these words, up to which all are held at once."""

BM25_K1 = 1.2
"""Of the index's bm25(): a word that is in n of N passages adds less to a score than
(K1 + 1) log((N - n + 1/2) / (n + 1/2)), however often it occurs in one."""

_STOP_TEXT = """
a about after all also an and any are as at be because been before being between both but by can
could did do does for from had has have he her his how i if in into is it its me more most my no nor
not of on or other our out over own same she should so some such than that the their them then there
these they this those through to too under until up was we were what when where which while who whom
whose why will with would you your
"""
STOP_WORDS = frozenset(_STOP_TEXT.split())

# letters and digits, each perhaps followed by loose accents
_WORD = re.compile(r"(?:[^\W_][\u0300-\u036f]*)+")


@dataclass(frozen=True, slots=True, kw_only=True)
class Passage:
    title: str
    text: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Hit:
    """`row` is the passage's place in the corpus, from 0; a higher score is a better match."""

    row: int
    title: str
    text: str
    score: float


class SearchIndex:
    """A BM25 index; safe to search from many threads.

    Args:
        passages: what to index. None opens the index in `path`.
        path: file of the index; None keeps it in memory.
        title_weight: how much a match in the title counts against one in the text.
        stem: index English words by their stem ("written" and "writing" meet in "write").
    Raises:
        FileExistsError: both `passages` and the path of a file that is already there.
        FileNotFoundError: no `passages` and no such file.
        ValueError: neither is given, the file is no index, or a passage is not valid UTF-8 text.

    Example:
        >>> index = SearchIndex([Passage(title="Ulm", text="Ulm was written by Ida.")])
        >>> index.search("who wrote 'Ulm'?")[0].text
        'Ulm was written by Ida.'
    """

    def __init__(
        self,
        passages: Iterable[Passage] | None = None,
        *,
        path: Path | None = None,
        title_weight: float = 1.0,
        stem: bool = False,
    ) -> None:
        self._lock = threading.Lock()
        self._title_weight = float(title_weight)
        if passages is None:
            if path is None:
                raise ValueError("SearchIndex needs passages, or the path of an index")
            self._connection = _open(path)
        else:
            if path is not None and path.exists():
                raise FileExistsError(f"{path} exists; open it without passages, or remove it")
            self._connection = _build(passages, path, stem)
        # the rollouts of a group ask much the same
        self._cached = functools.lru_cache(maxsize=MAX_CACHED_QUERIES)(self._look_up)
        self._num_with = functools.lru_cache(maxsize=MAX_CACHED_WORDS)(self._count)
        self._asked = functools.lru_cache(maxsize=MAX_HELD_WORDS)(self._added)
        self._passage = functools.lru_cache(maxsize=MAX_CACHED_PASSAGES)(self._read)
        (self.num_passages,) = self._connection.execute("SELECT count(*) FROM passages").fetchone()
        self._known = self._every_word()

    def search(self, query: str, k: int = 1) -> list[Hit]:
        """The `k` best passages, best first, ties in corpus order; empty without a match."""
        counted = ((word, self._num_with(word)) for word in query_words(query))
        # rarest first; what is nowhere says nothing, and leaves much the same query to many
        words = tuple(sorted((pair for pair in counted if pair[1]), key=lambda pair: pair[1]))
        return list(self._cached(words, k)) if words and k >= 1 else []

    def _look_up(self, counted: tuple[tuple[str, int], ...], k: int) -> tuple[Hit, ...]:
        words, counts = zip(*counted, strict=True)
        # what the words from the i-th on can add to a score at most
        rest = [math.fsum(map(self._most, counts[i:])) for i in range(len(words) + 1)]
        every = len(words)
        taken = next((i for i in range(1, every) if sum(counts[:i]) >= k), every)
        while True:
            hits = self._best(words, words[:taken], k)
            least = hits[-1].score if len(hits) == k else 0.0
            if taken == every or least > rest[taken]:
                return hits
            taken = next((i for i in range(taken + 1, every) if least > rest[i]), every)

    def _best(self, words: tuple[str, ...], needed: tuple[str, ...], k: int) -> tuple[Hit, ...]:
        """The `k` best by all words among the passages with one of those that are needed."""
        few = sum(map(self._num_with, needed)) <= FEW_PASSAGES
        if few and all(self._num_with(word) <= MAX_HELD_PASSAGES for word in words):
            return self._best_of_few(words, needed, k)
        only, values = "", [self._title_weight, match_expression(words)]
        if len(needed) < len(words):
            # the plus sign: rows are filtered before they are scored, and not looked up one by one
            only = " AND +rowid IN (SELECT rowid FROM passages WHERE passages MATCH ?)"
            values.append(match_expression(needed))
        rows = self._fetch(
            "SELECT rowid, title, text, bm25(passages, ?, 1.0) AS score FROM passages"
            f" WHERE passages MATCH ?{only} ORDER BY score, rowid LIMIT ?",
            *values,
            k,
        )
        return tuple(
            Hit(row=row - 1, title=title, text=text, score=-score)
            for row, title, text, score in rows
        )

    def _best_of_few(
        self, words: tuple[str, ...], needed: tuple[str, ...], k: int
    ) -> tuple[Hit, ...]:
        added = [self._held(word) for word in words]
        scores = {
            row: sum(by_row.get(row, 0.0) for by_row in added)
            for word in needed
            for row in self._held(word)
        }
        hits: list[Hit] = []
        for row in sorted(scores, key=lambda row: (-scores[row], row))[:k]:
            title, text = self._passage(row)
            hits.append(Hit(row=row - 1, title=title, text=text, score=scores[row]))
        return tuple(hits)

    def _held(self, word: str) -> dict[int, float]:
        # only of these it is certain how the index folds them
        if self._known is not None and word.isascii():
            return self._known.get(word.lower(), {})
        return self._asked(word)

    def _every_word(self) -> dict[str, dict[int, float]] | None:
        """What each word of the corpus adds, None if there are too many or they are stemmed."""
        (statement,) = self._fetch("SELECT sql FROM sqlite_master WHERE name = 'passages'")[0]
        if "porter" in statement:
            return None
        with self._lock:
            self._connection.execute(
                "CREATE VIRTUAL TABLE temp.words USING fts5vocab(main, passages, row)"
            )
        counted = self._fetch("SELECT term, doc FROM temp.words LIMIT ?", MAX_KNOWN_WORDS + 1)
        places = sum(min(count, MAX_HELD_PASSAGES + 1) for _, count in counted)
        if len(counted) > MAX_KNOWN_WORDS or places > MAX_KNOWN_PLACES:
            return None
        return {word: self._added(word) for word, _ in counted}

    def _added(self, word: str) -> dict[int, float]:
        """What a word adds to the score of each row that it is in; not all of too many."""
        rows = self._fetch(
            "SELECT rowid, -bm25(passages, ?, 1.0) FROM passages WHERE passages MATCH ? LIMIT ?",
            self._title_weight,
            match_expression((word,)),
            MAX_HELD_PASSAGES + 1,
        )
        return dict(rows)

    def _count(self, word: str) -> int:
        # most words that are new are rare: what they add is asked for next, and counts them too
        added = self._held(word)
        if len(added) <= MAX_HELD_PASSAGES:
            return len(added)
        counted = "SELECT count(*) FROM passages WHERE passages MATCH ?"
        return self._fetch(counted, match_expression((word,)))[0][0]

    def _read(self, row: int) -> tuple[str, str]:
        return self._fetch("SELECT title, text FROM passages WHERE rowid = ?", row)[0]  # type: ignore[return-value]

    def _fetch(self, statement: str, *values: object) -> list[tuple[Any, ...]]:
        with self._lock:
            return self._connection.execute(statement, values).fetchall()

    def _most(self, count: int) -> float:
        odds = (self.num_passages - count + 0.5) / (count + 0.5)
        return (BM25_K1 + 1) * max(math.log(odds), 1e-6)

    def close(self) -> None:
        with self._lock:
            self._connection.close()


def query_words(query: str) -> tuple[str, ...]:
    """The words that are looked up, at most `MAX_QUERY_WORDS`.

    Example:
        >>> query_words('who wrote "Ulm" OR NEAR(x)?')
        ('wrote', 'Ulm', 'NEAR', 'x')
    """
    # case and accents are left to the index, so that it folds query and passage alike
    words = {word.lower(): word for word in _WORD.findall(query)}
    telling = [word for low, word in words.items() if low not in STOP_WORDS] or [*words.values()]
    return tuple(telling[:MAX_QUERY_WORDS])


def match_expression(words: Iterable[str]) -> str:
    """Words in the index's own language: quoted, and any of them may match.

    Example:
        >>> match_expression(("wrote", "Ulm", "NEAR", "x"))
        '"wrote" OR "Ulm" OR "NEAR" OR "x"'
    """
    return " OR ".join(f'"{word}"' for word in words)


def _build(passages: Iterable[Passage], path: Path | None, stem: bool) -> sqlite3.Connection:
    # built beside its place and then moved, so that a half-written index is never opened
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial") if path else None
    if partial:
        partial.unlink(missing_ok=True)
    connection = sqlite3.connect(str(partial or ":memory:"), check_same_thread=False)
    tokenizer = "porter unicode61 remove_diacritics 2" if stem else "unicode61 remove_diacritics 2"
    connection.execute(
        f"CREATE VIRTUAL TABLE passages USING fts5(title, text, tokenize = '{tokenizer}')"
    )
    try:
        with connection:
            connection.executemany(
                "INSERT INTO passages (title, text) VALUES (?, ?)",
                ((passage.title, passage.text) for passage in passages),
            )
    except UnicodeEncodeError as error:
        connection.close()
        raise ValueError(f"a passage is not valid UTF-8 text: {error}") from None
    if partial and path:
        connection.close()
        partial.replace(path)
        return _open(path)
    return connection


def _open(path: Path) -> sqlite3.Connection:
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such search index")
    connection = sqlite3.connect(
        f"{path.resolve().as_uri()}?mode=ro", uri=True, check_same_thread=False
    )
    try:
        connection.execute("SELECT rowid FROM passages LIMIT 1").fetchall()
    except sqlite3.DatabaseError as error:
        connection.close()
        raise ValueError(f"{path}: not a search index: {error}") from None
    return connection
