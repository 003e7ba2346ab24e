"""khugepaged: small pages that lie together become a huge one.

Source: mm/khugepaged.c (``khugepaged_scan_mm_slot``, ``collapse_huge_page``), v6.12. A go looks at
``pages_to_scan`` PTEs. Where enough of a table's are present it takes ``mmap_lock`` for write,
takes the range back (start and end around clearing the PMD), copies the pages and maps the huge
one. Stage 2 loses the table in the unmap; the next fault maps a block. Faults meanwhile wait for
``mmap_lock``.
"""

from __future__ import annotations

from collections.abc import Generator
from typing import TYPE_CHECKING, Any

import numpy as np
from simpy import Event

from simkvm.contenders.contender import Contender, Steps
from simkvm.kernel import mmap_lock
from simkvm.kernel.host_memory import MIGRATION, OWN
from simkvm.kernel.task import Task, reach
from simkvm.scenario.contenders import Khugepaged as Spec

if TYPE_CHECKING:
    from simkvm.kernel.kvm import Kvm


class Khugepaged(Contender):
    """A go every ``scan_sleep``, on from where the last one ended."""

    def __init__(self, kvm: Kvm, task: Task, rng: np.random.Generator, spec: Spec) -> None:
        super().__init__(kvm, task, rng)
        self._spec = spec
        self._entries = kvm.host.entries
        self._table = 0

    def run(self) -> Generator[Event, Any, None]:
        """Go after go until the end of the run."""
        spec, whole = self._spec, self.kvm.leaves // self._entries
        t_ns, due_ns = 0, spec.start
        while whole:
            t_ns = yield from self.sleep_until(t_ns, due_ns)
            scanned = 0
            while self.kvm.alive and scanned < min(spec.pages_to_scan, whole * self._entries):
                t_ns = yield from self._look_at(t_ns, self._table)
                self._table = (self._table + 1) % whole
                scanned += self._entries
            if not self.kvm.alive:
                return
            due_ns = t_ns + spec.scan_sleep

    def _look_at(self, t_ns: int, table: int) -> Steps:
        """One table: collapse it if enough of its pages are there."""
        t_ns = yield from self.read_lock_mmap(t_ns)
        if self.kvm.host.huge[table]:  # found at the PMD
            return t_ns + self.kvm.costs.ageing.scan_ns
        t_ns = yield from reach(self.kvm.env, t_ns + self._entries * self.kvm.costs.ageing.scan_ns)
        self.kvm.host.mmap_lock.post(self.task.cpu.id, t_ns)
        return (yield from self._collapse(t_ns, table)) if self._fit(table) else t_ns

    def _fit(self, table: int) -> bool:
        """Whether few enough pages are missing, and none is on its way or shared."""
        state = self.kvm.host.state[table * self._entries : (table + 1) * self._entries]
        own = int(np.count_nonzero(state & OWN))
        missing = self._entries - own
        return own > 0 and missing <= self._spec.max_ptes_none and not (state >= MIGRATION).any()

    def _collapse(self, t_ns: int, table: int) -> Steps:
        kvm, entries = self.kvm, self._entries
        first, last = table * entries, (table + 1) * entries

        def clear_pmd(at_ns: int, first: int, last: int) -> int:
            return at_ns + kvm.costs.unmap.host_page_ns

        t_ns = yield from mmap_lock.write_lock(kvm, self.task, t_ns)
        t_ns = yield from self.invalidate(t_ns, first, last, clear_pmd)
        if not self._fit(table):  # the PTEs are looked at again; then the PMD is put back
            return (yield from mmap_lock.write_unlock(kvm, self.task, t_ns))
        copied = int(np.count_nonzero(kvm.host.state[first:last] & OWN))
        t_ns = yield from reach(kvm.env, t_ns + copied * kvm.costs.copy_page_ns)
        kvm.host.zap(first, last)
        kvm.host.install_huge(first, last)
        return (yield from mmap_lock.write_unlock(kvm, self.task, t_ns))
