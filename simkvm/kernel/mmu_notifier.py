"""The MMU notifier of one guest: how the host takes memory back, and who may look meanwhile.

Source: virt/kvm/kvm_main.c and mm/mmu_notifier.c, v6.12. An invalidation is two calls: *start*
takes ``mmu_lock`` for write, counts itself in progress and unmaps; then the host changes its own
page table; *end* takes the lock for write again, moves the sequence and uncounts. A stage-2 fault
that finds, under the lock, an invalidation in progress, or a sequence that moved since it looked
the page up, gives up and is taken again. Which invalidations count is ``fault_retry``: any of the
VM (arm64), or those whose range the page lies in (x86). Stage 2 is unmapped whatever the host is
about to do: remove, protect, replace or move its pages.

A huge page of which the range has only a part is split in between, an invalidation of its own over
all of it (mm/huge_memory.c, ``__split_huge_pmd``). On x86 nothing else takes back a block that a
fault maps meanwhile for a page of it that lies beside the range.
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
from simkvm.kernel.zap_leafs import ZapLeafs

if TYPE_CHECKING:
    from simkvm.kernel.kvm import Kvm

Steps = Generator[Event, Any, int]
#: What the host does to its own mappings of the leaves ``first`` up to ``last`` from a time on, in
#: between start and end; returns when it is done.
Change = Callable[[int, int, int], int]


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
        #: What the invalidations in progress cover, all that began since none was.
        self.envelope = (0, 0)
        self.stale = {"any": self._any_ran, "range": self._range_ran}[kvm.kernel["fault_retry"]]
        self._active = 0  #: invalidations that began and have not ended, whether they hold or wait
        self._idle: Event | None = None

    # -- who gives up -------------------------------------------------------------------------

    def _any_ran(self, leaf: int, noted_ns: int) -> bool:
        """``mmu_invalidate_retry``: whether any invalidation runs, or ended since ``noted_ns``."""
        return self.in_progress > 0 or self.moved_ns > noted_ns

    def _range_ran(self, leaf: int, noted_ns: int) -> bool:
        """``mmu_invalidate_retry_gfn``: as :meth:`_any_ran`, but one that runs has to cover
        ``leaf``. Of one that ended the range is not known any more.
        """
        low, high = self.envelope
        return (self.in_progress > 0 and low <= leaf < high) or self.moved_ns > noted_ns

    def _begin(self, first: int, last: int) -> None:
        """``kvm_mmu_invalidate_begin`` and ``_range_add``: the envelope grows until none runs."""
        self.in_progress += 1
        low, high = self.envelope
        if self.in_progress > 1:
            first, last = min(low, first), max(high, last)
        self.envelope = (first, last)

    # -- an invalidation ----------------------------------------------------------------------

    def hears(self, first: int, last: int) -> bool:
        """Whether KVM hears of these leaves: subscribed, and a memslot that is there has some."""
        return self.subscribed and self._kvm.memslots.there(first, last)

    def idle(self) -> Event | None:
        """None if no invalidation is active, else the event of the last one's end.

        What the update of memory slots waits for (``mn_active_invalidate_count``).
        """
        if not self._active:
            return None
        if self._idle is None:
            self._idle = Event(self._kvm.env)
        return self._idle

    def invalidate(
        self,
        task: Task,
        t_ns: int,
        first: int,
        last: int,
        blockable: bool = True,
        leaving: CacheLine | None = None,
        change: Change | None = None,
    ) -> Steps:
        """Take the leaves ``first`` up to ``last`` back, from ``t_ns`` on; returns when it is done.

        ``blockable``: whether the lock may be dropped between chunks (the OOM reaper may not).
        ``leaving``: the line of another lock that the caller lets go of then.
        ``change``: what the host does in between; default: it removes its mappings.
        """
        kvm = self._kvm
        if change is None:
            change = kvm.zap_host
        if not self.hears(first, last):
            t_ns = change(t_ns, first, last)
            if leaving is not None:
                leaving.post(task.cpu.id, t_ns)
            return t_ns
        self._active += 1
        token = self.srcu.enter(t_ns)
        t_ns = yield from self._start(task, t_ns + kvm.costs.ageing.call_ns, first, last, blockable)
        t_ns = yield from self.split_huge(task, t_ns, first, last, blockable)
        t_ns = change(t_ns, first, last)
        t_ns = yield from reach(kvm.env, t_ns)
        t_ns = yield from self._end(task, t_ns + kvm.costs.ageing.call_ns, first, last, leaving)
        self.srcu.leave(token, t_ns)
        self._ended(t_ns)
        return t_ns

    def split_huge(
        self, task: Task, t_ns: int, first: int, last: int, blockable: bool = True
    ) -> Steps:
        """Split the huge pages of which only ``first`` up to ``last`` goes (``__split_huge_pmd``).

        That is an invalidation of all of each, inside another one if that is under way: where a
        fault gives up only within the range, it may have mapped the block again meanwhile.
        """
        host, size = self._kvm.host, self._kvm.host.entries

        def split(at_ns: int, begin: int, end: int) -> int:
            host.huge[max(begin, first) // size : -(-min(end, last) // size)] = False
            return at_ns + size * self._kvm.costs.unmap.visit_ns

        for huge in self._kvm.huge_in_part(first, last):
            t_ns = yield from self.invalidate(
                task, t_ns, huge.start, huge.stop, blockable, change=split
            )
        return t_ns

    def _ended(self, t_ns: int) -> None:
        self._active -= 1
        if not self._active and self._idle is not None:
            waiting, self._idle = self._idle, None
            waiting._ok = True
            waiting._value = t_ns
            env = self._kvm.env
            env.schedule(waiting, delay=max(0, t_ns - int(env.now)))

    def _start(self, task: Task, t_ns: int, first: int, last: int, blockable: bool) -> Steps:
        def begin(entry_ns: int) -> int:
            self._begin(first, last)
            return entry_ns + self._kvm.costs.unmap.bookkeeping_ns

        return unmap_range(self._kvm, task, t_ns, first, last, RANGE_START, begin, blockable)

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
            task.spend("unmap_lock", entry_ns - t_ns)
            if leaving is not None:
                leaving.post(task.cpu.id, entry_ns + hold_ns)
            return hold_ns, entry_ns + hold_ns

        t_ns = yield from reach(kvm.env, t_ns)
        task.cpu.spin(t_ns)
        t_ns = yield from acquired(kvm.mmu_lock.write(t_ns, task.cpu.id, RANGE_END, section))
        task.cpu.enter_kernel(t_ns)
        return t_ns


def unmap_range(
    kvm: Kvm,
    task: Task,
    t_ns: int,
    first: int,
    last: int,
    site: int,
    begin: Callable[[int], int],
    blockable: bool = True,
) -> Steps:
    """Take ``mmu_lock`` for write at ``site`` and unmap the leaves ``first`` up to ``last``.

    ``begin`` is called once with the time of entry and returns when the walk starts. A blockable
    walk may drop the lock: where ``unmap_yield`` says. Returns the end.
    """

    def lock(task: Task, t_ns: int) -> Steps:
        return _lock(kvm, task, t_ns, site)

    entry = yield from lock(task, t_ns)
    end = yield from reach(kvm.env, begin(entry))
    way = UNMAPS[kvm.kernel["unmap_yield"]](kvm, lock)
    end = yield from way.run(task, entry, end, first, last, blockable)
    yield from reach(kvm.env, end)
    kvm.mmu_lock.release(end)
    task.cpu.enter_kernel(end)
    return end


class UnmapChunks:
    """Chunk by chunk (``stage2_apply_range``); ``lock`` takes ``mmu_lock`` again."""

    def __init__(self, kvm: Kvm, lock: Callable[[Task, int], Steps]) -> None:
        self._kvm = kvm
        self._lock = lock

    def run(
        self, task: Task, entry_ns: int, t_ns: int, first: int, last: int, blockable: bool
    ) -> Steps:
        """Unmap the leaves ``first`` up to ``last`` from ``t_ns`` on, the lock had at ``entry_ns``.

        Returns when the last chunk is done, with the lock held.
        """
        kvm = self._kvm
        slots = [s for s in kvm.memslots.overlapping(first, last) if kvm.memslots.there(*s)]
        parts = [part for low, high in slots for part in chunks(kvm.stage2, low, high)]
        ends = {high for _, high in slots}  # behind a slot's last chunk the lock is not offered
        for number, (low, high) in enumerate(parts):
            if not kvm.stage2.attached:
                break
            t_ns = kvm.unmap_chunk(task.cpu.id, t_ns, low, high)
            task.cpu.atomic(entry_ns, t_ns)
            if number + 1 == len(parts):
                break
            t_ns = yield from reach(kvm.env, t_ns)
            if blockable and high not in ends and kvm.lock_break(task, t_ns):
                kvm.mmu_lock.release(t_ns)
                task.cpu.context_switch(t_ns)
                t_ns = yield from kvm.let_others_run(task, t_ns)
                t_ns = entry_ns = yield from self._lock(task, t_ns)
        return t_ns


UNMAPS: dict[str, type[UnmapChunks | ZapLeafs]] = {"chunk": UnmapChunks, "entry": ZapLeafs}
"""By the value of ``unmap_yield``."""


def _lock(kvm: Kvm, task: Task, t_ns: int, site: int) -> Steps:
    """Take the lock for as long as it takes; returns at the time of entry."""
    t_ns = yield from reach(kvm.env, t_ns)
    task.cpu.spin(t_ns)

    def section(entry_ns: int) -> tuple[int, int]:
        task.spend("unmap_lock", entry_ns - t_ns)
        return OPEN, entry_ns

    grant = kvm.mmu_lock.write(t_ns, task.cpu.id, site, section)
    return (yield from reach(kvm.env, (yield from acquired(grant))))


def unmap_walk(kvm: Kvm, first: int, last: int, t_ns: int) -> tuple[UnmapWalk, int]:
    """One chunk's walk that starts at ``t_ns``: what it did, and when it is done."""
    walk = UnmapWalk(kvm.stage2, first, last, kvm.unmap_costs(t_ns), kvm.keep_tables)
    end = t_ns + walk.elapsed_ns
    flushes = len(walk.tables) + (1 if kvm.deferred_tlbi else walk.leaves)
    kvm.tlbi.walk(end, flushes)
    if kvm.deferred_tlbi:
        end += kvm.costs.tlbi_all_ns
    return walk, end
