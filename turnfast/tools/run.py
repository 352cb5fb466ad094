"""Run one tool call under a deadline; whatever goes wrong ends this call and nothing else.

How a deadline is kept, for plain and for `async` functions, is in deadline.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from .deadline import Late, Raised, Returned, call_here, call_within
from .formats import MalformedCall, ToolCall
from .tool import BadArguments, Tool

MAX_RESULT_CHARS = 16_384

Fault = Literal[
    "malformed", "unknown_tool", "bad_arguments", "raised", "timeout", "flood", "bad_output"
]


@dataclass(frozen=True, slots=True, kw_only=True)
class ToolResult:
    """What a tool returned. An empty result is no success: the call ran, but found nothing."""

    text: str

    @property
    def success(self) -> bool:
        return bool(self.text.strip())

    @property
    def shown(self) -> str:
        """What the agent reads."""
        return self.text if self.success else "No result."


@dataclass(frozen=True, slots=True, kw_only=True)
class ToolError:
    """A call that failed; `text` says why, in words meant for the agent."""

    kind: Fault
    text: str

    @property
    def success(self) -> bool:
        return False

    @property
    def shown(self) -> str:
        """What the agent reads."""
        return f"Error: {self.text}"


def check_call(
    tools: Sequence[Tool], call: ToolCall | MalformedCall
) -> tuple[Tool, dict[str, Any]] | ToolError:
    """The tool and its checked arguments, or the error that the call would end with."""
    if isinstance(call, MalformedCall):
        return ToolError(kind="malformed", text=call.reason)
    for tool in tools:
        if tool.name == call.name:
            try:
                return tool, tool.bind(call.arguments)
            except BadArguments as error:
                return ToolError(kind="bad_arguments", text=_readable(str(error)))
    known = ", ".join(tool.name for tool in tools) or "none"
    return ToolError(kind="unknown_tool", text=f"no such tool; known: {known}")


async def run_tool(
    tools: Sequence[Tool],
    call: ToolCall | MalformedCall,
    *,
    timeout_s: float,
    max_chars: int = MAX_RESULT_CHARS,
) -> ToolResult | ToolError:
    """Check and run one call.

    Args:
        timeout_s: wall-clock deadline of the call, in seconds.
        max_chars: a longer result is refused as a flood, in characters.
    Returns:
        The result, or a `ToolError` for a malformed call, an unknown tool, bad arguments, a tool
        that raised, missed the deadline, flooded, or returned something other than valid text.

    Example:
        >>> call = parse_call('<tool>{"name": "search", "args": {"query": "Ulm"}}</tool>')
        >>> asyncio.run(run_tool([search], call, timeout_s=10))
        ToolResult(text='Ulm was written by Ida.')
    """
    checked = check_call(tools, call)
    if isinstance(checked, ToolError):
        return checked
    tool, arguments = checked
    if tool.inline:
        ended = call_here(tool.function, arguments, timeout_s=timeout_s)
    else:
        ended = await call_within(
            tool.function, (), arguments, timeout_s=timeout_s, label=f"tool-{tool.name}"
        )
    match ended:
        case Returned(value=value):
            return _check_output(tool, value, max_chars)
        case Raised(error=error):
            return _raised(error)
        case Late(hanging=0):
            return ToolError(kind="timeout", text=f"{tool.name} gave no result in {timeout_s:g} s")
        case Late(hanging=hanging):
            return ToolError(kind="timeout", text=f"{hanging} earlier calls are still hanging")


def _check_output(tool: Tool, value: Any, max_chars: int) -> ToolResult | ToolError:
    if isinstance(value, ToolError):
        return value
    if not isinstance(value, str):
        kind = type(value).__name__
        return ToolError(kind="bad_output", text=f"{tool.name} returned {kind}, not text")
    if len(value) > max_chars:
        return ToolError(
            kind="flood",
            text=f"the result has {len(value)} characters, the limit is {max_chars}",
        )
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        return ToolError(kind="bad_output", text=f"{tool.name} returned invalid UTF-8")
    return ToolResult(text=value)


def _raised(error: BaseException) -> ToolError:
    try:
        text = str(error)
    except Exception:  # an exception whose __str__ raises is still only an error of this call
        text = ""
    name = type(error).__name__
    return ToolError(kind="raised", text=_readable(f"{name}: {text}" if text else name))


def _readable(text: str, limit: int = 300) -> str:
    """One line of valid text, short enough for a prompt."""
    line = " ".join(text.encode("utf-8", errors="replace").decode("utf-8").split())
    return line if len(line) <= limit else line[:limit] + "…"
