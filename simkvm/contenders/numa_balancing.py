"""NUMA balancing: a window of memory is made inaccessible, to learn from the faults who uses it.

Source: kernel/sched/fair.c (``task_numa_work``) and mm/mprotect.c (``change_prot_numa``), v6.12. A
scan takes ``scan_size`` of pages that it changed, but passes over eight times as much at most,
then goes on there ``period`` later, and at the start again when it came to the end. What a scan
costs is held against it 32-fold, so it never takes more than 3 % of a CPU. On arm64 and x86
alike stage 2 is unmapped, and the next access takes a hinting fault in the host.

In Linux the scan is done by whichever vCPU's thread finds it due, here by a thread of its own.
"""

from __future__ import annotations

from collections.abc import Generator
from typing import TYPE_CHECKING, Any, Final

import numpy as np
from simpy import Event

from simkvm.contenders.contender import Steps
from simkvm.contenders.protection import ProtectionChanger
from simkvm.kernel.host_change import make_prot_none
from simkvm.kernel.task import Task
from simkvm.scenario.contenders import NumaBalancing as Spec

if TYPE_CHECKING:
    from simkvm.kernel.kvm import Kvm

SCANNED_AT_MOST: Final = 8  #: times the pages that a scan wants to change
HELD_AGAINST: Final = 32  #: times what a scan took, until the next
HUGE_BYTES: Final = 2 << 20  #: windows end at multiples of ``HPAGE_SIZE``


class NumaBalancing(ProtectionChanger):
    """Scans of one guest's address space."""

    def __init__(self, kvm: Kvm, task: Task, rng: np.random.Generator, spec: Spec) -> None:
        super().__init__(kvm, task, rng)
        self._spec = spec
        self._leaf = kvm.stage2.leaf_bytes
        self._align = max(1, HUGE_BYTES // self._leaf)
        self._offset = 0
        self.scans = 0

    def run(self) -> Generator[Event, Any, None]:
        """Scan after scan until the guest is gone."""
        spec, t_ns = self._spec, 0
        due_ns = spec.start + spec.delay
        while True:
            t_ns = yield from self.sleep_until(t_ns, due_ns)
            if not self.kvm.alive:
                return
            began_ns = t_ns
            if self.kvm.host.mmap_writer is None:  # a trylock
                t_ns = yield from self._scan(t_ns)
            due_ns = began_ns + spec.period + HELD_AGAINST * (t_ns - began_ns)

    def _scan(self, t_ns: int) -> Steps:
        """One call of ``task_numa_work``."""
        kvm = self.kvm
        self.scans += 1
        wanted = max(1, self._spec.scan_size // self._leaf)
        passed = SCANNED_AT_MOST * wanted
        t_ns = yield from self.read_lock_mmap(t_ns)
        while wanted > 0 and passed > 0 and self._offset < kvm.leaves:
            first = self._offset
            last = min(-(-(first + wanted) // self._align) * self._align, kvm.leaves)
            changed = 0

            def hint(*where: Any) -> int:
                nonlocal changed
                count = make_prot_none(*where)
                changed += count
                return count

            t_ns = yield from self.change_protection(t_ns, first, last, hint)
            wanted -= last - first if changed else 0
            passed -= last - first
            self._offset = last
            t_ns += kvm.costs.ageing.resched_ns
        if self._offset == kvm.leaves:
            self._offset = 0
        kvm.host.mmap_lock.post(self.task.cpu.id, t_ns)
        return t_ns
