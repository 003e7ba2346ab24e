"""The host's node of memory: its pages, its LRUs, its swap, and counts of what reclaim does.

Source: include/linux/mmzone.h (``pg_data_t``) and the names of /proc/vmstat, v6.12. One node.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from simkvm.kernel.lrugen import ListedLruvec
from simkvm.kernel.page_alloc import HostPages
from simkvm.kernel.reclaim_throttle import ReclaimThrottle
from simkvm.kernel.sched import Scheduler
from simkvm.kernel.swap import SwapDevice

if TYPE_CHECKING:
    from simkvm.kernel.aging_call import Pass
    from simkvm.kernel.kvm import Kvm
    from simkvm.kernel.swappable import SwappableMemory


@dataclass
class Vmstat:
    """Counters as /proc/vmstat names them; pages unless it says otherwise."""

    pgscan_kswapd: int = 0
    pgscan_direct: int = 0
    pgsteal_kswapd: int = 0
    pgsteal_direct: int = 0
    pgactivate: int = 0  #: folios that reclaim found in use
    pswpin: int = 0
    pswpout: int = 0
    pgmajfault: int = 0  #: faults that read from swap
    swap_cache_hits: int = 0  #: faults that found their page in the swap cache
    first_faults: int = 0  #: faults that took a fresh page, cleared
    workingset_refault: int = 0
    workingset_activate: int = 0
    kswapd_wakeups: int = 0
    oom_kills: int = 0
    look_arounds: int = 0


@dataclass
class Pgdat:
    """One node. ``kvms``: by the number of a lruvec and of a guest in it."""

    pages: HostPages
    swap: SwapDevice | None
    sched: Scheduler
    vmstat: Vmstat = field(default_factory=Vmstat)
    lruvecs: list[ListedLruvec] = field(default_factory=list)
    kvms: list[list[Kvm]] = field(default_factory=list)
    passes: list[Pass] = field(default_factory=list)  #: of ageing that reclaim asked for
    kswapd_failures: int = 0  #: runs of kswapd in a row that took nothing; others reset it
    stalls: list[int] = field(default_factory=list)  #: begin, end, begin, end... of stalled tasks

    jiffy_ns: int = 4_000_000

    def __post_init__(self) -> None:
        self.throttle = ReclaimThrottle(self, self.jiffy_ns)
        swap = self.swap
        if swap is not None:
            swap.sched = self.sched
            self.pages.pool = lambda: swap.pool_pages

        self.pages.reclaimable = self._reclaimable

    def _reclaimable(self) -> int:
        """Anonymous pages, if there is a slot left for any (``zone_reclaimable_pages``).

        Isolated ones count, as they did up to v4.8: a batch is a small part of a host's memory, but
        may be a large one of a host that was scaled down.
        """
        if self.swap is None or not self.swap.free_slots:
            return 0
        return sum(self._hosts(lambda host: host.page_count))

    def write_pending(self) -> int:
        """Pages that are being written (NR_ZONE_WRITE_PENDING)."""
        return sum(self._hosts(lambda host: len(host.writing)))

    def _hosts(self, what: Callable[[SwappableMemory], int]) -> Iterator[int]:
        for number, kvms in enumerate(self.kvms):
            for place in range(len(kvms)):
                yield what(self.memory(number, place))

    def memory(self, lruvec: int, guest: int) -> SwappableMemory:
        """The host's mappings of a guest."""
        return self.kvms[lruvec][guest].host  # type: ignore[return-value]

    def stalled(self, begin_ns: int, end_ns: int) -> None:
        """A task waited for memory (PSI): from ``begin_ns`` to ``end_ns``."""
        if end_ns > begin_ns:
            self.stalls += (begin_ns, end_ns)
