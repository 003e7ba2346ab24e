"""kswapd: reclaims in the background, from the low watermark up to the high one.

Source: mm/vmscan.c (``kswapd``, ``balance_pgdat``), v6.12.
"""

from __future__ import annotations

from collections.abc import Generator
from typing import TYPE_CHECKING, Any, Final

from simpy import Event

from simkvm.kernel.page_alloc import MAX_RECLAIM_RETRIES
from simkvm.kernel.task import Task, reach
from simkvm.kernel.vmscan import SWAP_CLUSTER_MAX, Reclaimer, ScanControl

if TYPE_CHECKING:
    from simkvm.kernel.pgdat import Pgdat

Steps = Generator[Event, Any, int]
NEVER: Final = -1
NAP_NS: Final = 100_000_000  #: HZ / 10


class Kswapd:
    """The thread."""

    def __init__(self, pgdat: Pgdat, task: Task, wakeup_ns: int) -> None:
        self._pgdat = pgdat
        self._task = task
        self._env = pgdat.pages.env
        self._wakeup_ns = wakeup_ns
        self._reclaimer = Reclaimer(pgdat, task)
        self._woken: Event | None = None  # while it sleeps
        self._busy_ns = 0
        self._began_ns = NEVER  #: since when it has worked, if it does
        pgdat.pages.wake_kswapd = self.wake

    @property
    def task(self) -> Task:
        """Its task, with the time that its functions took."""
        return self._task

    def busy_until(self, t_ns: int) -> int:
        """What it has worked until ``t_ns``."""
        return self._busy_ns + (max(0, t_ns - self._began_ns) if self._began_ns != NEVER else 0)

    def wake(self, t_ns: int) -> None:
        """An allocation at ``t_ns`` found too few pages free (``wakeup_kswapd``)."""
        woken = self._woken
        if woken is None or self._pgdat.kswapd_failures >= MAX_RECLAIM_RETRIES:
            return
        self._woken = None
        woken._ok = True
        woken._value = t_ns + self._wakeup_ns
        self._env.schedule(woken, delay=max(0, woken._value - int(self._env.now)))

    def run(self) -> Generator[Event, Any, None]:
        """Sleep, balance, sleep..."""
        sched, task = self._pgdat.sched, self._task
        t_ns = yield from sched.checkpoint(task, 0)
        while True:
            if self._may_sleep():
                sched.sleep(task, t_ns)
                self._woken = Event(self._env)
                self._nap(self._woken, t_ns)
                t_ns = yield self._woken
                t_ns = yield from sched.wake(task, t_ns)
                self._pgdat.vmstat.kswapd_wakeups += 1
            self._began_ns = t_ns
            t_ns = yield from self._balance(t_ns)
            t_ns = yield from reach(self._env, t_ns + task.cpu.take_stolen())
            t_ns = yield from sched.checkpoint(task, t_ns)
            self._busy_ns += t_ns - self._began_ns
            self._began_ns = NEVER

    def _may_sleep(self) -> bool:
        """Whether the node is balanced, or hopeless (``prepare_kswapd_sleep``)."""
        return self._pgdat.pages.balanced or self._pgdat.kswapd_failures >= MAX_RECLAIM_RETRIES

    def _nap(self, woken: Event, t_ns: int) -> None:
        """Sleep lightly at first: up again if the node is not balanced any more when that is over.

        (``kswapd_try_to_sleep``; after that only the low watermark wakes it.)
        """

        def over(_: Event) -> None:
            if self._woken is woken and not self._may_sleep():
                self.wake(int(self._env.now))

        nap = self._env.timeout(max(0, t_ns - int(self._env.now)) + NAP_NS)
        assert nap.callbacks is not None
        nap.callbacks.append(over)

    def _balance(self, t_ns: int) -> Steps:
        """``balance_pgdat``: rounds of growing effort until the high watermark is reached."""
        pages = self._pgdat.pages
        sc = ScanControl(max(pages.marks.high, SWAP_CLUSTER_MAX), kswapd=True)
        total = 0
        while sc.priority >= 1 and not pages.balanced:
            sc.reclaimed = 0
            t_ns = yield from self._reclaimer.age_node(sc, t_ns)
            t_ns = yield from self._reclaimer.shrink_node(sc, t_ns)
            t_ns = yield from reach(self._env, t_ns + self._task.cpu.take_stolen())
            total += sc.reclaimed
            if sc.scanned < sc.nr_to_reclaim or not sc.reclaimed:
                sc.priority -= 1
        self._reclaimer.ended(sc)
        if not total and not pages.balanced:
            self._pgdat.kswapd_failures += 1
        return t_ns
