"""What contenders share: a thread of the host that takes guest memory back through the notifier."""

from __future__ import annotations

from collections.abc import Generator
from typing import TYPE_CHECKING, Any

import numpy as np
from simpy import Event

from simkvm.kernel.task import Task, reach

if TYPE_CHECKING:
    from simkvm.contenders.in_turn import Turns
    from simkvm.kernel.kvm import Kvm

NS_PER_S = 1_000_000_000
Steps = Generator[Event, Any, int]


class Contender:
    """A thread on a CPU of its own that works on ``kvm``; draws only from ``rng``."""

    def __init__(self, kvm: Kvm, task: Task, rng: np.random.Generator) -> None:
        self.kvm = kvm
        self.task = task
        self.rng = rng
        self.calls = 0
        self.done_ns = 0  #: end of the last call
        self.number = 0  #: of the guest, if
        self.turns: Turns | None = None  #: the thread works on other guests too

    def thread(self) -> Generator[Event, Any, None]:
        """:meth:`run`, and the turn to the next guest at its end."""
        yield from self.run()
        if self.turns is not None:
            self.turns.finished(max(self.done_ns, int(self.kvm.env.now)))

    def run(self) -> Generator[Event, Any, None]:
        """The thread; a subclass writes it."""
        raise NotImplementedError

    def sleep_until(self, t_ns: int, due_ns: int) -> Steps:
        """Sleep from ``t_ns`` to ``due_ns``; one that is late goes on at once."""
        if self.turns is not None:
            t_ns = yield from self.turns.wait(self.number, t_ns, due_ns)
            self.task.cpu.enter_kernel(t_ns)
            return t_ns
        if due_ns <= t_ns:
            return t_ns
        self.task.cpu.sleep(t_ns)
        t_ns = yield from reach(self.kvm.env, due_ns)
        self.task.cpu.enter_kernel(t_ns)
        return t_ns

    def take_back(self, t_ns: int, first_byte: int, size: int) -> Steps:
        """``MADV_DONTNEED`` of ``size`` bytes at ``first_byte`` of guest memory.

        One range start and end whatever the size (mm/madvise.c). Returns when it is done.
        """
        kvm = self.kvm
        self.calls += 1
        leaf = kvm.stage2.leaf_bytes
        first, last = first_byte // leaf, -(-(first_byte + size) // leaf)
        t_ns = yield from reach(kvm.env, t_ns)  # one that is late did not sleep
        mmap_lock = kvm.host.mmap_lock
        t_ns = mmap_lock.visit(self.task.cpu.id, t_ns, 1)
        t_ns = yield from kvm.notifier.invalidate(self.task, t_ns, first, last, leaving=mmap_lock)
        t_ns = yield from reach(kvm.env, t_ns)
        self.done_ns = t_ns + self.task.cpu.take_stolen()
        return self.done_ns
