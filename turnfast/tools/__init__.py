"""Tools: typed Python functions that an agent may call."""

from .deadline import Late, Raised, Returned, call_within
from .parse import MalformedCall, ToolCall, parse_call, parse_calls, without_thoughts
from .run import MAX_RESULT_CHARS, ToolError, ToolResult, check_call, run_tool
from .search_index import STOP_WORDS, Hit, Passage, SearchIndex
from .tool import BadArguments, Tool, tool

__all__ = [
    "MAX_RESULT_CHARS",
    "STOP_WORDS",
    "BadArguments",
    "Hit",
    "Late",
    "MalformedCall",
    "Passage",
    "Raised",
    "Returned",
    "SearchIndex",
    "Tool",
    "ToolCall",
    "ToolError",
    "ToolResult",
    "call_within",
    "check_call",
    "parse_call",
    "parse_calls",
    "run_tool",
    "tool",
    "without_thoughts",
]
