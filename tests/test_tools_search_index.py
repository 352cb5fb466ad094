"""The BM25 index: ranking, Unicode, query syntax, threads."""

from __future__ import annotations

import math
import random
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from turnfast.tools import Passage, SearchIndex

PASSAGES = [
    Passage(title="Ulm", text="Ulm was written by Ida."),
    Passage(title="Rom", text="Rom was painted by Ole, who never saw Ulm."),
    Passage(title="Zoë", text="Zoë Ångström lives in 北京 and wrote «Naïve Ræv» in 1999."),
    Passage(title="", text="the and of"),
]
INDEX = SearchIndex(PASSAGES)


def titles(query: str, k: int = 5) -> list[str]:
    return [hit.title for hit in INDEX.search(query, k)]


def test_the_best_match_is_first():
    (hit,) = INDEX.search("who wrote Ulm? written")
    assert (hit.row, hit.title, hit.text) == (0, "Ulm", "Ulm was written by Ida.")
    assert titles("Ulm") == ["Ulm", "Rom"]
    assert titles("Ulm", 0) == [] and titles("Ulm", -1) == [] and titles("Ulm", 1) == ["Ulm"]


def test_unicode_case_and_accents_are_folded():
    for query in ("zoe", "ZOË", "Zoe\u0308", "angstrom", "北京", "«naive»", "1999", "ræv"):
        assert titles(query) == ["Zoë"], query


def test_a_query_without_a_known_word_has_no_hits():
    for query in ("", " ", "?!", '"', "*", "\x00", "\ud800", "🙂", "nosuchword", '" OR 1=1 --'):
        assert titles(query) == [], query


def test_stop_words_are_used_only_if_there_are_no_other_words():
    assert [hit.row for hit in INDEX.search("the", 5)] == [3]
    assert titles("the Ulm of") == ["Ulm", "Rom"]


@pytest.mark.parametrize(
    "query",
    [
        "Ulm'; DROP TABLE passages; --",
        "title:Ulm",
        "Ulm NEAR/2 Ida",
        "NOT Ulm",
        "Ulm AND (",
        "^Ulm",
        "Ulm*",
        "{title text}: Ulm",
        "-Ulm",
        "Ulm \x00 Ida",
        'Ulm" "Ida',
        "Ulm) UNION SELECT sql FROM sqlite_master",
    ],
)
def test_query_syntax_is_read_as_words(query):
    assert titles(query) == ["Ulm", "Rom"]
    assert INDEX.num_passages == 4 and titles("Ida") == ["Ulm"]


@given(st.text(max_size=80) | st.text(alphabet='"*^():{}+-ANDORNT \x00\ud800', max_size=40))
@settings(max_examples=300, deadline=None)
def test_any_text_is_a_query(text):
    assert len(INDEX.search(text, 3)) <= 3


@given(st.characters(categories=["L", "N"]))
@settings(max_examples=200, deadline=None)
def test_a_word_with_any_letter_or_digit_is_found(letter):
    word = f"a{letter}z"
    index = SearchIndex([Passage(title="", text="other"), Passage(title="", text=f"x {word} y")])
    assert [hit.row for hit in index.search(word, 2)] == [1]


def test_equal_scores_keep_the_order_of_the_corpus():
    index = SearchIndex([Passage(title="", text="same words")] * 50)
    assert [hit.row for hit in index.search("same", 20)] == list(range(20))


def test_title_weight_and_stemming():
    passages = [Passage(title="x", text="river river"), Passage(title="river", text="y y")]
    assert SearchIndex(passages, title_weight=0.01).search("river")[0].row == 0
    assert SearchIndex(passages, title_weight=10.0).search("river")[0].row == 1
    assert SearchIndex(passages).search("rivers") == []
    assert len(SearchIndex(passages, stem=True).search("rivers", 5)) == 2


def test_invalid_utf8_is_an_error():
    with pytest.raises(ValueError, match="not valid UTF-8"):
        SearchIndex([Passage(title="x", text="lone surrogate \ud800")])


def bm25(texts: list[list[str]], query: list[str]) -> list[float]:
    """BM25 with k1 = 1.2 and b = 0.75; a word in more than half of the texts has an IDF of 1e-6."""
    mean_length = sum(map(len, texts)) / len(texts)
    scores = [0.0] * len(texts)
    for word in dict.fromkeys(query):
        count = sum(word in text for text in texts)
        idf = math.log((len(texts) - count + 0.5) / (count + 0.5))
        for i, text in enumerate(texts):
            n = Counter(text)[word]
            scale = n + 1.2 * (0.25 + 0.75 * len(text) / mean_length)
            scores[i] += (idf if idf > 0 else 1e-6) * n * 2.2 / scale
    return scores


WORDS = st.sampled_from(["ab", "bb", "cc", "dd", "ee", "ff", "gg", "hh"])


@given(
    st.lists(st.lists(WORDS, min_size=1, max_size=6), min_size=1, max_size=30),
    st.lists(WORDS, min_size=1, max_size=5),
    st.integers(1, 6),
)
@settings(max_examples=300, deadline=None)
def test_scores_equal_bm25(texts, query, k):
    index = SearchIndex([Passage(title="", text=" ".join(text)) for text in texts])
    hits = index.search(" ".join(query), k)
    scores = bm25(texts, query)
    best = sorted((score for score in scores if score > 0), reverse=True)[:k]
    assert [hit.score for hit in hits] == pytest.approx(best, rel=1e-9)
    assert [scores[hit.row] for hit in hits] == pytest.approx(best, rel=1e-9)


def test_eight_threads_search_ten_thousand_passages():
    rng = random.Random(0)
    words = ["".join(rng.choices("abcdefghij", k=4)) for _ in range(3000)]
    passages = [
        Passage(title=f"t{i}", text=" ".join([f"key{i}", *rng.choices(words, k=30)]))
        for i in range(10_000)
    ]
    index = SearchIndex(passages)
    assert index.num_passages == 10_000
    keys = range(0, 10_000, 50)
    with ThreadPoolExecutor(8) as pool:
        hits = pool.map(lambda i: index.search(f"the of and key{i}", 3), keys)
        assert [first.row for first, *_ in hits] == list(keys)
    assert len(index.search(" ".join(words), 5)) == 5  # only the first 64 words are looked up
