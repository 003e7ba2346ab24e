"""Dirty logging as live migration uses it: on, rounds of get and clear, off.

Source: the ioctls of virt/kvm/kvm_main.c, v6.12, in the order in which QEMU and dirty_log_perf_test
make them; what they do is in :mod:`simkvm.kernel.dirty_log`. Each is made for one memslot after the
other.
"""

from __future__ import annotations

from collections.abc import Generator
from typing import TYPE_CHECKING, Any

import numpy as np
from simpy import Event

from simkvm.contenders.contender import Contender, Steps
from simkvm.kernel.task import Task, reach
from simkvm.scenario.contenders import DirtyLog as Spec

if TYPE_CHECKING:
    from simkvm.kernel.kvm import Kvm


class DirtyLog(Contender):
    """The migration thread."""

    def __init__(self, kvm: Kvm, task: Task, rng: np.random.Generator, spec: Spec) -> None:
        super().__init__(kvm, task, rng)
        self._spec = spec
        self._slots = [range(*slot) for slot in kvm.memslots]
        log = kvm.dirty_log
        log.manual_protect, log.initially_set = spec.manual_protect, spec.initially_set
        log.split_chunk_bytes = spec.eager_split_chunk or 0
        self._chunk = (spec.clear_chunk or kvm.leaves * kvm.stage2.leaf_bytes) // (
            kvm.stage2.leaf_bytes
        )

    def run(self) -> Generator[Event, Any, None]:
        """Round after round."""
        spec, log, task = self._spec, self.kvm.dirty_log, self.task
        t_ns = yield from self.sleep_until(0, spec.start)
        for slot in self._slots if self.kvm.alive else ():
            t_ns = yield from log.enable(task, t_ns, slot)
        rounds = 0
        while self.kvm.alive and (spec.rounds is None or rounds < spec.rounds):
            t_ns = yield from self.sleep_until(t_ns, t_ns + spec.interval)
            for slot in self._slots:
                t_ns = yield from log.get(task, t_ns, slot)
            if spec.manual_protect:
                t_ns = yield from self._clear(t_ns)
            rounds += 1
            self.calls += 1
        for slot in self._slots if self.kvm.alive else ():
            t_ns = yield from log.disable(task, t_ns, slot)
        self.kvm.sched.sleep(self.task, (yield from reach(self.kvm.env, t_ns)))

    def _clear(self, t_ns: int) -> Steps:
        """Clear what was got, an ioctl a chunk."""
        log = self.kvm.dirty_log
        for slot in self._slots:
            for first in range(0, len(slot), self._chunk):
                if self.kvm.alive:
                    t_ns = yield from log.clear(self.task, t_ns, slot, first, self._chunk)
        return t_ns
