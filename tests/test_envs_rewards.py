"""Scores of texts: normalisation, containment, format and tags."""

from __future__ import annotations

import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from turnfast.envs.rewards.answers import (
    contains_answer,
    exact_match,
    f1,
    format_score,
    normalize_answer,
    read_answer,
    tags_score,
)


def test_normalisation():
    assert normalize_answer("  The  Ulm, of\tan Ida! ") == "ulm of ida"
    assert normalize_answer("Theo's anthem") == "theos anthem"
    assert exact_match("the Beatles", ["Beatles", "Fab Four"]) == 1.0
    assert exact_match("Beatles band", ["Beatles"]) == 0.0
    assert exact_match("Ida", []) == 0.0


@given(st.text())
@settings(deadline=None)
def test_normalisation_is_idempotent_and_a_text_matches_itself(text):
    once = normalize_answer(text)
    assert normalize_answer(once) == once
    assert exact_match(text, ["x", text]) == 1.0
    assert f1(text, [text]) == 1.0


@pytest.mark.parametrize(
    ("answer", "accepted", "value"),
    [
        ("Ida of Ulm", ["Ida"], 0.5),
        ("Ida Ida", ["Ida Berg"], 0.5),
        ("Ole", ["Ida"], 0.0),
        ("", ["Ida"], 0.0),
        ("the", ["a"], 1.0),
        ("Ida of Ulm", ["Ole", "Ulm Ida"], 0.8),
        ("Ida", [], 0.0),
    ],
)
def test_f1(answer, accepted, value):
    assert f1(answer, accepted) == pytest.approx(value)


@pytest.mark.parametrize(
    ("text", "accepted", "value"),
    [
        ("It was written by Ida.", ["Ida"], 1.0),
        ("in the north", ["no"], 0.0),
        ("Idaho", ["Ida"], 0.0),
        ("Ole/Ida", ["Ida"], 1.0),
        ("the years 1990–1995", ["1995"], 1.0),
        ("in the US of old", ["U.S."], 1.0),
        ("by J. R. Berg", ["J.R. Berg"], 1.0),
        ("...", ["?!"], 0.0),
        ("by Ida the Great", ["Ole", "ida  great"], 1.0),
        ("他住在北京市", ["北京"], 1.0),
        ("anything at all", ["The"], 0.0),
        ("", ["Ida"], 0.0),
        ("Ida", [], 0.0),
    ],
)
def test_only_whole_words_are_contained(text, accepted, value):
    assert contains_answer(text, accepted) == value


def test_the_last_answer_outside_the_reasoning_is_read():
    assert read_answer("<answer> Ida\n</answer>") == "Ida"
    assert read_answer("<answer>Ole</answer> no, <answer>Ida</answer>") == "Ida"
    assert read_answer("<reasoning><answer>Ole</answer></reasoning>") is None
    assert read_answer("<answer>Ida") is None
    assert read_answer("<answer></answer>") == ""


CALL = '<tool>{"name": "s", "args": {}}</tool>'
NATIVE = '<tool_call>{"name": "s"}</tool_call>'
THOUGHT = "<reasoning>hm\n</reasoning>"


@pytest.mark.parametrize(
    ("text", "native", "reasoning", "form", "tags"),
    [
        (THOUGHT + CALL, False, True, 1.0, 1.0),
        (f" {THOUGHT}\n<answer>Ida</answer>\n", False, True, 1.0, 1.0),
        (CALL, False, True, 0.0, 0.5),
        (CALL, False, False, 1.0, 1.0),
        ("<answer>Ida</answer>", False, False, 1.0, 1.0),
        ("well: <answer>Ida</answer>", False, False, 0.0, 1.0),
        ("<answer>Ida</answer><answer>Ida</answer>", False, False, 0.0, 0.0),
        ("<answer>Ida", False, False, 0.0, 0.0),
        (THOUGHT * 2 + CALL, False, True, 0.0, 0.5),
        (CALL + CALL, False, False, 0.0, 0.0),
        (NATIVE, True, True, 1.0, 1.0),
        (f"<think>a</think>\n{NATIVE}\n{NATIVE}", True, False, 1.0, 1.0),
        (NATIVE + "<tool_call>", True, False, 0.0, 0.0),
        ("", False, True, 0.0, 0.0),
    ],
)
def test_format_and_tags(text, native, reasoning, form, tags):
    assert format_score(text, native=native, reasoning=reasoning) == form
    assert tags_score(text, native=native, reasoning=reasoning) == tags


def test_the_format_of_long_texts_takes_linear_time():
    begin = time.perf_counter()
    for text in ("<answer>" * 20_000, THOUGHT * 5_000, "<tool>" + " " * 100_000, "<" * 100_000):
        assert format_score(text, native=False, reasoning=True) == 0.0
        assert format_score(text, native=True, reasoning=False) == 0.0
    assert time.perf_counter() - begin < 10
