"""Tools: typed Python functions that an agent may call."""

from .arithmetic import calculate, format_number
from .background import BackgroundLoop
from .deadline import Raised, Returned, TimedOut, await_call, call_with_timeout
from .formats import Attempt, MalformedCall, ToolCall
from .parse import parse_calls, read_calls, strip_reasoning
from .run import MAX_RESULT_CHARS, ToolError, ToolResult, check_call, run_tool
from .search_index import STOP_WORDS, Hit, Passage, SearchIndex
from .tool import BadArguments, Tool, tool

__all__ = [
    "MAX_RESULT_CHARS",
    "STOP_WORDS",
    "Attempt",
    "BackgroundLoop",
    "BadArguments",
    "Hit",
    "MalformedCall",
    "Passage",
    "Raised",
    "Returned",
    "SearchIndex",
    "TimedOut",
    "Tool",
    "ToolCall",
    "ToolError",
    "ToolResult",
    "await_call",
    "calculate",
    "call_with_timeout",
    "check_call",
    "format_number",
    "parse_calls",
    "read_calls",
    "run_tool",
    "strip_reasoning",
    "tool",
]
