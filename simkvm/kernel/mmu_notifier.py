"""The MMU notifier of one guest: how the host takes memory back, and who may look meanwhile.

Source: virt/kvm/kvm_main.c and mm/mmu_notifier.c, v6.12. An invalidation is two calls: *start*
takes ``mmu_lock`` for write, counts itself in progress and unmaps; then the host changes its own
page table; *end* takes the lock for write again, moves the sequence and uncounts. A stage-2 fault
that finds, under the lock, an invalidation in progress anywhere in the VM, or a sequence that
moved since it looked the page up, gives up and is taken again (arm64 does not compare ranges).
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from typing import TYPE_CHECKING, Any

from simpy import Environment, Event

from simkvm.kernel.cacheline import CacheLine
from simkvm.kernel.qrwlock import OPEN
from simkvm.kernel.sites import RANGE_END, RANGE_START
from simkvm.kernel.stage2 import VALID
from simkvm.kernel.task import Task, acquired, reach
from simkvm.kernel.unmap import UnmapWalk, chunks

if TYPE_CHECKING:
    from simkvm.kernel.kvm import Kvm

Steps = Generator[Event, Any, int]
#: What the host does to the mappings of a range: (t, first, last) -> when it is done.
HostStep = Callable[[int, int, int], int]


class Srcu:
    """Sleepable RCU: a waiter goes on when all sections that began before it have ended."""

    def __init__(self, env: Environment, wakeup_ns: int) -> None:
        self._env = env
        self._wakeup_ns = wakeup_ns
        self._inside: dict[int, int] = {}
        self._next = 0
        self._waiting: list[tuple[set[int], Event]] = []

    def enter(self, t_ns: int) -> int:
        """Begin a section; returns its token."""
        token = self._next
        self._next += 1
        self._inside[token] = t_ns
        return token

    def leave(self, token: int, t_ns: int) -> None:
        """End the section of ``token`` at ``t_ns``."""
        del self._inside[token]
        for holdouts, event in self._waiting:
            holdouts.discard(token)
            if not holdouts and not event.triggered:
                event._ok = True
                event._value = None
                delay = t_ns + self._wakeup_ns - int(self._env.now)
                self._env.schedule(event, delay=max(0, delay))
        self._waiting = [entry for entry in self._waiting if entry[0]]

    def synchronize(self, t_ns: int) -> Event:
        """An event for "everybody that was inside at ``t_ns`` has left"."""
        event = Event(self._env)
        holdouts = set(self._inside)
        if holdouts:
            self._waiting.append((holdouts, event))
        else:
            # Nobody inside: the expedited path, two wake-ups of the worker (kernel/rcu/srcutree.c).
            event._ok = True
            event._value = None
            delay = t_ns + 2 * self._wakeup_ns - int(self._env.now)
            self._env.schedule(event, delay=max(0, delay))
        return event


class MmuNotifier:
    """Subscription of one guest."""

    def __init__(self, kvm: Kvm, srcu: Srcu) -> None:
        self._kvm = kvm
        self.srcu = srcu
        self.subscribed = True
        self.in_progress = 0
        self.sequence = 0
        self.moved_ns = -1  #: when the sequence moved last

    def invalidate(
        self,
        task: Task,
        t_ns: int,
        first: int,
        last: int,
        blockable: bool = True,
        leaving: CacheLine | None = None,
        host_step: HostStep | None = None,
    ) -> Steps:
        """Take the leaves ``first`` up to ``last`` back, from ``t_ns`` on; returns when it is done.

        ``blockable``: whether the lock may be dropped between chunks (the OOM reaper may not).
        ``leaving``: the line of another lock that the caller lets go of then. ``host_step``: what
        the host does to its own mappings, if not to remove them.
        """
        kvm = self._kvm
        host_step = host_step or kvm.zap_host
        if not self.subscribed:
            t_ns = host_step(t_ns, first, last)
            if leaving is not None:
                leaving.post(task.cpu.id, t_ns)
            return t_ns
        token = self.srcu.enter(t_ns)
        t_ns = yield from self._start(task, t_ns + kvm.costs.ageing.call_ns, first, last, blockable)
        t_ns = host_step(t_ns, first, last)
        t_ns = yield from reach(kvm.env, t_ns)
        t_ns = yield from self._end(task, t_ns + kvm.costs.ageing.call_ns, first, last, leaving)
        self.srcu.leave(token, t_ns)
        return t_ns

    def _start(self, task: Task, t_ns: int, first: int, last: int, blockable: bool) -> Steps:
        kvm = self._kvm
        parts = chunks(kvm.stage2, first, last)
        entry = yield from self._lock(task, t_ns)
        self.in_progress += 1
        end = yield from reach(kvm.env, entry + kvm.costs.unmap.bookkeeping_ns)
        for number, (low, high) in enumerate(parts):
            if not kvm.stage2.attached:
                break
            end = kvm.unmap_chunk(task.cpu.id, end, low, high)
            task.cpu.atomic(entry, end)
            if number + 1 == len(parts):
                break
            end = yield from reach(kvm.env, end)
            if blockable and kvm.lock_break(task.cpu, end):
                kvm.mmu_lock.release(end)
                task.cpu.context_switch(end)
                end = entry = yield from self._lock(task, end + kvm.costs.ageing.resched_ns)
        yield from reach(kvm.env, end)
        kvm.mmu_lock.release(end)
        task.cpu.enter_kernel(end)
        return end

    def _lock(self, task: Task, t_ns: int) -> Steps:
        """Take the lock for as long as it takes; returns at the time of entry."""
        env = self._kvm.env
        t_ns = yield from reach(env, t_ns)
        task.cpu.spin(t_ns)
        grant = self._kvm.mmu_lock.write(t_ns, task.cpu.id, RANGE_START, lambda at: (OPEN, at))
        return (yield from reach(env, (yield from acquired(grant))))

    def _end(
        self, task: Task, t_ns: int, first: int, last: int, leaving: CacheLine | None
    ) -> Steps:
        kvm = self._kvm
        hold_ns = kvm.costs.unmap.bookkeeping_ns

        def section(entry_ns: int) -> tuple[int, int]:
            self.sequence += 1
            self.moved_ns = entry_ns
            self.in_progress -= 1
            left = int((kvm.stage2.leaf.entries[first:last] & VALID).sum())
            kvm.oracle.invalidated(first, last, left, entry_ns)
            if leaving is not None:
                leaving.post(task.cpu.id, entry_ns + hold_ns)
            return hold_ns, entry_ns + hold_ns

        t_ns = yield from reach(kvm.env, t_ns)
        task.cpu.spin(t_ns)
        t_ns = yield from acquired(kvm.mmu_lock.write(t_ns, task.cpu.id, RANGE_END, section))
        task.cpu.enter_kernel(t_ns)
        return t_ns


def unmap_walk(kvm: Kvm, first: int, last: int, t_ns: int) -> tuple[UnmapWalk, int]:
    """One chunk's walk that starts at ``t_ns``: what it did, and when it is done."""
    walk = UnmapWalk(kvm.stage2, first, last, kvm.unmap_costs(t_ns))
    end = t_ns + walk.elapsed_ns
    flushes = len(walk.tables) + (1 if kvm.deferred_tlbi else walk.leaves)
    kvm.tlbi.walk(end, flushes)
    if kvm.deferred_tlbi:
        end += kvm.costs.tlbi_all_ns
    return walk, end
