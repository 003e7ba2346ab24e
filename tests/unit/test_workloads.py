"""Closed-loop workloads and the vCPU that runs them: small cases by hand, and plans cut short."""

from __future__ import annotations

from collections.abc import Generator, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from simpy import Environment, Event
from worlds import MIB, MS, US, run, scenario, world

from simkvm import api
from simkvm.guest import job_vcpu, workloads
from simkvm.guest.barrier import Barrier
from simkvm.guest.interactive import Browser
from simkvm.guest.jobs import Jobs, Seat, Stage
from simkvm.guest.memcached import Layout, Server, chunk_bytes, gaussian, item_bytes
from simkvm.guest.sort import Executor
from simkvm.kernel.stage2 import AF
from simkvm.kernel.world import World
from simkvm.observe.record import Record
from simkvm.scenario.errors import InputError
from simkvm.scenario.load import load
from simkvm.scenario.machine import load_machine
from simkvm.scenario.workloads import Interactive, Memcached, Sort
from simkvm.show.tables import run_report
from simkvm.show.text import render
from simkvm.units import format_count, format_duration

MACHINE = load_machine("ampere-altra-80c")
WAKEUP_NS = round(MACHINE["wakeup_ns"])
REFILL_NS = round(MACHINE["tlb_miss_nested_warm_ns"])
FOUR_KIB = 4096


# -- given by hand ---------------------------------------------------------------------------------


def jobs(*each: tuple[list[int], int, int], step: int = US) -> Jobs:
    """Jobs of (pages, CPU time, gap), each touching its pages, for write, from its start on."""
    counts = [len(pages) for pages, _, _ in each]
    pages = [page for pages, _, _ in each for page in pages]
    return Jobs(
        offsets=np.concatenate(([0], np.cumsum(counts))).astype(np.int64),
        pages=np.array(pages, np.int64),
        writes=np.ones(len(pages), np.bool_),
        at_ns=np.concatenate([np.arange(count) * step for count in counts]).astype(np.int64),
        total_ns=np.array([total for _, total, _ in each], np.int64),
        gap_ns=np.array([gap for _, _, gap in each], np.int64),
        work=np.ones(len(each), np.int64),
        last=True,
    )


def given(patch: pytest.MonkeyPatch, *stages: list[Stage], warmup: int = 0, **guest: Any) -> World:
    """A world in which vCPU n goes through the n-th list of stages."""

    class Given:
        def __init__(self, _: Memcached, seat: Seat) -> None:
            self.vcpu = seat.vcpu

        def stages(self) -> Iterator[Stage]:
            return iter(stages[self.vcpu])

    patch.setitem(workloads.PROGRAMS, "memcached", Given)
    access = {"pattern": "memcached", "keys": 10, "requests": 1, "warmup": warmup}
    keys = {"vcpus": len(stages), "memory": 8 * MIB, "mapped": True, "access": access, **guest}
    return world(guest=keys)


def seat(
    vcpu: int, vcpus: int, pages: int, rng: np.random.Generator, layout: np.random.Generator
) -> Seat:
    """A place in a guest of pages of 4 KiB that has all its memory."""
    touch_ns = round(MACHINE["page_touch_ns"])
    return Seat(vcpu, vcpus, pages, FOUR_KIB, rng, layout, touch_ns, MACHINE, mapped=True)


def unmap(made: World, *pages: int) -> None:
    """Have nothing mapped at ``pages`` when the run begins."""
    kvm = made.kvms[0]
    for page in pages:
        kvm.host.zap(page, page + 1)
        kvm.stage2.leaf.entries[page] = 0


def answered(made: World, vcpu: int = 0) -> list[tuple[int, int]]:
    """(end, latency) of all requests of a vCPU, in order."""
    found: list[tuple[int, int]] = []
    answers = made.kvms[0].vcpus[vcpu].answers
    assert answers is not None
    add = answers.add

    def noted(ends_ns: list[int], latencies_ns: list[int]) -> None:
        found.extend(zip(ends_ns, latencies_ns, strict=True))
        add(ends_ns, latencies_ns)

    answers.add = noted  # type: ignore[method-assign,assignment]
    made.run()
    return found


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

    made.env.process(look())
    made.run()
    assert seen == ["GUEST", "IDLE", "GUEST"]


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


# -- plans -----------------------------------------------------------------------------------------

SERVER: dict[str, Any] = {
    "pattern": "memcached",
    "clients": 13,
    "keys": 20_000,
    "value_size": 900,
    "service": 9 * US,
    "network": 30 * US,
    "think": 20 * US,
    "think_law": "exponential",
    "get_ratio": 0.7,
    "keys_drawn": "zipf",
}
PROGRAMS: dict[str, dict[str, Any]] = {
    "memcached": SERVER,
    "sort": {"pattern": "sort", "data": 8 * MIB, "block": 65536, "page_cpu": 3 * US},
    "chase": {"pattern": "chase", "span": "guest"},
    "interactive": {
        "pattern": "interactive",
        "tabs": 4,
        "tab_size": 4 * MIB,
        "pause": MS,
        "burst_cpu": 200 * US,
    },
}


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


# -- memcached -------------------------------------------------------------------------------------


def test_slab_classes_are_memcacheds() -> None:
    """As ``memcached -vv`` prints them with its defaults."""
    sizes, at = [], 1
    while at <= 512 * 1024:
        sizes.append(chunk_bytes(at))
        at = sizes[-1] + 1
    assert sizes[:15] == [
        *(96, 120, 152, 192, 240, 304, 384, 480, 600, 752, 944, 1184, 1480, 1856, 2320),
    ]
    assert sizes[-3:] == [315872, 394840, 524288]


def test_items_lie_one_behind_the_other_and_may_straddle_pages() -> None:
    access = Memcached(keys=1000, value_size=1000)
    layout = Layout.of(access)
    assert layout.item == item_bytes(1000, 1000) == 48 + 8 + len("memtier-1000") + 1 + 1000 + 2
    assert layout.chunk == 1184
    assert layout.slabs_at == MIB, "a table of 65,536 pointers is half of one"
    begin = layout.items_at(np.array([0, 3, 885, 886]))
    # A slab of 1 MiB has 885 chunks; what is left over is not used.
    assert (begin - MIB).tolist() == [0, 3552, MIB, MIB + 1184]


def test_a_request_touches_bucket_and_all_pages_of_its_item() -> None:
    access = Memcached(keys=1000, value_size=1000, service=10 * US)
    rng = np.random.default_rng(1)
    server = Server(access, seat(0, 1, 4096, rng, rng))
    keys, sets = np.array([0, 3, 3]), np.array([False, False, True])
    service = np.full(3, 10 * US)
    made = server._jobs(keys, sets, service, np.full(3, 5), last=True)
    buckets = (server.layout.buckets_at(keys) // FOUR_KIB).tolist()
    assert max(buckets) < 128
    # Item 3 begins 3552 bytes into page 256 and is 1071 long.
    assert made.offsets.tolist() == [0, 2, 5, 8]
    assert made.pages.tolist() == [buckets[0], 256, buckets[1], 256, 257, buckets[2], 256, 257]
    # GET: the header is written, the rest of the item and the bucket are read.
    assert made.writes.tolist() == [False, True, False, True, False, True, True, True]
    touch = server.seat.touch_ns
    after = [0, 1, 0, 1, 2, 0, 1, 2]
    assert made.at_ns.tolist() == [5 * US + touch * number for number in after]
    assert made.total_ns.tolist() == [10 * US + touch * number for number in (2, 3, 3)]


def test_connections_are_dealt_out_in_turn_and_all_ask() -> None:
    rng = np.random.default_rng(1)
    access = Memcached(clients=5, requests=3)
    counts = []
    for vcpu in range(3):
        (stage,) = Server(access, seat(vcpu, 3, 60_000, rng, rng)).stages()
        counts.append((len(stage.first_ns), sum(len(batch) for batch in stage.batches)))
    assert counts == [(2, 6), (2, 6), (1, 3)]


def test_a_loaded_server_has_faulted_on_every_page_before_the_first_request() -> None:
    access = {**SERVER, "requests": 5}
    guest = {"vcpus": 3, "memory": 32 * MIB, "access": access}
    found = run(guest=guest).summary
    table, items = 512 * 1024 // FOUR_KIB, MIB // 1184
    slabs, rest = divmod(20_000, items)
    used = table + slabs * MIB // FOUR_KIB + -(-rest * 1184 // FOUR_KIB)
    assert int(found["faults"]) - int(found["fault_retries"]) == used
    assert found["requests"] == 13 * 5
    cold = run(guest={**guest, "access": {**access, "load": False}}).summary
    assert 0 < int(cold["faults"]) < 2 * 3 * 13 * 5, "otherwise a request faults on what it needs"


def test_gaussian_keys_stay_in_range_and_lie_around_the_middle() -> None:
    drawn = gaussian(np.random.default_rng(1), 600, 100.0, 20_000)
    assert drawn.min() >= 0
    assert drawn.max() < 600
    assert abs(float(drawn.mean()) - 300) < 5 * 100 / 20_000**0.5
    assert np.mean(np.abs(drawn - 299.5) < 100) == pytest.approx(0.6827 / 0.9973, abs=0.02)


def test_the_fingerprint_covers_latencies() -> None:
    """Clients far away: the server does the same, they wait longer."""
    near, again, far = (
        planned(64, {**SERVER, "network": network, "think": 90 * US - network, "requests": 20})
        for network in (20 * US, 20 * US, 30 * US)
    )
    assert near.fingerprint == again.fingerprint != far.fingerprint


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


# -- the others ------------------------------------------------------------------------------------


def test_a_shuffle_reads_every_page_of_every_output_once() -> None:
    access = Sort(data=101 * FOUR_KIB, block=3 * FOUR_KIB)
    read: list[int] = []
    for vcpu in range(4):
        rng = np.random.default_rng(vcpu)
        executor = Executor(access, seat(vcpu, 4, 202, rng, rng))
        before, pages = executor._fetched()
        assert before == len(read), "where the others' parts end"
        fetched = pages.tolist()
        runs = sum(b != a + 1 for a, b in pairwise(fetched)) + 1
        assert runs <= 4 * 3, "blocks are read in order"
        assert fetched != sorted(fetched), "but come in any"
        read += fetched
    assert sorted(read) == list(range(101))


def test_a_sort_reads_and_writes_all_data_in_both_stages() -> None:
    access = {"pattern": "sort", "data": 8 * MIB, "page_cpu": US, "load": False}
    found = run(guest={"vcpus": 3, "memory": 16 * MIB, "access": access})
    assert found.summary["touches"] == 4 * 8 * MIB // FOUR_KIB
    spent_s = int(found.summary["sim_ns"]) / 1e9
    assert found.summary["bytes_per_s"] == pytest.approx(4 * 8 * MIB / spent_s, rel=0.001)


def test_a_cycle_comes_by_every_page_before_any_twice() -> None:
    made = world(
        guest={"memory": MIB, "mapped": True, "access": {"pattern": "chase", "loads": 256}}
    )
    entries = made.kvms[0].stage2.leaf.entries
    entries &= np.uint8(~2 & 0xFF)
    found = made.run()
    assert (entries & 2).all(), "256 loads, 256 pages"
    load_ns = round(MACHINE["dram_local_ns"])
    assert found.summary["sim_ns"] == 256 * load_ns
    assert found.summary["loads_per_s"] == pytest.approx(1e9 / load_ns)


def test_all_vcpus_visit_the_same_tabs() -> None:
    access = Interactive(tabs=5, tab_size=64 * FOUR_KIB, order="random", visits=30, bursts=2)
    visited = []
    for vcpu in range(2):
        rng, layout = np.random.default_rng(vcpu), np.random.default_rng(99)
        browser = Browser(access, seat(vcpu, 2, 320, rng, layout))
        tabs = []
        for stage in browser.stages():
            (batch,) = stage.batches
            assert len(set((batch.pages // 64).tolist())) == 1, "one tab a visit"
            tabs.append(int(batch.pages[0]) // 64)
        visited.append(tabs)
    assert visited[0] == visited[1]
    assert set(visited[0]) == set(range(5))
    assert all(a != b for a, b in pairwise(visited[0]))


def test_a_visit_opens_with_the_whole_working_set() -> None:
    access = {
        "pattern": "interactive",
        "tabs": 2,
        "tab_size": MIB,
        "working_set": 0.5,
        "bursts": 0,
        "visits": 2,
        "burst_pages": 64,
        "burst_cpu": 64 * 900,
    }
    found = run(guest={"vcpus": 2, "memory": 4 * MIB, "mapped": True, "access": access})
    assert found.summary["touches"] == 2 * 128
    assert found.summary["requests"] == 2 * 2
    touch_ns = round(MACHINE["page_touch_ns"])
    assert found.summary["latency_max_ns"] == 64 * (900 + touch_ns)


# -- the rest of the host --------------------------------------------------------------------------


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


WRONG = {
    "keys: 1000000": "access.keys: hash table and slabs of 1000000 items take",
    "warmup: 20 ms": "access.warmup: 20 ms leaves nothing to measure: the run ends at 20 ms",
    "sd: 3": "access.sd: belongs to keys_drawn gaussian, not random",
    "requests: 0": "access.requests: ",
}


@pytest.mark.parametrize("line", WRONG)
def test_wrong_input_is_one_line(tmp_path: Path, line: str) -> None:
    path = tmp_path / "server.yaml"
    path.write_text(FILE.format(line=line))
    with pytest.raises(InputError) as error:
        load(path)
    assert WRONG[line] in str(error.value)


FILE = """\
name: server
machine: ampere-altra-80c
kernel: linux-6.12
duration: 20 ms
guests:
  vm0:
    vcpus: 4
    memory: 160 MiB
    access:
      pattern: memcached
      clients: 16
      value_size: 1 KiB
      service: 20 us
      {line}
"""


def test_a_file_says_it_in_units(tmp_path: Path) -> None:
    path = tmp_path / "server.yaml"
    path.write_text(FILE.format(line="keys: 20000"))
    access = load(path).points[0].scenario.guests["vm0"].access
    assert isinstance(access, Memcached)
    assert (access.value_size, access.service, access.keys) == (1024, 20_000, 20_000)


@pytest.mark.parametrize(
    ("access", "message"),
    [
        ({"pattern": "sort", "data": 3 * MIB}, "twice 3 MiB"),
        ({"pattern": "sort", "data": MIB, "block": 5000}, "not a multiple of page_size"),
        ({"pattern": "interactive", "tab_size": MIB}, "8 x 1 MiB are more"),
        ({"pattern": "chase"}, "is endless: that needs a duration"),
        ({"pattern": "interactive", "tabs": 1, "tab_size": MIB}, "is endless"),
    ],
)
def test_what_does_not_fit_is_refused(access: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        scenario(guest={"memory": 4 * MIB, "access": access})


def test_software_accessed_flags_are_refused() -> None:
    machine = {"base": "ampere-altra-80c", "set": {"hw_af": False}}
    with pytest.raises(InputError, match="no hardware accessed flag"):
        scenario(guest={"memory": 64 * MIB, "access": SERVER}, machine=machine, duration=MS)


# -- what is shown ---------------------------------------------------------------------------------


def test_a_report_says_what_clients_saw_and_only_if_there_are_any(tmp_path: Path) -> None:
    path = tmp_path / "server.yaml"
    path.write_text(FILE.format(line="keys: 20000"))
    result = api.run(path)
    summary = result.summary
    text = render(run_report(result))
    (row,) = (
        line.split() for line in text.splitlines() if format_count(summary["requests"]) in line
    )
    assert "Requests and work done" in text
    assert format_duration(int(summary["latency_p999_ns"])) in " ".join(row)
    histograms = result.histograms
    ours = histograms[histograms["site"] == "request"]
    assert ours["count"].sum() == summary["requests"] > 1000
    assert set(ours["quantity"]) == {"latency"}

    path.write_text(QUIET)
    quiet = api.run(path)
    assert "Requests" not in render(run_report(quiet))
    assert quiet.summary["requests"] == 0
    assert np.isnan(quiet.summary["latency_p99_ns"])
    assert np.isnan(quiet.summary["requests_per_s"])


QUIET = """\
name: quiet
machine: ampere-altra-80c
kernel: linux-6.12
guests:
  vm0: {memory: 1 MiB, access: {pattern: populate}}
"""


def test_loading_does_not_count() -> None:
    access = {**SERVER, "requests": 20, "think_law": "constant"}
    guest = {"vcpus": 1, "memory": 32 * MIB, "access": access}
    loaded = run(guest=guest).summary
    mapped = run(guest={**guest, "mapped": True}).summary
    assert int(loaded["sim_ns"]) > 2 * int(mapped["sim_ns"])
    assert loaded["requests"] == mapped["requests"] == 13 * 20
    assert loaded["requests_per_s"] == pytest.approx(mapped["requests_per_s"], rel=0.01)
