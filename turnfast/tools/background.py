"""An event loop in a thread of its own, for clients that live longer than one rollout.

Every rollout runs in a fresh event loop, and that loop stands still while the engine computes. A
connection to a judge or to a tool server belongs to one loop and should go on meanwhile.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Coroutine
from typing import Any, TypeVar

T = TypeVar("T")


class BackgroundLoop:
    """Starts with the first call; a daemon thread, so it never holds up the interpreter's exit."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._lock = threading.Lock()
        self._loop: asyncio.AbstractEventLoop | None = None

    async def run(self, coroutine: Coroutine[Any, Any, T]) -> T:
        """Run a coroutine there and wait here; cancelling the wait cancels it."""
        future = asyncio.run_coroutine_threadsafe(coroutine, self._started())
        return await asyncio.wrap_future(future)

    def run_blocking(self, coroutine: Coroutine[Any, Any, T], *, timeout_s: float) -> T:
        """The same from plain code; raises TimeoutError, and cancels it, after `timeout_s`."""
        future = asyncio.run_coroutine_threadsafe(coroutine, self._started())
        try:
            return future.result(timeout_s)
        except TimeoutError:
            future.cancel()
            raise

    def _started(self) -> asyncio.AbstractEventLoop:
        with self._lock:
            if self._loop is None:
                self._loop = asyncio.new_event_loop()
                threading.Thread(
                    target=self._loop.run_forever, name=self._name, daemon=True
                ).start()
            return self._loop
