"""Ageing by reverse map: one folio at a time, from the folio to its entries.

Source: mm/rmap.c (``rmap_walk``, ``page_vma_mapped_walk``), v6.12. Who wants to know about one
folio finds the mapping, waits for the lock of the host's page table, and asks at each entry;
between two folios it holds nothing. A huge page is one entry, and one folio.
:data:`~simkvm.kernel.aging.METHODS` lists who does.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
from simpy import Event

from simkvm.kernel.aging_call import Leaves, Pass
from simkvm.kernel.host_memory import OWN, YOUNG
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

    def at_entry(self, t_ns: int, first: int, last: int, report: Pass) -> Answer:
        """One present entry, of the leaves ``first`` up to ``last``, its table locked.

        Returns when it is done and whether it was young.
        """
        raise NotImplementedError

    def host_young(self, first: int, last: int) -> bool:
        """Test and clear the accessed flag of the host's own entry."""
        state = self.kvm.host.state
        young = bool((state[first:last] & YOUNG).any())
        state[first:last] &= np.uint8(~YOUNG & 0xFF)
        return young

    def leaves(self, table: int) -> Leaves:
        """What is mapped at host table ``table`` by pages of their own, a huge page as a whole."""
        huge = self.kvm.huge_page(table)
        if huge is None:
            return self.kvm.host.table_leaves(table)
        leaves = np.arange(huge.start, huge.stop, dtype=np.int64)
        own: Leaves = leaves[(self.kvm.host.state[leaves] & OWN) != 0]
        return own

    def entries(self, folio: Leaves) -> int:
        """Entries of the host that map ``folio``, as it was."""
        huge = self.kvm.huge_page(int(folio[0]) // self.kvm.host.entries)
        return 1 if huge is not None and len(huge) == len(folio) else len(folio)

    def gone(self, folio: Leaves) -> bool:
        """Whether khugepaged made a huge page of ``folio`` and others meanwhile."""
        table = int(folio[0]) // self.kvm.host.entries
        return bool(self.kvm.host.huge[table]) and self.entries(folio) == len(folio)

    def folios(self, leaves: Leaves) -> Iterator[Leaves]:
        """Cut ``leaves``, in order, into the folios that they map."""
        if len(leaves) and self.entries(leaves) == 1:
            yield leaves
        elif len(leaves):
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
        step = len(folio) // self.entries(folio)
        for leaf in folio.tolist()[::step]:
            # An unmap or a collapse may have come meanwhile, up to the end of the last call.
            t_ns = yield from reach(kvm.env, t_ns)
            if kvm.host.fast[leaf] & OWN and not (step == 1 and self.gone(folio)):
                t_ns, used = yield from self.at_entry(t_ns, leaf, leaf + step, report)
                young |= used
        if token is not None:
            kvm.notifier.srcu.leave(token, t_ns)
        t_ns = yield from reach(kvm.env, t_ns)
        kvm.host.unlock_table(table, t_ns)
        cpu.enter_kernel(t_ns)
        kvm.unpin(t_ns)
        return t_ns, young

    def _lock(self, t_ns: int, table: int) -> Generator[Event, Any, int]:
        """Wait for the lock of host table ``table``: others look too, or a fault installs."""
        kvm = self.kvm
        t_ns = yield from reach(kvm.env, t_ns)
        while True:
            if table in kvm.host.locked:
                self.task.cpu.spin(t_ns)
                released: int = yield kvm.host.released(table)
                t_ns = max(t_ns, released + kvm.costs.line.transfer_ns)
            elif not (until_ns := self.faults_until(t_ns, table)):
                break
            else:
                t_ns = until_ns
            t_ns = yield from reach(kvm.env, t_ns)
        kvm.host.lock_table(table, t_ns)
        self.task.cpu.spin(t_ns)
        first = table * kvm.host.entries
        kvm.accesses.catch_up(t_ns, first, min(first + kvm.host.entries, kvm.leaves))
        return t_ns

    def cond_resched(self, t_ns: int) -> Generator[Event, Any, int]:
        """Between two folios another thread may run; returns when this one goes on."""
        t_ns += self.costs.resched_ns
        return (yield from self.kvm.sched.checkpoint(self.task, t_ns))

    def faults_until(self, t_ns: int, table: int) -> int:
        """When the last of the faults that want or have host table ``table`` now is done; or 0."""
        faults = self.kvm.host_faults()
        return max((f.ptl_until_ns for f in faults if f.holds_table(table, t_ns)), default=0)

    def ask(self, t_ns: int, first: int, last: int, report: Pass, flush: bool = False) -> Answer:
        """One notifier call about one entry: when it is over, and whether the guest used it."""
        if not self.kvm.notifier.hears(first, last):
            return t_ns, False
        report.calls += 1
        began_ns = t_ns
        t_ns, young = yield from self.notifier.clear(t_ns, first, last, flush)
        self.task.spend("notifier", t_ns - began_ns)
        return t_ns, bool(len(young))
