"""Load the reward functions of `[[env.rewards]]`: built-in ones by name, others by module:function.

    exact_match answer_contained f1      the final answer against the accepted ones    outcome
    tool_executed answer_in_result       as in arXiv 2505.11821                        call
    retrieval                            share of the task's `supporting_titles` that  call
                                         a result of this turn contains for the first time
    format tags_once                     the format of the turn                        turn
    judge                                the score of a language model (judge.py)      any

A class in place of a function is constructed once, with `options` as its arguments, then called.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ...config.schema import RewardConfig
from ...config.signature import check_options, suggest
from ...errors import ConfigError
from ..base import Reward
from ..importing import import_named
from . import functions
from .judge import Judge

_INLINE: Mapping[str, Callable[..., float]] = {
    "exact_match": functions.exact_match,
    "answer_contained": functions.answer_contained,
    "f1": functions.f1,
    "tool_executed": functions.tool_executed,
    "answer_in_result": functions.answer_in_result,
    "retrieval": functions.retrieval,
    "format": functions.turn_format,
    "tags_once": functions.turn_tags,
}
BUILT_IN: Mapping[str, Callable[..., Any]] = {**_INLINE, "judge": Judge}


def load_rewards(configs: Sequence[RewardConfig]) -> tuple[Reward, ...]:
    """Find the reward functions of a recipe and check their options.

    Raises:
        ConfigError: names `env.rewards[i]` and the fix.
    """
    loaded = tuple(_load(config, f"env.rewards[{i}]") for i, config in enumerate(configs))
    names = [reward.name for reward in loaded]
    for i, name in enumerate(names):
        if name in names[:i]:
            raise ConfigError(
                f"env.rewards[{i}].name: there is already a reward {name!r}; give this one another "
                "name"
            )
    return loaded


def _load(config: RewardConfig, field: str) -> Reward:
    name = config.function
    function = BUILT_IN.get(name)
    if function is None and ":" not in name:
        raise ConfigError(
            f"{field}.function: no reward function is called {name!r}{suggest(name, BUILT_IN)} "
            "(give your own as module:function)"
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
            f"{field}.function: {name} must accept (task, turns) and nothing else: {error}"
        ) from None
    return Reward(
        name=config.name or name.rpartition(":")[2],
        function=function,
        on=config.on,
        weight=config.weight,
        deadline_s=config.deadline_s,
        inline=name in _INLINE,
    )
