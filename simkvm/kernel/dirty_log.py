"""Dirty logging of a memslot: which pages were written since they were last asked for.

Source: virt/kvm/kvm_main.c (``kvm_get_dirty_log_protect``, ``kvm_clear_dirty_log_protect``) and
arch/arm64/kvm/mmu.c (``kvm_mmu_wp_memory_region``, ``kvm_mmu_split_memory_region``), v6.12.

* *enable* puts a slot that logs in place, which waits for the faults in flight, takes the right to
  write from all of it, chunk by chunk, then flushes outside the lock; where the kernel can split
  eagerly the lock is taken once more for that. With the bitmap initially set it does neither;
* *get* copies the bitmap out. Without manual protection it also clears it and write-protects again:
  one hold of the lock over the whole bitmap, a small walk for each 64 pages that have a bit set;
* *clear* does that for the bits that the last *get* showed, one hold an ioctl: what was written
  since stays in the bitmap;
* *disable* puts a slot that does not log in place; on arm64 that is all, faults put blocks back.
  x86 zaps or recovers huge pages.

A fault that makes a page writable notes it (:meth:`DirtyLog.mark`), under the lock. So between two
holds of the lock a page of the slot that is writable has its bit set.
"""

from __future__ import annotations

from collections.abc import Generator
from typing import TYPE_CHECKING, Any, Final

import numpy as np
from numpy.typing import NDArray
from simpy import Event

from simkvm.kernel.apply_range import apply_range, open_for_write
from simkvm.kernel.eager_split import EagerSplit
from simkvm.kernel.memslot import MemslotUpdate
from simkvm.kernel.recover_huge import RECOVER
from simkvm.kernel.sites import DIRTY_LOG_CLEAR, DIRTY_LOG_GET, WRITE_PROTECT
from simkvm.kernel.stage2 import WRITE
from simkvm.kernel.task import Task, acquired, reach

if TYPE_CHECKING:
    from simkvm.kernel.kvm import Kvm
    from simkvm.scenario.machine import Machine

Steps = Generator[Event, Any, int]
WORD: Final = 64  #: pages in a word of the bitmap


class DirtyLog:
    """The dirty bitmap of one guest, a leaf a bit; slots are ranges of leaves.

    ``manual_protect``: KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2 is on; ``initially_set``: with all bits
    set when logging begins; ``split_chunk_bytes``: what eager splitting does in one go, 0 for off.
    ``got``: the bitmap that user space has, as the last *get* filled it.
    """

    def __init__(self, kvm: Kvm, machine: Machine) -> None:
        self._kvm = kvm
        self._enable_lock = kvm.kernel["write_protect_lock"]
        self._clear_lock = kvm.kernel["dirty_log_clear_lock"]
        self._store_ns = round(machine["write_protect_ns"])
        self._word_ns = round(machine["l2_ns"])
        self._copy_ns_per_page = machine["copy_4k_ns"] / 4096 / 8
        self.manual_protect = True
        self.initially_set = False
        self.split_chunk_bytes = 0
        self.eager_split = EagerSplit(kvm)
        self._can_split = kvm.kernel["eager_split"] == "chunked"
        self._asks_anyway = kvm.kernel["mmu"] == "stage2"  # x86 knows before it takes the lock
        self._recover = RECOVER[kvm.kernel["recover_huge"]]()
        self._bitmap: NDArray[np.bool_] = np.zeros(0, np.bool_)
        self.got: NDArray[np.bool_] = np.zeros(0, np.bool_)
        self._logged: list[range] = []

    def logs(self, leaf: int) -> bool:
        """Whether writes to ``leaf`` are logged."""
        return bool(self._logged) and any(leaf in slot for slot in self._logged)

    def mark(self, leaf: int) -> None:
        """A fault made ``leaf`` writable."""
        if self.logs(leaf):
            self._bitmap[leaf] = True

    def dirty(self, slot: range) -> int:
        """Pages of ``slot`` whose bit is set."""
        return int(np.count_nonzero(self._bitmap[slot.start : slot.stop]))

    # -- the ioctls ---------------------------------------------------------------------------

    def enable(self, task: Task, t_ns: int, slot: range) -> Steps:
        """KVM_SET_USER_MEMORY_REGION with KVM_MEM_LOG_DIRTY_PAGES."""
        kvm = self._kvm
        if not len(self._bitmap):
            self._bitmap, self.got = np.zeros((2, kvm.leaves), np.bool_)
        self._bitmap[slot.start : slot.stop] = self.manual_protect and self.initially_set
        t_ns = yield from MemslotUpdate(kvm, task).change_flags(
            t_ns, lambda: self._logged.append(slot)
        )
        if self.manual_protect and self.initially_set:
            return t_ns
        t_ns = yield from apply_range(
            kvm, task, t_ns, slot.start, slot.stop, WRITE_PROTECT, self._protect, self._enable_lock
        )
        t_ns = yield from self._flush(t_ns)
        if self._can_split and (self.split_chunk_bytes or self._asks_anyway):
            t_ns = yield from self.eager_split.run(
                task, t_ns, slot.start, slot.stop, self.split_chunk_bytes
            )
        return t_ns

    def get(self, task: Task, t_ns: int, slot: range) -> Steps:
        """KVM_GET_DIRTY_LOG."""
        copied_ns = round(len(slot) * self._copy_ns_per_page)
        if self.manual_protect:
            t_ns = yield from reach(self._kvm.env, t_ns)
            whole = slice(slot.start, slot.stop)
            self.got[whole] = self._bitmap[whole]
            return (yield from reach(self._kvm.env, t_ns + copied_ns))
        self.got[slot.start : slot.stop] = True
        return copied_ns + (yield from self._take(task, t_ns, slot, DIRTY_LOG_GET, "write"))

    def clear(self, task: Task, t_ns: int, slot: range, first: int, pages: int) -> Steps:
        """KVM_CLEAR_DIRTY_LOG of ``pages`` from page ``first`` of the slot on, as :attr:`got`."""
        part = range(slot.start + first, min(slot.start + first + pages, slot.stop))
        if not self.manual_protect:
            raise ValueError("KVM_CLEAR_DIRTY_LOG needs manual protection")
        return (yield from self._take(task, t_ns, part, DIRTY_LOG_CLEAR, self._clear_lock))

    def disable(self, task: Task, t_ns: int, slot: range) -> Steps:
        """Logging ends."""
        t_ns = yield from MemslotUpdate(self._kvm, task).change_flags(
            t_ns, lambda: self._logged.remove(slot)
        )
        # kvm_arch_commit_memory_region() frees what eager splitting has left over.
        t_ns = yield from self._kvm.split_cache.free(task, t_ns)
        return (yield from self._recover.run(self._kvm, task, t_ns, slot.start, slot.stop))

    # -- inside -------------------------------------------------------------------------------

    def _protect(self, t_ns: int, first: int, last: int) -> int:
        """Take WRITE from a chunk; translations that allow it live to the end of the last one."""
        kvm = self._kvm
        kvm.accesses.catch_up(t_ns, first, last)
        young = kvm.leaves_change(first, last, WRITE)
        visits, changed = kvm.stage2.write_protect(first, last)
        end_ns = t_ns + visits * kvm.costs.unmap.visit_ns + changed * self._store_ns
        kvm.leaves_changed(young, t_ns, end_ns - t_ns)
        if last == self._logged[-1].stop:
            self._forget(end_ns)
        return end_ns

    def _forget(self, t_ns: int) -> None:
        """Translations go at ``t_ns``, when the lock is let go of and the flush begins.

        Told at once: nobody may count on what they allow later.
        """
        with self._kvm.mappings_going(t_ns):
            pass

    def _flush(self, t_ns: int) -> Steps:
        """One flush of the VM's translations, outside the lock."""
        kvm = self._kvm
        t_ns = yield from reach(kvm.env, t_ns)
        return (yield from reach(kvm.env, kvm.flush_ns(t_ns, kvm.costs.tlbi_all_ns)))

    def _take(self, task: Task, t_ns: int, part: range, site: int, lock: str) -> Steps:
        """Take the bits of ``part`` that :attr:`got` asks for and protect their pages again.

        One hold of the lock; with the bitmap initially set blocks are split in it, too.
        """
        kvm = self._kvm
        if self._can_split and self.split_chunk_bytes and self.initially_set:
            t_ns = yield from open_for_write(kvm, task, t_ns, site)
            hold_ns, taken = self._protect_words(t_ns, part)
            t_ns = yield from reach(kvm.env, t_ns + hold_ns)
            t_ns = yield from self.eager_split.under_lock(
                task, t_ns, part.start, part.stop, self.split_chunk_bytes
            )
            kvm.mmu_lock.release(t_ns)
            task.cpu.enter_kernel(t_ns)
            return (yield from self._flush(t_ns)) if taken else t_ns
        taken = 0

        def section(at_ns: int) -> tuple[int, int]:
            nonlocal taken
            hold_ns, taken = self._protect_words(at_ns, part)
            return hold_ns, at_ns + hold_ns

        t_ns = yield from reach(kvm.env, t_ns)
        task.cpu.spin(t_ns)
        ask = kvm.mmu_lock.read if lock == "read" else kvm.mmu_lock.write
        t_ns = yield from acquired(ask(t_ns, task.cpu.id, site, section))
        task.cpu.enter_kernel(t_ns)
        return (yield from self._flush(t_ns)) if taken else t_ns

    def _protect_words(self, t_ns: int, part: range) -> tuple[int, int]:
        """The loop over the bitmap: for each word with bits a walk from its first to its last."""
        kvm, costs = self._kvm, self._kvm.costs
        kvm.accesses.catch_up(t_ns, part.start, part.stop)
        whole = slice(part.start, part.stop)
        self.got[whole] &= self._bitmap[whole]
        bits = part.start + np.flatnonzero(self.got[whole])
        words_ns = -(-len(part) // WORD) * self._word_ns
        if not len(bits):
            return words_ns, 0
        starts = np.flatnonzero(np.diff((bits - part.start) // WORD, prepend=-1))
        lows, highs = bits[starts], bits[np.append(starts[1:], len(bits)) - 1] + 1
        young = kvm.leaves_change(int(lows[0]), int(highs[-1]), WRITE)
        visits, changed = kvm.stage2.write_protect_words(lows, highs)
        self._bitmap[bits] = False
        walks_ns = len(starts) * costs.ageing.walk_ns + visits * costs.unmap.visit_ns
        hold_ns = words_ns + walks_ns + changed * self._store_ns
        lost = (kvm.stage2.leaf.entries[young] & WRITE) == 0
        kvm.leaves_changed(young[lost], t_ns, hold_ns)
        self._forget(t_ns + hold_ns)
        return hold_ns, len(bits)
