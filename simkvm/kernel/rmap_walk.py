"""Ageing by reverse map: one folio at a time, from the folio to its entries.

Source: mm/rmap.c (``rmap_walk``, ``page_vma_mapped_walk``), v6.12. Who wants to know about one
folio finds the mapping, waits for the lock of the host's page table, and asks at each entry;
between two folios it holds nothing. :data:`~simkvm.kernel.aging.METHODS` lists who does.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
from simpy import Event

from simkvm.kernel.aging_call import Leaves, Pass
from simkvm.kernel.host_memory import OWN
from simkvm.kernel.task import Task, reach
from simkvm.kernel.young_notifier import YoungNotifier

if TYPE_CHECKING:
    from simkvm.kernel.kvm import Kvm

Answer = Generator[Event, Any, tuple[int, bool]]


class RmapAgeing:
    """Asks about folios of one guest, for ``task``. Subclasses say what is asked at each entry."""

    def __init__(self, kvm: Kvm, task: Task) -> None:
        self.kvm = kvm
        self.task = task
        self.costs = kvm.costs.ageing
        self.notifier = YoungNotifier(kvm, task)

    def open_generation(self, t_ns: int) -> Generator[Event, Any, int]:
        """The end of a memcg's passes opens no generation: only MGLRU's walk does."""
        yield from ()
        return t_ns

    def at_entry(self, t_ns: int, leaf: int, report: Pass) -> Answer:
        """One present entry, its table locked: returns when it is done and whether it was young."""
        raise NotImplementedError

    def folios(self, leaves: Leaves) -> Iterator[Leaves]:
        """Cut ``leaves``, in order, into the folios that they map."""
        if len(leaves):
            others = np.diff(leaves // self.kvm.folio_leaves) != 0
            yield from np.split(leaves, np.flatnonzero(others) + 1)

    def check(self, t_ns: int, folio: Leaves, report: Pass) -> Answer:
        """One walk over the entries of ``folio``, all of one host table, from ``t_ns`` on."""
        kvm, cpu = self.kvm, self.task.cpu
        table = int(folio[0]) // kvm.host.entries
        kvm.pin()
        t_ns = yield from self._lock(t_ns + self.costs.rmap_ns, table)
        token = (
            kvm.notifier.srcu.enter(t_ns)
            if kvm.notifier.hears(int(folio[0]), int(folio[-1]) + 1)
            else None
        )
        young = False
        for leaf in folio.tolist():
            if kvm.host.fast[leaf] & OWN:  # an unmap may have come meanwhile
                t_ns, used = yield from self.at_entry(t_ns, leaf, report)
                young |= used
        if token is not None:
            kvm.notifier.srcu.leave(token, t_ns)
        t_ns = yield from reach(kvm.env, t_ns)
        kvm.host.unlock(t_ns)
        cpu.enter_kernel(t_ns)
        kvm.unpin(t_ns)
        return t_ns, young

    def _lock(self, t_ns: int, table: int) -> Generator[Event, Any, int]:
        """Wait for the lock of host table ``table``; a fault may be installing an entry."""
        kvm = self.kvm
        t_ns = yield from reach(kvm.env, t_ns)
        while until_ns := self.faults_until(t_ns, table):
            t_ns = yield from reach(kvm.env, until_ns)
        kvm.host.lock_for_ageing(table, t_ns)
        self.task.cpu.spin(t_ns)
        for vcpu in kvm.vcpus:
            vcpu.catch_up(t_ns)
        return t_ns

    def faults_until(self, t_ns: int, table: int) -> int:
        """When the last of the faults that want or have host table ``table`` now is done; or 0."""
        faults = [vcpu.fault for vcpu in self.kvm.vcpus]
        return max((f.ptl_until_ns for f in faults if f.holds_table(table, t_ns)), default=0)

    def ask(self, t_ns: int, leaf: int, report: Pass, flush: bool = False) -> Answer:
        """One notifier call about ``leaf``: when it is over, and whether the guest used it."""
        if not self.kvm.notifier.hears(leaf, leaf + 1):
            return t_ns, False
        report.calls += 1
        t_ns, young = yield from self.notifier.clear(t_ns, leaf, leaf + 1, flush)
        return t_ns, bool(len(young))
