"""Who sleeps in direct reclaim, and until when (mm/vmscan.c, v6.12)."""

from __future__ import annotations

from collections.abc import Generator
from typing import Any

import pytest
from simpy import Environment, Event

from simkvm.kernel.cpu import Cpu
from simkvm.kernel.page_alloc import MAX_RECLAIM_RETRIES, HostPages, Watermarks
from simkvm.kernel.pgdat import Pgdat
from simkvm.kernel.sched import OwnCpus
from simkvm.kernel.task import Task
from simkvm.units import KIB

JIFFY_NS = 4_000_000


class Node:
    """A node with 100 pages to reclaim, ``writing`` of them on their way to swap."""

    def __init__(self, writing: int = 0) -> None:
        self.env = Environment()
        pages = HostPages(self.env, 1000, 4 * KIB, Watermarks(10, 20, 30))
        self.pgdat = Pgdat(pages, None, OwnCpus(), jiffy_ns=JIFFY_NS)
        pages.reclaimable = lambda: 100
        self.pgdat.write_pending = lambda: writing  # type: ignore[method-assign]
        self.ends: list[int] = []

    def consider(self, t_ns: int, priority: int = 1, reclaimed: int = 0, scanned: int = 64) -> None:
        """A round of somebody's that is over at ``t_ns``."""

        def steps() -> Generator[Event, Any, None]:
            yield self.env.timeout(t_ns)
            task = Task("reclaimer", Cpu(0))
            throttle = self.pgdat.throttle
            self.ends.append(
                (yield from throttle.consider(task, t_ns, priority, reclaimed, scanned))
            )

        self.env.process(steps())

    def run(self) -> list[int]:
        self.env.run(10 * JIFFY_NS)
        return self.ends


@pytest.mark.parametrize(
    ("t_ns", "end_ns"), [(0, 2 * JIFFY_NS), (5, 2 * JIFFY_NS), (JIFFY_NS, 3 * JIFFY_NS)]
)
def test_a_timer_of_a_jiffy_is_never_early(t_ns: int, end_ns: int) -> None:
    node = Node()
    node.consider(t_ns)
    assert node.run() == [end_ns]
    assert node.pgdat.throttle.sleeps == 1


@pytest.mark.parametrize(("priority", "reclaimed"), [(2, 0), (0, 0), (12, 0), (1, 1)])
def test_only_a_last_but_one_round_in_vain_sleeps(priority: int, reclaimed: int) -> None:
    node = Node()
    node.consider(7, priority, reclaimed)
    assert node.run() == [7]


def test_somebody_who_gets_on_well_wakes_the_others() -> None:
    """More than an eighth of what was scanned."""
    node = Node()
    node.consider(7)
    node.consider(1000, priority=12, reclaimed=8)
    node.consider(2000, priority=12, reclaimed=9)
    assert node.run() == [1000, 2000, 2000]


def test_nobody_sleeps_where_kswapd_has_given_up() -> None:
    node = Node()
    node.pgdat.kswapd_failures = MAX_RECLAIM_RETRIES
    node.consider(7)
    assert node.run() == [7]


@pytest.mark.parametrize(("writing", "end_ns"), [(50, 2 * JIFFY_NS), (51, 7)])
def test_nobody_sleeps_where_most_is_being_written(writing: int, end_ns: int) -> None:
    """``skip_throttle_noprogress``: twice what is written against what is reclaimable."""
    node = Node(writing)
    node.consider(7)
    assert node.run() == [end_ns]
