"""Huge pages of the host are split: one invalidation each, and small pages stay.

Source: mm/huge_memory.c (``split_huge_page_to_list_to_order``, ``unmap_folio``), v6.12. Stage 2
loses the block and no table; the pages fault back one by one.
"""

from __future__ import annotations

from collections.abc import Generator
from typing import TYPE_CHECKING, Any

import numpy as np
from simpy import Event

from simkvm.contenders.contender import Contender
from simkvm.kernel.task import Task
from simkvm.scenario.contenders import ThpSplit as Spec
from simkvm.units import NS_PER_S

if TYPE_CHECKING:
    from simkvm.kernel.kvm import Kvm


class ThpSplit(Contender):
    """Splits at ``rate`` until no huge page is left."""

    def __init__(self, kvm: Kvm, task: Task, rng: np.random.Generator, spec: Spec) -> None:
        super().__init__(kvm, task, rng)
        self._spec = spec

    def run(self) -> Generator[Event, Any, None]:
        """Huge page after huge page; one that finds none looks again at the next due time."""
        kvm, spec = self.kvm, self._spec
        t_ns = number = 0
        while True:
            due_ns = spec.start + int(number * NS_PER_S / spec.rate)
            t_ns = yield from self.sleep_until(t_ns, due_ns)
            if not kvm.alive:
                return
            number += 1
            tables = np.flatnonzero(kvm.host.huge)
            if len(tables):
                pick = int(self.rng.integers(len(tables))) if spec.order == "random" else 0
                t_ns = yield from self._split(t_ns, int(tables[pick]))

    def _split(self, t_ns: int, table: int) -> Generator[Event, Any, int]:
        kvm, entries = self.kvm, self.kvm.host.entries
        first, last = table * entries, min((table + 1) * entries, kvm.leaves)

        def split(at_ns: int, first: int, last: int) -> int:
            kvm.host.huge[table] = False
            return at_ns + (last - first) * kvm.costs.unmap.visit_ns

        return (yield from self.invalidate(t_ns, first, last, split))
