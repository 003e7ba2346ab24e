"""The host's node of memory: its pages, its LRUs, its swap, and counts of what reclaim does.

Source: include/linux/mmzone.h (``pg_data_t``) and the names of /proc/vmstat, v6.12. One node.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from simkvm.kernel.listed import DEFAULT_SWAPPINESS, FolioLists
from simkvm.kernel.lru_walk import LRU_GEN_ALL
from simkvm.kernel.lrugen import ListedLruvec
from simkvm.kernel.memcg_lru import MemcgLru
from simkvm.kernel.mglru import MIN_LRU_BATCH
from simkvm.kernel.page_alloc import HostPages
from simkvm.kernel.reclaim_throttle import ReclaimThrottle
from simkvm.kernel.sched import Scheduler
from simkvm.kernel.swap import SwapDevice
from simkvm.kernel.vmstat import Vmstat

if TYPE_CHECKING:
    import numpy as np

    from simkvm.kernel.aging_call import Pass
    from simkvm.kernel.kvm import Kvm
    from simkvm.kernel.swappable import SwappableMemory


@dataclass
class Pgdat:
    """One node. ``kvms``: by the number of a lruvec and of a guest in it."""

    pages: HostPages
    swap: SwapDevice | None
    sched: Scheduler
    vmstat: Vmstat = field(default_factory=Vmstat)
    lruvecs: list[FolioLists] = field(default_factory=list)
    kvms: list[list[Kvm]] = field(default_factory=list)
    passes: list[Pass] = field(default_factory=list)  #: of ageing that reclaim asked for
    paths: list[str] = field(default_factory=list)  #: of memcgs
    lru_gen: int = LRU_GEN_ALL  #: its capabilities (/sys/kernel/mm/lru_gen/enabled)
    swappiness: int = DEFAULT_SWAPPINESS
    drive: SwapDevice | None = None  #: of files
    wake_flusher: Callable[[], None] = lambda: None
    next_memcg: int = 0  #: at which a direct reclaimer of the classic LRU begins
    min_ttl_ns: int = 0  #: what may not be evicted for that long (min_ttl_ms); 0: no matter
    walked_at: dict[str, int] = field(default_factory=dict)  #: touches of a guest when walked last
    kswapd_failures: int = 0  #: runs of kswapd in a row that took nothing; others reset it
    stalls: list[int] = field(default_factory=list)  #: begin, end, begin, end... of stalled tasks
    direct_ns: int = 0  #: what tasks reclaimed themselves, throttled sleep apart
    direct_functions: dict[str, int] = field(default_factory=dict)  #: and of it each function
    jiffy_ns: int = 4_000_000

    def __post_init__(self) -> None:
        self.throttle = ReclaimThrottle(self, self.jiffy_ns)
        self.memcg_lru: MemcgLru
        swap = self.swap
        if swap is not None:
            swap.sched = self.sched
            self.pages.pool = lambda: swap.pool_pages
        if self.drive is not None:
            self.drive.sched = self.sched
        self.pages.reclaimable = self._reclaimable

    def _reclaimable(self) -> int:
        """Pages of files, and anonymous ones if there is a slot left (``zone_reclaimable_pages``).

        Isolated ones count, as they did up to v4.8: a batch is a small part of a host's memory, but
        may be a large one of a host that was scaled down.
        """
        slots = self.can_reclaim_anon
        return sum(self._hosts(lambda host: host.page_count if slots or host.file else 0))

    def write_pending(self) -> int:
        """Pages that are being written (NR_ZONE_WRITE_PENDING)."""
        return sum(self._hosts(lambda host: len(host.writing)))

    def _hosts(self, what: Callable[[SwappableMemory], int]) -> Iterator[int]:
        for number, kvms in enumerate(self.kvms):
            for place in range(len(kvms)):
                yield what(self.memory(number, place))

    def charge(self, lruvecs: Sequence[FolioLists], rng: np.random.Generator) -> None:
        """These are the memcgs; ``rng`` draws their places in the order of reclaim."""
        self.lruvecs += lruvecs
        self.memcg_lru = MemcgLru(len(lruvecs), rng)

    @property
    def generations(self) -> list[ListedLruvec]:
        """The lruvecs, if they are the multi-gen LRU's, or none."""
        return [lruvec for lruvec in self.lruvecs if isinstance(lruvec, ListedLruvec)]

    @property
    def can_reclaim_anon(self) -> bool:
        """Whether there is a slot of swap left (``can_reclaim_anon_pages``)."""
        return self.swap is not None and self.swap.free_slots > 0

    def swappiness_now(self) -> int:
        """How readily anonymous folios are evicted: not at all when swap is (almost) full."""
        if self.swap is None or self.swap.free_slots < MIN_LRU_BATCH:
            return 0
        return self.swappiness

    def memory(self, lruvec: int, guest: int) -> SwappableMemory:
        """The host's mappings of a guest."""
        return self.kvms[lruvec][guest].host  # type: ignore[return-value]

    @staticmethod
    def memory_of(kvm: Kvm) -> SwappableMemory:
        """The host's mappings of a guest."""
        return kvm.host  # type: ignore[return-value]

    def reclaimed_directly(self, ns: int, functions: Mapping[str, int]) -> None:
        """A task spent ``ns`` on a round of direct reclaim, of it so much in ``functions``."""
        self.direct_ns += ns
        for name, spent_ns in functions.items():
            self.direct_functions[name] = self.direct_functions.get(name, 0) + spent_ns

    def stalled(self, begin_ns: int, end_ns: int) -> None:
        """A task waited for memory (PSI): from ``begin_ns`` to ``end_ns``."""
        if end_ns > begin_ns:
            self.stalls += (begin_ns, end_ns)
