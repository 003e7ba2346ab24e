"""The VMM forks: its pages are shared with the child until either of them writes.

Source: mm/memory.c (``copy_page_range``, ``do_wp_page``), kernel/fork.c (``dup_mmap``), v6.12. One
range start and end over all guest memory, under ``mmap_lock`` for write; every page of the guest's
own is write-protected. A write then copies, with an invalidation of that page, as long as a child
lives; after that the page is the guest's alone again and is only made writable.
"""

from __future__ import annotations

from collections.abc import Generator
from typing import TYPE_CHECKING, Any

import numpy as np
from simpy import Event

from simkvm.contenders.contender import Contender, Steps
from simkvm.kernel import mmap_lock
from simkvm.kernel.host_change import write_protect
from simkvm.kernel.task import Task, reach
from simkvm.scenario.contenders import Fork as Spec

if TYPE_CHECKING:
    from simkvm.kernel.kvm import Kvm


class Fork(Contender):
    """Forks every ``interval``; each child lives for ``child``."""

    def __init__(self, kvm: Kvm, task: Task, rng: np.random.Generator, spec: Spec) -> None:
        super().__init__(kvm, task, rng)
        self._spec = spec
        self._share = self.change(write_protect, kvm.costs.takers.pte_ns)

    def run(self) -> Generator[Event, Any, None]:
        """Fork, wait for the child's exit, and so on."""
        spec, t_ns, due_ns = self._spec, 0, self._spec.start
        while True:
            t_ns = yield from self.sleep_until(t_ns, due_ns)
            if not self.kvm.alive:
                return
            t_ns = yield from self._dup_mmap(t_ns)
            t_ns = yield from self.sleep_until(t_ns, t_ns + spec.child)
            self.kvm.host.children -= 1
            if spec.interval is None:
                break
            due_ns += spec.interval
        self.kvm.sched.sleep(self.task, t_ns)

    def _dup_mmap(self, t_ns: int) -> Steps:
        kvm = self.kvm
        t_ns = yield from mmap_lock.write_lock(kvm, self.task, t_ns)
        t_ns = yield from reach(kvm.env, t_ns)
        kvm.host.children += 1
        t_ns = yield from self.invalidate(t_ns, 0, kvm.leaves, self._share)
        return (yield from mmap_lock.write_unlock(kvm, self.task, t_ns))
