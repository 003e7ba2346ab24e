"""CPUs that are shared: who gets one, for how long, and what those that wait or leave are told."""

from __future__ import annotations

from collections.abc import Callable, Generator
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from simpy import Event
from worlds import MIB, MS, world

from simkvm.guest.vcpu import Vcpu
from simkvm.kernel.cpu import IDLE, KERNEL, Cpu
from simkvm.kernel.run_queue import RunQueue, Thread
from simkvm.kernel.sched import FairScheduler
from simkvm.kernel.task import Task, reach
from simkvm.kernel.world import World
from simkvm.validate.theory_sched import Computing, Host

TICK = 4 * MS  #: at 250 Hz
SWITCH = 1600


def ran(thread: Computing) -> int:
    return sum(end - begin for _, begin, end in thread.stretches)


# -- one CPU ----------------------------------------------------------------------------------


@pytest.mark.parametrize("threads", [2, 3])
def test_equal_threads_have_equal_parts(threads: int) -> None:
    host = Host(1, hz=250, switch_ns=SWITCH)
    for _ in range(threads):
        host.env.process(host.thread().compute(0, 1 << 60))
    host.env.run(900 * MS + 1)
    parts = [ran(thread) for thread in host.threads]
    switches = sum(thread.switches for thread in host.sched.threads.values()) - 1
    assert max(parts) - min(parts) <= TICK
    assert abs(sum(parts) + switches * SWITCH - 900 * MS) <= TICK
    for thread in host.threads:
        turns = [end - begin for _, begin, end in thread.stretches]
        # From a switch to the next tick; a thread that is still behind then has another turn.
        assert set(turns[1:]) <= {TICK - SWITCH, TICK}


def test_a_thread_that_mostly_sleeps_is_served_within_two_slices() -> None:
    host = Host(1, hz=250, switch_ns=SWITCH)
    delays = []

    def short(thread: Computing) -> Generator[Event, Any, None]:
        t_ns = 0
        for number in range(200):
            t_ns = yield from reach(host.env, t_ns + 7 * MS + number * 12_345)
            done_ns = yield from thread.run(t_ns, MS // 10)
            delays.append(done_ns - t_ns - MS // 10)
            t_ns = done_ns

    host.env.process(short(host.thread()))
    for _ in range(2):
        host.env.process(host.thread().compute(0, 1 << 60))
    host.env.run(4000 * MS)
    assert len(delays) == 200
    assert max(delays) <= 2 * (TICK + SWITCH)
    assert np.mean(delays) < TICK


def queue(slice_ns: int = 750_000) -> RunQueue:
    return RunQueue(Cpu(0), slice_ns, 2 * slice_ns, lambda t_ns: (t_ns // TICK + 1) * TICK)


def thread(of: RunQueue, name: str = "thread") -> Thread:
    return Thread(Task(name, of.cpu), of)


def test_a_slice_is_renewed_at_ticks_while_nobody_waits() -> None:
    of = queue()
    alone = thread(of)
    of.place(alone)
    of.run(alone, 1 * MS)
    assert of.next_tick() == TICK
    assert not of.account(1 * MS + 700_000)
    assert alone.deadline == 750_000
    assert not of.account(8 * MS + 500_000), "it was at the ticks at 4 and 8 ms"
    assert alone.deadline == 7 * MS + 750_000, "from the tick at 8 ms, after 7 ms"
    assert alone.vruntime == alone.run_ns == 7 * MS + 500_000
    assert of.account(11 * MS), "over since 8.75 ms, and nobody looked"
    assert alone.deadline == alone.vruntime + 750_000


def test_a_thread_keeps_what_it_was_behind() -> None:
    """Also with itself on the queue, which moves the average."""
    of = queue()
    first, second, third = (thread(of, name) for name in "abc")
    of.place(first)
    of.run(first, 0)
    for other in (second, third):
        of.place(other)
        of.waiting.append(other)
    of.account(900_000)
    assert [each.vruntime for each in (first, second, third)] == [900_000, 0, 0]
    of.remove(second, 900_000)
    assert second.lag == 300_000
    of.place(second)
    of.waiting.append(second)
    total = sum(each.vruntime for each in (first, second, third))
    assert total // 3 - second.vruntime == pytest.approx(300_000, abs=2)


def test_the_lag_is_bounded() -> None:
    of = queue()
    first, second = thread(of), thread(of)
    of.place(first)
    of.run(first, 0)
    of.place(second)
    of.waiting.append(second)
    of.remove(second, 100 * MS)
    assert second.lag == 2 * 750_000


def test_a_running_thread_that_is_not_ahead_keeps_the_cpu_for_its_slice() -> None:
    of = queue()
    running, coming = thread(of), thread(of)
    of.place(running)
    of.run(running, 0)
    of.account(300_000)
    coming.lag = 400_000
    of.place(coming)
    of.waiting.append(coming)
    assert coming.vruntime < running.vruntime
    assert of.pick() is coming, "the running one is ahead of the average"
    of.waiting.remove(coming)
    coming.lag = -400_000
    of.place(coming)
    of.waiting.append(coming)
    assert of.pick() is running


# -- between CPUs -----------------------------------------------------------------------------


def test_a_thread_wakes_up_on_its_own_cpu_if_that_is_idle_else_on_another() -> None:
    host = Host(3, hz=250)
    busy, comes = host.thread(0), host.thread(0)

    def life() -> Generator[Event, Any, None]:
        yield from comes.run(1 * MS, 2 * MS)
        yield host.env.timeout(20 * MS - host.env.now)
        yield from comes.run(20 * MS, 2 * MS)
        yield host.env.timeout(50 * MS - host.env.now)
        yield from comes.run(50 * MS, 2 * MS)

    host.env.process(busy.run(0, 30 * MS))
    host.env.process(life())
    host.env.run()
    assert comes.stretches == [(1, 1 * MS, 3 * MS), (1, 20 * MS, 22 * MS), (1, 50 * MS, 52 * MS)]
    assert busy.stretches == [(0, 0, 30 * MS)]


def test_a_cpu_that_becomes_idle_takes_who_has_waited_longest() -> None:
    host = Host(2, hz=250, switch_ns=SWITCH)
    demands = [40 * MS, 6 * MS, 40 * MS, 40 * MS, 40 * MS]
    threads = [host.thread(int(number == 1)) for number in range(len(demands))]
    for number, (made, demand) in enumerate(zip(threads, demands, strict=True)):
        host.env.process(made.run(number, demand))
    host.env.run()
    assert threads[1].stretches == [(1, 1, 6 * MS + 1)], "alone: no tick interrupts it"
    second = [(made, s) for made in threads for s in made.stretches if s.cpu == 1]
    pulled, stretch = min(second[1:], key=lambda pair: pair[1].begin_ns)
    assert stretch.begin_ns == 6 * MS + 1 + SWITCH
    assert pulled is threads[3], "the first of those that never ran; thread 2 ran from 4 ms on"
    for _, before, after in (
        (cpu, a, b)
        for cpu in (0, 1)
        for a, b in pairwise(sorted(s for m in threads for s in m.stretches if s.cpu == cpu))
    ):
        assert after.begin_ns - before.end_ns == SWITCH, "no CPU was idle before the end"


# -- what RCU sees ----------------------------------------------------------------------------


def test_a_cpu_that_switches_threads_is_not_idle() -> None:
    cpu = Cpu(0)
    cpu.enter_kernel(0)
    cpu.sleep(100)
    cpu.switch(100)
    cpu.enter_guest(150, 300)
    assert cpu.state(120) is KERNEL
    assert cpu.switched_between(99, 100)
    assert not cpu.extended_between(0, 400), "the idleness told ahead never came"


def test_a_cpu_is_idle_only_when_nobody_is_there() -> None:
    host = Host(1, hz=250, switch_ns=SWITCH)
    one, two = host.thread(), host.thread()
    host.env.process(one.run(0, 10 * MS))
    host.env.process(two.run(MS // 2, 3 * MS))
    seen: list[tuple[int, bool]] = []

    def look() -> Generator[Event, Any, None]:
        while host.env.now < 20 * MS:
            yield host.env.timeout(100_003)
            now = int(host.env.now)
            seen.append((now, host.cpus[0].state(now) is IDLE))

    host.env.process(look())
    host.env.run()
    end = max(s.end_ns for made in host.threads for s in made.stretches)
    assert end == 13 * MS + 2 * SWITCH
    assert all(idle == (now >= end) for now, idle in seen)
    assert host.cpus[0].switched_between(4 * MS - 1, 4 * MS)


# -- vCPUs ------------------------------------------------------------------------------------

WARM: dict[str, Any] = {
    "memory": 2 * MIB,
    "access": {"pattern": "uniform", "touches": 40_000, "think": 1000},
}


def shared(cpus: int = 1, **keys: Any) -> World:
    return world(host={"scheduler": "fair", "cpus": cpus}, **keys)


def compute(made: World, demand_ns: int) -> Computing:
    """Another thread of ``made``, which computes from the start on."""
    assert isinstance(made.sched, FairScheduler)
    computing = Computing(made.env, made.sched, Task("computing", made.cpus[0]))
    made.env.process(computing.run(0, demand_ns))
    return computing


def leavings(patch: pytest.MonkeyPatch, note: Callable[[Vcpu, int], None]) -> None:
    leave = Vcpu._leave_guest

    def noted(vcpu: Vcpu, t_ns: int) -> None:
        leave(vcpu, t_ns)
        note(vcpu, t_ns)

    patch.setattr(Vcpu, "_leave_guest", noted)


def faults_of(patch: pytest.MonkeyPatch) -> list[int]:
    """Leaves of the faults to come, in order."""
    noted: list[int] = []
    mapped = Vcpu.mapped

    def note(vcpu: Vcpu, t_ns: int) -> int:
        noted.append(vcpu._list[vcpu._position])
        return mapped(vcpu, t_ns)

    patch.setattr(Vcpu, "mapped", note)
    return noted


def test_a_preempted_guest_loses_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """At each preemption it did what it does in as much time of its own."""
    left: list[tuple[int, int]] = []
    faults = faults_of(monkeypatch)
    made = shared(guest=WARM)
    (vcpu,) = made.kvms[0].vcpus
    computing = compute(made, 30 * MS)
    reenter_ns = made.kvms[0].costs.fault.enter_ns
    assert isinstance(made.sched, FairScheduler)
    account = made.sched.threads[vcpu.task]

    def note(vcpu: Vcpu, t_ns: int) -> None:
        left.append((account.run_ns - reenter_ns * len(left), vcpu.touches))

    leavings(monkeypatch, note)
    made.run()
    faults_shared = faults.copy()
    faults.clear()
    alone = world(guest=WARM)
    (other,) = alone.kvms[0].vcpus
    seen = []
    process = alone.env.process(other.run())
    other.process = process
    for at_ns, _ in left:
        alone.env.run(at_ns)
        seen.append(other.touches_by(at_ns))
    alone.env.run()
    assert len(left) > 5
    assert seen == [touches for _, touches in left]
    assert vcpu.touches == other.touches == 40_000
    assert faults_shared == faults
    assert vcpu.fault.faults == other.fault.faults
    assert (made.kvms[0].stage2.leaf.entries == alone.kvms[0].stage2.leaf.entries).all()
    assert (vcpu._tags == other._tags).all()
    threads = list(made.sched.threads.values())
    switched = sum(each.switches for each in threads) - 1  # the first was from idle
    whole = other.finished_ns + 30 * MS + len(left) * reenter_ns + switched * SWITCH
    assert max(vcpu.finished_ns, computing.stretches[-1].end_ns) == whole
