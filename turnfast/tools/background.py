"""An event loop in its own thread, for clients that are used during the whole run.

The rollouts of each training step run in a new event loop, which is blocked while the engine
computes. A connection to a judge or a tool server belongs to one loop, which must keep running.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Coroutine
from typing import Any, TypeVar

T = TypeVar("T")


class BackgroundLoop:
    """An event loop that starts with the first call, in a daemon thread."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._lock = threading.Lock()
        self._loop: asyncio.AbstractEventLoop | None = None

    async def run(self, coroutine: Coroutine[Any, Any, T]) -> T:
        """Run a coroutine in the background loop; cancelling this call cancels the coroutine."""
        future = asyncio.run_coroutine_threadsafe(coroutine, self._start())
        return await asyncio.wrap_future(future)

    def run_blocking(self, coroutine: Coroutine[Any, Any, T], *, timeout_s: float) -> T:
        """Run a coroutine from synchronous code.

        Raises:
            TimeoutError: no result within `timeout_s` seconds; the coroutine is cancelled.
        """
        future = asyncio.run_coroutine_threadsafe(coroutine, self._start())
        try:
            return future.result(timeout_s)
        except TimeoutError:
            future.cancel()
            raise

    def _start(self) -> asyncio.AbstractEventLoop:
        with self._lock:
            if self._loop is None:
                self._loop = asyncio.new_event_loop()
                threading.Thread(
                    target=self._loop.run_forever, name=self._name, daemon=True
                ).start()
            return self._loop
