"""Which rows of the key-value cache hold which tokens, and which of them can be reused.

A row of the cache (slot) keeps its tokens after its request has finished, until another request
takes it. A new request looks for the slot with its longest prefix: the next turn of a trajectory
continues in the slot of the previous turn, and the rollouts of one prompt copy the prefix that the
first of them computes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

MIN_COPY = 16
"""Shorter prefixes cost less to compute again than to copy in every layer."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Placement:
    """The slot of a request. Its first `cached` tokens are in the slot, or are copied from the slot
    `source` during the next forward, after that forward has written its own tokens."""

    slot: int
    cached: int
    source: int | None


class SlotTable:
    """The token ids of every slot whose keys and values are computed.

    Example, two slots of eight tokens, without `MIN_COPY`::

        place([5, 6, 7, 8])      -> slot 0, cached 0
        place([5, 6, 7, 9])      -> slot 1, cached 3, source 0      (slot 0 is in use: copy)
        release(0)
        place([5, 6, 7, 8, 4])   -> slot 0, cached 4                (continues in place)
    """

    def __init__(self, num_slots: int, capacity: int) -> None:
        self._ids = np.zeros((num_slots, capacity), dtype=np.int32)
        self._lengths = np.zeros(num_slots, dtype=np.int64)
        self._free = dict.fromkeys(range(num_slots))  # least recently used first
        self._pinned: set[int] = set()

    def place(self, prompt_ids: Sequence[int]) -> Placement | None:
        """Take a slot for a prompt; None if no slot can be taken before the next forward."""
        prompt = np.asarray(prompt_ids, dtype=np.int32)
        shared = self._shared_prefixes(prompt)
        placement = self._in_place(shared) or self._in_other_slot(shared)
        if placement is None:
            return None
        if placement.source is not None:
            self._pinned.add(placement.source)
        del self._free[placement.slot]
        self._ids[placement.slot, : len(prompt)] = prompt
        self._lengths[placement.slot] = len(prompt)
        return placement

    def append(self, slot: int, token_id: int) -> None:
        """Record a token that the next forward writes at the end of the slot."""
        self._ids[slot, self._lengths[slot]] = token_id
        self._lengths[slot] += 1

    def tokens(self, slot: int) -> np.ndarray:
        """Ids in the slot, int32."""
        return self._ids[slot, : self._lengths[slot]]

    def length(self, slot: int) -> int:
        return int(self._lengths[slot])

    def release(self, slot: int) -> None:
        self._free[slot] = None

    def unpin(self) -> None:
        """Allow copied slots to be overwritten again, after a forward."""
        self._pinned.clear()

    def clear(self) -> None:
        """Discard all cached tokens, after a change of weights."""
        self._lengths[:] = 0
        self._free = dict.fromkeys(sorted(self._free))

    def _shared_prefixes(self, prompt: np.ndarray) -> np.ndarray:
        # the last prompt token is always computed: its hidden state predicts the first sample
        limit = len(prompt) - 1
        differs = self._ids[:, :limit] != prompt[:limit]
        first = np.where(differs.any(axis=1), differs.argmax(axis=1), limit) if limit else 0
        return np.minimum(first, self._lengths)

    def _in_place(self, shared: np.ndarray) -> Placement | None:
        best = int(shared.max())
        if best == 0:
            return None
        for slot in np.flatnonzero(shared == best):
            # a slot that shares less than half of its tokens is kept for other requests
            mostly_shared = 2 * best >= self._lengths[slot]
            if slot in self._free and slot not in self._pinned and mostly_shared:
                return Placement(slot=int(slot), cached=best, source=None)
        return None

    def _in_other_slot(self, shared: np.ndarray) -> Placement | None:
        unpinned = [slot for slot in self._free if slot not in self._pinned]
        if not unpinned:
            return None
        source = int(shared.argmax())
        cached = int(shared[source])
        if cached < MIN_COPY:
            return Placement(slot=unpinned[0], cached=0, source=None)
        if unpinned == [source]:
            return Placement(slot=source, cached=cached, source=None)
        slot = next(slot for slot in unpinned if slot != source)
        return Placement(slot=slot, cached=cached, source=source)
