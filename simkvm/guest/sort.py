"""A parallel sort in stages, as Spark does it: scan and write, shuffle and write.

Memory holds the data twice: where a stage reads it, and where it writes it; the next stage goes the
other way. A vCPU's output of the scan is cut into as many equal parts as there are vCPUs; in the
shuffle it fetches its part from each, block by block.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from simkvm.guest.jobs import (
    PIECE_PAGES,
    Int64s,
    Seat,
    Stage,
    back_to_back,
    in_batches,
    loading,
    share_of,
)
from simkvm.scenario.workloads import Sort


class Executor:
    """What one vCPU does."""

    def __init__(self, access: Sort, seat: Seat) -> None:
        self.access = access
        self.seat = seat
        self.pages = access.data // seat.page_bytes
        self.block = access.block // seat.page_bytes

    def stages(self) -> Iterator[Stage]:
        """The data written, then scan and shuffle, ``rounds`` times."""
        own = share_of(self.pages, self.seat.vcpu, self.seat.vcpus)
        mine = np.arange(own.start, own.stop)
        yield from loading(self.access, self.seat, np.arange(self.pages))
        for _ in range(self.access.rounds):
            yield self._stage(mine, self.pages + mine)
            before, fetched = self._fetched()
            yield self._stage(self.pages + fetched, before + np.arange(len(fetched)))

    def _fetched(self) -> tuple[int, Int64s]:
        """The vCPU's part of each scan's output, by blocks in random order.

        Returns also how many pages the vCPUs before this one fetch.
        """
        seat, before, blocks = self.seat, 0, []
        for other in range(seat.vcpus):
            output = share_of(self.pages, other, seat.vcpus)
            part = share_of(len(output), seat.vcpu, seat.vcpus)
            before += part.start
            for first in range(part.start, part.stop, self.block):
                last = min(first + self.block, part.stop)
                blocks.append(np.arange(output.start + first, output.start + last))
        order = seat.rng.permutation(len(blocks))
        nothing = np.empty(0, np.int64)
        return before, np.concatenate([nothing, *(blocks[block] for block in order)])

    def _stage(self, read: Int64s, written: Int64s) -> Stage:
        """Read a page, write one, until all are read."""
        seat = self.seat
        pages = np.column_stack((read, written)).ravel()
        writes = np.tile([False, True], len(read))
        step_ns = seat.touch_ns + self.access.page_cpu // 2
        jobs = back_to_back(pages, writes, step_ns, 2 * PIECE_PAGES, seat.page_bytes)
        return Stage(in_batches(jobs), barrier=True)
