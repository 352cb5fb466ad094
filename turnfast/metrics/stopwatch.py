"""Where the time of a step went, in phases that add up to it."""

from __future__ import annotations

import contextlib
import time
from collections import defaultdict
from collections.abc import Callable, Iterator

PHASES = ("rollout", "score", "pack", "train", "sync")


class Stopwatch:
    """Splits the time of a step into phases that cannot overlap.

    A phase inside another one is taken out of the outer one's time, and what no phase covered is
    `time/other`, so the parts always add up to `time/step`.

    Args:
        synchronize: called at every border, so that queued GPU work counts where it was asked for
            (`torch.cuda.synchronize`); nothing on CPU.
    """

    def __init__(
        self,
        *,
        synchronize: Callable[[], object] | None = None,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self._synchronize = synchronize
        self._clock = clock
        self._spent: defaultdict[str, float] = defaultdict(float)
        self._open = ["other"]
        self._since = clock()

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Time of the block goes to `time/<name>`."""
        self._charge()
        self._open.append(name)
        try:
            yield
        finally:
            self._charge()
            self._open.pop()

    def lap(self) -> dict[str, float]:
        """Seconds since the last lap: `time/rollout` … `time/sync`, any other phase, `time/other`
        and `time/step`; then start over."""
        self._charge()
        names = dict.fromkeys((*PHASES, *self._spent, "other"))
        times = {f"time/{name}": self._spent[name] for name in names}
        self._spent.clear()
        return times | {"time/step": sum(times.values())}

    def _charge(self) -> None:
        if self._synchronize:
            self._synchronize()
        now = self._clock()
        self._spent[self._open[-1]] += now - self._since
        self._since = now
