"""An event loop for one coroutine, which nobody can hold open.

`asyncio.run` waits at its end until every task has let itself be cancelled. An environment that
swallows cancellation, such as a retry loop around a bare `except`, would hold up the run for ever.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Coroutine
from typing import Any, TypeVar

T = TypeVar("T")


def run_bounded(main: Coroutine[Any, Any, T], *, patience_s: float) -> T:
    """Run a coroutine in a loop of its own, and cancel at the end what is left.

    A task that is still there `patience_s` seconds later goes on in a daemon thread, where it
    delays nobody; were it dropped instead, its loop might spin on errors in the garbage collector.
    """
    loop = asyncio.new_event_loop()
    try:
        return loop.run_until_complete(main)
    finally:
        if loop.run_until_complete(_clear(patience_s)):
            threading.Thread(target=loop.run_forever, name="left-behind", daemon=True).start()
        else:
            loop.close()


async def _clear(patience_s: float) -> bool:
    """Cancel everybody else; whether somebody would not be cancelled."""
    left = asyncio.all_tasks() - {asyncio.current_task()}
    for task in left:
        task.cancel()
    done, stubborn = await asyncio.wait(left, timeout=patience_s) if left else (set(), set())
    for task in done:
        if not task.cancelled():
            task.exception()  # seen, or the loop would complain of it
    with contextlib.suppress(TimeoutError):
        await asyncio.wait_for(asyncio.get_running_loop().shutdown_asyncgens(), patience_s)
    return bool(stubborn)
