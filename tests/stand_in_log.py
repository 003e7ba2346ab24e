"""A stand-in for dirty logging: takes the lock of the right site, and notes what was asked.

Protecting takes the right to write from the leaves, so that the next write faults; a fault then
maps the leaf again as it would a new one.
"""

from __future__ import annotations

from collections.abc import Generator
from typing import Any

import numpy as np
from simpy import Event

from simkvm.kernel.dirty_logging import Memslot
from simkvm.kernel.kvm import Kvm
from simkvm.kernel.sites import DIRTY_LOG_CLEAR, DIRTY_LOG_GET, WRITE_PROTECT
from simkvm.kernel.stage2 import WRITE
from simkvm.kernel.task import Task, acquired, reach

Steps = Generator[Event, Any, int]
HOLD_NS = 1_000


class StandInLog:
    """Holds the write lock for a microsecond in each ioctl; ``disable`` takes no lock."""

    def __init__(self, kvm: Kvm) -> None:
        self._kvm = kvm
        self.manual_protect = True
        self.calls: list[tuple[Any, ...]] = []

    def enable(self, task: Task, t_ns: int, memslot: Memslot) -> Steps:
        self.calls.append(("enable", memslot.number))
        slot = None if self.manual_protect else memslot
        return (yield from self._locked(task, t_ns, WRITE_PROTECT, slot))

    def get(self, task: Task, t_ns: int, memslot: Memslot) -> Steps:
        self.calls.append(("get", memslot.number))
        slot = None if self.manual_protect else memslot
        return (yield from self._locked(task, t_ns, DIRTY_LOG_GET, slot))

    def clear(self, task: Task, t_ns: int, memslot: Memslot, first_page: int, pages: int) -> Steps:
        self.calls.append(("clear", memslot.number, first_page, pages))
        return (yield from self._locked(task, t_ns, DIRTY_LOG_CLEAR, memslot))

    def disable(self, task: Task, t_ns: int, memslot: Memslot) -> Steps:
        self.calls.append(("disable", memslot.number))
        return (yield from reach(self._kvm.env, t_ns + HOLD_NS))

    def _locked(self, task: Task, t_ns: int, site: int, protect: Memslot | None) -> Steps:
        kvm = self._kvm

        def section(entry_ns: int) -> tuple[int, int]:
            if protect is not None:
                for vcpu in kvm.vcpus:
                    vcpu.catch_up(entry_ns)
                first, last = protect.first_page, protect.first_page + protect.pages
                leaves = slice(first // kvm.leaf_pages, last // kvm.leaf_pages)
                kvm.stage2.leaf.entries[leaves] &= np.uint8(~WRITE & 0xFF)
                for vcpu in kvm.vcpus:
                    vcpu.flushed(entry_ns)
            return HOLD_NS, entry_ns + HOLD_NS

        t_ns = yield from reach(kvm.env, t_ns)
        return (yield from acquired(kvm.mmu_lock.write(t_ns, task.cpu.id, site, section)))
