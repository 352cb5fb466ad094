"""From `[[env.rewards]]` to reward functions: the built-in ones by name, others by module:function.

    exact_match answer_contained f1      the final answer against the accepted ones    outcome
    tool_executed answer_in_result       the paper's two                               call
    retrieval                            share of the task's `supporting_titles` that  call
                                         a result of this turn names for the first time
    format tags_once                     the form of the turn                          turn
    judge                                a language model's opinion (judge_reward.py)  any

A class in place of a function is made once, with `options` as its arguments, and then called.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ...config.schema import RewardConfig
from ...config.signature import check_options, suggest
from ...errors import ConfigError
from ...types import Task
from ..base import PlayedTurn
from ..importing import import_named
from . import answers as rewards
from .judge import Judge
from .reward import Reward


def exact_match(task: Task, turns: Sequence[PlayedTurn]) -> float:
    answer = final_answer(turns)
    return 0.0 if answer is None else rewards.exact_match(answer, task.answers)


def answer_contained(task: Task, turns: Sequence[PlayedTurn]) -> float:
    answer = final_answer(turns)
    return 0.0 if answer is None else rewards.contains_answer(answer, task.answers)


def f1(task: Task, turns: Sequence[PlayedTurn]) -> float:
    answer = final_answer(turns)
    return 0.0 if answer is None else rewards.f1(answer, task.answers)


def tool_executed(task: Task, turns: Sequence[PlayedTurn]) -> float:
    calls = turns[-1].calls
    return sum(call.result.success for call in calls) / len(calls) if calls else 0.0


def answer_in_result(task: Task, turns: Sequence[PlayedTurn]) -> float:
    *earlier, last = (_results(turn) for turn in turns)
    if any(rewards.contains_answer(text, task.answers) for text in earlier):
        return 0.0
    return rewards.contains_answer(last, task.answers)


def retrieval(task: Task, turns: Sequence[PlayedTurn]) -> float:
    titles: Sequence[str] = task.data.get("supporting_titles", ())
    if not titles:
        raise ValueError(f"task {task.id!r} has no supporting_titles to be found")
    *earlier, last = (_results(turn) for turn in turns)
    seen = "\n".join(earlier)
    new = [t for t in set(titles) if t.lower() in last.lower() and t.lower() not in seen.lower()]
    return len(new) / len(set(titles))


def format(
    task: Task, turns: Sequence[PlayedTurn], *, native: bool = False, reasoning: bool = True
) -> float:
    return rewards.format_score(turns[-1].text, native=native, reasoning=reasoning)


def tags_once(
    task: Task, turns: Sequence[PlayedTurn], *, native: bool = False, reasoning: bool = True
) -> float:
    return rewards.tags_score(turns[-1].text, native=native, reasoning=reasoning)


BUILT_IN: Mapping[str, Callable[..., Any]] = {"judge": Judge} | {
    function.__name__: function
    for function in (
        exact_match,
        answer_contained,
        f1,
        tool_executed,
        answer_in_result,
        retrieval,
        format,
        tags_once,
    )
}


def load_rewards(configs: Sequence[RewardConfig]) -> tuple[Reward, ...]:
    """Find, check and make the reward functions of a recipe.

    Raises:
        ConfigError: names `env.rewards` and which entry, and what would do instead.
    """
    loaded = tuple(_load(config, f"env.rewards[{i}]") for i, config in enumerate(configs))
    names = [reward.name for reward in loaded]
    for i, name in enumerate(names):
        if name in names[:i]:
            raise ConfigError(
                f"env.rewards[{i}].name: there is a {name!r} already; give each a name of its own"
            )
    return loaded


def final_answer(turns: Sequence[PlayedTurn]) -> str | None:
    """The answer of the last turn; None without one, or beside a call, whose result it ignores."""
    if not turns or turns[-1].calls:
        return None
    return rewards.read_answer(turns[-1].text)


def _load(config: RewardConfig, field: str) -> Reward:
    name = config.function
    function = BUILT_IN.get(name)
    if function is None and ":" not in name:
        raise ConfigError(
            f"{field}.function: no reward is called {name!r}{suggest(name, BUILT_IN)} (your own is "
            "given as module:function)"
        )
    if function is None:
        function = import_named(name, field=f"{field}.function", form="module:function")
    if isinstance(function, type):
        function = function(**check_options(function, config.options, field=f"{field}.options"))
    else:
        options = check_options(function, config.options, field=f"{field}.options", skip=2)
        function = functools.partial(function, **options)
    try:
        inspect.signature(function).bind(None, ())
    except TypeError as error:
        raise ConfigError(
            f"{field}.function: {name} must take (task, turns) and nothing else: {error}"
        ) from None
    return Reward(
        name=config.name or name.rpartition(":")[2],
        function=function,
        on=config.on,
        weight=config.weight,
        deadline_s=config.deadline_s,
    )


def _results(turn: PlayedTurn) -> str:
    return "\n".join(call.result.shown for call in turn.calls if call.result.success)
