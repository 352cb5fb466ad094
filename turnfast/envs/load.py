"""Construct the environment of `env.name`, `env.options` and `env.rewards`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ..config.schema import EnvConfig, RewardConfig
from ..config.signature import check_options, suggest
from ..errors import ConfigError
from ..types import Task
from .adapters.gymnasium import GymnasiumEnv
from .adapters.mcp import McpEnv
from .adapters.textarena import TextArenaEnv
from .adapters.verifiers import VerifiersEnv
from .base import Env, Reward, Split
from .examples.calculator import CalculatorEnv
from .examples.frozen_lake import FrozenLakeEnv
from .examples.wordle import WordleEnv
from .importing import import_named
from .lookup.env import LookupEnv
from .python import PythonEnv
from .rewards.builtin import load_rewards
from .search.env import SearchEnv
from .tool_env import ToolEnv

BUILT_IN: Mapping[str, Callable[..., Env]] = {
    "lookup": LookupEnv,
    "search": SearchEnv,
    "calculator": CalculatorEnv,
    "python": PythonEnv,
    "frozen_lake": FrozenLakeEnv,
    "wordle": WordleEnv,
    "gymnasium": GymnasiumEnv,
    "textarena": TextArenaEnv,
    "mcp": McpEnv,
    "verifiers": VerifiersEnv,
}


def load_env(
    name: str,
    options: Mapping[str, Any],
    *,
    rewards: Sequence[RewardConfig] = (),
    max_turns: int = 4,
    tool_timeout_s: float = 10.0,
) -> Env:
    """Construct the environment of a run.

    Args:
        name: one of `BUILT_IN`, or "module:Class" for your own, where `module` is a file in the
            current directory (`capitals` for capitals.py) or an importable module.
        options: arguments of the class, checked against its signature.
        rewards: `env.rewards`, functions added to the rewards of the environment.
        max_turns, tool_timeout_s: `env.max_turns` and `env.tool_timeout_s`, in turns and seconds;
            used by subclasses of `ToolEnv`.
    Raises:
        ConfigError: names `env.name`, `env.options.<option>` or `env.rewards`, and the fix.
        Exception: raised by the constructor of the class.

    Example:
        >>> env = load_env("lookup", {"hops": 2}, max_turns=4)
        >>> env.tasks("train")[0].question
        'Who is the teacher of the author of Sorime?'
    """
    make = BUILT_IN.get(name) or _find(name)
    added = load_rewards(rewards)
    env = make(**check_options(make, options, field="env.options"))
    required = ("tasks", "episode", "tools", "native_calls")
    missing = [attribute for attribute in required if not hasattr(env, attribute)]
    if missing:
        hint = "; does __init__ call super().__init__(**options)?" if "tools" in missing else ""
        raise ConfigError(f"env.name: {name} is not an environment, it has no {missing[0]}{hint}")
    if isinstance(env, ToolEnv):
        if type(env).tasks is ToolEnv.tasks:
            raise ConfigError(f"env.name: {name} must define tasks(self, split)")
        env.set_limits(max_turns=max_turns, tool_timeout_s=tool_timeout_s)
    own: Sequence[Reward] = getattr(env, "rewards", ())
    for reward in added:
        if reward.name in [other.name for other in own]:
            raise ConfigError(
                f"env.rewards: {name} already has a reward {reward.name!r}; change its weight with "
                "env.options.weights, or give this one another name"
            )
    env.rewards = (*own, *added)
    return env


def open_env(config: EnvConfig) -> Env:
    """`load_env` with the fields of a recipe."""
    return load_env(
        config.name,
        config.options,
        rewards=config.rewards,
        max_turns=config.max_turns,
        tool_timeout_s=config.tool_timeout_s,
    )


def tasks_of(env: Env, split: Split, *, name: str) -> Sequence[Task]:
    """The tasks of a split.

    Args:
        name: `env.name`, for the errors.
    Raises:
        ConfigError: there are none, or one is not a `Task`.
    """
    tasks = env.tasks(split)
    if not tasks:
        raise ConfigError(f"env.name: {name} has no tasks in split {split!r}")
    wrong = next((task for task in tasks if not isinstance(task, Task)), None)
    if wrong is not None:
        raise ConfigError(
            f"env.name: {name}.tasks({split!r}) contains {wrong!r:.60}; each must be a "
            "turnfast.envs.Task"
        )
    return tasks


def _find(name: str) -> Callable[..., Env]:
    if ":" not in name:
        hint = suggest(name, BUILT_IN)
        raise ConfigError(
            f"env.name: no environment is called {name!r}{hint} (give your own as module:Class)"
        )
    return import_named(name, field="env.name", form="module:Class")
