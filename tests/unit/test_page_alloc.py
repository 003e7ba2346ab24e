"""Watermarks, and what an allocation does when few pages are left (mm/page_alloc.c, v6.12)."""

from __future__ import annotations

from collections.abc import Generator
from typing import Any

import pytest
from simpy import Environment, Event

from simkvm.kernel.cpu import Cpu
from simkvm.kernel.page_alloc import MAX_RECLAIM_RETRIES, HostPages, Watermarks
from simkvm.kernel.task import Task
from simkvm.units import KIB, MIB

MARKS = Watermarks(min=10, low=20, high=30)
ROUND_NS = 1000


class Host:
    """A host of 100 pages whose reclaim gives what it is told to."""

    def __init__(
        self, used: int = 0, gains: list[int] | None = None, reclaimable: int = 50
    ) -> None:
        self.env = Environment()
        self.pages = HostPages(self.env, 100, 4 * KIB, MARKS)
        self.pages.take(used)
        self.gains = gains or []
        self.pages.reclaimable = lambda: reclaimable
        self.pages.reclaimer = lambda task: self  # type: ignore[assignment,return-value]
        self.pages.out_of_memory = self.kill
        self.woken: list[int] = []
        self.pages.wake_kswapd = self.woken.append
        self.killed: list[int] = []
        self.rounds = 0
        self.victim_pages = 40
        self.alive = True

    def direct(self, t_ns: int) -> Generator[Event, Any, tuple[int, int]]:
        """A round of reclaim: it gives the next gain, or nothing."""
        yield self.env.timeout(ROUND_NS)
        gain = self.gains[self.rounds] if self.rounds < len(self.gains) else 0
        self.rounds += 1
        self.pages.put(gain)
        return gain, t_ns + ROUND_NS

    def kill(self, t_ns: int) -> None:
        """The OOM killer."""
        self.killed.append(t_ns)
        self.pages.put(self.victim_pages)

    def allocate(self, pages: int = 1) -> tuple[int, bool]:
        """An allocation at time 0: when it was over, and whether it got what it wanted."""
        task = Task("test", Cpu(0))
        steps = self.pages.allocate(task, 0, lambda: self.alive, pages)
        return self.env.run(self.env.process(steps))  # type: ignore[no-any-return]


def test_watermarks_of_a_host() -> None:
    """``init_per_zone_wmark_min``: the root of 16 times the KiB; a quarter between marks."""
    marks = Watermarks.of(64 * MIB // 4096, 4096, None, 10)
    assert marks.min == 1024 * KIB // 4096  # sqrt(65536 KiB * 16) = 1024 KiB
    assert (marks.low, marks.high) == (marks.min * 5 // 4, marks.min * 3 // 2)


@pytest.mark.parametrize(
    ("size", "kbytes"), [(256 * KIB, 128), (64 << 30, 32768), (8192 << 30, 262144)]
)
def test_the_reserve_has_bounds(size: int, kbytes: int) -> None:
    assert Watermarks.of(size // 4096, 4096, None, 1).min == kbytes // 4


def test_the_scale_factor_widens_the_marks() -> None:
    marks = Watermarks.of(100_000, 4096, 4 * MIB, 300)
    assert (marks.min, marks.low, marks.high) == (1024, 4024, 7024)


@pytest.mark.parametrize(
    ("free", "wakes", "gets"), [(21, 0, 1), (20, 1, 1), (11, 1, 1), (10, 1, 0)]
)
def test_marks_are_compared_with_what_is_free_before(free: int, wakes: int, gets: int) -> None:
    """``__zone_watermark_ok``: an order-0 page may be taken if more than the mark are free."""
    host = Host(used=100 - free)
    assert host.pages.quickly(5, 1) == bool(gets)
    assert host.woken == [5] * wakes
    assert host.pages.free == free - gets


def test_several_pages_are_several_allocations() -> None:
    """The last of 40 finds 39 fewer."""
    assert Host(used=100 - 50).pages.quickly(0, 40)  # 11 > 10 for the last one
    assert not Host(used=100 - 49).pages.quickly(0, 40)


def test_direct_reclaim_goes_on_until_there_is_a_page() -> None:
    host = Host(used=92, gains=[1, 1, 1, 1])
    assert host.allocate() == (3 * ROUND_NS, True)
    assert (host.rounds, host.pages.free, host.killed) == (3, 10, [])
    assert (host.pages.allocstalls, host.pages.stall_ns) == (1, 3 * ROUND_NS)


def test_somebody_is_killed_after_too_many_rounds_in_vain() -> None:
    """``should_reclaim_retry``: up to MAX_RECLAIM_RETRIES rounds without progress, in a row."""
    host = Host(used=90)
    host.allocate()
    assert host.rounds == MAX_RECLAIM_RETRIES + 1
    assert host.killed == [host.rounds * ROUND_NS]


def test_progress_starts_the_count_anew() -> None:
    host = Host(used=95, gains=[0] * MAX_RECLAIM_RETRIES + [1])
    host.allocate()
    assert host.rounds == 2 * (MAX_RECLAIM_RETRIES + 1)


def test_nothing_left_to_reclaim_is_no_reason_to_wait() -> None:
    """All that is reclaimable and free together would not do: the killer comes at once."""
    host = Host(used=95, reclaimable=5)
    host.allocate()
    assert (host.rounds, len(host.killed)) == (1, 1)
    host = Host(used=95, reclaimable=6)
    host.allocate()
    assert host.rounds == MAX_RECLAIM_RETRIES + 1


def test_a_victim_may_use_half_of_the_reserve() -> None:
    """ALLOC_OOM (``__zone_watermark_ok``); it does not reclaim, and may get nothing."""
    for free, gets in ((6, True), (5, False)):
        host = Host(used=100 - free)
        host.alive = False
        assert host.allocate() == (0, gets)
        assert (host.rounds, host.killed) == (0, [])


def test_pages_of_the_pool_are_not_free() -> None:
    host = Host(used=50)
    host.pages.pool = lambda: 30
    assert host.pages.free == 20
    host.pages.take(1)
    assert host.pages.lowest == 19
