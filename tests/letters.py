"""An environment that rewards any text by its letters, so a random model earns rewards."""

from __future__ import annotations

import asyncio

from turnfast.envs import Demonstration, Outcome, Step, Task

WORDS = ("ulm", "oslo", "ida", "bela", "koru", "arne", "mira", "sorime", "tovel", "ganu")


class Letters:
    """Args: wait_s: seconds that every step of the environment takes."""

    tools = ()
    native_calls = False

    def __init__(self, *, wait_s: float = 0.0, eval_words: int = 3) -> None:
        self._wait_s = wait_s
        self._eval_words = eval_words

    def tasks(self, split):
        words = WORDS[3:] if split == "train" else WORDS[: self._eval_words]
        return [Task(id=f"{split}-{word}", question=f"Say {word}.") for word in words]

    def episode(self, task):
        return Spelling(task, self._wait_s)

    def demonstrations(self, seed):
        user = ({"role": "user", "content": f"Say {word}."} for word in WORDS)
        said = ({"role": "assistant", "content": word} for word in WORDS)
        return [Demonstration(messages=pair) for pair in zip(user, said, strict=True)]

    def corpus(self):
        return [f"user\nSay {word}.\nassistant\n{word}\nAgain, {word}." for word in WORDS]


class Spelling:
    def __init__(self, task, wait_s):
        self._task, self._wait_s, self._texts = task, wait_s, []

    async def start(self):
        return [{"role": "user", "content": self._task.question}]

    async def step(self, text):
        await asyncio.sleep(self._wait_s)
        self._texts.append(text)
        vowels = sum(letter in "aeiou" for letter in text.lower())
        return Step(
            messages=({"role": "user", "content": f"Again, {len(text)}."},),
            reward=vowels / (1 + len(text)),
            reward_parts={"vowels": vowels / (1 + len(text))},
            tool_calls=1,
            tool_successes=int(vowels > 0),
        )

    async def finish(self):
        said = "".join(self._texts)
        plain = sum(letter.isascii() and letter.isalpha() for letter in said)
        return Outcome(
            reward=plain / (1 + len(said)), metrics={"exact_match": float(plain == len(said))}
        )
