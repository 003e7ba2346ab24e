"""A client machine with many tabs open: its user visits one after another."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from simkvm.guest.jobs import ENDLESS, Int64s, Jobs, Seat, Stage, loading
from simkvm.scenario.workloads import Interactive


class Browser:
    """What one vCPU does of it. All of them agree on tabs and visits."""

    def __init__(self, access: Interactive, seat: Seat) -> None:
        self.access = access
        self.seat = seat
        self._visits = seat.layout_rng
        size = access.tab_size // seat.page_bytes
        used = max(1, round(access.working_set * size))
        #: Pages of each tab's working set in the order of addresses, shape (tabs, used).
        self.tabs = np.array(
            [
                tab * size + np.sort(self._visits.permutation(size)[:used])
                for tab in range(access.tabs)
            ]
        )

    def stages(self) -> Iterator[Stage]:
        """Visit after visit; the next one begins when the last burst anywhere is over."""
        access, seat, tab = self.access, self.seat, 0
        used = access.tabs * access.tab_size // seat.page_bytes
        yield from loading(access, seat, np.arange(used))
        for number in range(access.visits or ENDLESS):
            idle_ns = access.idle if number else 0
            yield Stage(iter([self._visit(tab)]), first_ns=(idle_ns,), requests=True, barrier=True)
            tab = self._next(tab)

    def _next(self, tab: int) -> int:
        tabs = self.access.tabs
        if self.access.order == "turn" or tabs == 1:
            return (tab + 1) % tabs
        other = int(self._visits.integers(tabs - 1))
        return other + (other >= tab)

    def _visit(self, tab: int) -> Jobs:
        """The vCPU's part of the whole working set in order, then parts of it at random."""
        access, seat, working_set = self.access, self.seat, self.tabs[tab]
        opening = working_set[seat.vcpu :: seat.vcpus]
        drawn = seat.rng.integers(0, len(working_set), access.bursts * access.burst_pages)
        pages = np.concatenate((opening, working_set[drawn]))
        counts = np.array([len(opening), *[access.burst_pages] * access.bursts])
        counts = counts[counts > 0]  # of few pages not every vCPU gets one
        offsets = np.concatenate(([0], np.cumsum(counts)))
        step_ns = access.burst_cpu // access.burst_pages + seat.touch_ns
        within = np.arange(len(pages)) - np.repeat(offsets[:-1], counts)
        pauses = seat.rng.exponential(access.pause, len(counts))
        return Jobs(
            offsets=offsets,
            pages=pages,
            writes=seat.rng.random(len(pages)) < access.write_ratio,
            at_ns=within * step_ns,
            total_ns=counts * step_ns,
            gap_ns=_whole(pauses),
            work=np.ones(len(counts), np.int64),
            last=True,
        )


def _whole(times_ns: np.ndarray[tuple[int, ...], np.dtype[np.float64]]) -> Int64s:
    whole: Int64s = np.rint(times_ns).astype(np.int64)
    return whole
