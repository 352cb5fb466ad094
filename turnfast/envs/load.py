"""From `env.name` and `env.options` to an environment."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ..config.schema import Config, RewardConfig
from ..config.signature import check_options, suggest
from ..errors import ConfigError
from ..types import Task
from .adapters.gymnasium import GymnasiumEnv
from .adapters.mcp import McpEnv
from .adapters.textarena import TextArenaEnv
from .adapters.verifiers import VerifiersEnv
from .base import Env, Split
from .examples.calculator import CalculatorEnv
from .examples.frozen_lake import FrozenLakeEnv
from .examples.wordle import WordleEnv
from .importing import import_named
from .lookup.env import LookupEnv
from .python import PythonEnv
from .rewards.builtin import load_rewards
from .rewards.reward import with_rewards
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
    """Make the environment of a run.

    Args:
        name: one of `BUILT_IN`, or "module:Class" of the user's own, where `module` is a file in
            the current directory (`capitals` for capitals.py) or anything that can be imported.
        options: arguments of the class, checked against its signature.
        rewards: `env.rewards`, functions whose rewards are added to those of the environment.
        max_turns, tool_timeout_s: `env.max_turns` and `env.tool_timeout_s`, in turns and seconds;
            taken by environments that are a `ToolEnv`.
    Raises:
        ConfigError: names `env.name` or `env.options.<option>`, and what would do instead.

    Example:
        >>> env = load_env("lookup", {"hops": 2}, max_turns=4)
        >>> env.tasks("train")[0].question
        'Who is the teacher of the author of Sorime?'
    """
    make = BUILT_IN.get(name) or _find(name)
    added = load_rewards(rewards)
    env = make(**check_options(make, options, field="env.options"))
    missing = [
        attribute
        for attribute in ("tasks", "episode", "tools", "native_calls")
        if not hasattr(env, attribute)
    ]
    if missing:
        hint = "; does __init__ call super().__init__(**options)?" if "tools" in missing else ""
        raise ConfigError(f"env.name: {name} is no environment, it lacks {missing}{hint}")
    if isinstance(env, ToolEnv):
        if type(env).tasks is ToolEnv.tasks:
            raise ConfigError(f"env.name: {name} must define tasks(self, split)")
        env.set_limits(max_turns=max_turns, tool_timeout_s=tool_timeout_s)
        for reward in added:
            if reward.name in env.weights:
                raise ConfigError(
                    f"env.rewards: {name} has a part {reward.name!r} of its own; set its weight "
                    "with env.options.weights, or give this one another name"
                )
    return with_rewards(env, added) if added else env


def tasks_of(env: Env, split: Split, *, name: str) -> Sequence[Task]:
    """The tasks of a split that must have some.

    Args:
        name: `env.name`, for the refusals.
    Raises:
        ConfigError: there are none, they are no `Task`s, or the environment fails to list them.
    """
    try:
        tasks = env.tasks(split)
    except ConfigError:
        raise
    except Exception as error:
        raise ConfigError(
            f"env.name: {name}.tasks({split!r}) failed: {type(error).__name__}: {error}"
        ) from error
    if not tasks:
        raise ConfigError(f"env.name: {name} has no tasks in its split {split!r}")
    odd = next((task for task in tasks if not isinstance(task, Task)), None)
    if odd is not None:
        raise ConfigError(
            f"env.name: {name}.tasks({split!r}) has {odd!r:.60} in it; each must be a "
            "turnfast.envs.Task"
        )
    return tasks


def _find(name: str) -> Callable[..., Env]:
    if ":" not in name:
        hint = suggest(name, BUILT_IN)
        raise ConfigError(
            f"env.name: no environment is called {name!r}{hint} (your own is given as module:Class)"
        )
    return import_named(name, field="env.name", form="module:Class")


def open_env(config: Config) -> Env:
    return load_env(
        config.env.name,
        config.env.options,
        rewards=config.env.rewards,
        max_turns=config.env.max_turns,
        tool_timeout_s=config.env.tool_timeout_s,
    )
