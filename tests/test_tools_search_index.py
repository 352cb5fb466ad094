"""The BM25 index: right hits, and no text that can harm it."""

from __future__ import annotations

import random
import threading

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from turnfast.tools import Passage, SearchIndex, search_index
from turnfast.tools.search_index import match_expression

PASSAGES = [
    Passage(title="Ulm", text="Ulm was written by Ida."),
    Passage(title="Rom", text="Rom was painted by Ole, who never saw Ulm."),
    Passage(title="Zoë", text="Zoë Ångström lives in 北京 and wrote «Naïve Ræv» in 1999."),
    Passage(title="", text="the and of"),
]
INDEX = SearchIndex(PASSAGES)


def titles(query: str, k: int = 5) -> list[str]:
    return [hit.title for hit in INDEX.search(query, k)]


def test_the_best_match_comes_first():
    (hit,) = INDEX.search("who wrote Ulm? written")
    assert (hit.row, hit.title, hit.text) == (0, "Ulm", "Ulm was written by Ida.")
    assert titles("Ulm") == ["Ulm", "Rom"]
    scores = [hit.score for hit in INDEX.search("Ulm", 5)]
    assert scores == sorted(scores, reverse=True) and scores[0] > 0
    assert titles("Ulm", 0) == [] and titles("Ulm", 1) == ["Ulm"]


def test_unicode_is_folded_alike_in_query_and_text():
    for query in ("zoe", "ZOË", "Zoe\u0308", "angstrom", "北京", "«naive»", "1999", "ræv"):
        assert titles(query) == ["Zoë"], query


def test_queries_without_a_word_find_nothing():
    for query in ("", " ", "?!", '"', "*", "\x00", "\ud800", "🙂", "nosuchword"):
        assert titles(query) == [], query
    assert [hit.row for hit in INDEX.search("the", 5)] == [
        3
    ]  # stop words, when all else is missing


INJECTIONS = [
    '" OR 1=1 --',
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
]


@pytest.mark.parametrize("query", INJECTIONS)
def test_query_language_is_mere_words(query):
    assert "Ulm" in titles(query) or query == INJECTIONS[0]
    assert INDEX.num_passages == 4 and titles("Ida") == ["Ulm"]


@given(st.text(max_size=80) | st.text(alphabet='"*^():{}+-ANDORNT \x00\ud800', max_size=40))
@settings(max_examples=300, deadline=None)
def test_any_text_is_a_query(text):
    assert len(INDEX.search(text, 3)) <= 3


@given(st.characters(categories=["L", "N"]))
@settings(max_examples=200, deadline=None)
def test_every_word_is_found_again(letter):
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


def test_ten_thousand_passages_long_queries_and_eight_threads():
    rng = random.Random(0)
    words = ["".join(rng.choices("abcdefghij", k=4)) for _ in range(3000)]
    passages = [
        Passage(title=f"t{i}", text=" ".join([f"key{i}", *rng.choices(words, k=30)]))
        for i in range(10_000)
    ]
    index = SearchIndex(passages)
    assert index.num_passages == 10_000
    wrong: list[int] = []

    def look_up(start: int) -> None:
        for i in range(start, 10_000, 400):
            if index.search(f"the of and key{i}", 3)[0].row != i:
                wrong.append(i)

    threads = [threading.Thread(target=look_up, args=(start,)) for start in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
    assert len(index.search(" ".join(words), 5)) == 5  # 3,000 words, of which 64 are looked up


WORDS = ["ab", "bb", "cc", "dd", "ee", "ff", "gg", "hh"]


@given(
    st.lists(st.lists(st.sampled_from(WORDS), max_size=6), max_size=30),
    st.lists(st.sampled_from([*WORDS, "nowhere"]), min_size=1, max_size=5),
    st.integers(1, 6),
    st.sampled_from([0.5, 1.0, 3.0]),
)
@pytest.mark.parametrize("few", [0, 3, 1000])
@settings(max_examples=300, deadline=None)
def test_what_is_passed_over_is_never_a_hit(few, texts, query, k, title_weight):
    """Against the index's own scores of every passage, however many are scored in memory."""
    passages = [Passage(title=" ".join(text[:2]), text=" ".join(text[2:])) for text in texts]
    index = SearchIndex(passages, title_weight=title_weight)
    match = match_expression(dict.fromkeys(query))
    everything = index._connection.execute(
        "SELECT rowid - 1, -bm25(passages, ?, 1.0) AS score FROM passages"
        " WHERE passages MATCH ? ORDER BY score DESC, rowid LIMIT ?",
        (title_weight, match, k),
    ).fetchall()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(search_index, "FEW_PASSAGES", few)
        hits = index.search(" ".join(query), k)
    assert [hit.score for hit in hits] == pytest.approx([score for _, score in everything])
    # scores that rounding alone tells apart may change places
    ranked = {row: round(score, 9) for row, score in everything}
    expected = sorted(ranked, key=lambda row: (-ranked[row], row))
    if len({round(score, 9) for _, score in everything}) == len(everything):
        assert [hit.row for hit in hits] == expected


def test_few_passages_are_scored(monkeypatch):
    passages = [Passage(title=f"t{i}", text="the author of something") for i in range(2000)]
    index = SearchIndex([*passages, Passage(title="Ulm", text="The author of Ulm is Ida.")])
    asked: list[tuple[str, ...]] = []
    best = index._best

    def watched(words, needed, k):
        asked.append(needed)
        return best(words, needed, k)

    monkeypatch.setattr(index, "_best", watched)
    assert index.search("author of Ulm")[0].title == "Ulm" and asked == [("Ulm",)]
    asked.clear()
    assert index.search("author of Ulm and Nobody") and asked == []  # much the same query
    assert len(index.search("author of Ulm", 3)) == 3 and asked[-1] == ("Ulm", "author")
    asked.clear()
    # two words that are in the same passage, and three hits asked for
    assert len(index.search("author of Ulm Ida", 3)) == 3 and asked[-1] == ("Ulm", "Ida", "author")


def test_an_index_in_a_file(tmp_path):
    path = tmp_path / "it's #1.sqlite"
    SearchIndex(PASSAGES, path=path).close()
    assert list(tmp_path.iterdir()) == [path]
    again = SearchIndex(path=path)
    assert (again.num_passages, again.search("Ida")[0].title) == (4, "Ulm")
    with pytest.raises(FileExistsError, match="exists"):
        SearchIndex(PASSAGES, path=path)
    with pytest.raises(FileNotFoundError, match="no such search index"):
        SearchIndex(path=tmp_path / "none")
    (tmp_path / "text").write_text("not a data base, but long enough to be looked at" * 50)
    with pytest.raises(ValueError, match="not a search index"):
        SearchIndex(path=tmp_path / "text")
    with pytest.raises(ValueError, match="needs passages"):
        SearchIndex()


def test_a_failed_build_leaves_no_index(tmp_path):
    with pytest.raises(ValueError, match="not valid UTF-8"):
        SearchIndex([Passage(title="x", text="half a pair \ud800")], path=tmp_path / "index")
    assert not (tmp_path / "index").exists()
