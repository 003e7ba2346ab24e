"""The vCPU that works off jobs: small cases by hand, and plans cut short."""

from __future__ import annotations

from collections.abc import Generator, Iterator
from typing import Any

import numpy as np
import pytest
from job_worlds import (
    FOUR_KIB,
    PROGRAMS,
    REFILL_NS,
    SERVER,
    WAKEUP_NS,
    answered,
    given,
    jobs,
    seat,
    unmap,
)
from simpy import Environment, Event
from worlds import MS, US, run, world

from simkvm.guest import job_vcpu, patterns, workloads
from simkvm.guest.barrier import Barrier
from simkvm.guest.jobs import Seat, Stage, back_to_back, in_batches
from simkvm.guest.memcached import Server
from simkvm.kernel.stage2 import AF
from simkvm.observe.record import Record
from simkvm.scenario.workloads import Memcached
from simkvm.units import MIB


def test_two_connections_are_served_first_come_first_served(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    work = jobs(*[([0], 10 * US, 5 * US)] * 4)
    stage = Stage(iter([work]), first_ns=(0, 3 * US), each=2, extra_ns=7 * US, requests=True)
    made = given(monkeypatch, [stage])
    # 0: 0-10. 1, there since 3: 10-20. 0 again since 15: 20-30. 1 again since 25: 30-40.
    assert answered(made) == [
        (10 * US, 17 * US),
        (20 * US, 24 * US),
        (30 * US, 22 * US),
        (40 * US, 22 * US),
    ]
    assert made.kvms[0].vcpus[0].finished_ns == 40 * US


def test_an_idle_worker_has_to_wake_up(monkeypatch: pytest.MonkeyPatch) -> None:
    stage = Stage(iter([jobs(*[([0], 10 * US, 5 * US)] * 2)]), each=2, requests=True)
    made = given(monkeypatch, [stage])
    again = 15 * US + WAKEUP_NS
    assert answered(made) == [(10 * US, 10 * US), (again + 10 * US, WAKEUP_NS + 10 * US)]


def test_the_cpu_of_a_worker_without_a_request_is_idle(monkeypatch: pytest.MonkeyPatch) -> None:
    stage = Stage(iter([jobs(*[([0], 10 * US, 50 * US)] * 3)]), each=3)
    made = given(monkeypatch, [stage])
    vcpu, seen = made.kvms[0].vcpus[0], []

    def look() -> Generator[Event, Any, None]:
        for t_ns in (5 * US, 12 * US, 65 * US):
            yield made.env.timeout(t_ns - int(made.env.now))
            seen.append(vcpu.cpu.state(t_ns).name)
            vcpu.catch_up(t_ns)  # which is the same afterwards, and a little later
            seen.append(vcpu.cpu.state(t_ns - 3 * US).name)

    made.env.process(look())
    made.run()
    assert seen == ["GUEST", "GUEST", "IDLE", "GUEST", "GUEST", "IDLE"]


def test_when_each_page_was_touched_last_is_known_to_the_nanosecond(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    work = jobs(([0, 1, 2], 10 * US, 5 * US), ([1, 3], 10 * US, 0))
    made = given(monkeypatch, [Stage(iter([work]), each=2)])
    kvm = made.kvms[0]
    kvm.remember_touches()
    made.run()
    again = 15 * US + WAKEUP_NS
    assert kvm.last_touch_ns[:5].tolist() == [0, again, 2 * US, again + US, -1]


def test_a_fault_makes_all_requests_behind_it_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    def served(mapped: bool) -> list[tuple[int, int]]:
        work = jobs(*[([0], 10 * US, 5 * US)] * 4)
        stage = Stage(iter([work]), first_ns=(0, 3 * US), each=2, requests=True)
        return answered(given(monkeypatch, [stage], mapped=mapped))

    warm, cold = served(True), served(False)
    late = cold[0][0] - warm[0][0]
    assert late > US, "the first touch faults"
    assert [end - before for (end, _), (before, _) in zip(cold, warm, strict=True)] == [late] * 4
    # The first client asks again later, the second one has waited since 3 us.
    assert [waited - before for (_, waited), (_, before) in zip(cold, warm, strict=True)] == [
        late,
        late,
        0,
        0,
    ]


def test_what_is_answered_in_the_warm_up_does_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    stage = Stage(iter([jobs(*[([0], 10 * US, 0)] * 4)]), each=4, requests=True)
    made = given(monkeypatch, [stage], warmup=20 * US)
    summary = made.run().summary
    # The answer at 20 us is the first that counts: 3 in the 20 us that are left.
    assert summary["requests"] == 3
    assert summary["requests_per_s"] == pytest.approx(3 / 20e-6)


def test_vcpus_wait_for_one_another_at_a_barrier(monkeypatch: pytest.MonkeyPatch) -> None:
    def stages(first: int, second: int) -> list[Stage]:
        return [
            Stage(iter([jobs(([0], first, 0))]), each=1, barrier=True),
            Stage(iter([jobs(([0], second, 0))]), each=1),
        ]

    made = given(monkeypatch, stages(30 * US, 5 * US), stages(10 * US, 7 * US))
    made.run()
    last, woken = (vcpu.finished_ns for vcpu in made.kvms[0].vcpus)
    assert last == 35 * US
    assert woken == 30 * US + WAKEUP_NS + 7 * US


@pytest.mark.parametrize(
    ("flushes", "busy_us", "refills"), [(1, 1000, 40), (3, 1000, 120), (500, 1000, 8000)]
)
def test_invalidations_cost_the_hot_pages_used_since(
    monkeypatch: pytest.MonkeyPatch, flushes: int, busy_us: int, refills: int
) -> None:
    """40 hot pages, each used again after 5 us: 1 ms of work comes by 8,000 of them."""
    number = 40
    stage = Stage(iter([jobs(*[([0], 100 * US, 0)] * number)]), each=number)
    made = given(monkeypatch, [stage])

    def flush() -> Generator[Event, Any, None]:
        yield made.env.timeout(busy_us * US // 2)
        for _ in range(flushes):
            made.kvms[0].accesses.flushed(int(made.env.now), 0, 0)

    made.env.process(flush())
    made.run()
    end_ns = made.kvms[0].vcpus[0].finished_ns
    assert end_ns == number * 100 * US + refills * REFILL_NS


def test_hot_pages_are_counted_once_if_a_fault_lies_between(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The first job faults half-way: 50 us of it come before that settlement, 50 us after it."""

    def end_ns(flushes: int) -> int:
        first, rest = ([0, 1], 100 * US, 0), ([0], 100 * US, 0)
        work = jobs(first, *[rest] * 99, step=50 * US)
        made = given(monkeypatch, [Stage(iter([work]), each=100)])
        kvm = made.kvms[0]
        unmap(made, 1)

        def flush() -> Generator[Event, Any, None]:
            for t_ns in (10 * US, 90 * US):
                yield made.env.timeout(t_ns - int(made.env.now))
                for _ in range(flushes):
                    kvm.accesses.flushed(t_ns, 0, 0)

        made.env.process(flush())
        made.run()
        assert kvm.vcpus[0].fault.faults == 1
        return kvm.vcpus[0].finished_ns

    # Then 9 jobs before the one that begins after 1 ms, and 8 hot pages a microsecond.
    assert end_ns(1000) - end_ns(0) == (8 * 50 + 8 * (50 + 900)) * REFILL_NS


def test_what_softirqs_took_is_lost_at_the_next_settlement(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def steal_at(t_ns: int, fault: bool) -> int:
        first = ([0, 1], 100 * US, 0)
        work = jobs(first, *[([0], 100 * US, 0)] * 19, step=50 * US)
        stage = Stage(iter([work]), each=20, requests=True)
        made = given(monkeypatch, [stage])
        cpu = made.kvms[0].vcpus[0].cpu
        if fault:
            unmap(made, 1)

        def steal() -> Generator[Event, Any, None]:
            yield made.env.timeout(t_ns)
            cpu.steal(t_ns, 7 * US)

        made.env.process(steal())
        found = answered(made)
        late = [end - 100 * US * (number + 1) for number, (end, _) in enumerate(found)]
        assert late[-1] == late[10]
        return late[-1] - late[9] if t_ns > 100 * US else late[0]

    assert steal_at(420 * US, fault=False) == 7 * US, "by the first job that begins after 1 ms"
    # Nothing but the fault, or the fault and that.
    late = steal_at(101 * US, fault=True)
    assert late == 7 * US
    assert steal_at(20 * US, fault=True) == 7 * US + steal_at(99 * US, fault=True)


def test_a_job_goes_on_where_it_faulted(monkeypatch: pytest.MonkeyPatch) -> None:
    def end_ns(*missing: int) -> int:
        made = given(monkeypatch, [Stage(iter([jobs(([0, 1, 2], 10 * US, 0))]), each=1)])
        unmap(made, *missing)
        made.run()
        return made.kvms[0].vcpus[0].finished_ns

    assert end_ns() == 10 * US
    one = end_ns(0) - 10 * US
    assert one > US
    assert end_ns(1) == end_ns(2) == 10 * US + one
    # The memory cache of the vCPU is filled once.
    assert end_ns(0, 1) - end_ns(0) == end_ns(0, 1, 2) - end_ns(0, 1) <= one


def test_no_touch_behind_a_fault_is_made_before_it_is_handled(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    work = jobs(([0, 1, 2], 10 * US, 0), step=100)
    made = given(monkeypatch, [Stage(iter([work]), each=1)])
    kvm = made.kvms[0]
    unmap(made, 1)
    kvm.stage2.leaf.entries[:3] &= np.uint8(~AF & 0xFF)
    seen = []

    def look() -> Generator[Event, Any, None]:
        yield made.env.timeout(250)
        assert kvm.vcpus[0].touches_by(250) == 1
        kvm.accesses.catch_up(250, 0, kvm.leaves)
        seen.extend(bool(entry & AF) for entry in kvm.stage2.leaf.entries[:3])

    made.env.process(look())
    made.run()
    assert seen == [True, False, False]
    assert kvm.vcpus[0].touches == 3


@pytest.mark.parametrize(("later_ns", "faults"), [(500, 2), (50 * US, 1)])
def test_two_vcpus_meet_on_a_page(
    monkeypatch: pytest.MonkeyPatch, later_ns: int, faults: int
) -> None:
    """Who touches it before the other has mapped it faults too; who comes later does not."""
    stages = [
        [Stage(iter([jobs(([0], 10 * US, 0))]), first_ns=(at,), each=1)] for at in (0, later_ns)
    ]
    made = given(monkeypatch, *stages)
    unmap(made, 0)
    made.run()
    kvm = made.kvms[0]
    assert sum(vcpu.fault.faults for vcpu in kvm.vcpus) == faults
    on_time = later_ns + WAKEUP_NS + 10 * US
    assert (kvm.vcpus[1].finished_ns == on_time) == (faults == 1)


def test_a_barrier_is_left_when_the_last_one_came_whoever_tells_last() -> None:
    env = Environment()
    barrier = Barrier(env, 2)
    met = barrier.arrive(50)
    assert isinstance(met, Event)
    assert barrier.arrive(30) == 50
    assert env.run(met) == env.now == 50


def test_who_waits_at_a_barrier_is_in_no_fault_and_dies_with_the_vm(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def stages(time: int) -> list[Stage]:
        return [Stage(iter([jobs(([0], time, 0))]), each=1, barrier=True)]

    made = given(
        monkeypatch,
        stages(10 * US),
        stages(30 * MS),
        teardown={"at": 2 * MS, "order": "close_vm"},
    )
    waiting, busy = made.kvms[0].vcpus
    seen = []

    def look() -> Generator[Event, Any, None]:
        yield made.env.timeout(MS)
        seen.append((waiting.faulting, waiting.cpu.state(MS).name, busy.cpu.state(MS).name))

    made.env.process(look())
    made.run()
    assert seen == [(False, "IDLE", "GUEST")]
    assert all(2 * MS <= vcpu.finished_ns < 3 * MS for vcpu in made.kvms[0].vcpus)


@pytest.mark.parametrize("per_job", [1, 7, 5000])
@pytest.mark.parametrize(
    "access",
    [
        {"pattern": "populate", "think": 300},
        {"pattern": "uniform", "touches": 5000, "think": 300, "write_ratio": 0.5},
    ],
    ids=lambda access: access["pattern"],
)
def test_touches_made_as_jobs_fault_as_those_of_a_plain_vcpu(
    monkeypatch: pytest.MonkeyPatch, access: dict[str, Any], per_job: int
) -> None:
    """Every acquisition of ``mmu_lock`` the same, with a taker about.

    Invalidations cost nothing here, as the two do not pay alike, and the TLB has one entry. Where
    pages are touched again there is no ageing: flags that nobody asked for are set at other times.
    """
    machine = {
        "base": "ampere-altra-80c",
        "set": {"tlb_miss_nested_warm_ns": 0, "tlb_l2_entries": 1},
    }
    vmm = {"kind": "madvise_dontneed", "guest": "vm0", "range": 8 * FOUR_KIB, "rate": 5000.0}
    rest = {
        "machine": machine,
        "contenders": {"vmm": {**vmm, "order": "random"}},
        "ageing": {"interval": MS} if access["pattern"] == "populate" else None,
        "duration": 12 * MS,
    }
    guest = {"vcpus": 3, "memory": 8 * MIB, "access": access}
    plain = world(guest=guest, **rest)

    class AsJobs:
        def __init__(self, _: Memcached, seat: Seat) -> None:
            self.seat = seat

        def stages(self) -> Iterator[Stage]:
            name = f"vm0/vcpu{self.seat.vcpu}"
            chunks = patterns.build(
                plain.guests["vm0"].access,
                vcpu=self.seat.vcpu,
                vcpus=3,
                pages=self.seat.pages,
                page_bytes=FOUR_KIB,
                rng=plain.stream(name),
                layout_rng=plain.stream("vm0/layout"),
            )
            made = list(chunks)
            pages = np.concatenate([chunk.pages for chunk in made])
            writes = np.concatenate([chunk.writes for chunk in made])
            step_ns = self.seat.touch_ns + 300
            yield Stage(in_batches(back_to_back(pages, writes, step_ns, per_job, 1)))

    monkeypatch.setitem(workloads.PROGRAMS, "memcached", AsJobs)
    stub = {"pattern": "memcached", "keys": 10, "requests": 1}
    worked = world(guest={**guest, "access": stub}, **rest)
    one, other = plain.run(), worked.run()
    assert int(one.summary["fault_retries"]) > 0
    assert other.locks == one.locks
    stats = [made.recorder.locks["vm0"].digest for made in (plain, worked)]
    assert stats[0] == stats[1]
    for column in ("touches", "faults", "vcpu_wall_ns", "unmapped_pages"):
        assert other.summary[column] == one.summary[column]


def planned(limit: int, access: dict[str, Any], seed: int = 1, **keys: Any) -> Record:
    """A run in which no vCPU plans more than ``limit`` jobs ahead."""
    guest = {"vcpus": 3, "memory": 32 * MIB, "access": access, **keys.pop("guest", {})}
    made = world(guest=guest, duration=12 * MS, seed=seed, **keys)
    for vcpu in made.kvms[0].vcpus:
        vcpu._jobs_ahead = limit  # type: ignore[attr-defined]
    return made.run()


@pytest.mark.parametrize("program", PROGRAMS)
@pytest.mark.parametrize("mapped", [True, False])
def test_how_far_is_planned_ahead_changes_nothing(program: str, mapped: bool) -> None:
    taker = {
        "kind": "madvise_dontneed",
        "guest": "vm0",
        "range": FOUR_KIB,
        "rate": 20_000.0,
        "order": "random",
    }
    keys = {"guest": {"mapped": mapped}, "contenders": {"vmm": taker}, "ageing": {"interval": MS}}
    one, few, many = (planned(limit, PROGRAMS[program], **keys) for limit in (1, 3, 64))
    assert one.summary["faults"], "plans are cut"
    assert "age" in one.locks["site"]
    for other in (few, many):
        assert other.fingerprint == one.fingerprint
        same = {**other.summary, "events": one.summary["events"]}
        assert repr(same) == repr(one.summary)
        assert other.locks == one.locks


def test_ranges_taken_back_cut_plans_alike() -> None:
    """By x86's flushes too, which interrupt vCPUs, and with ageing that takes no lock."""
    taker = {
        "kind": "madvise_dontneed",
        "guest": "vm0",
        "range": 64 * FOUR_KIB,
        "rate": 3000.0,
        "order": "random",
    }
    keys = {"guest": {"mapped": True}, "contenders": {"vmm": taker}, "ageing": {"interval": MS}}
    for kernel, machine in (
        ("linux-7.1-lockless", "ampere-altra-80c"),
        ("linux-6.12-x86", "x86-icelake-64c"),
    ):
        one, many = (
            planned(limit, SERVER, kernel=kernel, machine=machine, **keys) for limit in (1, 64)
        )
        assert int(one.summary["faults"]) > 100
        assert many.fingerprint == one.fingerprint


def test_under_memory_pressure_it_changes_nothing_either() -> None:
    """Pages swapped out and in, and every victim's flags asked for one by one."""
    keys = {
        "guest": {"memory": 48 * MIB, "mapped": True},
        "host": {"memory": {"size": 36 * MIB, "watermark_scale": 100}, "swap": {"kind": "optane"}},
    }
    one, many = (planned(limit, SERVER, **keys) for limit in (1, 64))
    assert int(one.summary["faults"]) > 100
    assert many.fingerprint == one.fingerprint


def unmapped_at(t_ns: int, page: int) -> tuple[str, list[tuple[int, int]], int]:
    """Requests of a world in which ``page`` goes at ``t_ns``, and how many were planned anew."""
    guest = {"vcpus": 1, "memory": 32 * MIB, "mapped": True, "access": SERVER}
    made = world(guest=guest, duration=3 * MS)
    kvm, cuts = made.kvms[0], 0
    vcpu = kvm.vcpus[0]
    assert isinstance(vcpu, job_vcpu.JobVcpu)
    cut = vcpu._cut

    def counted(touch: int) -> int:
        nonlocal cuts
        cuts += 1
        return cut(touch)

    vcpu._cut = counted  # type: ignore[method-assign]

    def take() -> None:
        kvm.accesses.catch_up(t_ns, page, page + 1)
        unmap(made, page)
        kvm.accesses.unmapped(t_ns, page, page + 1)

    def later() -> Generator[Event, Any, None]:
        yield made.env.timeout(t_ns)
        take()

    if t_ns:
        made.env.process(later())
    else:
        take()
    found = answered(made)
    return repr(vcpu.answers.digest), found, cuts


def test_a_cut_plan_is_as_if_the_unmap_had_been_known_from_the_start() -> None:
    """A page that is first asked for later than it goes."""
    access = Memcached.model_validate(SERVER)
    made = world(guest={"memory": 32 * MIB, "access": access.model_dump()}, duration=MS)
    rng = made.stream("vm0/vcpu0")
    (stage,) = Server(access, seat(0, 1, 8192, rng, rng)).stages()
    batch = next(stage.batches)
    pages = batch.pages.tolist()
    firsts = {page: pages.index(page) for page in dict.fromkeys(pages)}
    page = next(page for page, touch in firsts.items() if touch > 60)

    known, requests, never = unmapped_at(0, page)
    late, others, cuts = unmapped_at(100 * US, page)
    assert (never, cuts) == (0, 1)
    assert others == requests
    assert late == known
    undisturbed = run(
        guest={"vcpus": 1, "memory": 32 * MIB, "mapped": True, "access": SERVER}, duration=3 * MS
    )
    assert undisturbed.summary["faults"] == 0


def test_clients_that_are_done_stay_done_after_a_cut() -> None:
    access = {**SERVER, "requests": 40}
    guest = {"vcpus": 2, "memory": 32 * MIB, "mapped": True, "access": access}
    taker = {"kind": "madvise_dontneed", "guest": "vm0", "range": FOUR_KIB, "rate": 50_000.0}
    found = run(guest=guest, contenders={"vmm": {**taker, "order": "random"}})
    assert found.summary["requests"] == 13 * 40


def test_latencies_are_right_to_one_percent(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(7)
    times = rng.integers(5 * US, 5 * MS, 500)
    stage = Stage(
        iter([jobs(*[([0], int(time), 0) for time in times])]), each=len(times), requests=True
    )
    found = given(monkeypatch, [stage]).run().summary
    exact = np.sort(times)
    for column, share in (("p50", 0.5), ("p99", 0.99), ("p999", 0.999)):
        rank = int(np.ceil(share * len(times))) - 1
        assert found[f"latency_{column}_ns"] == pytest.approx(int(exact[rank]), rel=0.01)
    assert found["latency_mean_ns"] == pytest.approx(times.mean())


@pytest.mark.parametrize("program", PROGRAMS)
def test_a_vm_that_dies_takes_its_work_along(program: str) -> None:
    guest = {
        "vcpus": 3,
        "memory": 32 * MIB,
        "access": PROGRAMS[program],
        "teardown": {"at": 5 * MS, "order": "close_vm"},
    }
    made = world(guest=guest, duration=20 * MS)
    found = made.run()
    assert found.summary["safety"] == "clean"
    assert all(5 * MS <= vcpu.finished_ns < 6 * MS for vcpu in made.kvms[0].vcpus)


def test_ageing_finds_what_requests_touched() -> None:
    """After a walk that clears all flags, the pages of the requests since, and no others."""
    guest = {"vcpus": 2, "memory": 32 * MIB, "mapped": True, "access": SERVER}
    made = world(guest=guest, duration=30 * MS, ageing={"interval": 10 * MS})
    touched: set[int] = set()
    for vcpu in made.kvms[0].vcpus:
        apply = vcpu._apply  # type: ignore[attr-defined]

        def noted(reached: int, vcpu: Any = vcpu, apply: Any = apply) -> None:
            touched.update(vcpu._list[vcpu._position : reached])
            apply(reached)

        vcpu._apply = noted  # type: ignore[attr-defined]
    found = made.run()
    first, *later = found.passes["young"]
    assert first == 8192, "a mapped guest begins young"
    assert 0 < max(later) < len(touched) < 8192


def test_the_fingerprint_covers_latencies(monkeypatch: pytest.MonkeyPatch) -> None:
    """Clients further away, who ask at the same times: the server does the same, they wait more."""

    def fingerprint(extra_ns: int) -> str:
        work = jobs(*[([0], 10 * US, 0)] * 4)
        stage = Stage(iter([work]), each=4, extra_ns=extra_ns, requests=True)
        return given(monkeypatch, [stage]).run().fingerprint

    assert fingerprint(US) == fingerprint(US) != fingerprint(2 * US)
