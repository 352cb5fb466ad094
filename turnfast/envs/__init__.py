"""Environments: tasks, and episodes that reply to an agent's text with messages and rewards."""

from ..tools import Tool, tool
from ..types import Message, Task
from .base import (
    CallResult,
    Demonstration,
    Demonstrator,
    Env,
    Episode,
    Outcome,
    PlayedTurn,
    Reward,
    RewardFunction,
    Split,
    Step,
)
from .load import load_env, tasks_of
from .lookup.env import LookupEnv
from .rewards.answers import contains_answer, exact_match, f1, normalize_answer
from .rewards.reward import FaultKind, RewardFault, Scorer, check_reward
from .search.env import SearchEnv
from .tool_env import ToolEnv, ToolEpisode

__all__ = [
    "CallResult",
    "Demonstration",
    "Demonstrator",
    "Env",
    "Episode",
    "FaultKind",
    "LookupEnv",
    "Message",
    "Outcome",
    "PlayedTurn",
    "Reward",
    "RewardFault",
    "RewardFunction",
    "Scorer",
    "SearchEnv",
    "Split",
    "Step",
    "Task",
    "Tool",
    "ToolEnv",
    "ToolEpisode",
    "check_reward",
    "contains_answer",
    "exact_match",
    "f1",
    "load_env",
    "normalize_answer",
    "tasks_of",
    "tool",
]
