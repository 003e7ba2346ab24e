"""What contenders share: a thread of the host that takes guest memory through the notifier."""

from __future__ import annotations

from collections.abc import Callable, Generator
from typing import TYPE_CHECKING, Any

import numpy as np
from simpy import Event

from simkvm.kernel import mmap_lock
from simkvm.kernel.cacheline import CacheLine
from simkvm.kernel.host_memory import HostMemory
from simkvm.kernel.mmu_notifier import Change
from simkvm.kernel.task import Task, reach

if TYPE_CHECKING:
    from simkvm.contenders.in_turn import Turns
    from simkvm.kernel.kvm import Kvm

Steps = Generator[Event, Any, int]
HostChange = Callable[[HostMemory, int, int], int]


class Contender:
    """A thread that works on ``kvm``; draws only from ``rng``."""

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
        end_ns = max(self.done_ns, int(self.kvm.env.now))
        if self.turns is not None:
            self.turns.finished(end_ns)
        else:
            self.kvm.sched.exit(self.task, end_ns)

    def run(self) -> Generator[Event, Any, None]:
        """The thread; a subclass writes it."""
        raise NotImplementedError

    def sleep_until(self, t_ns: int, due_ns: int) -> Steps:
        """Sleep from ``t_ns`` to ``due_ns``; one that is late goes on at once."""
        if self.turns is not None:
            t_ns = yield from self.turns.wait(self.number, t_ns, due_ns)
            return (yield from self.kvm.sched.wake(self.task, t_ns))
        if due_ns <= t_ns:
            return (yield from self.kvm.sched.checkpoint(self.task, t_ns))
        # Its timer is set when it goes to sleep, after those of threads that did so before.
        t_ns = yield from reach(self.kvm.env, t_ns)
        self.kvm.sched.sleep(self.task, t_ns)
        t_ns = yield from reach(self.kvm.env, due_ns)
        return (yield from self.kvm.sched.wake(self.task, t_ns))

    def invalidate(
        self,
        t_ns: int,
        first: int,
        last: int,
        change: Change | None = None,
        leaving: CacheLine | None = None,
        blockable: bool = True,
    ) -> Steps:
        """One range start and end over the leaves ``first`` up to ``last``, counted as a call.

        ``change``: what the host does in between, removing its mappings if None; ``leaving``: the
        line of a lock that is let go of at the end. Returns when it is done.
        """
        self.calls += 1
        notifier = self.kvm.notifier
        t_ns = yield from notifier.invalidate(
            self.task, t_ns, first, last, blockable, leaving=leaving, change=change
        )
        t_ns = yield from reach(self.kvm.env, t_ns)
        self.done_ns = t_ns = t_ns + self.task.cpu.take_stolen()
        return (yield from self.kvm.sched.checkpoint(self.task, t_ns))

    def change(self, what: HostChange, each_ns: int) -> Change:
        """``what`` done to the host's entries of a range, at ``each_ns`` for each it changes."""
        host = self.kvm.host
        return lambda t_ns, first, last: t_ns + what(host, first, last) * each_ns

    def read_lock_mmap(self, t_ns: int) -> Steps:
        """Take ``mmap_lock`` for read from ``t_ns`` on; returns when it is had."""
        t_ns = yield from mmap_lock.wait(self.kvm, self.task, t_ns)
        return self.kvm.host.mmap_lock.visit(self.task.cpu.id, t_ns, mmap_lock.LOCK)

    def take_back(self, t_ns: int, first_byte: int, size: int) -> Steps:
        """``MADV_DONTNEED`` of ``size`` bytes at ``first_byte`` of guest memory.

        One range start and end whatever the size (mm/madvise.c). Returns when it is done.
        """
        leaf = self.kvm.stage2.leaf_bytes
        first, last = first_byte // leaf, -(-(first_byte + size) // leaf)
        t_ns = yield from self.read_lock_mmap(t_ns)
        return (yield from self.invalidate(t_ns, first, last, leaving=self.kvm.host.mmap_lock))
