"""A VMM that deletes its guest's memory slot and creates it again, or moves it.

Source: virt/kvm/kvm_main.c (``kvm_set_memslot``), v6.12; the mechanism is in
:mod:`simkvm.kernel.memslot`. While the slot is away every access of the guest is MMIO; the VMM of
the model has nothing to answer and runs the vCPU again.
"""

from __future__ import annotations

from collections.abc import Generator
from typing import TYPE_CHECKING, Any

import numpy as np
from simpy import Event

from simkvm.contenders.contender import Contender
from simkvm.kernel.memslot import MemslotUpdate
from simkvm.kernel.task import Task, reach
from simkvm.scenario.contenders import Memslot as Spec

if TYPE_CHECKING:
    from simkvm.kernel.kvm import Kvm


class Memslot(Contender):
    """Every ``interval`` a delete and a create with ``pause`` in between, or one move."""

    def __init__(self, kvm: Kvm, task: Task, rng: np.random.Generator, spec: Spec) -> None:
        super().__init__(kvm, task, rng)
        self._spec = spec
        self.update = MemslotUpdate(kvm, task, spec.slot)

    def run(self) -> Generator[Event, Any, None]:
        """Update after update."""
        spec, kvm, t_ns, due_ns = self._spec, self.kvm, 0, self._spec.start
        while True:
            t_ns = yield from self.sleep_until(t_ns, due_ns)
            if not kvm.alive:
                return
            self.calls += 1
            if spec.operation == "move":
                t_ns = yield from self.update.move(t_ns)
            else:
                t_ns = yield from self.update.delete(t_ns)
                t_ns = yield from self.sleep_until(t_ns, t_ns + spec.pause)
                t_ns = yield from self.update.create(t_ns)
            self.done_ns = t_ns = yield from reach(kvm.env, t_ns)
            if spec.interval is None:
                break
            due_ns += spec.interval
        self.kvm.sched.sleep(self.task, t_ns)
