"""Verifiable rewards for question answering (arXiv 2505.11821), each part between 0 and 1.

A part times its weight is what enters a reward. Turn rewards are at most 0.2 + 0.5 = 0.7, outcome
rewards at most 0.5 + 1.0 + 0.2 + 0.2 = 1.9:

    tool_executed      successful calls / attempted calls of this turn           0.2   turn
    answer_in_result   an accepted answer occurs in this turn's results          0.5   turn
    answer_contained   an accepted answer occurs in the final answer             0.5   outcome
    exact_match        the final answer is an accepted answer                    1.0   outcome
    format             share of turns that are reasoning, then a call or answer  0.2   outcome
    tags_once          share of expected tag pairs that occur exactly once       0.2   outcome

Answers are compared after the normalisation of SQuAD (arXiv 1606.05250): lower case, without
punctuation, without the articles a, an, the, with single spaces.
"""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Iterable, Sequence
from functools import lru_cache

from ...tools import ToolCall, read_calls, strip_reasoning

_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)
_PUNCTUATION = re.compile(r"[^\w\s]|_")
_ARTICLES = re.compile(r"\b(a|an|the)\b")
_UNSPACED = re.compile(r"[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u2e80-\u9fff\uf900-\ufaff]")


@lru_cache(maxsize=4096)  # the parts of a reward ask for the same few texts
def normalize_answer(text: str) -> str:
    """Example: "The  Ulm, of Ida!" becomes "ulm of ida"."""
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_NO_PUNCTUATION)).split())


def exact_match(answer: str, accepted: Iterable[str]) -> float:
    """1.0 if the normalised answer is one of the normalised accepted ones, else 0.0."""
    said = normalize_answer(answer)
    return float(any(said == normalize_answer(right) for right in accepted))


def f1(answer: str, accepted: Iterable[str]) -> float:
    """Word overlap with the nearest accepted answer: 2PR / (P + R), words counted as often as they
    occur. Example: "Ida of Ulm" against "Ida" has P = 1/3, R = 1, F1 = 0.5."""
    return max((_f1(normalize_answer(answer), normalize_answer(r)) for r in accepted), default=0.0)


def contains_answer(text: str, accepted: Iterable[str]) -> float:
    """1.0 if an accepted answer occurs in the text as whole words, else 0.0.

    Whole words, as "no" would otherwise occur in "north"; in scripts without spaces between words
    any occurrence counts. An answer of which normalisation leaves nothing occurs nowhere.
    """
    accepted = tuple(accepted)
    # punctuation both taken out, which joins "U.S.", and as a space, which parts "Ulm/Rom"
    for form in (normalize_answer, _spaced):
        inside = form(text)
        for right in map(form, accepted):
            whole = f" {right} " in f" {inside} "
            if right and (whole or (_UNSPACED.search(right) and right in inside)):
                return 1.0
    return 0.0


def read_answer(text: str) -> str | None:
    """The content of the last <answer> of a turn, outside of its reasoning; None without one."""
    return read_tag(text, "answer")


def read_tag(text: str, tag: str) -> str | None:
    """The same for any tag; `<move>up</move>` holds "up"."""
    found = re.findall(rf"<{tag}>(.*?)</{tag}>", strip_reasoning(text), flags=re.DOTALL)
    return found[-1].strip() if found else None


def format_score(text: str, *, native: bool, reasoning: bool) -> float:
    """1.0 if a turn is reasoning (where it is asked for) and then calls or one answer, else 0.0."""
    if native and _is_untagged_call(text):
        return 1.0
    return float(_form(native, reasoning).fullmatch(text) is not None)


def tags_score(text: str, *, native: bool, reasoning: bool) -> float:
    """The share of the expected tag pairs of a turn that occur exactly once.

    Expected are the call's tags, or the answer's where the turn has no trace of a call, and before
    it the reasoning's where reasoning is asked for. In native form several calls are one's right,
    and calls of Llama 3 and Mistral, which have no tags, count as 1.
    """
    if native and _is_untagged_call(text):
        return 1.0
    call = "tool_call" if native else "tool"
    action = call if f"<{call}>" in text or f"</{call}>" in text else "answer"
    expected = [action, *(["reasoning"] if reasoning and not native else [])]
    return sum(_once(text, tag, many=native and tag == call) for tag in expected) / len(expected)


def mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else 0.0


@lru_cache(maxsize=4096)
def _spaced(text: str) -> str:
    return normalize_answer(_PUNCTUATION.sub(" ", text))


def _f1(said: str, right: str) -> float:
    if said == right:
        return 1.0
    theirs, ours = said.split(), right.split()
    common = 0 if set(theirs).isdisjoint(ours) else (Counter(theirs) & Counter(ours)).total()
    return 2 * common / max(1, len(theirs) + len(ours))


def _is_untagged_call(text: str) -> bool:
    """Whether a turn is well-formed calls of Llama 3 or Mistral, and nothing else but thoughts."""
    calls, rest = read_calls(text)
    whole = all(isinstance(call, ToolCall) for call in calls)
    return bool(calls) and whole and not rest.strip() and "<tool" not in strip_reasoning(text)


@lru_cache
def _form(native: bool, reasoning: bool) -> re.Pattern[str]:
    """Of a turn that is as it should be."""
    thought = "think" if native else "reasoning"
    head = rf"\s*(<{thought}>(?:(?!</{thought}>).)*</{thought}>\s*)"
    head += "" if reasoning and not native else "?"
    call = _pair("tool_call") + r"(\s*" + _pair("tool_call") + ")*" if native else _pair("tool")
    return re.compile(head + rf"({call}|{_pair('answer')})\s*", flags=re.DOTALL)


def _pair(tag: str) -> str:
    return rf"<{tag}>(?:(?!</?{tag}>).)*</{tag}>"


def _once(text: str, tag: str, *, many: bool) -> bool:
    opened, closed = text.count(f"<{tag}>"), text.count(f"</{tag}>")
    return opened == closed and (opened >= 1 if many else opened == 1)
