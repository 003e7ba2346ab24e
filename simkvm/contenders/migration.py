"""Pages that move: migration on command (``migrate_pages(2)``, a cpuset) and compaction.

Source: mm/migrate.c (``migrate_pages_batch``) and mm/compaction.c (``compact_zone``), v6.12. A
batch of folios is unmapped first, one range start and end for each, a migration entry left in
its place; then they are copied and mapped again one after the other, without any notifier call.
A fault that meets a migration entry waits. Migration takes up to ``NR_MAX_BATCHED_MIGRATION``
pages a batch; compaction isolates ``COMPACT_CLUSTER_MAX`` and hands these over.

Where a guest's pages lie in the host's physical memory is data: those that stand in compaction's
way are drawn from its stream.
"""

from __future__ import annotations

from collections.abc import Generator
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from simpy import Event

from simkvm.contenders.contender import Contender, Steps
from simkvm.kernel import host_change
from simkvm.kernel.host_memory import OWN
from simkvm.kernel.task import Task, reach
from simkvm.scenario.contenders import Compaction as CompactionSpec
from simkvm.scenario.contenders import Migration as MigrationSpec

if TYPE_CHECKING:
    from simkvm.kernel.kvm import Kvm


class PageMover(Contender):
    """A thread that moves some of the guest's folios each time it runs."""

    isolate_ns = 0  #: finding a page to move, and a place for it

    def __init__(
        self, kvm: Kvm, task: Task, rng: np.random.Generator, spec: MigrationSpec | CompactionSpec
    ) -> None:
        super().__init__(kvm, task, rng)
        self._spec = spec
        self._folio = kvm.folio_leaves
        self._batch_folios = max(1, spec.batch // (kvm.folio_leaves * kvm.leaf_pages))
        self._depart = self.change(host_change.depart, kvm.costs.unmap.host_page_ns)
        self.moved = 0  #: folios

    def folios(self) -> NDArray[np.int64]:
        """Numbers of the folios that one run wants to move, in order; absent ones may be in it."""
        raise NotImplementedError

    def run(self) -> Generator[Event, Any, None]:
        """Run after run, ``interval`` apart."""
        spec, t_ns, due_ns = self._spec, 0, self._spec.start
        while True:
            t_ns = yield from self.sleep_until(t_ns, due_ns)
            folios = self.folios()
            for at in range(0, len(folios), self._batch_folios):
                if not self.kvm.alive:
                    return
                t_ns = yield from self._batch(t_ns, folios[at : at + self._batch_folios].tolist())
            if spec.interval is None:
                break
            due_ns = max(t_ns, due_ns + spec.interval)
        self.kvm.sched.sleep(self.task, t_ns)

    def _batch(self, t_ns: int, folios: list[int]) -> Steps:
        """Unmap all, then move all (``migrate_folio_unmap``, ``migrate_folio_move``)."""
        kvm = self.kvm
        gone = []
        for first, last in map(self._span, folios):
            t_ns = yield from reach(kvm.env, t_ns)
            if not (kvm.host.state[first:last] & OWN).any():
                continue
            t_ns += (last - first) * self.isolate_ns
            t_ns = yield from self.invalidate(t_ns, first, last, self._depart)
            gone.append((first, last))
        for first, last in gone:
            t_ns = yield from reach(kvm.env, t_ns + self._copy_ns(first, last))
            host_change.arrive(kvm.host, kvm.env, first, last, t_ns)
        self.moved += len(gone)
        return t_ns + kvm.costs.ageing.resched_ns

    def _span(self, folio: int) -> tuple[int, int]:
        """The leaves of a folio; of a huge page, if one is mapped there."""
        host, first = self.kvm.host, folio * self._folio
        table = first // host.entries
        if host.huge[table]:
            return table * host.entries, min((table + 1) * host.entries, self.kvm.leaves)
        return first, min(first + self._folio, self.kvm.leaves)

    def _copy_ns(self, first: int, last: int) -> int:
        takers = self.kvm.costs.takers
        if last - first == self.kvm.host.entries > self._folio:
            return takers.migrate_huge_ns
        return (last - first) * takers.migrate_ns


class Migration(PageMover):
    """Moves a range of the guest's memory, from its start on."""

    def folios(self) -> NDArray[np.int64]:
        """All folios of the range, in order of address."""
        assert isinstance(self._spec, MigrationSpec)
        span = self.kvm.leaves
        if self._spec.range is not None:
            span = self._spec.range // self.kvm.stage2.leaf_bytes
        return np.arange(-(-span // self._folio))


class Compaction(PageMover):
    """Moves the guest's pages that lie where a large folio is to be."""

    def __init__(
        self, kvm: Kvm, task: Task, rng: np.random.Generator, spec: CompactionSpec
    ) -> None:
        super().__init__(kvm, task, rng, spec)
        self.isolate_ns = kvm.costs.takers.isolate_ns
        self._order = rng.permutation(-(-kvm.leaves // self._folio))
        self._next = 0

    def folios(self) -> NDArray[np.int64]:
        """The next ``pages`` present ones, in the order in which they lie in the host's memory."""
        assert isinstance(self._spec, CompactionSpec)
        own = np.flatnonzero(self.kvm.host.state & OWN) // self._folio
        wanted = -(-self._spec.pages // (self._folio * self.kvm.leaf_pages))
        ahead = np.roll(self._order, -self._next)
        found = np.flatnonzero(np.isin(ahead, own))[:wanted]
        if len(found):
            self._next = (self._next + int(found[-1]) + 1) % len(self._order)
        return ahead[found]
