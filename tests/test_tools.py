"""Tools: schemas, call parsing, deadlines and failing calls."""

from __future__ import annotations

import asyncio
import datetime
import json
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from typing import Annotated, Literal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import Field

from turnfast.tools import (
    BadArguments,
    MalformedCall,
    Tool,
    ToolCall,
    ToolError,
    ToolResult,
    deadline,
    parse_calls,
    run_tool,
    tool,
)


@tool
def add(a: int, b: int = 1) -> str:
    """Add two
    numbers.

    Args:
        a: the first,
            which comes first.
        b (int): the second.
    Returns:
        the sum.
    """
    return str(a + b)


def run(called: Tool, /, timeout_s: float = 5.0, **arguments: object) -> ToolResult | ToolError:
    call = ToolCall(name=called.name, arguments=arguments)
    return asyncio.run(run_tool([called], call, timeout_s=timeout_s))


# --- schema and arguments


def test_schema_of_a_function():
    assert add.schema == {
        "type": "function",
        "function": {
            "name": "add",
            "description": "Add two numbers.",
            "parameters": {
                "type": "object",
                "additionalProperties": False,
                "required": ["a"],
                "properties": {
                    "a": {"type": "integer", "description": "the first, which comes first."},
                    "b": {"type": "integer", "default": 1, "description": "the second."},
                },
            },
        },
    }
    json.dumps(add.schema)
    assert add(2, 3) == "5"


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ({}, "a: missing"),
        ({"a": "1"}, "a: .*valid integer"),
        ({"a": 1.5}, "a: .*valid integer"),
        ({"a": True}, "a: .*valid integer"),
        ({"a": None}, "a: .*valid integer"),
        ({"a": 1, "c": 2}, "c: no such argument"),
        ({"p0": 1}, "missing"),
        ({"a": {1, 2}}, "not JSON"),
    ],
)
def test_invalid_arguments_are_errors(arguments, reason):
    with pytest.raises(BadArguments, match=reason):
        add.bind(arguments)


def test_argument_types():
    @tool(name="plan.trip", description="Plan.")
    def plan(
        day: datetime.date,
        kind: Literal["rail", "air"],
        stops: tuple[str, ...] = (),
        count: Annotated[int, Field(ge=1)] = 1,
        note: str | None = None,
        json: str = "",
        _x: int = 0,
    ) -> str:
        return f"{day:%d.%m.} {kind} {stops} {count} {note} {json} {_x}"

    assert (plan.name, plan.description) == ("plan.trip", "Plan.")
    bound = plan.bind({"day": "2026-01-02", "kind": "air", "stops": ["a"], "json": "j", "_x": 3})
    assert plan(**bound) == "02.01. air ('a',) 1 None j 3"
    for bad in ({"kind": "sea"}, {"count": 0}, {"stops": "abc"}, {"day": "x"}):
        with pytest.raises(BadArguments):
            plan.bind({"day": "2026-01-02", "kind": "air", **bad})


@pytest.mark.parametrize(
    ("function", "name", "message"),
    [
        (lambda: "", None, "the name may contain only"),
        (lambda x: "", "f", "'x' has no type"),
        (lambda *x: "", "f", r"\*x has no schema"),
        (lambda x, /: "", "f", "'x' is positional-only"),
    ],
)
def test_functions_without_a_schema_are_errors(function, name, message):
    with pytest.raises(TypeError, match=message):
        tool(name=name)(function)


def test_a_method_is_bound_to_its_instance():
    class Book:
        def __init__(self, title: str) -> None:
            self.title = title

        @tool
        def read(self, page: int) -> str:
            return f"{self.title} {page}"

    assert run(Book("Ulm").read, page=1) == ToolResult(text="Ulm 1")
    assert run(Book("Rom").read, page=2) == ToolResult(text="Rom 2")
    assert "self" not in Book.read.parameters["properties"]


# --- parsing

JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=6,
)
TAGS = st.sampled_from(
    ["<tool>", "</tool>", "<tool_call>", "</tool_call>", "<reasoning>", "{", "}"]
)


@given(st.text(min_size=1), st.dictionaries(st.text(), JSON, max_size=4), st.booleans(), st.text())
@settings(deadline=None)
def test_both_tag_formats_are_parsed(name, arguments, native, around):
    key, tag = ("arguments", "tool_call") if native else ("args", "tool")
    around = around.replace("<", "")
    for ascii_only in (True, False):
        body = json.dumps({"name": name, key: arguments}, ensure_ascii=ascii_only)
        text = f"{around}<{tag}>\n{body} </{tag}>{around}"
        assert parse_calls(text) == (ToolCall(name=name, arguments=arguments),)


@given(st.lists(TAGS | st.text(max_size=5) | JSON.map(json.dumps), max_size=12).map("".join))
@settings(max_examples=200, deadline=None)
def test_any_text_is_parsed_and_every_opening_tag_is_an_attempt(text):
    calls = parse_calls(text)
    assert all(isinstance(call, ToolCall | MalformedCall) for call in calls)
    if "<tool>" in text and "<reasoning>" not in text:
        assert calls


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ('<tool>{"name": "add", "args": {"a": 1}</tool>', "not valid JSON"),
        ("<tool>{'name': 'add'}</tool>", "not valid JSON"),
        ("<tool></tool>", "not valid JSON"),
        ("<tool>", "no closing </tool>"),
        ('<tool>{"name": "add"}', "no closing </tool>"),
        ('<tool_call>{"name": "add"}</tool>', "no closing </tool_call>"),
        ('<tool>{"name": "add"} {"name": "add"}</tool>', "more than one JSON object"),
        ("<tool>[1]</tool>", "not a JSON object"),
        ('<tool>{"args": {}}</tool>', '"name" is missing'),
        ('<tool>{"name": 3, "args": {}}</tool>', '"name" is missing'),
        ('<tool>{"name": "add", "args": "{}"}</tool>', '"args" is not an object'),
        ('<tool>{"name": "add", "args": {}, "id": 1}</tool>', "unknown key 'id'"),
        ('<tool>{"name": "add", "args": {"a": NaN}}</tool>', "not valid JSON"),
        ('<tool {"name": "add"}>', "no <tool> or <tool_call> tag is well formed"),
        ('{"name": "add"}</tool>', "no <tool> or <tool_call> tag is well formed"),
        ("<tool>" + "[" * 100_000 + "</tool>", "not valid JSON"),
        ("<tool>" + "1" * 10_000 + "</tool>", "not valid JSON"),
    ],
)
def test_malformed_calls_give_the_reason(text, reason):
    assert parse_calls(text)[0] == MalformedCall(reason=reason)


def test_the_calls_of_a_turn_keep_their_order_and_reasoning_is_ignored():
    text = (
        '<reasoning>maybe <tool>{"name": "no"}</tool></reasoning>'
        '<tool>{"name": "one"}</tool> and <tool>{"nam</tool>'
        '<tool_call>{"name": "two", "arguments": {"x": "</tool_call>"}}</tool_call>'
    )
    assert parse_calls(text) == (
        ToolCall(name="one", arguments={}),
        MalformedCall(reason="not valid JSON"),
        ToolCall(name="two", arguments={"x": "</tool_call>"}),
    )
    assert parse_calls("I could use a tool.") == ()


# --- running


def test_an_empty_result_is_not_a_success():
    result, empty = run(add, a=1), ToolResult(text=" \n")
    assert (result, result.success, result.shown) == (ToolResult(text="2"), True, "2")
    assert (empty.success, empty.shown) == (False, "No result.")


@pytest.mark.parametrize(
    ("text", "kind", "shown"),
    [
        ("<tool>{</tool>", "malformed", "Error: not valid JSON"),
        ('<tool>{"name": "sub"}</tool>', "unknown_tool", "Error: no such tool; known: add"),
        ('<tool>{"name": "add", "args": {}}</tool>', "bad_arguments", "Error: a: missing"),
    ],
)
def test_errors_before_the_call(text, kind, shown):
    (call,) = parse_calls(text)
    error = asyncio.run(run_tool([add], call, timeout_s=1))
    assert isinstance(error, ToolError) and not error.success
    assert (error.kind, error.shown) == (kind, shown)


class NoText(Exception):
    def __str__(self) -> str:
        raise RuntimeError("no text")


def raises(error: BaseException):
    raise error


@pytest.mark.parametrize(
    ("body", "kind", "text"),
    [
        (lambda: raises(ValueError("no such page")), "raised", "ValueError: no such page"),
        (lambda: raises(NoText()), "raised", "NoText"),
        (lambda: raises(StopIteration()), "raised", "StopIteration"),
        (lambda: raises(SystemExit(3)), "raised", "SystemExit: 3"),
        (lambda: raises(ValueError("\udcff" + "x" * 999)), "raised", "ValueError: ?" + "x" * 287),
        (lambda: "x" * 20_000, "flood", "the result has 20000 characters, the limit is 16384"),
        (lambda: b"\xff\xfe", "bad_output", "act returned bytes, not text"),
        (lambda: None, "bad_output", "act returned NoneType, not text"),
        (lambda: 3, "bad_output", "act returned int, not text"),
        (lambda: b"\xff".decode("utf-8", "surrogateescape"), "bad_output", "invalid UTF-8"),
    ],
)
@pytest.mark.parametrize("is_async", [False, True])
def test_a_failing_tool_ends_only_its_own_call(body, kind, text, is_async):
    async def coroutine() -> str:
        await asyncio.sleep(0)
        return body()

    error = run(tool(name="act")(coroutine if is_async else body))
    assert isinstance(error, ToolError)
    assert error.kind == kind
    assert text in error.text
    assert len(error.shown) <= 320
    error.shown.encode("utf-8")


def test_a_keyboard_interrupt_in_a_thread_ends_only_its_own_call():
    error = run(tool(name="act")(lambda: raises(KeyboardInterrupt())))
    assert error == ToolError(kind="raised", text="KeyboardInterrupt")


@pytest.fixture
def hanging() -> Iterator[tuple[Tool, Callable[[], None]]]:
    """A tool that hangs, and a function that ends all its calls."""
    event = threading.Event()

    def end_calls() -> None:
        event.set()
        for thread in threading.enumerate():
            if thread.name == "tool-hang":
                thread.join(10)

    yield tool(name="hang")(lambda: str(event.wait(60))), end_calls
    end_calls()


def test_hanging_tools_time_out_and_do_not_delay_others(hanging):
    @tool
    async def hang_async() -> str:
        await asyncio.sleep(30)
        return "late"

    async def run_all() -> list[ToolResult | ToolError]:
        calls = [ToolCall(name=name, arguments={}) for name in ["hang", "hang_async"] * 20]
        calls.append(ToolCall(name="add", arguments={"a": 1}))
        tools = [hanging[0], hang_async, add]
        return await asyncio.gather(*(run_tool(tools, call, timeout_s=0.3) for call in calls))

    begin = time.perf_counter()
    *errors, result = asyncio.run(run_all())
    elapsed_s = time.perf_counter() - begin
    assert all(isinstance(error, ToolError) and error.kind == "timeout" for error in errors)
    assert result == ToolResult(text="2")
    assert 0.3 <= elapsed_s < 20.0


def test_a_result_before_the_deadline_counts_although_the_event_loop_was_blocked():
    async def run_busy() -> ToolResult | ToolError:
        call = asyncio.ensure_future(
            run_tool([add], ToolCall(name="add", arguments={"a": 1}), timeout_s=0.1)
        )
        await asyncio.sleep(0)
        time.sleep(0.6)  # blocks the loop past the deadline, as an engine step does
        return await call

    assert asyncio.run(run_busy()) == ToolResult(text="2")


def test_cancelling_the_caller_cancels_an_async_tool():
    cancelled = threading.Event()

    @tool
    async def wait() -> str:
        try:
            await asyncio.sleep(30)
        finally:
            cancelled.set()
        return ""

    async def run_cancelled() -> None:
        async with asyncio.timeout(0.1):
            await run_tool([wait], ToolCall(name="wait", arguments={}), timeout_s=20)

    with pytest.raises(TimeoutError):
        asyncio.run(run_cancelled())
    assert cancelled.is_set()


@pytest.mark.parametrize("is_async", [False, True])
def test_a_tool_sees_the_context_variables_of_its_caller(is_async):
    rollout: ContextVar[str] = ContextVar("rollout", default="none")

    def plain() -> str:
        return f"{rollout.get()} {threading.current_thread() is threading.main_thread()}"

    async def coroutine() -> str:
        return plain()

    called = tool(name="called")(coroutine if is_async else plain)

    async def run_in_context(value: str) -> ToolResult | ToolError:
        rollout.set(value)
        return await run_tool([called], ToolCall(name="called", arguments={}), timeout_s=5.0)

    async def run_both() -> list[ToolResult | ToolError]:
        return await asyncio.gather(run_in_context("one"), run_in_context("two"))

    results = asyncio.run(run_both())
    assert [result.shown for result in results] == [f"one {is_async}", f"two {is_async}"]


def test_the_number_of_hanging_threads_is_limited(monkeypatch, hanging):
    hang, end_calls = hanging
    monkeypatch.setattr(deadline, "MAX_HANGING_THREADS", 3)
    errors = [run(hang, timeout_s=0.02) for _ in range(4)]
    assert [error.shown for error in errors] == [
        *["Error: hang gave no result in 0.02 s"] * 3,
        "Error: 3 earlier calls still hang",
    ]
    end_calls()
    assert run(add, a=1) == ToolResult(text="2")


def test_a_hanging_tool_does_not_delay_the_exit_of_the_interpreter():
    program = """
import asyncio, time
from turnfast.tools import ToolCall, run_tool, tool

@tool
def hang() -> str:
    time.sleep(60)
    return ""

print(asyncio.run(run_tool([hang], ToolCall(name="hang", arguments={}), timeout_s=0.1)).kind)
"""
    begin = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=50, check=False
    )
    assert (done.returncode, done.stdout.strip(), done.stderr) == (0, "timeout", "")
    assert time.perf_counter() - begin < 50  # the tool sleeps for 60 s
