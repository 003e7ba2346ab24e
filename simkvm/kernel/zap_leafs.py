"""Unmapping on x86: leaf entries are zapped, tables stay, and the walk may yield at any entry.

Source: arch/x86/kvm/mmu/tdp_mmu.c (``tdp_mmu_zap_leafs``, ``tdp_mmu_iter_cond_resched``) and mmu.c
(``kvm_unmap_gfn_range``, ``__walk_slot_rmaps``), v6.12. Before each entry the walk looks whether
somebody waits for ``mmu_lock``; if so it flushes what it has zapped, lets go of the lock and queues
again, but never before it has got past one entry since it had the lock. What was zapped since is
flushed once, at the end, still under the lock. However empty, no table goes.

No entry costs an event: how long each takes is known beforehand, because only the holder of the
lock changes entries. The walk goes on in one piece until it is done or somebody joins the line of
the lock, and then to the end of the entry that it is in. A piece's zaps take effect at its end;
until the flush that follows, guests go on with translations that they have.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from simpy import Environment, Event

from simkvm.kernel.qrwlock import QueuedRwlock
from simkvm.kernel.remote_flush import Ipi
from simkvm.kernel.stage2 import TABLE, VALID, Stage2
from simkvm.kernel.task import Task, reach
from simkvm.kernel.unmap import chunks

if TYPE_CHECKING:
    from simkvm.kernel.kvm import Kvm

Steps = Generator[Event, Any, int]
Array = NDArray[np.int64]


@dataclass(frozen=True)
class ZapCosts:
    """Integer nanoseconds of the iterator's steps."""

    visit_ns: int
    descend_ns: int  #: entering a table
    leaf_ns: int  #: zapping one valid leaf, its share of the flush apart


@dataclass(frozen=True)
class Walk:
    """Entries in the order of the walk: the first leaf of each, and when each is over.

    ``ends_ns`` counts from the start of the walk; ``last`` is where the last entry ends.
    """

    leaves: Array
    ends_ns: Array
    last: int

    def __len__(self) -> int:
        return len(self.leaves)

    def leaf_at(self, entry: int) -> int:
        """Where ``entry`` begins, or the walk ends."""
        return int(self.leaves[entry]) if entry < len(self.leaves) else self.last

    def end_of(self, entry: int) -> int:
        """When the walk has ``entry`` entries behind it, in ns after its start."""
        return int(self.ends_ns[entry - 1]) if entry else 0

    def behind(self, t_ns: int) -> int:
        """Entries that are over, or being done, ``t_ns`` after the start."""
        return min(int(np.searchsorted(self.ends_ns, t_ns, "left")) + 1, len(self))


def table_walk(stage2: Stage2, first: int, last: int, costs: ZapCosts) -> Walk:
    """The TDP iterator from leaf ``first`` up to ``last``.

    Each entry of a linked leaf-level table is visited; one that is no table, at any level above,
    is visited once for all that it covers.
    """
    _, lower, down, phase = stage2.steps[-1]
    low, high = (first + phase) >> down, ((last - 1 + phase) >> down) + 1
    begin = np.maximum((np.arange(low, high, dtype=np.int64) << down) - phase, first)
    entries = np.diff(begin, append=last)
    descents = np.zeros(high - low, np.int64)
    reached = np.ones(high - low, np.bool_)  # tables whose every parent, down to a level, is linked
    for upper, _, shift, offset in stage2.steps:
        at = (begin + offset) >> shift
        fresh = np.diff(at, prepend=-1) != 0
        linked = (upper.entries[at] & TABLE) != 0
        entries[reached & ~linked] = fresh[reached & ~linked]
        reached &= linked
        descents += reached & fresh
    where = np.repeat(np.arange(high - low), entries)
    within = np.arange(len(where)) - np.repeat(np.cumsum(entries) - entries, entries)
    leaves = begin[where] + within
    spent = costs.visit_ns + (within == 0) * descents[where] * costs.descend_ns
    spent += ((lower.entries[leaves] & VALID) != 0) * reached[where] * costs.leaf_ns
    return Walk(leaves, np.cumsum(spent), last)


def contention(
    lock: QueuedRwlock, env: Environment, t_ns: int, until_ns: int
) -> Generator[Event, Any, int | None]:
    """When somebody joins the line of ``lock``, which is held open, from ``t_ns`` on.

    None if nobody does before ``until_ns``. Costs an event only if others act before that.
    """
    if lock.contended:
        return t_ns
    if until_ns < env.peek():
        return None
    woken = Event(env)

    def wake(at_ns: int) -> None:
        lock.on_contention = None
        if woken.triggered:
            return
        woken._ok = True
        woken._value = at_ns
        env.schedule(woken, delay=max(0, at_ns - int(env.now)))

    lock.on_contention = wake
    timeout = env.timeout(max(0, until_ns - int(env.now)))
    assert timeout.callbacks is not None
    timeout.callbacks.append(lambda _: None if woken.triggered else _succeed(woken))
    at: int | None = yield woken
    lock.on_contention = None
    return at


def _succeed(event: Event) -> None:
    event.succeed(None)


class ZapLeafs:
    """Unmaps ranges of ``kvm``; ``lock`` takes ``mmu_lock`` anew and returns the time of entry."""

    def __init__(self, kvm: Kvm, lock: Callable[[Task, int], Steps]) -> None:
        self._kvm = kvm
        self._lock = lock

    def run(
        self, task: Task, entry_ns: int, t_ns: int, first: int, last: int, blockable: bool
    ) -> Steps:
        """Zap the leaves ``first`` up to ``last`` from ``t_ns`` on; the lock is held, and kept.

        Returns when the flush is over.
        """
        kvm, lock = self._kvm, self._kvm.mmu_lock
        yields = blockable and kvm.break_lock
        unflushed = 0
        passed = False  # some entry since the lock was taken
        for low, high in chunks(kvm.stage2, first, last):  # to bound the arrays, no more
            walk, done, began = kvm.mmu.walk(kvm, low, high), 0, t_ns
            while done < len(walk) and kvm.stage2.attached:
                until = began + walk.end_of(len(walk))
                waiter = None
                if yields:
                    waiter = yield from contention(lock, kvm.env, t_ns, until)
                stop = len(walk)
                if waiter is not None and waiter > t_ns:
                    stop = walk.behind(waiter - began)  # to the end of the entry it is in then
                elif waiter is not None:
                    stop = done if passed else done + 1
                t_ns = yield from reach(kvm.env, began + walk.end_of(stop))
                if stop > done:
                    unflushed += self._zap(walk, done, stop, t_ns)
                    passed = True
                done = stop
                if waiter is not None and (done < len(walk) or high < last):
                    t_ns = yield from self._yield(task, t_ns, unflushed > 0)
                    began, unflushed, passed = t_ns - walk.end_of(done), 0, False
        if unflushed:
            t_ns = yield from self._flush(t_ns)
        return t_ns

    def _zap(self, walk: Walk, done: int, stop: int, t_ns: int) -> int:
        kvm, low, high = self._kvm, walk.leaf_at(done), walk.leaf_at(stop)
        removed = kvm.zap_leaves(t_ns, low, high)
        kvm.unmapped_leaves += removed
        return removed

    def _flush(self, t_ns: int) -> Steps:
        """Flush remotely, now that nothing before ``t_ns`` is left to happen."""
        kvm = self._kvm
        t_ns = yield from reach(kvm.env, t_ns)
        assert isinstance(kvm.remote_flush, Ipi)  # yields by entry are x86's
        return kvm.remote_flush.flush(kvm, t_ns)

    def _yield(self, task: Task, t_ns: int, flush: bool) -> Steps:
        """``cond_resched_rwlock_write``, after a flush if anything was zapped since the last."""
        kvm = self._kvm
        if flush:
            t_ns = yield from self._flush(t_ns)
        t_ns = yield from reach(kvm.env, t_ns)
        kvm.mmu_lock.release(t_ns)
        task.cpu.enter_kernel(t_ns)
        return (yield from self._lock(task, t_ns + kvm.costs.ageing.resched_ns))
