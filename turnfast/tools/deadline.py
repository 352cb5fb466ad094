"""Call somebody else's function under a deadline; a hanging one blocks nothing.

Plain functions run in a daemon thread that they have to themselves, so a hanging one blocks neither
the event loop, nor other calls, nor the interpreter's exit. A thread whose call has ended takes the
next one: to start a thread costs more than most calls. `async` functions run in the caller's loop
and are cancelled; one that never awaits cannot be interrupted: blocking work belongs in a plain
function. What is known to be short needs no thread: `call_here`.
"""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import inspect
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from queue import SimpleQueue
from typing import Any

MAX_ABANDONED_THREADS = 256
MAX_IDLE_THREADS = 256


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
    timeout_s: float | None,
    label: str,
) -> Returned | Raised | Late:
    """Call a plain or `async` function, wait at most `timeout_s` seconds (None: as long as the
    caller does), and say how it ended."""
    kwargs = kwargs or {}
    if is_async(function):
        running = asyncio.ensure_future(_guard(function, args, kwargs))
    else:
        hanging = _count_hanging()
        if hanging >= MAX_ABANDONED_THREADS:
            return Late(hanging=hanging)
        running = _begin(partial(function, *args, **kwargs), label)
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


async def ask(function: Callable[..., Any], *args: Any, label: str) -> Any:
    """What a function gives, however long it takes: an `async` one in this loop, a plain one in a
    thread, so that it may block while others go on.

    Raises:
        BaseException: what the function raises.
        RuntimeError: `MAX_ABANDONED_THREADS` earlier calls are still hanging.
    """
    if is_async(function):
        return await function(*args)
    match await call_within(function, args, timeout_s=None, label=label):
        case Returned(value=value):
            return await value if inspect.isawaitable(value) else value
        case Raised(error=error):
            raise error
        case Late(hanging=hanging):
            raise RuntimeError(f"{label}: {hanging} earlier calls are still hanging")


def call_here(
    function: Callable[..., Any], kwargs: Mapping[str, Any], *, timeout_s: float
) -> Returned | Raised | Late:
    """Call a plain function that is short and never waits, in the thread that asks.

    Nothing can interrupt it: a result that comes late is not taken, but was waited for.
    """
    begin = time.perf_counter()
    try:
        value = function(**kwargs)
    except (Exception, SystemExit) as error:
        return Raised(error=error)
    return Returned(value=value) if time.perf_counter() - begin <= timeout_s else Late()


def is_async(function: Callable[..., Any]) -> bool:
    code = getattr(function, "__code__", None)  # the usual case at once: a function or a method
    if code is not None and code.co_flags & inspect.CO_COROUTINE:
        return True
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


class _Call:
    """A plain function that runs in another thread; `future` belongs to the running loop."""

    def __init__(self, function: Callable[[], Any], label: str) -> None:
        self._function = function
        self._context = contextvars.copy_context()
        self._loop = asyncio.get_running_loop()
        self.future: asyncio.Future[Returned | Raised] = self._loop.create_future()
        self.label = label
        self.ended = threading.Event()

    def run(self) -> None:
        ended: Returned | Raised
        try:
            ended = Returned(value=self._context.run(self._function))
        except BaseException as error:  # a sys.exit in it must end only its own call
            ended = Raised(error=error)
        self.ended.set()
        # where the loop is closed, nobody waits for this result any more
        with contextlib.suppress(RuntimeError):
            self._loop.call_soon_threadsafe(self._deliver, ended)

    def _deliver(self, ended: Returned | Raised) -> None:
        if not self.future.done():
            self.future.set_result(ended)


class _Worker:
    """A daemon thread that makes one call after the other, until too many of its kind are idle."""

    def __init__(self) -> None:
        self.calls: SimpleQueue[_Call] = SimpleQueue()
        threading.Thread(target=self._work, daemon=True).start()

    def _work(self) -> None:
        while True:
            call = self.calls.get()
            threading.current_thread().name = call.label
            call.run()
            del call  # what it holds must not live until the next one
            with _LOCK:
                if len(_IDLE) >= MAX_IDLE_THREADS:
                    return
                _IDLE.append(self)


_IDLE: list[_Worker] = []
_ABANDONED: list[_Call] = []
_LOCK = threading.Lock()


def _count_hanging() -> int:
    with _LOCK:
        _ABANDONED[:] = [call for call in _ABANDONED if not call.ended.is_set()]
        return len(_ABANDONED)


def _begin(function: Callable[[], Any], label: str) -> asyncio.Future[Returned | Raised]:
    call = _Call(function, label)

    def abandon(done: asyncio.Future[Any]) -> None:
        if done.cancelled():
            with _LOCK:
                _ABANDONED.append(call)

    call.future.add_done_callback(abandon)
    with _LOCK:
        worker = _IDLE.pop() if _IDLE else None
    (worker or _Worker()).calls.put(call)
    return call.future
