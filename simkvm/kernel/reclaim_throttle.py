"""Direct reclaim that gets nowhere sleeps for a moment, so that writes can end.

Source: mm/vmscan.c (``consider_reclaim_throttle``, ``reclaim_throttle``,
``skip_throttle_noprogress``), v6.12. Who reclaimed nothing down to the last priority but one
waits for a timer of one jiffy, or until another direct reclaimer got on well. Not if kswapd has
given up, and not if more than half of what could be reclaimed is being written. Waits for other
reasons (too many isolated, writeback) do not arise: no reclaimer isolates half a node, and MGLRU
does not ask for the other.
"""

from __future__ import annotations

from collections.abc import Generator
from typing import TYPE_CHECKING, Any

from simpy import Event

from simkvm.kernel.page_alloc import MAX_RECLAIM_RETRIES
from simkvm.kernel.task import Task, reach

if TYPE_CHECKING:
    from simkvm.kernel.pgdat import Pgdat


class ReclaimThrottle:
    """The wait queue of one node; ``jiffy_ns``: a tick."""

    def __init__(self, pgdat: Pgdat, jiffy_ns: int) -> None:
        self._pgdat = pgdat
        self._env = pgdat.pages.env
        self._jiffy_ns = jiffy_ns
        self._waiting: list[Event] = []
        self.sleeps = 0

    def consider(
        self, task: Task, t_ns: int, priority: int, reclaimed: int, scanned: int
    ) -> Generator[Event, Any, int]:
        """After a round of direct reclaim by ``task``: returns when it goes on."""
        if reclaimed > scanned >> 3:
            self._wake(t_ns)
            return t_ns
        if priority != 1 or reclaimed or self._skips():
            return t_ns
        self.sleeps += 1
        sched = self._pgdat.sched
        t_ns = yield from reach(self._env, t_ns)
        sched.sleep(task, t_ns)
        woken = Event(self._env)
        self._waiting.append(woken)
        # A timer of a jiffy never fires early: it is due at the second tick from here.
        due_ns = (t_ns // self._jiffy_ns + 2) * self._jiffy_ns
        timer = self._env.timeout(due_ns - int(self._env.now), due_ns)
        yield woken | timer
        if woken in self._waiting:
            self._waiting.remove(woken)
        return (yield from sched.wake(task, max(t_ns, int(self._env.now))))

    def _skips(self) -> bool:
        pgdat = self._pgdat
        if pgdat.kswapd_failures >= MAX_RECLAIM_RETRIES:
            return True
        return 2 * pgdat.write_pending() > pgdat.pages.reclaimable()

    def _wake(self, t_ns: int) -> None:
        waiting, self._waiting = self._waiting, []
        for woken in waiting:
            woken._ok = True
            woken._value = None
            self._env.schedule(woken, delay=max(0, t_ns - int(self._env.now)))
