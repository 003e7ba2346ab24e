"""Dependent loads, one page after another, as multichase makes them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

import numpy as np

from simkvm.guest.jobs import ENDLESS, Int64s, Jobs, Seat, Stage, back_to_back, loading, share_of
from simkvm.guest.popularity import scattered
from simkvm.scenario.workloads import Chase

PIECE_LOADS: Final = 1024  #: loads of a job
BATCH_LOADS: Final = 16 * PIECE_LOADS


class Chaser:
    """One thread.

    A cycle through n pages is a random order of them, gone through again and again. In a guest
    whose vCPUs share all memory there is one cycle, which they enter at equal distances.
    """

    def __init__(self, access: Chase, seat: Seat) -> None:
        self.access = access
        self.seat = seat
        shared = access.span == "guest"
        self.pages = range(seat.pages) if shared else share_of(seat.pages, seat.vcpu, seat.vcpus)
        self.start = seat.vcpu * seat.pages // seat.vcpus if shared else 0
        rng = seat.layout_rng if shared else seat.rng
        self.cycle: Int64s | None = None
        if access.order == "cycle":
            self.cycle = self.pages.start + scattered(len(self.pages), rng).astype(np.int64)

    def stages(self) -> Iterator[Stage]:
        """The chain is made, then loads until there have been enough."""
        yield from loading(self.access, self.seat, np.arange(self.seat.pages))
        yield Stage(self._batches())

    def _batches(self) -> Iterator[Jobs]:
        access, seat, done = self.access, self.seat, 0
        left = ENDLESS if access.loads is None else access.loads
        load_ns = access.load_time or round(seat.machine["dram_local_ns"])
        while left > 0:
            count = min(left, BATCH_LOADS)
            left -= count
            pages = self._next(done)[:count]
            done += count
            reads = np.zeros(count, np.bool_)
            yield back_to_back(pages, reads, load_ns, PIECE_LOADS, 1, last=left == 0)

    def _next(self, done: int) -> Int64s:
        """The pages of a batch behind ``done`` loads."""
        if self.cycle is None:
            low, high = self.pages.start, self.pages.stop
            return self.seat.rng.integers(low, high, BATCH_LOADS, dtype=np.int64)
        places = (self.start + done + np.arange(BATCH_LOADS)) % len(self.cycle)
        pages: Int64s = self.cycle[places]
        return pages
