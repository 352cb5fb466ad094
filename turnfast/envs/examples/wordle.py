"""Wordle: guess a hidden word of five letters from the marks of earlier guesses.

    user       Guess the hidden word of 5 letters. …
    assistant  <guess>crane</guess>
    user       crane: . + . . #
    assistant  <guess>rouge</guess>                                          at most 6 guesses

A turn is rewarded by its information gain: log2 of the factor by which it reduces the number of
words that fit all marks, divided by log2 of the size of the list. The turn rewards of a solved game
sum to `knowledge`.
"""

from __future__ import annotations

import math
import random
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from ...config.schema import PositiveInt
from ...errors import ConfigError
from ...tools import Tool
from ...types import Message, Task
from ..base import Outcome, Reward, Split, Step
from ..rewards.answers import read_tag
from .wordle_words import WORDS

RIGHT, ELSEWHERE, ABSENT = "#", "+", "."
EVAL_SHARE = 0.2
MALFORMED_REWARD = -0.1
"""For a turn without a guess from the list; it counts as a guess."""


class WordleEnv:
    """Hidden words from a list; those of eval are never hidden in train.

    Args:
        seed: seed of the split and of the order of the tasks.
        words: file with one word per line, all of the same length; "" selects the built-in list.
        guesses: number of guesses; `env.max_turns` should not be smaller.
        knowledge: sum of the turn rewards of a solved game.
    """

    tools: Sequence[Tool] = ()
    native_calls = False
    rewards: Sequence[Reward] = ()

    def __init__(
        self,
        *,
        seed: int = 0,
        words: str = "",
        guesses: PositiveInt = 6,
        knowledge: float = 0.5,
    ) -> None:
        self.words: tuple[str, ...] = _read_words(Path(words)) if words else WORDS
        self.guesses = guesses
        self.knowledge = knowledge
        order = list(self.words)
        random.Random(f"turnfast wordle {seed}").shuffle(order)
        num_eval = max(1, round(EVAL_SHARE * len(order)))
        self._hidden: dict[Split, list[str]] = {"eval": order[:num_eval], "train": order[num_eval:]}

    def tasks(self, split: Split) -> Sequence[Task]:
        length = len(self.words[0])
        text = (
            f"Guess the hidden word of {length} letters. You have {self.guesses} guesses, one per "
            f"turn, as <guess>word</guess>. Each is answered letter by letter: {RIGHT} right, "
            f"{ELSEWHERE} elsewhere in the word, {ABSENT} not in it."
        )
        return [
            Task(id=f"{split}-{i}", question=text, answers=(word,))
            for i, word in enumerate(self._hidden[split])
        ]

    def episode(self, task: Task) -> WordleEpisode:
        return WordleEpisode(self, task)


class WordleEpisode:
    def __init__(self, env: WordleEnv, task: Task) -> None:
        self._env = env
        self._task = task
        self._hidden = task.answers[0]
        self._fitting: Sequence[str] = env.words
        self._num_guesses = 0
        self._solved = False

    async def start(self) -> Sequence[Message]:
        return [{"role": "user", "content": self._task.question}]

    async def step(self, text: str) -> Step:
        env = self._env
        guess = (read_tag(text, "guess") or "").lower()
        known = guess in env.words
        self._num_guesses += 1
        self._solved = guess == self._hidden
        if known:
            marks = mark(guess, self._hidden)
            fitting = [word for word in self._fitting if mark(guess, word) == marks]
            bits = math.log2(len(self._fitting) / len(fitting))
            self._fitting = fitting
            parts = {"knowledge": env.knowledge * bits / math.log2(len(env.words))}
            reply = f"{guess}: {' '.join(marks)}"
        else:
            parts = {"malformed": MALFORMED_REWARD}
            reply = f"{guess[:40]!r} is not on the list of words."
            reply = reply if guess else "Write <guess>word</guess>."
        done = self._solved or self._num_guesses == env.guesses
        return Step(
            messages=() if done else ({"role": "user", "content": reply},),
            reward=sum(parts.values()),
            reward_parts=parts,
            tool_calls=1,
            tool_successes=int(known),
            done=done,
        )

    async def finish(self) -> Outcome:
        solved = float(self._solved)
        return Outcome(
            reward=solved,
            reward_parts={"solved": solved},
            metrics={"exact_match": solved, "guesses": float(self._num_guesses)},
        )


def mark(guess: str, hidden: str) -> str:
    """One mark per letter; a letter is marked at most as often as the hidden word contains it.

    Example: "level" for the hidden "label" is "#..##": the second e is in its place, so the first
    one is not marked.
    """
    remaining = Counter(h for g, h in zip(guess, hidden, strict=True) if g != h)
    marks: list[str] = []
    for letter, right in zip(guess, hidden, strict=True):
        if letter == right:
            marks.append(RIGHT)
        elif remaining[letter]:
            remaining[letter] -= 1
            marks.append(ELSEWHERE)
        else:
            marks.append(ABSENT)
    return "".join(marks)


def _read_words(path: Path) -> tuple[str, ...]:
    try:
        words = tuple(dict.fromkeys(path.read_text(encoding="utf-8").lower().split()))
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"env.options.words: {path} cannot be read: {error}") from None
    if len(words) < 2:
        raise ConfigError(f"env.options.words: {path} needs at least two words")
    wrong = next((word for word in words if len(word) != len(words[0]) or not word.isalpha()), None)
    if wrong is not None:
        raise ConfigError(
            f"env.options.words: {path}: {wrong[:40]!r} is not a word of {len(words[0])} letters "
            f"like {words[0][:40]!r}"
        )
    return words
