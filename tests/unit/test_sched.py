"""CPUs that are shared: who gets one, for how long, and what those that wait or leave are told."""

from __future__ import annotations

from collections.abc import Callable, Generator
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from simpy import Event
from worlds import MS, acquisitions, world

from simkvm.guest.vcpu import Vcpu
from simkvm.kernel.cpu import GUEST, IDLE, KERNEL, Cpu
from simkvm.kernel.run_queue import RunQueue, Thread
from simkvm.kernel.sched import FairScheduler, OwnCpus
from simkvm.kernel.task import Task, reach
from simkvm.kernel.world import World
from simkvm.scenario.errors import InputError
from simkvm.units import MIB
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


@pytest.mark.parametrize("others", [1, 2])
def test_a_thread_that_mostly_sleeps_is_served_within_two_slices(others: int) -> None:
    host = Host(1, hz=250, switch_ns=SWITCH)
    delays: list[int] = []

    def short(thread: Computing) -> Generator[Event, Any, None]:
        t_ns = 0
        for number in range(200):
            t_ns = yield from reach(host.env, t_ns + 7 * MS + number * 12_345)
            done_ns = yield from thread.run(t_ns, MS // 10)
            delays.append(done_ns - t_ns - MS // 10)
            t_ns = done_ns

    host.env.process(short(host.thread()))
    for _ in range(others):
        host.env.process(host.thread().compute(0, 1 << 60))
    host.env.run(4000 * MS)
    assert len(delays) == 200
    assert max(delays) <= 2 * (TICK + SWITCH)
    assert np.mean(delays) < TICK
    assert delays.count(SWITCH) > 20, "one that is behind preempts who is ahead, at once"


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


def shared(cpus: int = 1, hz: int = 250, **keys: Any) -> World:
    return world(host={"scheduler": "fair", "cpus": cpus, "hz": hz}, **keys)


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
    seen: list[int] = []
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


FILLING: dict[str, Any] = {
    "memory": 64 * MIB,
    "access": {"pattern": "uniform", "touches": 30_000, "think": 1500},
}


def test_who_is_preempted_on_the_way_to_the_guest_pays_for_no_exit(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A tick while a fault is handled: the vCPU goes on as it was about to."""
    made = shared(guest=FILLING, hz=1000)
    (vcpu,) = made.kvms[0].vcpus
    computing = compute(made, 60 * MS)
    inside: list[bool] = []

    preempted = Vcpu.preempted

    def noted(vcpu: Vcpu, t_ns: int) -> None:
        inside.append(vcpu.cpu.state(t_ns) is GUEST)
        preempted(vcpu, t_ns)

    monkeypatch.setattr(Vcpu, "preempted", noted)
    made.run()
    alone = world(guest=FILLING)
    alone.run()
    assert min(sum(inside), len(inside) - sum(inside)) > 10
    assert isinstance(made.sched, FairScheduler)
    switched = sum(each.switches for each in made.sched.threads.values()) - 1
    whole = alone.kvms[0].vcpus[0].finished_ns + ran(computing) + switched * SWITCH
    whole += sum(inside) * made.kvms[0].costs.fault.enter_ns
    assert vcpu.finished_ns == whole


@pytest.mark.parametrize(("arch", "flushed"), [("arm64", True), ("x86", False)])
def test_translations_that_another_vcpu_of_the_vm_may_have_made_go(
    arch: str, flushed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """kvm_arch_vcpu_load() of arm64; a vCPU of x86 has a VPID of its own."""
    machine = {
        "arm64": {},
        "x86": {"machine": "x86-icelake-64c", "kernel": "linux-6.12-x86"},
    }[arch]
    made = shared(guest=WARM | {"vcpus": 2}, **machine)
    cached: list[int] = []
    enter = Vcpu._give_way

    def noted(vcpu: Vcpu) -> Generator[Event, Any, int]:
        before = np.count_nonzero(vcpu._tags >= 0)
        next_ns = yield from enter(vcpu)
        cached.append(int(np.count_nonzero(vcpu._tags >= 0)) - int(before))
        return next_ns

    monkeypatch.setattr(Vcpu, "_give_way", noted)
    made.run()
    assert len(cached) > 5
    assert any(lost < -100 for lost in cached) == flushed


def test_a_vcpu_that_waits_for_its_cpu_does_not_hold_a_slot_s_update_up(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    made = shared(guest=WARM)
    compute(made, 30 * MS)
    seen: list[bool] = []

    def note(vcpu: Vcpu, t_ns: int) -> None:
        seen.append(vcpu.faulting)

    leavings(monkeypatch, note)
    made.run()
    assert seen
    assert not any(seen)


def test_a_flush_interrupts_nobody_who_waits_for_a_cpu() -> None:
    """Their CPU is in guest mode, but it runs another vCPU."""
    made = shared(guest=WARM | {"vcpus": 3}, machine="x86-icelake-64c", kernel="linux-6.12-x86")
    for vcpu in made.kvms[0].vcpus:
        vcpu.process = made.env.process(vcpu.run())
    made.env.run(62 * MS + 123)
    now = int(made.env.now)
    assert made.cpus[0].state(now) is GUEST
    made.remote_flush.flush(made.kvms[0], now)
    assert made.remote_flush.interrupts == 1


# -- whole worlds -----------------------------------------------------------------------------

BUSY: dict[str, Any] = {
    "guest": {
        "vcpus": 8,
        "memory": 8 * MIB,
        "access": {"pattern": "uniform", "touches": 8000, "think": 2000},
    },
    "ageing": {"interval": 1 * MS},
    "contenders": {
        "drop": {"kind": "madvise_dontneed", "guest": "vm0", "range": 1 * MIB, "rate": 500}
    },
}
COLUMNS = {"runqueue_wait_total_ns", "cpu_busy_ratio", "context_switches"}


def test_more_threads_than_cpus() -> None:
    made = shared(4, **BUSY)
    summary = made.run().summary
    assert summary["touches"] == 64_000
    assert summary["violations"] == 0
    assert isinstance(made.sched, FairScheduler)
    threads = made.sched.threads.values()
    names = [each.task.name for each in threads]
    assert names == [*(f"vm0/vcpu{n}" for n in range(8)), "ageing", "drop"]
    assert summary["runqueue_wait_total_ns"] >= sum(each.wait_ns for each in threads) > 0
    assert summary["context_switches"] == sum(each.switches for each in threads)
    assert 0.8 < summary["cpu_busy_ratio"] <= 1
    busy_ns = sum(each.run_ns for each in threads) + sum(q.switch_ns for q in made.sched.queues)
    assert summary["cpu_busy_ratio"] == busy_ns / (4 * summary["sim_ns"])


def test_with_a_cpu_for_each_nothing_changes() -> None:
    own = world(**BUSY).run()
    fair = world(host={"scheduler": "fair"}, **BUSY).run()
    assert fair.fingerprint == own.fingerprint
    assert fair.summary["events"] == own.summary["events"]
    assert fair.summary["runqueue_wait_total_ns"] == 0
    assert set(fair.summary) - set(own.summary) == COLUMNS
    shared_columns = set(own.summary)
    assert {k: fair.summary[k] for k in shared_columns} == own.summary


def test_half_the_cpus_take_twice_as_long() -> None:
    """Guests that only compute: work is conserved, and nothing else is done."""
    guest = WARM | {"vcpus": 4}
    ends = [shared(cpus, guest=guest).run().summary["sim_ns"] for cpus in (4, 2, 1)]
    assert ends[1] / ends[0] == pytest.approx(2, rel=0.02)
    assert ends[2] / ends[0] == pytest.approx(4, rel=0.02)


def test_a_vm_ends_while_its_vcpus_wait_for_a_cpu() -> None:
    for order in ("process_exit", "close_vm"):
        made = shared(
            guest=WARM | {"vcpus": 3, "teardown": {"order": order, "at": 10 * MS}},
            ageing={"interval": 1 * MS},
        )
        made.run()
        assert all(end.done for end in made.teardowns)
        assert all(10 * MS <= vcpu.finished_ns < 30 * MS for vcpu in made.kvms[0].vcpus)


def test_without_a_scheduler_each_needs_a_cpu_and_a_selftest_always_does() -> None:
    with pytest.raises(InputError, match=r"8 vCPUs .* need 10 CPUs, the host has 4"):
        world(host={"cpus": 4}, **BUSY)
    with pytest.raises(InputError, match="a selftest's threads have a CPU each"):
        world(
            host={"scheduler": "fair"},
            guests={},
            selftest={"test": "access_tracking_perf_test", "vcpus": 2},
        )
    assert isinstance(world(**BUSY).sched, OwnCpus)


def test_a_guest_that_does_nothing_but_fault_is_preempted_too() -> None:
    """Each fault's section plans the next one: there it has to see that it is to go."""
    made = shared(guest={"memory": 64 * MIB, "access": {"pattern": "populate"}})
    computing = compute(made, 10 * MS)
    made.run()
    assert ran(computing) == 10 * MS
    assert computing.stretches[-1].end_ns < 25 * MS
    turns = [end - begin for _, begin, end in computing.stretches]
    assert max(turns) <= TICK


@pytest.mark.parametrize("preemption", ["none", "full"])
def test_a_reschedule_that_is_due_breaks_mmu_lock(preemption: str) -> None:
    """__cond_resched_rwlock_write(): between two chunks, whatever the preemption model."""
    made = world(
        host={"scheduler": "fair", "cpus": 1, "hz": 1000, "preemption": preemption},
        guest={"memory": 4096 * MIB, "mapping": 4096, "access": {"pattern": "populate"}},
    )
    (kvm,) = made.kvms
    task = Task("unmaps", made.cpus[0])
    computing = compute(made, 200 * MS)
    sparse = range(0, kvm.leaves, 512)  # a table each
    for leaf in sparse:
        kvm.tables_linked(kvm.stage2.map_leaf(leaf, 1), 0)
        kvm.host.install(leaf, True)

    def unmap() -> Generator[Event, Any, None]:
        t_ns = yield from made.sched.wake(task, 0)
        t_ns = yield from kvm.notifier.invalidate(task, t_ns, 0, kvm.leaves)
        made.sched.sleep(task, t_ns)

    made.env.run(made.env.process(unmap()))
    rows = [row for row in acquisitions(kvm.mmu_lock.rows) if row.mode]
    starts = rows[:-1]  # the last is the end of the range
    assert 2 <= len(starts) <= 4, "three offers between four chunks of 1 GiB"
    held = [(row.entry, row.release) for row in starts]
    for _, begin, end in computing.stretches:
        assert not any(begin < until and since < end for since, until in held)
    between = [(a.release, b.entry) for a, b in pairwise(starts)]
    for since, until in between:
        assert any(since <= begin and end <= until for _, begin, end in computing.stretches)
