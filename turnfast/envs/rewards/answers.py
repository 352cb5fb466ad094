"""Scores of texts for question answering (arXiv 2505.11821), each between 0 and 1.

The default rewards of `ToolEnv` weight them as follows; turn rewards are at most 0.2 + 0.5 = 0.7,
outcome rewards at most 0.5 + 1.0 + 0.2 + 0.2 = 1.9:

    tool_executed      successful / attempted calls of the turn                       0.2   turn
    answer_in_result   an accepted answer occurs in a result of the turn              0.5   turn
    answer_contained   an accepted answer occurs in the final answer                  0.5   outcome
    exact_match        the final answer is an accepted answer                         1.0   outcome
    format             share of turns that are reasoning, then a call or an answer    0.2   outcome
    tags_once          share of expected tag pairs that occur exactly once            0.2   outcome

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


@lru_cache(maxsize=4096)  # several rewards normalise the same texts
def normalize_answer(text: str) -> str:
    """Lower case, no punctuation, no articles: "The  Ulm, of Ida!" becomes "ulm of ida"."""
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_NO_PUNCTUATION)).split())


def exact_match(answer: str, accepted: Iterable[str]) -> float:
    """1.0 if the normalised answer is one of the normalised accepted ones, else 0.0."""
    return float(normalize_answer(answer) in map(normalize_answer, accepted))


def f1(answer: str, accepted: Iterable[str]) -> float:
    """Word overlap with the nearest accepted answer: 2PR / (P + R), repeated words counted.

    Example: "Ida of Ulm" against "Ida" has P = 1/3, R = 1, F1 = 0.5.
    """
    return max((_f1(normalize_answer(answer), normalize_answer(r)) for r in accepted), default=0.0)


def contains_answer(text: str, accepted: Iterable[str]) -> float:
    """1.0 if an accepted answer occurs in the text as whole words, else 0.0.

    Only whole words count, so "no" does not occur in "north". In scripts without spaces between
    words, any occurrence counts. An answer that normalises to nothing occurs nowhere.
    """
    accepted = tuple(accepted)
    # punctuation removed, which joins "U.S.", or replaced by spaces, which splits "Ulm/Rom"
    for normalize in (normalize_answer, _normalize_spaced):
        words = normalize(text)
        for answer in filter(None, map(normalize, accepted)):
            if f" {answer} " in f" {words} " or (_UNSPACED.search(answer) and answer in words):
                return 1.0
    return 0.0


def read_answer(text: str) -> str | None:
    """The content of the last <answer> outside of the reasoning; None without one."""
    return read_tag(text, "answer")


def read_tag(text: str, tag: str) -> str | None:
    """The content of the last pair of tags outside of the reasoning; None without one.

    Example: "<move>up</move>" and the tag "move" give "up".
    """
    contents = re.findall(rf"<{tag}>(.*?)</{tag}>", strip_reasoning(text), flags=re.DOTALL)
    return contents[-1].strip() if contents else None


def format_score(text: str, *, native: bool, reasoning: bool) -> float:
    """1.0 if a turn consists of reasoning (if required), then calls or one answer; else 0.0.

    Args:
        native: calls are in the model's own format; reasoning is then optional, in <think>.
        reasoning: <reasoning> is required in the paper's format.
    """
    if native and _is_untagged_call(text):
        return 1.0
    return float(_turn_pattern(native, reasoning).fullmatch(text) is not None)


def tags_score(text: str, *, native: bool, reasoning: bool) -> float:
    """Share of the expected tag pairs of a turn that occur exactly once.

    Expected are the tags of the call, or those of the answer if the turn has no call tag, and those
    of the reasoning if it is required. In native format a turn may have several calls, and calls of
    Llama 3 and Mistral, which have no tags, score 1.
    """
    if native and _is_untagged_call(text):
        return 1.0
    call = "tool_call" if native else "tool"
    action = call if f"<{call}>" in text or f"</{call}>" in text else "answer"
    expected = [action, *(["reasoning"] if reasoning and not native else [])]
    return mean([_is_closed_once(text, tag, many=native and tag == call) for tag in expected])


def mean(values: Sequence[float]) -> float:
    """0.0 without values."""
    return sum(values) / len(values) if values else 0.0


@lru_cache(maxsize=4096)
def _normalize_spaced(text: str) -> str:
    return normalize_answer(_PUNCTUATION.sub(" ", text))


def _f1(answer: str, accepted: str) -> float:
    if answer == accepted:
        return 1.0
    answer_words, accepted_words = answer.split(), accepted.split()
    num_common = (Counter(answer_words) & Counter(accepted_words)).total()
    return 2 * num_common / max(1, len(answer_words) + len(accepted_words))


def _is_untagged_call(text: str) -> bool:
    """Whether a turn has only reasoning and valid calls in the format of Llama 3 or Mistral."""
    calls, rest = read_calls(text)
    valid = bool(calls) and all(isinstance(call, ToolCall) for call in calls)
    return valid and not rest.strip() and "<tool" not in strip_reasoning(text)


@lru_cache
def _turn_pattern(native: bool, reasoning: bool) -> re.Pattern[str]:
    """Matches a turn in the expected format."""
    thought = "think" if native else "reasoning"
    head = rf"\s*(<{thought}>(?:(?!</{thought}>).)*</{thought}>\s*)"
    head += "" if reasoning and not native else "?"
    call = _pair("tool_call") + r"(\s*" + _pair("tool_call") + ")*" if native else _pair("tool")
    return re.compile(head + rf"({call}|{_pair('answer')})\s*", flags=re.DOTALL)


def _pair(tag: str) -> str:
    return rf"<{tag}>(?:(?!</?{tag}>).)*</{tag}>"


def _is_closed_once(text: str, tag: str, *, many: bool) -> bool:
    opened, closed = text.count(f"<{tag}>"), text.count(f"</{tag}>")
    return opened == closed and (opened >= 1 if many else opened == 1)
