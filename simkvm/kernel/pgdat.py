"""The host's node of memory: its pages, its LRUs, its swap, and counts of what reclaim does.

Source: include/linux/mmzone.h (``pg_data_t``) and the names of /proc/vmstat, v6.12. One node.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from simkvm.kernel.lrugen import ListedLruvec
from simkvm.kernel.page_alloc import HostPages
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

    def __post_init__(self) -> None:
        swap = self.swap
        if swap is not None:
            swap.sched = self.sched
            self.pages.pool = lambda: swap.pool_pages

        self.pages.reclaimable = self._reclaimable

    def _reclaimable(self) -> int:
        """Pages on LRUs; without a slot left anonymous ones stay (``zone_reclaimable_pages``)."""
        if self.swap is None or not self.swap.free_slots:
            return 0
        return sum(sum(lruvec.sizes) for lruvec in self.lruvecs)

    def memory(self, lruvec: int, guest: int) -> SwappableMemory:
        """The host's mappings of a guest."""
        return self.kvms[lruvec][guest].host  # type: ignore[return-value]

    def stalled(self, begin_ns: int, end_ns: int) -> None:
        """A task waited for memory (PSI): from ``begin_ns`` to ``end_ns``."""
        if end_ns > begin_ns:
            self.stalls += (begin_ns, end_ns)
