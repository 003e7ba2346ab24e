"""A walk over entries under ``mmu_lock`` that may let go of the lock between any two of them.

Source: arch/x86/kvm/mmu/tdp_mmu.c (``tdp_mmu_iter_cond_resched``), kernel/sched/core.c
(``__cond_resched_rwlock_write``), v6.12. Before each entry the walk looks whether somebody waits
for the lock; if so it lets go and queues again, but never before it has got past one entry since
it had the lock (the iterator's ``yielded_gfn``).

No entry costs an event: how long each takes is known beforehand, because only the holder of the
lock changes entries. The walk goes on in one piece until it is done or somebody joins the line of
the lock, and then to the end of the entry that it is in. What a piece does takes effect at its end.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from simpy import Environment, Event

from simkvm.kernel.qrwlock import QueuedRwlock
from simkvm.kernel.stage2 import TABLE, Stage2
from simkvm.kernel.task import reach

if TYPE_CHECKING:
    from simkvm.kernel.kvm import Kvm

Steps = Generator[Event, Any, int]
Array = NDArray[np.int64]


@dataclass(frozen=True)
class Walk:
    """Entries in the order of the walk, by number, and when each is over.

    ``ends_ns`` counts from the start of the walk; ``last`` is the number where the walk ends.
    ``reached``: whether the entry is one of a linked table of the walk's lowest level.
    """

    entries: Array
    ends_ns: Array
    last: int
    reached: NDArray[np.bool_]

    def __len__(self) -> int:
        return len(self.entries)

    def entry(self, place: int) -> int:
        """The number of the entry at ``place``, or where the walk ends."""
        return int(self.entries[place]) if place < len(self.entries) else self.last

    def end_of(self, places: int) -> int:
        """When the walk has ``places`` entries behind it, in ns after its start."""
        return int(self.ends_ns[places - 1]) if places else 0

    def behind(self, t_ns: int) -> int:
        """Entries that are over, or begun, ``t_ns`` after the start."""
        return min(int(np.searchsorted(self.ends_ns, t_ns, "left")) + 1, len(self))


def tree(
    stage2: Stage2, level: int, first: int, last: int, visit_ns: int, descend_ns: int
) -> tuple[Array, NDArray[np.bool_], Array]:
    """What an iterator meets that goes down to ``level``, over its entries ``first`` to ``last``.

    Each entry of a linked table of that level is visited; one further up that is no table, once
    for all that it covers; one that is a table, and then entered. Returns entries, which of them
    are of linked tables of that level, and what each costs, with the way down to it, in ns.
    """
    bits = stage2.geometry.index_bits
    base = stage2.first_entry(level)
    begin = np.arange((first + base) >> bits, ((last - 1 + base) >> bits) + 1, dtype=np.int64)
    begin = np.maximum((begin << bits) - base, first)
    width = np.diff(begin, append=last)
    descents = np.zeros(len(begin), np.int64)
    reached = np.ones(len(begin), np.bool_)
    for number in range(stage2.geometry.start_level, level):
        at = ((begin + base) >> (bits * (level - number))) - stage2.first_entry(number)
        fresh = np.diff(at, prepend=-1) != 0
        linked = (stage2.levels[number].entries[at] & TABLE) != 0
        width[reached & ~linked] = fresh[reached & ~linked]
        reached &= linked
        descents += reached & fresh
    table = np.repeat(np.arange(len(begin)), width)
    within = np.arange(len(table)) - np.repeat(np.cumsum(width) - width, width)
    spent = visit_ns + (within == 0) * descents[table] * (visit_ns + descend_ns)
    return begin[table] + within, reached[table], spent


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

    def over(_: Event) -> None:
        if not woken.triggered:
            woken.succeed(None)

    lock.on_contention = wake
    timeout = env.timeout(max(0, until_ns - int(env.now)))
    assert timeout.callbacks is not None
    timeout.callbacks.append(over)
    at: int | None = yield woken
    lock.on_contention = None
    return at


class YieldingWalker:
    """Makes walks for ``kvm``, whose lock it holds. ``may_yield``: whether it ever lets go.

    ``apply(walk, done, stop, t_ns)`` does the entries ``done`` up to ``stop`` at ``t_ns``;
    ``let_go(t_ns)`` releases the lock, takes it again and returns the time of entry.
    """

    def __init__(
        self,
        kvm: Kvm,
        may_yield: bool,
        apply: Callable[[Walk, int, int, int], None],
        let_go: Callable[[int], Steps],
    ) -> None:
        self._kvm = kvm
        self._may_yield = may_yield and kvm.break_lock
        self._apply = apply
        self._let_go = let_go
        self._passed = False  #: an entry, since the lock was taken

    def run(self, walk: Walk, t_ns: int, more: bool, piece: int = 1 << 62) -> Steps:
        """Make ``walk`` from ``t_ns`` on; returns when it is done, with the lock held.

        ``more``: whether another walk follows that looks at the lock before its first entry.
        ``piece``: entries after which what was done takes effect even if nobody comes.
        """
        kvm, done, began = self._kvm, 0, t_ns
        while done < len(walk):
            stop, waiter = min(len(walk), done + piece), None
            if self._may_yield:
                until = began + walk.end_of(stop)
                waiter = yield from contention(kvm.mmu_lock, kvm.env, t_ns, until)
            if waiter is not None and waiter > t_ns:
                stop = min(stop, walk.behind(waiter - began))
            elif waiter is not None:
                stop = done if self._passed else done + 1
            t_ns = yield from reach(kvm.env, began + walk.end_of(stop))
            if stop > done:
                self._apply(walk, done, stop, t_ns)
                self._passed = True
            done = stop
            if waiter is not None and (more or done < len(walk)):
                t_ns = yield from self._let_go(t_ns)
                began, self._passed = t_ns - walk.end_of(done), False
        return t_ns
