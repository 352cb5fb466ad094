"""Arithmetic questions and a calculator tool.

    user       What is (317 - 48) * 26?
    assistant  <tool>{"name": "calculate", "args": {"expression": "317 - 48"}}</tool>
    user       <result>269</result>
    assistant  <tool>{"name": "calculate", "args": {"expression": "269 * 26"}}</tool>
    user       <result>6994</result>
    assistant  <answer>6994</answer>

With `max_operations = 1` the calculator accepts one operation per call, so a question with n
operations needs n calls: rollouts have different numbers of turns.
"""

from __future__ import annotations

import ast
import random
from collections.abc import Sequence
from typing import Annotated, Any

from pydantic import Field

from ...config.schema import PositiveInt
from ...errors import ConfigError
from ...tools import calculate, format_number, tool
from ...types import Task
from ..base import Split
from ..tool_env import ToolEnv

Operations = Annotated[int, Field(ge=1, le=8)]


class CalculatorEnv(ToolEnv):
    """Arithmetic expressions of integers with + - *.

    Args:
        seed: seed of the expressions; those of eval do not occur in train.
        operations: operations per expression, one number or several to draw from.
        largest: largest number in an expression.
        max_operations: operations that one call may contain; more is an error.
        train_tasks, eval_tasks: expressions per split.
        options: as in `ToolEnv`.
    """

    def __init__(
        self,
        *,
        seed: int = 0,
        operations: Operations | list[Operations] = 2,
        largest: Annotated[int, Field(ge=10, le=10**9)] = 999,
        max_operations: PositiveInt = 8,
        train_tasks: PositiveInt = 4096,
        eval_tasks: PositiveInt = 256,
        **options: Any,
    ) -> None:
        super().__init__(**options)
        self.operations = (operations,) if isinstance(operations, int) else tuple(operations)
        if not self.operations:
            raise ConfigError("env.options.operations: the list is empty; give numbers from 1 to 8")
        self._max_operations = max_operations
        rng = random.Random(f"turnfast calculator {seed}")
        num_tasks = train_tasks + eval_tasks
        drawn: dict[str, None] = {}
        for _ in range(50 * num_tasks):
            drawn.setdefault(_draw(rng, rng.choice(self.operations), largest))
            if len(drawn) == num_tasks:
                break
        else:
            raise ConfigError(
                f"env.options.largest: {largest} allows fewer than {num_tasks} different "
                "expressions; raise it, or lower train_tasks or eval_tasks"
            )
        expressions = list(drawn)
        self._expressions: dict[Split, list[str]] = {
            "train": expressions[:train_tasks],
            "eval": expressions[train_tasks:],
        }

    def tasks(self, split: Split) -> Sequence[Task]:
        return [
            Task(
                id=f"{split}-{i}",
                question=f"What is {text}?",
                answers=(format_number(calculate(text)),),
                data={"expression": text},
            )
            for i, text in enumerate(self._expressions[split])
        ]

    def set_limits(self, *, max_turns: int, tool_timeout_s: float) -> None:
        calls = -(-max(self.operations) // self._max_operations)
        if max_turns <= calls:
            raise ConfigError(
                f"env.max_turns: {max_turns} leaves no turn for the answer after {calls} calls; "
                f"set it to {calls + 1} or more"
            )
        super().set_limits(max_turns=max_turns, tool_timeout_s=tool_timeout_s)

    @tool
    def calculate(self, expression: str) -> str:
        """Work out an arithmetic expression.

        Args:
            expression: numbers, + - * / // % ** and brackets.
        """
        value = calculate(expression)
        count = sum(isinstance(node, ast.BinOp) for node in ast.walk(ast.parse(expression.strip())))
        if count > self._max_operations:
            raise ValueError(f"{count} operations; one call accepts {self._max_operations}")
        return format_number(value)


def _draw(rng: random.Random, operations: int, largest: int) -> str:
    """A random expression tree with `operations` operations, as text."""
    if operations == 0:
        return str(rng.randint(2, largest))
    left = rng.randrange(operations)
    operands = [_draw(rng, left, largest), _draw(rng, operations - 1 - left, largest)]
    bracketed = [f"({operand})" if " " in operand else operand for operand in operands]
    return f" {rng.choice('+-*')} ".join(bracketed)
