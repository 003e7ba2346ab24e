"""``mprotect``: memory is made read-only and writable again, over and over.

Source: mm/mprotect.c (``mprotect_fixup``), v6.12; the pattern is that of the selftest
mmu_stress_test. ``mmap_lock`` is held for write over each call. arm64 unmaps stage 2 for a change
of protection too, both ways. While the range is read-only, reads are mapped without the right to
write, and a write is -EFAULT from KVM_RUN; the VMM, as the selftest does, runs the vCPU again
until the write goes through.
"""

from __future__ import annotations

from collections.abc import Generator
from typing import TYPE_CHECKING, Any

import numpy as np
from simpy import Event

from simkvm.contenders.contender import Steps
from simkvm.contenders.protection import ProtectionChanger
from simkvm.kernel import mmap_lock
from simkvm.kernel.host_change import make_writable, write_protect
from simkvm.kernel.memslot import Refusal
from simkvm.kernel.task import Task
from simkvm.scenario.contenders import Mprotect as Spec

if TYPE_CHECKING:
    from simkvm.kernel.kvm import Kvm


class Mprotect(ProtectionChanger):
    """Cycles of read-only and writable over the first ``range`` bytes."""

    def __init__(self, kvm: Kvm, task: Task, rng: np.random.Generator, spec: Spec) -> None:
        super().__init__(kvm, task, rng)
        self._spec = spec
        span = kvm.leaves
        if spec.range is not None:
            span = -(-spec.range // kvm.stage2.leaf_bytes)
        self._refusal = Refusal(0, span, reads=False)

    def run(self) -> Generator[Event, Any, None]:
        """Cycle after cycle."""
        spec, t_ns, due_ns, cycles = self._spec, 0, self._spec.start, 0
        while spec.cycles is None or cycles < spec.cycles:
            t_ns = yield from self.sleep_until(t_ns, due_ns)
            if not self.kvm.alive:
                return
            t_ns = yield from self._mprotect(t_ns, read_only=True)
            t_ns = yield from self.sleep_until(t_ns, t_ns + spec.read_only)
            t_ns = yield from self._mprotect(t_ns, read_only=False)
            due_ns = t_ns + spec.writable
            cycles += 1
        self.kvm.sched.sleep(self.task, t_ns)

    def _mprotect(self, t_ns: int, read_only: bool) -> Steps:
        kvm = self.kvm
        t_ns = yield from mmap_lock.write_lock(kvm, self.task, t_ns)
        if read_only:
            kvm.refusals.append(self._refusal)
        else:
            kvm.refusals.remove(self._refusal)
        what = write_protect if read_only else make_writable
        t_ns = yield from self.change_protection(t_ns, 0, self._refusal.last, what)
        return (yield from mmap_lock.write_unlock(kvm, self.task, t_ns))
