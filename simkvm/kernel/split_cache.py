"""The VM's cache of pages for eager splitting, and what two ends of the VM do to it.

Source: virt/kvm/kvm_main.c (``kvm_mmu_free_memory_cache``), v6.12. The pages stand in an array with
a count; freeing takes the last one off until the count is zero, then frees the array and forgets
it. Nothing here is atomic: whoever calls it has to keep others out. ``kvm_uninit_stage2_mmu`` calls
it without ``mmu_lock`` (message 20260504224213.1049426-1-jthoughton@google.com).
"""

from __future__ import annotations

from collections.abc import Generator
from typing import TYPE_CHECKING, Any

from simpy import Event

from simkvm.kernel.cacheline import CacheLine
from simkvm.kernel.task import Task, reach

if TYPE_CHECKING:
    from simkvm.kernel.kvm import Kvm


class SplitCache:
    """``mmu.split_page_cache`` of ``kvm`` with ``pages`` pages; 0: it was never filled.

    Eager splitting fills it and takes its tables from it (``simkvm/kernel/eager_split.py``).
    """

    def __init__(self, kvm: Kvm, pages: int) -> None:
        self._kvm = kvm
        self.pages = pages
        self._filled = self._array = pages > 0
        self._line = CacheLine(kvm.costs.line)

    def top_up(self, pages: int) -> int:
        """Have at least ``pages`` pages in it; returns how many had to be allocated."""
        oracle, lacking = self._kvm.oracle, max(0, pages - self.pages)
        if not self._array:
            oracle.page_allocated("the array of the split cache")
            self._filled = self._array = True
        for number in range(self.pages, self.pages + lacking):
            oracle.page_allocated(f"page {number} of the split cache")
        self.pages += lacking
        return lacking

    def take(self, pages: int) -> None:
        """Split takes ``pages`` of them for tables, the last first."""
        self.pages -= pages

    def free(self, task: Task, t_ns: int) -> Generator[Event, Any, int]:
        """Have ``task`` free what is in it, from ``t_ns`` on; returns when that is done."""
        if not self._filled:
            return t_ns
        kvm, line = self._kvm, self._line
        cpu, free_ns = task.cpu.id, kvm.costs.free.free_ns
        while True:
            t_ns = yield from reach(kvm.env, line.serve(cpu, t_ns))
            count = self.pages
            if not count:
                break
            t_ns = yield from reach(kvm.env, line.serve(cpu, t_ns))
            self.pages = count - 1
            t_ns = yield from reach(kvm.env, t_ns + free_ns)
            kvm.oracle.page_freed(f"page {count - 1} of the split cache", t_ns, task.name)
        if self._array:
            t_ns = yield from reach(kvm.env, t_ns + free_ns)
            kvm.oracle.page_freed("the array of the split cache", t_ns, task.name)
            self._array = False
        return t_ns

    def free_alone(self, task: Task, t_ns: int) -> int:
        """As :meth:`free`, with ``mmu_lock`` held for write."""
        kvm = self._kvm
        local_ns, free_ns = kvm.costs.line.same_ns, kvm.costs.free.free_ns
        for number in reversed(range(self.pages)):
            t_ns += 2 * local_ns + free_ns
            kvm.oracle.page_freed(f"page {number} of the split cache", t_ns, task.name)
        if self._array:
            t_ns += local_ns + free_ns
            kvm.oracle.page_freed("the array of the split cache", t_ns, task.name)
        self.pages, self._array = 0, False
        return t_ns
