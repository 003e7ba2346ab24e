"""The flusher thread: writes dirty pages of files back to their drive.

Source: fs/fs-writeback.c (``wb_do_writeback``, ``wb_writeback``, ``writeback_chunk_size``,
``requeue_inode``), mm/page-writeback.c (``domain_dirty_limits``, ``writeback_iter``), v6.12. It
works when more than a tenth of the memory that could be dirty is (vm.dirty_background_ratio), until
that is no longer so; when reclaim finds nothing but dirty pages, for as many as are dirty then; and
every five seconds (vm.dirty_writeback_centisecs) for files that have been dirty for thirty
(vm.dirty_expire_centisecs), all pages of them. Files take turns, a chunk of each; the next chunk
of a file begins where the last one ended, or at its first page when the end was reached. A page is
locked, taken its right to be written to, one notifier range a page, and sent; pages that lie next
to one another in the file share requests.

What is left out: a chunk may be as large as an eighth of the limit of dirty pages, but is not cut
to half a second of a slow drive; dirty pages of a chunk are looked up once, so those that become
dirty while it is written wait for the next; pages that somebody holds locked are not waited for.
"""

from __future__ import annotations

from collections.abc import Generator
from typing import TYPE_CHECKING, Any, Final

import numpy as np
from simpy import Event

from simkvm.kernel.file_memory import FileMemory
from simkvm.kernel.swappable import DIRTY, WRITEBACK
from simkvm.kernel.task import Task, reach
from simkvm.units import MIB, NS_PER_S

if TYPE_CHECKING:
    from simkvm.kernel.kvm import Kvm
    from simkvm.kernel.pgdat import Pgdat

Steps = Generator[Event, Any, int]
BACKGROUND_RATIO: Final = 10  #: percent
DIRTY_RATIO: Final = 20  #: percent (vm.dirty_ratio), of which a chunk is an eighth at most:
DIRTY_SCOPE: Final = 8
MIN_WRITEBACK_BYTES: Final = 4 * MIB  #: and this at least
INTERVAL_NS: Final = 5 * NS_PER_S
EXPIRE_NS: Final = 30 * NS_PER_S
ENDLESS: Final = 1 << 62
BATCH: Final = 32  #: pages that are looked up together (PAGEVEC_SIZE and its successors)


class Flusher:
    """Writes back the files of ``kvms``, on ``task``."""

    def __init__(self, pgdat: Pgdat, kvms: list[Kvm], task: Task) -> None:
        self._pgdat = pgdat
        self._kvms = kvms
        self.task = task
        self._env = pgdat.pages.env
        self._asleep: Event | None = None
        self._woken = False
        self._asked = False  #: by reclaim, to write all
        self._looked_ns = 0  #: when it looked for old files last
        pgdat.wake_flusher = self.write_all
        for kvm in kvms:
            self._memory(kvm).dirtied = self._dirtied

    @staticmethod
    def _memory(kvm: Kvm) -> FileMemory:
        assert isinstance(kvm.host, FileMemory)
        return kvm.host

    # -- what there is to do ----------------------------------------------------------------------

    @property
    def _dirty(self) -> int:
        return sum(self._memory(kvm).dirty for kvm in self._kvms)

    @property
    def _dirtyable(self) -> int:
        """Pages that could be dirty: of files, and free above the high watermark."""
        pages = self._pgdat.pages
        files = sum(self._memory(kvm).page_count for kvm in self._kvms)
        return max(0, pages.free - pages.marks.high) + files

    @property
    def _over_threshold(self) -> bool:
        return self._dirty * 100 > self._dirtyable * BACKGROUND_RATIO

    def _dirtied(self) -> None:
        if self._over_threshold:
            self._wake()

    def write_all(self) -> None:
        """Reclaim found only dirty pages (``wakeup_flusher_threads``)."""
        if self._dirty:
            self._asked = True
            self._wake()

    def _wake(self) -> None:
        self._woken = True
        if self._asleep is not None and not self._asleep.triggered:
            self._asleep.succeed()

    # -- the thread -------------------------------------------------------------------------------

    def run(self) -> Generator[Event, Any, None]:
        """Sleep, write back, sleep..."""
        sched = self._kvms[0].sched
        t_ns = 0
        while True:
            if not self._woken:
                sched.sleep(self.task, t_ns)
                self._asleep = Event(self._env)
                yield self._asleep | self._env.timeout(INTERVAL_NS)
                self._asleep = None
                t_ns = int(self._env.now) + self._kvms[0].costs.wakeup_ns
                t_ns = yield from reach(self._env, t_ns)
                t_ns = yield from sched.wake(self.task, t_ns)
            self._woken = False
            t_ns = yield from self._work(t_ns)
            t_ns = yield from reach(self._env, t_ns + self.task.cpu.take_stolen())

    def _work(self, t_ns: int) -> Steps:
        """``wb_do_writeback``: what reclaim asked for, what is old, what is too much."""
        if self._asked:
            t_ns = yield from self._write_back(t_ns, self._dirty)
            self._asked = False
        if t_ns - self._looked_ns >= INTERVAL_NS:
            self._looked_ns = t_ns
            t_ns = yield from self._write_back(t_ns, self._dirty, dirty_for_ns=EXPIRE_NS)
        return (yield from self._write_back(t_ns, ENDLESS, background=True))

    def _write_back(
        self, t_ns: int, left: int, background: bool = False, dirty_for_ns: int = 0
    ) -> Steps:
        """``wb_writeback``: ``left`` pages, a chunk of each file in turn, while that gets on.

        ``background``: only while too much is dirty.
        """
        written = 1
        while written and left > 0 and (self._over_threshold or not background):
            written = 0
            for kvm in self._kvms:
                memory = self._memory(kvm)
                if memory.dirty and memory.dirty_since_ns <= t_ns - dirty_for_ns and left > 0:
                    done, t_ns = yield from self._write_chunk(kvm, self._chunk(left), t_ns)
                    written += done
                    left -= done
        return t_ns

    def _chunk(self, left: int) -> int:
        """``writeback_chunk_size``."""
        least = MIN_WRITEBACK_BYTES // self._pgdat.pages.page_bytes
        pages = min(self._dirtyable * DIRTY_RATIO // 100 // DIRTY_SCOPE, left)
        return (pages + least) // least * least

    def _write_chunk(
        self, kvm: Kvm, most: int, t_ns: int
    ) -> Generator[Event, Any, tuple[int, int]]:
        """Returns how many pages were sent, and when that is done."""
        memory, written = self._memory(kvm), 0
        leaves = memory.dirty_leaves()
        leaves = leaves[leaves >= memory.writeback_index][:most]
        for first in range(0, len(leaves), BATCH):
            sent, t_ns = yield from self._write(kvm, leaves[first : first + BATCH], t_ns)
            written += sent
            t_ns = yield from kvm.sched.checkpoint(self.task, t_ns)
        memory.writeback_index = int(leaves[-1]) + 1 if len(leaves) == most else 0
        return written, t_ns

    def _write(
        self, kvm: Kvm, leaves: np.ndarray[Any, Any], t_ns: int
    ) -> Generator[Event, Any, tuple[int, int]]:
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
        return len(cleaned), t_ns

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
        for leaf in leaves:
            if not memory.fast_swap[leaf] & DIRTY:
                memory.lru.written_back(leaf)  # type: ignore[attr-defined]
