"""The flusher thread: writes dirty pages of files back to their drive.

Source: fs/fs-writeback.c (``wb_workfn``, ``writeback_sb_inodes``), mm/page-writeback.c
(``domain_dirty_limits``, ``write_cache_pages``), v6.12. It works when a tenth of the memory that
could be dirty is (vm.dirty_background_ratio), when reclaim finds nothing but dirty pages, and for
what is left every five seconds (vm.dirty_writeback_centisecs). A page is locked, taken its right to
be written to, one notifier range a page, and sent; pages that lie next to one another in the file
share requests.
"""

from __future__ import annotations

from collections.abc import Generator
from typing import TYPE_CHECKING, Any, Final

import numpy as np
from simpy import Event

from simkvm.kernel.file_memory import FileMemory
from simkvm.kernel.swappable import DIRTY, WRITEBACK
from simkvm.kernel.task import Task, reach

if TYPE_CHECKING:
    from simkvm.kernel.kvm import Kvm
    from simkvm.kernel.pgdat import Pgdat

Steps = Generator[Event, Any, int]
BACKGROUND_RATIO: Final = 10  #: percent
INTERVAL_NS: Final = 5_000_000_000
MAX_WRITEBACK_PAGES: Final = 1024  #: of one file before the next has its turn
BATCH: Final = 32  #: pages that are looked up together (PAGEVEC_SIZE and its successors)


class Flusher:
    """Writes back the files of ``kvms``, on ``task``."""

    def __init__(self, pgdat: Pgdat, kvms: list[Kvm], task: Task) -> None:
        self._pgdat = pgdat
        self._kvms = kvms
        self.task = task
        self._env = pgdat.pages.env
        self._asleep: Event | None = None
        pgdat.wake_flusher = self.wake
        for kvm in kvms:
            self._memory(kvm).dirtied = self._dirtied

    @staticmethod
    def _memory(kvm: Kvm) -> FileMemory:
        assert isinstance(kvm.host, FileMemory)
        return kvm.host

    def _dirtied(self) -> None:
        memories = [self._memory(kvm) for kvm in self._kvms]
        dirtyable = self._pgdat.pages.free + sum(memory.page_count for memory in memories)
        if sum(memory.dirty for memory in memories) * 100 > dirtyable * BACKGROUND_RATIO:
            self.wake()

    def wake(self) -> None:
        """Somebody wants pages written back."""
        if self._asleep is not None and not self._asleep.triggered:
            self._asleep.succeed()

    def run(self) -> Generator[Event, Any, None]:
        """Sleep, write back, sleep..."""
        sched = self._kvms[0].sched
        t_ns = 0
        while True:
            sched.sleep(self.task, t_ns)
            self._asleep = Event(self._env)
            yield self._asleep | self._env.timeout(INTERVAL_NS)
            self._asleep = None
            t_ns = int(self._env.now) + self._kvms[0].costs.wakeup_ns
            t_ns = yield from reach(self._env, t_ns)
            t_ns = yield from sched.wake(self.task, t_ns)
            for kvm in self._kvms:
                leaves = self._memory(kvm).dirty_leaves()[:MAX_WRITEBACK_PAGES]
                for first in range(0, len(leaves), BATCH):
                    t_ns = yield from self._write(kvm, leaves[first : first + BATCH], t_ns)
                    t_ns = yield from sched.checkpoint(self.task, t_ns)
            t_ns = yield from reach(self._env, t_ns + self.task.cpu.take_stolen())

    def _write(self, kvm: Kvm, leaves: np.ndarray[Any, Any], t_ns: int) -> Steps:
        """One batch; pages that somebody holds locked are left for the next time."""
        memory, device = self._memory(kvm), self._memory(kvm).device
        assert device is not None
        cleaned: list[int] = []
        for leaf in leaves.tolist():
            t_ns = yield from reach(self._env, t_ns)
            if memory.fast_swap[leaf] & DIRTY and memory.trylock_folio(leaf):
                t_ns = yield from self._clean(kvm, memory, leaf, t_ns)
                memory.unlock_folio(leaf, t_ns)
                cleaned.append(leaf)
        for part in np.split(cleaned, np.flatnonzero(np.diff(cleaned) != 1) + 1):
            run = [int(leaf) for leaf in part]
            if run:
                t_ns, ends_ns = yield from device.write(self.task, t_ns, len(run))
                self._pgdat.vmstat.nr_written += len(run)
                self._env.process(self._end(memory, run, max(ends_ns)))
        return t_ns

    def _clean(self, kvm: Kvm, memory: FileMemory, leaf: int, t_ns: int) -> Steps:
        """``folio_clear_dirty_for_io``: whoever writes from now on takes a fault."""

        def change(at_ns: int, first: int, last: int) -> int:
            return at_ns + memory.clean(first, last) * kvm.costs.takers.pte_ns

        return kvm.notifier.invalidate(
            self.task, t_ns, leaf, leaf + 1, blockable=False, change=change
        )

    def _end(self, memory: FileMemory, leaves: list[int], t_ns: int) -> Generator[Event, Any, None]:
        yield from reach(self._env, t_ns)
        memory.swap[leaves] &= np.uint8(~WRITEBACK & 0xFF)
