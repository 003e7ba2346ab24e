"""When kswapd works and when it sleeps (mm/vmscan.c, ``kswapd``, ``balance_pgdat``, v6.12)."""

from __future__ import annotations

from collections.abc import Generator
from typing import Any

from simpy import Environment, Event

from simkvm.kernel.cpu import Cpu
from simkvm.kernel.kswapd import NAP_NS, Kswapd
from simkvm.kernel.page_alloc import MAX_RECLAIM_RETRIES, HostPages, Watermarks
from simkvm.kernel.pgdat import Pgdat
from simkvm.kernel.sched import OwnCpus
from simkvm.kernel.task import Task
from simkvm.kernel.vmscan import ScanControl
from simkvm.units import KIB

MARKS = Watermarks(min=100, low=200, high=300)
WAKEUP_NS = 700
ROUND_NS = 1000


class Node:
    """A node of 1000 pages, ``free`` of them, whose reclaim gives ``gain`` pages a round."""

    def __init__(self, free: int, gain: int = 0, scans: int = 1000) -> None:
        self.env = Environment()
        self.pages = HostPages(self.env, 1000, 4 * KIB, MARKS)
        self.pages.take(1000 - free)
        self.pgdat = Pgdat(self.pages, None, OwnCpus())
        self.gain, self.scans = gain, scans
        self.priorities: list[int] = []
        self.ends: list[int] = []  #: after how many rounds it was told that the last is over
        self.kswapd = Kswapd(self.pgdat, Task("kswapd", Cpu(0), {}), WAKEUP_NS)
        self.kswapd._reclaimer = self  # type: ignore[assignment]
        self.env.process(self.kswapd.run())

    def age_node(self, sc: ScanControl, t_ns: int) -> Generator[Event, Any, int]:
        """What comes before a round."""
        yield from ()
        return t_ns

    def ended(self, sc: ScanControl) -> bool:
        """What comes after the last one."""
        self.ends.append(len(self.priorities))
        return False

    def shrink_node(self, sc: ScanControl, t_ns: int) -> Generator[Event, Any, int]:
        """A round."""
        yield self.env.timeout(ROUND_NS)
        self.priorities.append(sc.priority)
        sc.scanned, sc.reclaimed = self.scans, self.gain
        self.pages.put(self.gain)
        return t_ns + ROUND_NS

    def until(self, t_ns: int) -> Node:
        self.env.run(t_ns)
        return self


def test_it_works_while_the_high_mark_is_not_met() -> None:
    node = Node(250, gain=20).until(50_000)
    assert node.pages.free == 310  # 300 is not enough: more than the mark
    assert node.kswapd.busy_until(50_000) == 3 * ROUND_NS
    assert node.ends == [3]
    assert node.pgdat.vmstat.kswapd_wakeups == 0  # nobody had to wake it


def test_it_sleeps_until_an_allocation_meets_the_low_mark() -> None:
    node = Node(301, gain=60).until(10)
    node.pages.quickly(10, 100)  # from 301 to 201, which is above the mark
    assert node.until(5000).priorities == []
    node.pages.quickly(5000)
    assert node.until(6000).priorities == []
    node.pages.quickly(6000)  # 200 are not more than 200
    node.until(50_000)
    assert len(node.priorities) == 2
    assert node.pgdat.vmstat.kswapd_wakeups == 1
    assert node.kswapd.busy_until(50_000) == 2 * ROUND_NS


def test_being_woken_takes_a_while() -> None:
    node = Node(301).until(10)
    node.pages.take(150)
    node.pages.wake_kswapd(10)
    assert node.kswapd.busy_until(10 + WAKEUP_NS + 400) == 0
    node.until(10 + WAKEUP_NS + 400)
    assert node.kswapd.busy_until(10 + WAKEUP_NS + 400) == 400


def test_it_looks_again_after_a_nap() -> None:
    """``kswapd_try_to_sleep``: a node below the high mark after HZ/10 is balanced once more."""
    node = Node(301, gain=60).until(10)
    node.pages.take(50)  # 251: above the low mark, below the high one
    assert node.until(NAP_NS - 1).priorities == []
    assert len(node.until(NAP_NS + 10 * ROUND_NS).priorities) == 1


def test_a_nap_that_finds_the_node_balanced_becomes_a_sleep() -> None:
    node = Node(301, gain=60).until(NAP_NS + 1)
    node.pages.take(50)
    assert node.until(5 * NAP_NS).priorities == []


def test_effort_grows_where_little_is_scanned() -> None:
    """The priority falls if a round scanned less than it was to reclaim, or took nothing."""
    assert Node(250, gain=10, scans=299).until(20_000).priorities == [12, 11, 10, 9, 8, 7]
    assert Node(250, gain=10, scans=300).until(20_000).priorities == [12] * 6


def test_it_gives_up_after_so_many_runs_in_vain() -> None:
    node = Node(250).until(10 * NAP_NS)
    assert len(node.priorities) == 12 * MAX_RECLAIM_RETRIES
    node.pages.wake_kswapd(10 * NAP_NS)
    node.until(20 * NAP_NS)
    assert len(node.priorities) == 12 * MAX_RECLAIM_RETRIES
    node.pgdat.kswapd_failures = 0  # somebody else reclaimed something
    node.gain = 60
    node.pages.wake_kswapd(20 * NAP_NS)
    assert node.until(21 * NAP_NS).pages.free == 310


def test_a_run_that_finds_the_node_balanced_is_no_failure() -> None:
    node = Node(301).until(10)
    for _ in range(3):
        node.pages.wake_kswapd(int(node.env.now))
        node.until(int(node.env.now) + 10_000)
    assert node.pgdat.vmstat.kswapd_wakeups == 3
    assert node.pgdat.kswapd_failures == 0
