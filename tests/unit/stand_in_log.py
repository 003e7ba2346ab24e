"""A stand-in for dirty logging: takes the lock of the right site, and notes what was asked."""

from __future__ import annotations

from collections.abc import Generator
from typing import Any

from simpy import Event

from simkvm.kernel.dirty_logging import Memslot
from simkvm.kernel.kvm import Kvm
from simkvm.kernel.sites import DIRTY_LOG_CLEAR, DIRTY_LOG_GET, WRITE_PROTECT
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
        return (yield from self._locked(task, t_ns, WRITE_PROTECT))

    def get(self, task: Task, t_ns: int, memslot: Memslot) -> Steps:
        self.calls.append(("get", memslot.number))
        return (yield from self._locked(task, t_ns, DIRTY_LOG_GET))

    def clear(self, task: Task, t_ns: int, memslot: Memslot, first_page: int, pages: int) -> Steps:
        self.calls.append(("clear", memslot.number, first_page, pages))
        return (yield from self._locked(task, t_ns, DIRTY_LOG_CLEAR))

    def disable(self, task: Task, t_ns: int, memslot: Memslot) -> Steps:
        self.calls.append(("disable", memslot.number))
        return (yield from reach(self._kvm.env, t_ns + HOLD_NS))

    def _locked(self, task: Task, t_ns: int, site: int) -> Steps:
        t_ns = yield from reach(self._kvm.env, t_ns)
        grant = self._kvm.mmu_lock.write(
            t_ns, task.cpu.id, site, lambda at: (HOLD_NS, at + HOLD_NS)
        )
        return (yield from acquired(grant))
