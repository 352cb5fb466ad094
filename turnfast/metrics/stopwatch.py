"""The time of a training step, split into phases."""

from __future__ import annotations

import contextlib
import time
from collections import defaultdict
from collections.abc import Callable, Iterator

from .reduce import Max

PHASES = ("rollout", "score", "pack", "train", "sync")


class Stopwatch:
    """Splits the time of a step into phases that add up to it.

    The time of a nested phase does not count for the outer one. Time outside of all phases is
    `time/other`.

    Args:
        synchronize: called at every phase change, so that queued GPU work is charged to the phase
            that queued it (`torch.cuda.synchronize`).
    """

    def __init__(
        self,
        *,
        synchronize: Callable[[], object] | None = None,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self._synchronize = synchronize
        self._clock = clock
        self._spent_s: defaultdict[str, float] = defaultdict(float)
        self._open_phases = ["other"]
        self._last_change = clock()

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Charge the time of the block to `time/<name>`."""
        self._charge()
        self._open_phases.append(name)
        try:
            yield
        finally:
            self._charge()
            self._open_phases.pop()

    def lap(self) -> dict[str, Max]:
        """Return the seconds since the last lap and start the next one.

        The names are `time/rollout` … `time/sync`, any other phase, `time/other` and `time/step`.
        """
        self._charge()
        names = dict.fromkeys((*PHASES, *self._spent_s, "other"))
        times_s = {name: self._spent_s[name] for name in names}
        times_s["step"] = sum(times_s.values())
        self._spent_s.clear()
        return {f"time/{name}": Max(time_s) for name, time_s in times_s.items()}

    def _charge(self) -> None:
        if self._synchronize:
            self._synchronize()
        now = self._clock()
        self._spent_s[self._open_phases[-1]] += now - self._last_change
        self._last_change = now
