"""Call user functions under a deadline, so that a hanging one blocks nothing else.

A plain function runs in its own daemon thread. If it hangs, the thread is abandoned: the event
loop, other calls and the exit of the interpreter do not wait for it. An `async` function runs in
the caller's event loop and is cancelled at the deadline. It can only be cancelled where it awaits,
so blocking work belongs in a plain function.
"""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import inspect
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

MAX_HANGING_THREADS = 256


@dataclass(frozen=True, slots=True, kw_only=True)
class Returned:
    value: Any


@dataclass(frozen=True, slots=True, kw_only=True)
class Raised:
    error: BaseException


@dataclass(frozen=True, slots=True, kw_only=True)
class TimedOut:
    """No result within the deadline.

    Attributes:
        num_hanging: if positive, the call was not started, because this many earlier calls hang.
    """

    num_hanging: int = 0


async def call_with_timeout(
    function: Callable[..., Any],
    args: Sequence[Any] = (),
    kwargs: Mapping[str, Any] | None = None,
    *,
    timeout_s: float | None,
    label: str,
) -> Returned | Raised | TimedOut:
    """Call a plain or `async` function and report how the call ended.

    Args:
        timeout_s: deadline in seconds; None waits without limit.
        label: name of the thread.
    """
    call = partial(function, *args, **(kwargs or {}))
    if _is_async(function):
        running = asyncio.ensure_future(_await_outcome(call))
    else:
        num_hanging = _count_hanging()
        if num_hanging >= MAX_HANGING_THREADS:
            return TimedOut(num_hanging=num_hanging)
        running = _run_in_thread(call, label)
    try:
        # Not `asyncio.wait_for`, which discards a result that arrived in time if the event loop
        # was busy until after the deadline.
        done, _ = await asyncio.wait({running}, timeout=timeout_s)
    finally:
        running.cancel()
    if not done:
        return TimedOut()
    if running.cancelled():
        return Raised(error=asyncio.CancelledError())
    return running.result()


async def await_call(function: Callable[..., Any], *args: Any, label: str) -> Any:
    """Call a plain or `async` function without a deadline and return its result.

    Raises:
        BaseException: the error that the function raises.
        RuntimeError: `MAX_HANGING_THREADS` earlier calls hang.
    """
    if _is_async(function):
        return await function(*args)
    match await call_with_timeout(function, args, timeout_s=None, label=label):
        case Returned(value=value):
            return await value if inspect.isawaitable(value) else value
        case Raised(error=error):
            raise error
        case TimedOut(num_hanging=num_hanging):
            raise RuntimeError(f"{label}: {num_hanging} earlier calls still hang")


def _is_async(function: Callable[..., Any]) -> bool:
    """Return whether a function, or the `__call__` of an object, is `async`."""
    return inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(
        getattr(function, "__call__", None)  # noqa: B004
    )


async def _await_outcome(call: Callable[[], Any]) -> Returned | Raised:
    try:
        return Returned(value=await call())
    except (Exception, SystemExit) as error:
        return Raised(error=error)


_hanging: list[threading.Thread] = []
_hanging_lock = threading.Lock()


def _count_hanging() -> int:
    with _hanging_lock:
        _hanging[:] = [thread for thread in _hanging if thread.is_alive()]
        return len(_hanging)


def _run_in_thread(call: Callable[[], Any], label: str) -> asyncio.Future[Returned | Raised]:
    """Start a call in a new thread, with the caller's context variables.

    If the future is cancelled, the thread counts as hanging until it ends.
    """
    context = contextvars.copy_context()
    loop = asyncio.get_running_loop()
    future: asyncio.Future[Returned | Raised] = loop.create_future()

    def run() -> None:
        try:
            outcome: Returned | Raised = Returned(value=context.run(call))
        except BaseException as error:  # SystemExit too must end only this call
            outcome = Raised(error=error)
        # If the loop is closed, nothing waits for the outcome.
        with contextlib.suppress(RuntimeError):
            loop.call_soon_threadsafe(deliver, outcome)

    def deliver(outcome: Returned | Raised) -> None:
        if not future.done():
            future.set_result(outcome)

    def count_if_hanging(done: asyncio.Future[Any]) -> None:
        if done.cancelled():
            with _hanging_lock:
                _hanging.append(thread)

    thread = threading.Thread(target=run, name=label, daemon=True)
    future.add_done_callback(count_if_hanging)
    thread.start()
    return future
