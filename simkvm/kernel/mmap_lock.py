"""``mmap_lock`` held for write: ``mprotect`` and fork hold it over all that they do.

Source: mm/mprotect.c (``do_mprotect_pkey``), kernel/fork.c (``dup_mmap``), v6.12. Its readers are
short here and never wait for one another, so for them it is a cache line
(:class:`simkvm.kernel.cacheline.CacheLine`). A fault that meets a writer sleeps until the writer
is done; ageing, which only tries, skips the address space. A writer does not wait for the readers
that are inside, which are about to leave.
"""

from __future__ import annotations

from collections.abc import Generator
from typing import TYPE_CHECKING, Any, Final

from simpy import Event

from simkvm.kernel.task import Task, reach

if TYPE_CHECKING:
    from simkvm.kernel.kvm import Kvm

Steps = Generator[Event, Any, int]

#: What taking it does to its line: the count is changed, and the owner, next to it, is written
#: (kernel/locking/rwsem.c, ``rwsem_set_reader_owned``, v6.12).
LOCK: Final = 2
#: What letting go does: the count is changed.
UNLOCK: Final = 1


def write_lock(kvm: Kvm, task: Task, t_ns: int) -> Steps:
    """Take it for write at ``t_ns``, after a writer that has it; returns when it is had."""
    t_ns = yield from wait(kvm, task, t_ns)
    kvm.host.mmap_writer = []
    return kvm.host.mmap_lock.visit(task.cpu.id, t_ns, LOCK)


def write_unlock(kvm: Kvm, task: Task, t_ns: int) -> Steps:
    """Let go of it at ``t_ns`` and wake everybody who waits."""
    t_ns = yield from reach(kvm.env, t_ns)
    kvm.host.mmap_lock.post(task.cpu.id, t_ns)
    waiting, kvm.host.mmap_writer = kvm.host.mmap_writer, None
    for woken in waiting or ():
        woken._ok = True
        woken._value = t_ns + kvm.costs.wakeup_ns
        kvm.env.schedule(woken, delay=max(0, woken._value - int(kvm.env.now)))
    return t_ns


def wait(kvm: Kvm, task: Task, t_ns: int) -> Steps:
    """Come to the lock at ``t_ns`` as a reader: sleep while a writer has it."""
    t_ns = yield from reach(kvm.env, t_ns)
    while kvm.host.mmap_writer is not None:
        kvm.sched.sleep(task, t_ns)
        # One for each: a process that an event resumes does not see the others coming.
        woken = Event(kvm.env)
        kvm.host.mmap_writer.append(woken)
        woken_ns: int = yield woken
        t_ns = yield from kvm.sched.wake(task, woken_ns)
    return t_ns
