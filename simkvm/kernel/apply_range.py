"""A range operation under ``mmu_lock``, chunk by chunk.

Source: arch/arm64/kvm/mmu.c (``stage2_apply_range``), v6.12: chunks end at multiples of the largest
block; between them ``cond_resched_rwlock_write`` lets go of a contended lock and queues again. x86
does the same under its read lock where that is enough (arch/x86/kvm/mmu/tdp_mmu.c).
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from typing import TYPE_CHECKING, Any

from simpy import Event

from simkvm.kernel.qrwlock import OPEN
from simkvm.kernel.task import Task, acquired, reach
from simkvm.kernel.unmap import chunks

if TYPE_CHECKING:
    from simkvm.kernel.kvm import Kvm

Steps = Generator[Event, Any, int]
Step = Callable[[int, int, int], int]
"""What is done to a chunk: (begin, first leaf, last leaf) -> when that is done."""


def apply_range(
    kvm: Kvm, task: Task, t_ns: int, first: int, last: int, site: int, step: Step, lock: str
) -> Steps:
    """Do ``step`` to each chunk of the leaves ``first`` up to ``last``; returns when it is done.

    ``lock``: ``write`` or ``read``. ``site``: who takes it, in the lock's account.
    """
    take = _reading if lock == "read" else _writing
    return (yield from take(kvm, task, t_ns, chunks(kvm.stage2, first, last), site, step))


def _writing(
    kvm: Kvm, task: Task, t_ns: int, parts: list[tuple[int, int]], site: int, step: Step
) -> Steps:
    end = yield from open_for_write(kvm, task, t_ns, site)
    for number, (low, high) in enumerate(parts):
        if number and kvm.lock_break(task, end):
            kvm.mmu_lock.release(end)
            task.cpu.context_switch(end)
            end = yield from kvm.let_others_run(task, end)
            end = yield from open_for_write(kvm, task, end, site)
        if not kvm.stage2.attached:
            break
        end = yield from reach(kvm.env, step(end, low, high))
    kvm.mmu_lock.release(end)
    task.cpu.enter_kernel(end)
    return end


def open_for_write(kvm: Kvm, task: Task, t_ns: int, site: int) -> Steps:
    """Take the lock for write for as long as it takes; returns at the time of entry."""
    t_ns = yield from reach(kvm.env, t_ns)
    task.cpu.spin(t_ns)
    grant = kvm.mmu_lock.write(t_ns, task.cpu.id, site, lambda at: (OPEN, at))
    return (yield from reach(kvm.env, (yield from acquired(grant))))


def _reading(
    kvm: Kvm, task: Task, t_ns: int, parts: list[tuple[int, int]], site: int, step: Step
) -> Steps:
    for low, high in parts:
        t_ns = yield from reach(kvm.env, t_ns)
        task.cpu.spin(t_ns)

        def section(at_ns: int, low: int = low, high: int = high) -> tuple[int, int]:
            end_ns = step(at_ns, low, high) if kvm.stage2.attached else at_ns
            return end_ns - at_ns, end_ns

        t_ns = yield from acquired(kvm.mmu_lock.read(t_ns, task.cpu.id, site, section))
        task.cpu.enter_kernel(t_ns)
    return t_ns
