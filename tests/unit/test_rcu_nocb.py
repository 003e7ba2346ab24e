"""Offloaded and lazy callbacks, one rule at a time (kernel/rcu/tree_nocb.h, v6.12).

Expected times are worked out from ticks and wake-ups. ``WAKE`` passes from the wake-up of a kthread
until it runs; a timer never fires early, so one for n jiffies fires n + 1 ticks later, and one for
ten seconds at a multiple of 64 jiffies (512 at HZ=1000).
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise

import pytest
from simpy import Event

from simkvm.kernel.rcu_bypass import Bypass
from simkvm.kernel.rcu_config import RcuConfig, timer_wheel
from simkvm.kernel.rcu_segcblist import ALONE, Entry, SegmentedCallbackList
from tests.unit.test_rcu import COSTS, MS, Host

WAKE = COSTS.switch_ns


def scan(cpus: int) -> int:
    return COSTS.core_ns + cpus * COSTS.fqs_scan_per_cpu_ns


# -- which CPUs -------------------------------------------------------------------------------


def test_a_cpu_may_be_offloaded_and_have_its_tick() -> None:
    """It reports by its two ticks, but no tick numbers or invokes its callbacks."""
    host = Host(250, offloaded=(3,))
    host.guest_on(0, 2, 3)
    asked = host.tick(1) + 1 * MS
    host.call(asked, cpu=3)
    host.run()
    ((_, start, end, _),) = host.periods
    assert start == asked + 2 * WAKE, "rcuog, then the grace-period kthread"
    assert end == host.tick(3) + WAKE + scan(1)
    assert host.invoked == [(3, asked, end + 2 * WAKE)], "rcuog, then rcuo"
    assert host.cpus[3].stolen_ns == 3 * COSTS.core_ns, "start, report, end"


def test_with_all_cpus_offloaded_kthreads_run_anywhere() -> None:
    """The first idle CPU is taken, although it is offloaded itself."""
    host = Host(250, offloaded=(0, 1, 2, 3))
    host.guest_on(0, 1)
    host.call_many([1 * MS] * 50, cpu=0, cost_ns=10_000)
    host.run()
    assert len(host.invoked) == 50
    assert host.cpus[0].stolen_ns < 50 * 10_000
    assert host.rcu.idle


def test_the_end_of_another_grace_period_does_not_wake_rcuog() -> None:
    """A is queued while one runs and waits for the second; B, queued later, is numbered after it.

    So nobody has asked for the third when the second ends: rcuog and the kthread wake first.
    """
    host = Host(250, offloaded=(1,))
    host.guest_on(0, 1, 2, 3)
    host.call(1 * MS)
    host.call(host.tick(1) + 1 * MS, cpu=1)
    host.call(host.tick(1) + 2 * MS, cpu=1)
    host.run()
    (_, _, first, _), (_, start, second, _), (_, third, end, _) = host.periods
    assert start == first
    assert third == second + 2 * WAKE
    assert [t for cpu, _, t in host.invoked if cpu] == [second + 2 * WAKE, end + 2 * WAKE]


# -- invocation -------------------------------------------------------------------------------


def test_rcuo_and_a_thread_take_equal_turns_and_rcuo_ends_its_between_two_callbacks() -> None:
    """HZ=250, 8 CPUs: turns of 4 ms. 10 ms of callbacks take 18, of which the thread has 8."""
    host = Host(250, cpus=8, offloaded=(7,))
    host.guest_on(*range(8))
    cost = 30_000
    host.call_many([1 * MS] * 300, cpu=7, cost_ns=cost - COSTS.callback_invoke_ns)
    host.run()
    times = [t for _, _, t in host.invoked][:64]  # the others were in the bypass list
    assert {b - a for a, b in pairwise(times)} == {cost}
    times = [t for _, _, t in host.invoked][64:]
    turn = -(-4 * MS // cost) * cost  # 134 callbacks
    gaps = {i: b - a for i, (a, b) in enumerate(pairwise(times), 1) if b - a != cost}
    assert gaps == {134: turn + cost}
    assert [done for _, _, done, _ in host.batches] == [64, 236], "no limit to a batch"
    assert host.batches[1][3] == 236 * cost, "without the thread's turn"
    assert 300 * cost <= host.cpus[0].stolen_ns < 301 * cost


def test_on_an_idle_cpu_rcuo_just_goes_on() -> None:
    host = Host(250, cpus=8, offloaded=(7,))
    host.guest_on(7)
    host.call_many([1 * MS] * 60, cpu=7, cost_ns=100_000 - COSTS.callback_invoke_ns)
    host.run()
    assert {b - a for (_, _, a), (_, _, b) in pairwise(host.invoked)} == {100_000}


# -- the bypass list --------------------------------------------------------------------------


def entry(lazy: bool = False) -> Entry:
    return (0, lambda _: 0, ALONE, lazy)


def bypass(hz: int, **config: int) -> tuple[Bypass, SegmentedCallbackList]:
    callbacks = SegmentedCallbackList()
    return Bypass(callbacks, RcuConfig(hz, True, 4, **config)), callbacks


@pytest.mark.parametrize(("hz", "direct"), [(100, 160), (250, 64), (300, 53), (1000, 16)])
def test_so_many_calls_a_jiffy_go_to_the_callback_list(hz: int, direct: int) -> None:
    """16000 / HZ."""
    held, callbacks = bypass(hz)
    for _ in range(2 * direct):
        held.call(entry(), 7)
    assert (callbacks.waiting, len(held)) == (direct, direct)


def test_what_is_above_the_limit_counts_in_the_next_jiffy() -> None:
    """100 calls at a limit of 64: 35 are carried over, so 29 more are direct: 36, 37, ... 64."""
    held, callbacks = bypass(250)
    for _ in range(100):
        held.call(entry(), 7)
    assert (callbacks.waiting, len(held)) == (64, 36)
    held.call(entry(), 8)
    assert (callbacks.waiting, len(held)) == (101, 0), "the list is flushed first"
    for _ in range(28):
        held.call(entry(), 8)
    assert len(held) == 0
    held.call(entry(), 8)
    assert len(held) == 1


def test_under_a_flood_the_list_is_flushed_by_the_first_call_of_a_jiffy() -> None:
    """The count is carried over in full, so no call is direct; the one that flushes goes along."""
    held, callbacks = bypass(250)
    for _ in range(200):
        held.call(entry(), 7)
    assert (callbacks.waiting, len(held)) == (64, 136)
    held.call(entry(), 8)
    assert (callbacks.waiting, len(held)) == (201, 0)
    held.call(entry(), 8)
    assert (callbacks.waiting, len(held)) == (201, 1)


def test_a_list_of_qhimark_is_flushed_by_the_next_call() -> None:
    held, callbacks = bypass(250, qhimark=300)
    for _ in range(64 + 300):
        held.call(entry(), 7)
    assert len(held) == 300
    held.call(entry(), 7)
    assert (callbacks.waiting, len(held)) == (64 + 301, 0)


def test_rcuog_flushes_what_is_older_than_a_jiffy() -> None:
    held, _ = bypass(250)
    for _ in range(65):
        held.call(entry(), 7)
    held.flush_if_old(8)
    assert len(held) == 1
    held.flush_if_old(9)
    assert len(held) == 0


def test_bypassed_callbacks_wait_for_the_next_grace_period() -> None:
    """64 go with the first, which ends at tick 3; rcuog then finds the others two jiffies old."""
    host = Host(250, cpus=2, offloaded=(1,))
    asked = host.tick(1) + 1 * MS
    host.call_many([asked] * 80, cpu=1, cost_ns=0)
    host.run()
    (_, _, first, _), (_, start, second, _) = host.periods
    assert first == host.tick(3) + WAKE + scan(2)
    assert start == first + 2 * WAKE
    assert second == host.tick(5) + WAKE + scan(2)
    times = [t for _, _, t in host.invoked]
    one = COSTS.callback_invoke_ns
    assert times[:64] == [first + 2 * WAKE + i * one for i in range(64)]
    assert times[64:] == [second + 2 * WAKE + i * one for i in range(16)]


def held_up(host: Host, until_ns: int) -> None:
    """CPU 0 is in a reader for a while, so the first grace period is long."""
    host.cpus[0].atomic(0, until_ns)
    host.cpus[0].enter_guest(until_ns, 1 << 50)


def test_a_timer_flushes_the_bypass_list_while_a_grace_period_goes_on() -> None:
    """Armed in jiffy 1 for two: tick 4. By then the next grace period has been asked for."""
    host = Host(250, cpus=2, offloaded=(1,))
    held_up(host, host.tick(4) + 1 * MS)
    host.call_many([host.tick(1) + 1 * MS] * 80, cpu=1)
    host.run()
    (_, _, first, _), (_, start, _, _) = host.periods
    assert first == host.tick(5) + WAKE
    assert start == first


def test_and_not_before() -> None:
    """The same, but the grace period ends at tick 3: nobody has asked for another."""
    host = Host(250, cpus=2, offloaded=(1,))
    held_up(host, host.tick(2) + 1 * MS)
    host.call_many([host.tick(1) + 1 * MS] * 80, cpu=1)
    host.run()
    (_, _, first, _), (_, start, _, _) = host.periods
    assert first == host.tick(3) + WAKE + scan(1), "the timer of the kthread, for the idle CPU"
    assert start == first + 2 * WAKE


def flooded(host: Host, calls: int, held_until: int) -> int:
    """Time from the end of the first grace period to the second: 0 if it had been asked for.

    One call in jiffy 2 starts the first, which scans at even ticks; 60 follow in jiffy 6 and the
    rest in 7, all direct.
    """
    host.cpus[0].atomic(0, host.tick(held_until) + 1 * MS)
    host.cpus[0].sleep(host.tick(held_until) + 1 * MS)
    host.call(host.tick(2) + 1 * MS, cpu=1)
    host.call_many([host.tick(6) + 1 * MS] * 60, cpu=1)
    host.call_many([host.tick(7) + 1 * MS] * (calls - 61), cpu=1)
    host.run()
    (_, _, end, _), (_, start, _, _) = host.periods
    assert end == host.tick(held_until + 1) + WAKE + scan(1)
    return start - end


@pytest.mark.parametrize(("calls", "late_ns"), [(101, 2 * WAKE), (102, 0)])
def test_qhimark_more_callbacks_wake_rcuog_at_the_next_tick(calls: int, late_ns: int) -> None:
    """Counted from the call that woke it last. It numbers what was queued since, and so asks."""
    host = Host(250, cpus=2, offloaded=(1,), qhimark=100)
    assert flooded(host, calls, held_until=7) == late_ns


@pytest.mark.parametrize(("held_until", "late_ns"), [(7, 2 * WAKE), (9, 0)])
def test_without_a_tick_the_timer_wakes_rcuog(held_until: int, late_ns: int) -> None:
    """Armed in jiffy 7 for one: tick 9."""
    host = Host(250, cpus=2, nohz_full=(1,), qhimark=100)
    assert flooded(host, 102, held_until) == late_ns


# -- lazy callbacks ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("jiffy", "delta", "fires"),
    [
        (0, 1, 2),
        (5, 2, 8),
        (0, 62, 63),
        (0, 63, 64),  # the second level: eight jiffies a bucket
        (3, 503, 512),
        (1, 1000, 1024),  # ten seconds at HZ=100, 250, 300, 1000
        (1, 2500, 2560),
        (1, 3000, 3008),
        (1, 10000, 10240),
    ],
)
def test_a_timer_fires_at_the_end_of_its_bucket(jiffy: int, delta: int, fires: int) -> None:
    assert timer_wheel(jiffy, delta) == fires


@pytest.mark.parametrize(("hz", "fires"), [(100, 1024), (250, 2560), (300, 3008), (1000, 10240)])
def test_a_lone_lazy_callback_waits_ten_seconds_and_a_grace_period(hz: int, fires: int) -> None:
    host = Host(hz, offloaded=(3,), lazy=True)
    host.call(host.tick(1) + 1, cpu=3)
    host.run()
    ((_, start, end, _),) = host.periods
    assert start == host.tick(fires) + 2 * WAKE
    assert host.invoked == [(3, host.tick(1) + 1, end + 2 * WAKE)]
    assert host.invoked[0][2] - host.invoked[0][1] > 10_000 * MS


def test_a_lazy_callback_wakes_nobody() -> None:
    """The call arms the timer itself, in jiffy 59; rcuog could not do so before jiffy 60."""
    assert (timer_wheel(59, 2500), timer_wheel(60, 2500)) == (2560, 2624)
    host = Host(250, offloaded=(3,), lazy=True)
    host.call(host.tick(60) - 1_000, cpu=3)
    host.run()
    assert host.periods[0][1] == host.tick(2560) + 2 * WAKE


def test_lazy_is_nothing_to_a_cpu_that_is_not_offloaded() -> None:
    times = []
    for lazy in (False, True):
        host = Host(250, offloaded=(3,), lazy=lazy)
        host.guest_on(0, 1, 2)
        host.call(1 * MS)
        host.run()
        times.append(host.invoked)
    assert times[0] == times[1]


def test_one_that_hurries_takes_the_lazy_ones_with_it() -> None:
    host = Host(250, offloaded=(3,), lazy=True)
    host.call(host.tick(1) + 1 * MS, cpu=3)
    host.call(host.tick(9) + 1 * MS, cpu=2)  # another CPU's is no help, nor is its grace period
    host.call(host.tick(50) + 1 * MS, cpu=3, hurry=True)
    host.run()
    (_, start, end, _) = host.periods[1]
    assert start == host.tick(50) + 1 * MS + 2 * WAKE
    first, second = (t for cpu, _, t in host.invoked if cpu == 3)
    assert first == end + 2 * WAKE
    assert second == first + 60 + COSTS.callback_invoke_ns


def test_a_lazy_callback_stays_although_a_grace_period_runs_and_the_timer_starts_anew() -> None:
    """It is not numbered with the one that hurried before it, and rcuog arms the timer again.

    The grace period ends at tick 3, so the timer is for jiffy 2503 instead of 2501; with the
    first call in jiffy 61 the two are in different buckets.
    """
    host = Host(250, offloaded=(3,), lazy=True)
    host.call(host.tick(58) + 1 * MS, cpu=3, hurry=True)
    host.call(host.tick(58) + 2 * MS, cpu=3)
    host.run()
    (_, _, end, _), (_, start, _, _) = host.periods
    assert end == host.tick(60) + WAKE + scan(4)
    assert timer_wheel(58, 2500) == 2560
    assert timer_wheel(60, 2500) == 2624
    assert start == host.tick(2624) + 2 * WAKE


def test_qhimark_lazy_callbacks_do_not_wait() -> None:
    """The list holds 100 when the 101st comes: it flushes, and rcuog is woken at once."""
    host = Host(250, offloaded=(3,), lazy=True, qhimark=100)
    times = [host.tick(1) + i * 100_000 for i in range(1, 102)]
    host.call_many(times, cpu=3)
    host.run()
    _, start, _, _ = host.periods[0]
    assert start == times[-1] + 2 * WAKE
    assert len(host.periods) == 1
    assert len(host.invoked) == 101


def test_a_call_after_ten_seconds_flushes_before_the_timer() -> None:
    """First call in jiffy 1; the one in jiffy 2502 finds the list too old, the timer is at 2560."""
    host = Host(250, offloaded=(3,), lazy=True)
    host.call(host.tick(1) + 1 * MS, cpu=3)
    host.call(host.tick(2501) + 1 * MS, cpu=3)
    host.call(host.tick(2502) + 1 * MS, cpu=3)
    host.run()
    assert host.periods[0][1] == host.tick(2502) + 1 * MS + 2 * WAKE
    assert len(host.periods) == 1


def test_synchronize_rcu_hurries() -> None:
    host = Host(250, cpus=2, offloaded=(1,), lazy=True)
    waited: list[int] = []

    def caller() -> Iterator[Event]:
        yield host.env.timeout(5 * MS)
        host.cpus[1].enter_kernel(5 * MS)
        done = host.rcu.synchronize_rcu(1)
        host.cpus[1].sleep(5 * MS + 300)
        yield done
        waited.append(int(host.env.now))

    host.process(caller())
    host.run()
    ((_, start, end, _),) = host.periods
    assert start == 5 * MS + 2 * WAKE
    assert waited == [end + 2 * WAKE + COSTS.wakeup_ns]
