"""Call somebody else's function under a deadline; a hanging one blocks nothing.

Plain functions run in a daemon thread of their own, so a hanging one blocks neither the event
loop, nor other calls, nor the interpreter's exit. `async` functions run in the caller's loop and
are cancelled; one that never awaits cannot be interrupted: blocking work belongs in a plain
function.
"""

from __future__ import annotations

import asyncio
import contextvars
import inspect
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

MAX_ABANDONED_THREADS = 256


@dataclass(frozen=True, slots=True, kw_only=True)
class Returned:
    value: Any


@dataclass(frozen=True, slots=True, kw_only=True)
class Raised:
    error: BaseException


@dataclass(frozen=True, slots=True, kw_only=True)
class Late:
    """No result within the deadline, or none begun since `hanging` earlier calls still run."""

    hanging: int = 0


async def call_within(
    function: Callable[..., Any],
    args: Sequence[Any] = (),
    kwargs: Mapping[str, Any] | None = None,
    *,
    timeout_s: float,
    label: str,
) -> Returned | Raised | Late:
    """Call a plain or `async` function, wait at most `timeout_s` seconds, and say how it ended."""
    kwargs = kwargs or {}
    if _is_async(function):
        running = asyncio.ensure_future(_guard(function, args, kwargs))
    else:
        hanging = _count_hanging()
        if hanging >= MAX_ABANDONED_THREADS:
            return Late(hanging=hanging)
        running = _start_thread(function, args, kwargs, label)
    try:
        # not wait_for: a result that is there when the deadline passes must count, even if the
        # loop was busy sampling meanwhile
        done, _ = await asyncio.wait({running}, timeout=timeout_s)
    finally:
        running.cancel()
    if not done:
        return Late()
    if running.cancelled():
        return Raised(error=asyncio.CancelledError())
    return running.result()


def _is_async(function: Callable[..., Any]) -> bool:
    return inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(
        getattr(function, "__call__", None)  # noqa: B004 - an object whose __call__ is async
    )


async def _guard(
    function: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]
) -> Returned | Raised:
    try:
        return Returned(value=await function(*args, **kwargs))
    except (Exception, SystemExit) as error:
        return Raised(error=error)


_ABANDONED: list[threading.Thread] = []
_ABANDONED_LOCK = threading.Lock()


def _count_hanging() -> int:
    with _ABANDONED_LOCK:
        _ABANDONED[:] = [thread for thread in _ABANDONED if thread.is_alive()]
        return len(_ABANDONED)


def _start_thread(
    function: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any], label: str
) -> asyncio.Future[Returned | Raised]:
    """Run a plain function in its own daemon thread; the future belongs to the running loop."""
    loop = asyncio.get_running_loop()
    future: asyncio.Future[Returned | Raised] = loop.create_future()
    context = contextvars.copy_context()

    def work() -> None:
        ended: Returned | Raised
        try:
            ended = Returned(value=context.run(function, *args, **kwargs))
        except BaseException as error:  # a sys.exit in it must end only its own call
            ended = Raised(error=error)
        try:
            loop.call_soon_threadsafe(deliver, ended)
        except RuntimeError:
            return  # the loop is closed: nobody waits for this result any more

    def deliver(ended: Returned | Raised) -> None:
        if not future.done():
            future.set_result(ended)

    thread = threading.Thread(target=work, name=label, daemon=True)

    def abandon(done: asyncio.Future[Any]) -> None:
        if done.cancelled():
            with _ABANDONED_LOCK:
                _ABANDONED.append(thread)

    future.add_done_callback(abandon)
    thread.start()
    return future
