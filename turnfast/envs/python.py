"""Questions that a few lines of Python answer, with a sandboxed interpreter as the tool.

    user       What is the sum of the decimal digits of 3 ** 187?
    assistant  <reasoning>…</reasoning><tool>{"name": "python", "args": {"code":
               "print(sum(map(int, str(3 ** 187))))"}}</tool>
    user       <result>423</result>
    assistant  <reasoning>…</reasoning><answer>423</answer>

tools/sandbox.py describes the sandbox and its limits.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field

from ..config.schema import PositiveFloat, PositiveInt
from ..errors import ConfigError
from ..tools import ToolError, tool
from ..tools.sandbox import Limits, SandboxError, require_sandbox, run_python
from ..types import Task
from .base import Split
from .search.files import read_questions, split_records
from .tool_env import ToolEnv


class PythonEnv(ToolEnv):
    """Questions from a file or generated questions on numbers, and a tool that runs Python code.

    Args:
        questions: JSONL file of questions as for env "search"; "" generates `train_tasks` and
            `eval_tasks` questions of five kinds.
        eval_share: share of the file's questions that is held out for evaluation.
        seed: seed of the generation or the split.
        wall_s: wall time of one run; must be less than `env.tool_timeout_s`.
        memory_mib: address space of one process.
        unsafe_without_sandbox: the sentence in the error message allows running the code without a
            sandbox if none is available. The limits still apply, except for the number of
            processes, but the code can read files and use the network.
        options: options of `ToolEnv`.
    Raises:
        ConfigError: no sandbox is available, or the file is missing or malformed.
    """

    def __init__(
        self,
        *,
        questions: str = "",
        eval_share: Annotated[float, Field(gt=0, lt=1)] = 0.1,
        seed: int = 0,
        train_tasks: PositiveInt = 2048,
        eval_tasks: PositiveInt = 128,
        wall_s: PositiveFloat = 5.0,
        memory_mib: Annotated[int, Field(ge=64)] = 512,
        unsafe_without_sandbox: str = "",
        **options: Any,
    ) -> None:
        super().__init__(**options)
        try:
            self._sandboxed = require_sandbox(unsafe_without_sandbox)
        except SandboxError as error:
            raise ConfigError(f"env.options.unsafe_without_sandbox: {error}") from None
        self._limits = Limits(
            wall_s=wall_s, cpu_s=max(1, round(wall_s)), memory_bytes=memory_mib << 20
        )
        if questions:
            records = split_records(read_questions(Path(questions)), share=eval_share, seed=seed)
            self._tasks = {
                split: tuple(Task(id=r.id, question=r.question, answers=r.answers) for r in part)
                for split, part in records.items()
            }
        else:
            generated = _generate(seed, train_tasks + eval_tasks)
            self._tasks = {
                "train": _make_tasks("train", generated[:train_tasks]),
                "eval": _make_tasks("eval", generated[train_tasks:]),
            }

    def tasks(self, split: Split) -> Sequence[Task]:
        return self._tasks[split]

    def set_limits(self, *, max_turns: int, tool_timeout_s: float) -> None:
        if self._limits.wall_s >= tool_timeout_s:
            raise ConfigError(
                f"env.options.wall_s: {self._limits.wall_s:g} s must be less than "
                f"env.tool_timeout_s = {tool_timeout_s:g} s"
            )
        super().set_limits(max_turns=max_turns, tool_timeout_s=tool_timeout_s)

    @tool
    def python(self, code: str) -> str | ToolError:
        """Run a Python program and get what it prints.

        Args:
            code: the program; it can import the standard library.
        """
        ended = run_python(code, limits=self._limits, sandboxed=self._sandboxed)
        if ended.timed_out:
            text = f"the program did not end within {self._limits.wall_s:g} s"
            return ToolError(kind="timeout", text=text)
        if ended.too_many_processes:
            text = f"more than {self._limits.processes} processes and threads"
            return ToolError(kind="raised", text=text)
        if ended.code:
            # The last lines of a traceback are the most useful.
            text = ended.output.strip()[-500:] or f"the program ended with code {ended.code}"
            return ToolError(kind="raised", text=text)
        return ended.output.strip()


Kind = Callable[[random.Random], tuple[str, str]]


def _digits(rng: random.Random) -> tuple[str, str]:
    base, exponent = rng.randint(2, 19), rng.randint(50, 400)
    text = f"What is the sum of the decimal digits of {base} ** {exponent}?"
    return text, str(sum(map(int, str(base**exponent))))


def _divisors(rng: random.Random) -> tuple[str, str]:
    number = rng.randint(1000, 99999)
    text = f"How many positive divisors has {number}?"
    return text, str(sum(number % d == 0 for d in range(1, number + 1)))


def _remainder(rng: random.Random) -> tuple[str, str]:
    a, b, m = rng.randint(2, 999), rng.randint(100, 9999), rng.randint(100, 9999)
    return f"What is the remainder of {a} ** {b} divided by {m}?", str(pow(a, b, m))


def _multiples(rng: random.Random) -> tuple[str, str]:
    low, high, a, b = rng.randint(1, 500), rng.randint(501, 5000), *rng.sample(range(2, 30), 2)
    text = f"How many whole numbers from {low} to {high} are multiples of {a} or of {b}?"
    return text, str(sum(n % a == 0 or n % b == 0 for n in range(low, high + 1)))


def _median(rng: random.Random) -> tuple[str, str]:
    numbers = [rng.randint(0, 999) for _ in range(rng.choice((7, 9, 11, 13)))]
    listed = ", ".join(map(str, numbers))
    return f"What is the median of {listed}?", str(sorted(numbers)[len(numbers) // 2])


_KINDS: tuple[Kind, ...] = (_digits, _divisors, _remainder, _multiples, _median)


def _generate(seed: int, count: int) -> list[tuple[str, str]]:
    rng = random.Random(f"turnfast python {seed}")
    generated: dict[str, str] = {}
    while len(generated) < count:
        generated.update([rng.choice(_KINDS)(rng)])
    return list(generated.items())


def _make_tasks(split: str, generated: Sequence[tuple[str, str]]) -> tuple[Task, ...]:
    return tuple(
        Task(id=f"{split}-{i}", question=question, answers=(answer,))
        for i, (question, answer) in enumerate(generated)
    )
