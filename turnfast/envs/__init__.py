"""Environments: tasks, and episodes that answer an agent's text with messages and rewards."""

from ..tools import Tool, tool
from ..types import Message, Task
from .base import Demonstration, Demonstrator, Env, Episode, Outcome, Split, Step
from .load import load_env
from .lookup import LookupEnv
from .rewards import contains_answer, exact_match, f1, normalize_answer
from .search import SearchEnv
from .tool_env import CallResult, PlayedTurn, ToolEnv, ToolEpisode

__all__ = [
    "CallResult",
    "Demonstration",
    "Demonstrator",
    "Env",
    "Episode",
    "LookupEnv",
    "Message",
    "Outcome",
    "PlayedTurn",
    "SearchEnv",
    "Split",
    "Step",
    "Task",
    "Tool",
    "ToolEnv",
    "ToolEpisode",
    "contains_answer",
    "exact_match",
    "f1",
    "load_env",
    "normalize_answer",
    "tool",
]
