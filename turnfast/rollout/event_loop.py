"""Run one coroutine in an event loop of its own, with a bounded cleanup.

`asyncio.run` waits until every task has accepted its cancellation. An environment that swallows
cancellation, such as a retry loop around a bare `except`, would block the run forever.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Coroutine
from typing import Any, TypeVar

T = TypeVar("T")


def run_bounded(main: Coroutine[Any, Any, T], *, grace_s: float) -> T:
    """Run a coroutine in a new event loop, then cancel the tasks that are left.

    Tasks that still run `grace_s` seconds later continue in a daemon thread. Closing their loop
    instead could make the garbage collector raise errors in them repeatedly.
    """
    loop = asyncio.new_event_loop()
    try:
        return loop.run_until_complete(main)
    finally:
        if loop.run_until_complete(_cancel_others(grace_s)):
            threading.Thread(target=loop.run_forever, name="uncancelled", daemon=True).start()
        else:
            loop.close()


async def _cancel_others(grace_s: float) -> bool:
    """Cancel all other tasks of the loop; True if some ignored it."""
    others = asyncio.all_tasks() - {asyncio.current_task()}
    for task in others:
        task.cancel()
    done, running = await asyncio.wait(others, timeout=grace_s) if others else (set(), set())
    for task in done:
        if not task.cancelled():
            task.exception()  # marks it as retrieved, so that the loop does not log it
    with contextlib.suppress(TimeoutError):
        await asyncio.wait_for(asyncio.get_running_loop().shutdown_asyncgens(), grace_s)
    return bool(running)
