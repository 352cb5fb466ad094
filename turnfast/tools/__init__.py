"""Tools: typed Python functions that an agent may call."""

from .arithmetic import calculate, show_number
from .background import BackgroundLoop
from .deadline import Late, Raised, Returned, ask, call_within
from .formats import Attempt, CallFormat, MalformedCall, ToolCall, write_calls
from .parse import parse_call, parse_calls, read_calls, without_thoughts
from .run import MAX_RESULT_CHARS, ToolError, ToolResult, check_call, run_tool
from .search_index import STOP_WORDS, Hit, Passage, SearchIndex
from .tool import BadArguments, Tool, tool

__all__ = [
    "MAX_RESULT_CHARS",
    "STOP_WORDS",
    "Attempt",
    "BackgroundLoop",
    "BadArguments",
    "CallFormat",
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
    "ask",
    "calculate",
    "call_within",
    "check_call",
    "parse_call",
    "parse_calls",
    "read_calls",
    "run_tool",
    "show_number",
    "tool",
    "without_thoughts",
    "write_calls",
]
