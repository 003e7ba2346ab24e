"""The host's pages: who has how many, and what an allocation does when few are left.

Source: mm/page_alloc.c (``get_page_from_freelist``, ``__alloc_pages_slowpath``,
``__setup_per_zone_wmarks``), v6.12. One node, one zone, single pages. Above the low watermark an
allocation just takes its page; below it kswapd is woken; at the min watermark the allocator
reclaims by itself (direct reclaim), again and again, until it got its page. When that made no
progress more than ``MAX_RECLAIM_RETRIES`` times in a row, or all that could be reclaimed would not
do, somebody is killed.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from dataclasses import dataclass
from math import isqrt
from typing import TYPE_CHECKING, Any, Final

from simpy import Environment, Event

from simkvm.kernel.task import Task, reach

if TYPE_CHECKING:
    from simkvm.kernel.vmscan import Reclaimer

MAX_RECLAIM_RETRIES: Final = 16
MIN_FREE_KBYTES: Final = (128, 262144)  #: bounds of what the kernel chooses itself


@dataclass(frozen=True)
class Watermarks:
    """In pages: below ``low`` kswapd starts, above ``high`` it stops, ``min`` is a reserve."""

    min: int
    low: int
    high: int

    @classmethod
    def of(cls, pages: int, page_bytes: int, min_free: int | None, scale: int) -> Watermarks:
        """Of a host of ``pages``; ``min_free``: bytes of vm.min_free_kbytes, None as the kernel
        computes it; ``scale``: vm.watermark_scale_factor, in 1/10,000 of the memory.
        """
        if min_free is None:
            kbytes = isqrt(pages * page_bytes // 1024 * 16)  # init_per_zone_wmark_min()
            min_free = 1024 * min(max(kbytes, MIN_FREE_KBYTES[0]), MIN_FREE_KBYTES[1])
        least = min_free // page_bytes
        step = max(least // 4, pages * scale // 10_000)
        return cls(least, least + step, least + 2 * step)


class HostPages:
    """Free pages of the host. ``marks``: its watermarks. Everything counted is in pages."""

    def __init__(self, env: Environment, total: int, page_bytes: int, marks: Watermarks) -> None:
        self.env = env
        self.total = total
        self.page_bytes = page_bytes
        self.marks = marks
        self._unused = total
        self.lowest = total
        self.pool: Callable[[], int] = lambda: 0  #: pages that compressed swap takes
        self.wake_kswapd: Callable[[int], None] = lambda t_ns: None
        #: Makes the reclaimer of a task that allocates.
        self.reclaimer: Callable[[Task], Reclaimer] | None = None
        self.out_of_memory: Callable[[int], None] = lambda t_ns: None
        self.reclaimable: Callable[[], int] = lambda: 0  #: pages that reclaim might take
        self.spoken_for = 0  #: for page tables of guests that are about to be mapped as a whole
        self.to_map = 0  #: pages of memory of those guests
        self.allocstalls = 0  #: allocations that had to reclaim themselves
        self.stall_ns = 0

    @property
    def free(self) -> int:
        """Free pages."""
        return self._unused - self.pool()

    @property
    def balanced(self) -> bool:
        """Whether the high watermark is met (``pgdat_balanced``)."""
        return self.free > self.marks.high

    def take(self, pages: int = 1) -> None:
        """Take pages that nobody can refuse."""
        self._unused -= pages
        self.lowest = min(self.lowest, self.free)

    def put(self, pages: int) -> None:
        """Pages are free again."""
        self._unused += pages

    def quickly(self, t_ns: int, pages: int = 1) -> bool:
        """Take pages if that needs no reclaim by the caller; may wake kswapd at ``t_ns``."""
        if self._take_above(self.marks.low, pages):
            return True
        self.wake_kswapd(t_ns)
        return self._take_above(self.marks.min, pages)

    def _take_above(self, mark: int, pages: int) -> bool:
        """Take pages one by one, if each finds more than ``mark`` free (__zone_watermark_ok())."""
        if self.free - (pages - 1) <= mark:
            return False
        self.take(pages)
        return True

    def allocate(
        self, task: Task, t_ns: int, alive: Callable[[], bool], pages: int = 1
    ) -> Generator[Event, Any, tuple[int, bool]]:
        """Take pages for ``task`` at ``t_ns``, with direct reclaim as long as it takes.

        Returns when it goes on, and whether it has them. Who is ``alive`` always gets them. The OOM
        killer's victim may use half of the reserve (ALLOC_OOM), and then none.
        """
        t_ns = yield from reach(self.env, t_ns)
        if self.quickly(t_ns, pages):
            return t_ns, True
        self.allocstalls += 1
        began_ns = t_ns
        t_ns, got = yield from self._reclaim_until(task, t_ns, alive, pages)
        self.stall_ns += t_ns - began_ns
        return t_ns, got

    def _reclaim_until(
        self, task: Task, t_ns: int, alive: Callable[[], bool], pages: int
    ) -> Generator[Event, Any, tuple[int, bool]]:
        """``__alloc_pages_slowpath``, where the min watermark is not met."""
        assert self.reclaimer is not None
        reclaimer = self.reclaimer(task)
        fruitless = 0
        while alive():
            progress, t_ns = yield from reclaimer.direct(t_ns)
            t_ns = yield from reach(self.env, t_ns)
            if self.quickly(t_ns, pages):
                return t_ns, True
            fruitless = 0 if progress else fruitless + 1
            if self._worth_retrying(fruitless, pages):
                continue
            if alive():
                self.out_of_memory(t_ns)
            fruitless = 0
            if self.quickly(t_ns, pages):
                return t_ns, True
        return t_ns, self._take_above(self.marks.min // 2, pages)

    def _worth_retrying(self, fruitless: int, pages: int) -> bool:
        """Whether reclaim may yet help, if it took all that it can (``should_reclaim_retry``)."""
        available = self.free + self.reclaimable()
        return fruitless <= MAX_RECLAIM_RETRIES and available - (pages - 1) > self.marks.min
