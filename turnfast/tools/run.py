"""Run one tool call under a deadline; every failure ends only this call."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from .deadline import Raised, Returned, TimedOut, call_with_timeout
from .formats import MalformedCall, ToolCall
from .tool import BadArguments, Tool

MAX_RESULT_CHARS = 16_384

Fault = Literal[
    "malformed", "unknown_tool", "bad_arguments", "raised", "timeout", "flood", "bad_output"
]


@dataclass(frozen=True, slots=True, kw_only=True)
class ToolResult:
    """The text that a tool returned. An empty text is not a success: nothing was found."""

    text: str

    @property
    def success(self) -> bool:
        return bool(self.text.strip())

    @property
    def shown(self) -> str:
        """The text shown to the agent."""
        return self.text if self.success else "No result."


@dataclass(frozen=True, slots=True, kw_only=True)
class ToolError:
    """A failed call; `text` gives the reason and is written for the agent."""

    kind: Fault
    text: str

    @property
    def success(self) -> bool:
        return False

    @property
    def shown(self) -> str:
        """The text shown to the agent."""
        return f"Error: {self.text}"


def check_call(
    tools: Sequence[Tool], call: ToolCall | MalformedCall
) -> tuple[Tool, dict[str, Any]] | ToolError:
    """Return the tool and its checked arguments, or the error of the call."""
    if isinstance(call, MalformedCall):
        return ToolError(kind="malformed", text=call.reason)
    for tool in tools:
        if tool.name == call.name:
            try:
                return tool, tool.bind(call.arguments)
            except BadArguments as error:
                return ToolError(kind="bad_arguments", text=_one_line(str(error)))
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
        timeout_s: deadline of the call, in seconds.
        max_chars: longer results are an error of kind "flood".
    Returns:
        The result, or a `ToolError` if the call is malformed, names an unknown tool or has invalid
        arguments, or if the tool raises, exceeds the deadline or returns anything but valid text.

    Example:
        >>> call = ToolCall(name="search", arguments={"query": "Ulm"})
        >>> asyncio.run(run_tool([search], call, timeout_s=10))
        ToolResult(text='Ulm was written by Ida.')
    """
    checked = check_call(tools, call)
    if isinstance(checked, ToolError):
        return checked
    tool, arguments = checked
    match await call_with_timeout(
        tool.function, (), arguments, timeout_s=timeout_s, label=f"tool-{tool.name}"
    ):
        case Returned(value=value):
            return _check_output(tool, value, max_chars)
        case Raised(error=error):
            return _raised(error)
        case TimedOut(num_hanging=0):
            return ToolError(kind="timeout", text=f"{tool.name} gave no result in {timeout_s:g} s")
        case TimedOut(num_hanging=num_hanging):
            return ToolError(kind="timeout", text=f"{num_hanging} earlier calls still hang")


def _check_output(tool: Tool, value: Any, max_chars: int) -> ToolResult | ToolError:
    if isinstance(value, ToolError):
        return value
    if not isinstance(value, str):
        kind = type(value).__name__
        return ToolError(kind="bad_output", text=f"{tool.name} returned {kind}, not text")
    if len(value) > max_chars:
        text = f"the result has {len(value)} characters, the limit is {max_chars}"
        return ToolError(kind="flood", text=text)
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        return ToolError(kind="bad_output", text=f"{tool.name} returned invalid UTF-8")
    return ToolResult(text=value)


def _raised(error: BaseException) -> ToolError:
    try:
        text = str(error)
    except Exception:  # the exception's own __str__ raises
        text = ""
    name = type(error).__name__
    return ToolError(kind="raised", text=_one_line(f"{name}: {text}" if text else name))


def _one_line(text: str, limit: int = 300) -> str:
    """Return a text as one line of valid UTF-8, truncated to `limit` characters."""
    line = " ".join(text.encode("utf-8", errors="replace").decode("utf-8").split())
    return line if len(line) <= limit else line[:limit] + "…"
