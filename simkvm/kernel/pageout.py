"""madvise(MADV_PAGEOUT): reclaim of a range of a guest's memory, whether or not it was used.

Source: mm/madvise.c (``madvise_cold_or_pageout_pte_range``) and mm/vmscan.c (``reclaim_pages``),
v6.12. Table by table the pages that are on the LRU are taken off, and each in order of addresses is
unmapped with a notifier range of its own and written to swap; nobody is asked about it.
"""

from __future__ import annotations

from collections.abc import Generator
from typing import TYPE_CHECKING, Any

import numpy as np
from simpy import Event

from simkvm.kernel.host_memory import OWN
from simkvm.kernel.lrugen import ListedLruvec
from simkvm.kernel.scan_control import ScanControl
from simkvm.kernel.task import Task, reach
from simkvm.kernel.vmscan import Reclaimer

if TYPE_CHECKING:
    from simkvm.kernel.pgdat import Pgdat


class Pageout:
    """By ``task``, of guests of ``pgdat``."""

    def __init__(self, pgdat: Pgdat, task: Task) -> None:
        self._pgdat = pgdat
        self.reclaimer = Reclaimer(pgdat, task, ignore_references=True)

    def run(
        self, number: int, place: int, first: int, last: int, t_ns: int
    ) -> Generator[Event, Any, int]:
        """Leaves ``first`` up to ``last`` of a guest of lruvec ``number``, from ``t_ns`` on.

        Returns when it is done.
        """
        kvm, lruvec = self._pgdat.kvms[number][place], self._pgdat.lruvecs[number]
        assert isinstance(lruvec, ListedLruvec)
        host, entries = kvm.host, kvm.host.entries
        for start in range(first // entries * entries, last, entries):
            t_ns = yield from reach(self._pgdat.pages.env, t_ns)
            leaves = np.arange(max(first, start), min(last, start + entries), dtype=np.int64)
            mapped = leaves[(host.state[leaves] & OWN) != 0]
            ids = lruvec.take_off(mapped + int(lruvec.bases[place]))
            t_ns += len(ids) * kvm.costs.reclaim.isolate_ns
            if len(ids):
                sc = ScanControl(len(ids), kswapd=False)
                t_ns = yield from self.reclaimer.shrink_folio_list(number, lruvec, ids, sc, t_ns)
            t_ns = yield from self.reclaimer.cond_resched(number, t_ns)
        return t_ns
