"""Tools of an MCP server over stdio as tools of a `ToolEnv`.

    [env]
    name = "mcp"
    options = { command = "python", args = ["server.py"], questions = "questions.jsonl" }

or in your own environment::

    class Notes(ToolEnv):
        def __init__(self, **options):
            super().__init__(**options)
            self.tools = McpServer("python", ["server.py"]).tools

All rollouts share one server. Calls run concurrently, each with the deadline `env.tool_timeout_s`.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

from pydantic import ConfigDict, Field, create_model

from ...config.schema import PositiveFloat
from ...errors import ConfigError
from ...tools import BackgroundLoop, Tool, ToolError
from ...types import Task
from ..base import Split
from ..optional import import_optional
from ..search.files import read_questions, split_records
from ..tool_env import ToolEnv

_TYPES: Mapping[str, Any] = {
    "string": str,
    "integer": int,
    "number": float,
    "boolean": bool,
    "array": list,
    "object": dict,
}
_ABSENT = object()


class McpServer:
    """A server process and a session with it; both end with `close` or with this process.

    Args:
        command, args: the command line of the server.
        env: environment variables, in addition to those that the `mcp` package passes.
        start_timeout_s: deadline for starting the server and listing its tools.
    Raises:
        ConfigError: the package is not installed, or the command does not start an MCP server.
    """

    def __init__(
        self,
        command: str,
        args: Sequence[str] = (),
        *,
        env: Mapping[str, str] | None = None,
        start_timeout_s: float = 30.0,
    ) -> None:
        self._mcp = import_optional("mcp", install="turnfast[adapters]")
        stdio = import_optional("mcp.client.stdio", install="turnfast[adapters]")
        parameters = self._mcp.StdioServerParameters(
            command=command, args=list(args), env=dict(env) if env else None
        )
        self._open = lambda: stdio.stdio_client(parameters)
        self._background = BackgroundLoop("mcp")
        self._session: Any = None
        command_line = " ".join([command, *args])
        # The names in version 2 of the package and in version 1.
        protocol_error = getattr(self._mcp, "MCPError", None) or self._mcp.McpError
        try:
            listed = self._background.run_blocking(self._start(), timeout_s=start_timeout_s)
        except TimeoutError:
            raise ConfigError(
                f"env.options.command: {command_line!r} did not list its tools within "
                f"{start_timeout_s:g} s"
            ) from None
        except (OSError, protocol_error) as error:
            raise ConfigError(
                f"env.options.command: {command_line!r}: {type(error).__name__}: {error}"
            ) from None
        self.tools: tuple[Tool, ...] = tuple(map(self._make_tool, listed))

    def close(self) -> None:
        """End the session and the process."""
        self._background.run_blocking(self._stop(), timeout_s=10.0)

    async def _start(self) -> list[Any]:
        ready: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._closing = asyncio.Event()
        self._serving = asyncio.create_task(self._serve(ready))
        try:
            await ready
            return await self._list_tools()
        except BaseException:
            self._serving.cancel()
            raise

    async def _serve(self, ready: asyncio.Future[None]) -> None:
        # The package requires that the same task opens and closes the session.
        try:
            async with self._open() as streams, self._mcp.ClientSession(*streams) as session:
                await session.initialize()
                self._session = session
                ready.set_result(None)
                await self._closing.wait()
        except BaseException as error:
            if not ready.done():
                ready.set_exception(_first_cause(error))
            elif not isinstance(error, Exception):
                raise
        finally:
            self._session = None

    async def _list_tools(self) -> list[Any]:
        page = await self._session.list_tools()
        tools = list(page.tools)
        while cursor := _either(page, "next_cursor", "nextCursor"):
            page = await self._session.list_tools(cursor=cursor)
            tools += page.tools
        return tools

    async def _stop(self) -> None:
        self._closing.set()
        await asyncio.wait({self._serving}, timeout=5.0)
        self._serving.cancel()

    async def _call(self, name: str, arguments: Mapping[str, Any]) -> str | ToolError:
        if self._session is None:
            return ToolError(kind="raised", text="the tool server has stopped")
        result = await self._session.call_tool(name, dict(arguments))
        text = "\n".join(
            item.text if item.type == "text" else f"[{item.type}]" for item in result.content
        )
        if _either(result, "is_error", "isError"):
            return ToolError(kind="raised", text=text[:500] or f"{name} failed")
        return text

    def _make_tool(self, definition: Any) -> Tool:
        name = definition.name

        async def call(**arguments: Any) -> str | ToolError:
            present = {key: value for key, value in arguments.items() if value is not _ABSENT}
            return await self._background.run(self._call(name, present))

        schema = dict(_either(definition, "input_schema", "inputSchema") or {})
        return Tool(
            name=name,
            description=" ".join((definition.description or "").split()),
            parameters=schema,
            function=call,
            arguments=_arguments_model(name, schema),
        )


class McpEnv(ToolEnv):
    """Questions from a file and the tools of a server.

    Args:
        command, args, env, start_timeout_s: arguments of `McpServer`.
        questions: JSONL file of questions, as for env "search".
        eval_share: share of the questions that is held out for evaluation.
        seed: selects the held-out questions.
        options: options of `ToolEnv`.
    """

    def __init__(
        self,
        *,
        command: str,
        questions: str,
        args: list[str] | None = None,
        env: dict[str, str] | None = None,
        start_timeout_s: PositiveFloat = 30.0,
        eval_share: Annotated[float, Field(gt=0, lt=1)] = 0.1,
        seed: int = 0,
        **options: Any,
    ) -> None:
        super().__init__(**options)
        self._records = split_records(read_questions(Path(questions)), share=eval_share, seed=seed)
        self.server = McpServer(command, args or (), env=env, start_timeout_s=start_timeout_s)
        self.tools: Sequence[Tool] = self.server.tools

    def tasks(self, split: Split) -> Sequence[Task]:
        return [
            Task(id=record.id, question=record.question, answers=record.answers)
            for record in self._records[split]
        ]


def _arguments_model(name: str, schema: Mapping[str, Any]) -> Any:
    """Return a model that checks names and basic types; the server checks the full schema."""
    required = set(schema.get("required", ()))
    fields: dict[str, Any] = {}
    for i, (key, value) in enumerate(dict(schema.get("properties", {})).items()):
        kind = value.get("type") if isinstance(value, dict) else None
        hint = _TYPES.get(str(kind), Any)
        default = Field(alias=key) if key in required else Field(default=_ABSENT, alias=key)
        fields[f"p{i}"] = (hint, default)
    config = ConfigDict(extra="forbid", strict=True, arbitrary_types_allowed=True)
    return create_model(name, __config__=config, **fields)


def _either(value: Any, new: str, old: str) -> Any:
    """Return an attribute by its name in version 2 of the package or in version 1."""
    return getattr(value, new, None) or getattr(value, old, None)


def _first_cause(error: BaseException) -> BaseException:
    """Return the first exception inside nested exception groups."""
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error
