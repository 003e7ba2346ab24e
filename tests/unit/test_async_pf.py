"""Async page faults: who goes on while a page is read, who waits, and what that takes."""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import pytest
from job_worlds import PROGRAMS, REFILL_NS, SERVER, given, jobs
from simpy import Event
from worlds import MS, US, scenario, world

from simkvm.guest.job_threads import Parked, ThreadedVcpu
from simkvm.guest.jobs import Stage
from simkvm.kernel.async_pf import PER_VCPU, AsyncPf
from simkvm.kernel.mmap_lock import LOCK, UNLOCK
from simkvm.kernel.swap_fault import SwapFaultPath
from simkvm.kernel.swappable import SLOT, SwappableMemory
from simkvm.kernel.task import Task, reach
from simkvm.kernel.world import World
from simkvm.observe.record import Record
from simkvm.scenario.errors import InputError
from simkvm.units import MIB

READ_NS = 100 * US
JOB_NS = 10 * US
FAR_PAGE = 5
HOST = {"memory": {"size": 64 * MIB}, "swap": {"kind": "optane"}}


@dataclass
class Seen:
    """What happened in a run of jobs given by hand."""

    answers: list[tuple[int, int]] = field(default_factory=list)  #: end, latency
    absent_ns: list[int] = field(default_factory=list)  #: KVM found that a page has to be read
    ready_ns: list[int] = field(default_factory=list)
    ran_ns: list[int] = field(default_factory=list)  #: kworkers, on the vCPU's CPU
    fetched_ns: list[int] = field(default_factory=list)  #: how long taking the page in took
    finished_ns: int = 0
    summary: dict[str, Any] = field(default_factory=dict)


def swap_out(made: World, *pages: int) -> None:
    """``pages`` are in swap when the run begins."""
    kvm = made.kvms[0]
    host = kvm.host
    assert isinstance(host, SwappableMemory)
    assert host.device is not None
    for page in pages:
        kvm.stage2.leaf.entries[page] = 0
        host.zap(page, page + 1)
        host.device.allocate(1)
        host.swap[page] = SLOT


def read_takes(made: World, *each_ns: int) -> None:
    """Reads of the device take ``each_ns``, the last of them again and again; readers sleep."""
    left_ns = list(each_ns)
    assert made.pgdat is not None
    device = made.pgdat.swap
    assert device is not None

    def read(task: Task, t_ns: int) -> Generator[Event, Any, int]:
        made.sched.sleep(task, t_ns)
        ns = left_ns.pop(0) if len(left_ns) > 1 else left_ns[0]
        t_ns = yield from reach(made.env, t_ns + ns)
        return (yield from made.sched.wake(task, t_ns))

    device.read = read  # type: ignore[method-assign]


def flush_all(made: World, t_ns: int, times: int, _: Event) -> None:
    for _each in range(times):
        made.kvms[0].accesses.flushed(t_ns, 0, 0)


def watched(
    patch: pytest.MonkeyPatch,
    stage: Stage,
    *swapped: int,
    async_pf: bool = True,
    zapped: tuple[int, ...] = (),
    kill_ns: int = 0,
    reads_ns: tuple[int, ...] = (),
    flushed: int = 0,
) -> Seen:
    """Run ``stage`` on one vCPU; ``swapped`` is in swap, of ``zapped`` only stage 2 knows not."""
    seen = Seen()
    made = given(patch, [stage], host=HOST, async_pf=async_pf)
    swap_out(made, *swapped)
    read_takes(made, *(reads_ns or (READ_NS,)))
    kvm = made.kvms[0]
    for page in zapped:
        kvm.stage2.leaf.entries[page] = 0
    vcpu = kvm.vcpus[0]
    if zapped:  # this CPU has taken mmap_lock before
        kvm.host.mmap_lock.visit(vcpu.cpu.id, 0, LOCK + UNLOCK)
    put_to_sleep, page_ready = ThreadedVcpu._put_to_sleep, ThreadedVcpu._page_ready
    take_in, bring_in = AsyncPf.take_in, SwapFaultPath._bring_in

    def absent(self: ThreadedVcpu, t_ns: int) -> int:
        seen.absent_ns.append(t_ns)
        return put_to_sleep(self, t_ns)

    def ready(self: ThreadedVcpu, parked: Parked, t_ns: int) -> None:
        seen.ready_ns.append(t_ns)
        page_ready(self, parked, t_ns)

    def taken(self: AsyncPf, t_ns: int) -> Generator[Event, Any, tuple[int, int]]:
        there_ns, ran_ns = yield from take_in(self, t_ns)
        seen.ran_ns.append(ran_ns)
        return there_ns, ran_ns

    def brought(self: SwapFaultPath, t_ns: int) -> Generator[Event, Any, int]:
        there_ns = yield from bring_in(self, t_ns)
        if there_ns - t_ns >= READ_NS:
            seen.fetched_ns.append(there_ns - t_ns)
        return there_ns

    with patch.context() as patched:
        patched.setattr(ThreadedVcpu, "_put_to_sleep", absent)
        patched.setattr(ThreadedVcpu, "_page_ready", ready)
        patched.setattr(AsyncPf, "take_in", taken)
        patched.setattr(SwapFaultPath, "_bring_in", brought)
        add = vcpu.answers.add  # type: ignore[union-attr]

        def noted(ends_ns: list[int], latencies_ns: list[int]) -> None:
            seen.answers.extend(zip(ends_ns, latencies_ns, strict=True))
            add(ends_ns, latencies_ns)

        vcpu.answers.add = noted  # type: ignore[method-assign,union-attr,assignment]
        for t_ns in (10 * US, 600 * US):
            timer = made.env.timeout(t_ns)
            flush = partial(flush_all, made, t_ns, flushed)
            timer.callbacks.append(flush)  # type: ignore[union-attr]
        if kill_ns:
            assert made.pgdat is not None
            timer = made.env.timeout(kill_ns)
            kill = made.pgdat.pages.out_of_memory
            timer.callbacks.append(lambda _: kill(kill_ns))  # type: ignore[union-attr]
        seen.summary = dict(made.run().summary)
    seen.finished_ns = vcpu.finished_ns
    return seen


COSTS = world(host=HOST).kvms[0].costs
ENTER_NS, SWITCH_NS, WAKEUP_NS = COSTS.fault.enter_ns, COSTS.switch_ns, COSTS.wakeup_ns


def one_fault_ns(patch: pytest.MonkeyPatch) -> int:
    """What a fault adds to a job if the host has the page."""
    stage = Stage(iter([jobs(([FAR_PAGE], JOB_NS, 0))]), each=1, requests=True)
    return watched(patch, stage, zapped=(FAR_PAGE,)).answers[0][0] - JOB_NS


def stage_of(*each: tuple[list[int], int, int], clients: int, threads: int, times: int) -> Stage:
    first_ns = tuple(range(clients))  # in order, all within some nanoseconds
    batches = iter([jobs(*each)])
    return Stage(batches, first_ns=first_ns, each=times, requests=True, threads=threads)


# -- by hand ----------------------------------------------------------------------------------


def test_while_one_thread_waits_another_works(monkeypatch: pytest.MonkeyPatch) -> None:
    """The job at which the page comes loses a kick and the kworker's time, then its turn comes."""
    busy = [([0], JOB_NS, 0)] * 20
    work = ([FAR_PAGE], JOB_NS, 10**9), *busy
    fault_ns = one_fault_ns(monkeypatch)
    stage = Stage(iter([jobs(*work)]), first_ns=(0, 1), each=20, requests=True, threads=2)
    seen = watched(monkeypatch, stage, FAR_PAGE)
    (absent_ns,), (ready_ns,), (ran_ns,) = seen.absent_ns, seen.ready_ns, seen.ran_ns
    start_ns = absent_ns + ENTER_NS + SWITCH_NS
    before = (ready_ns - start_ns) // JOB_NS  # jobs done when the page comes
    assert 9 <= before <= 12
    expected = [start_ns + JOB_NS * (number + 1) for number in range(before)]
    interrupted_ns = start_ns + JOB_NS * (before + 1) + COSTS.kick_ns + ran_ns
    resumed_ns = interrupted_ns + SWITCH_NS + JOB_NS + fault_ns
    rest = [resumed_ns + JOB_NS * (number + 1) for number in range(20 - before - 1)]
    assert [end for end, _ in seen.answers] == [*expected, interrupted_ns, resumed_ns, *rest]
    assert seen.answers[before + 1] == (resumed_ns, resumed_ns), "it came at 0"
    assert seen.summary["async_page_faults"] == seen.summary["pgmajfault"] == 1


def test_without_async_faults_all_threads_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    def ends(async_pf: bool, threads: int) -> list[int]:
        work = ([FAR_PAGE], JOB_NS, 0), ([0], JOB_NS, 0)
        stage = stage_of(*work, clients=2, threads=threads, times=1)
        seen = watched(monkeypatch, stage, FAR_PAGE, async_pf=async_pf)
        assert seen.summary["async_page_faults"] == async_pf
        return [end for end, _ in seen.answers]

    alone = ends(False, 1)
    assert ends(False, 2) == alone
    assert alone[0] > READ_NS
    assert alone[1] == alone[0] + JOB_NS
    assert ends(True, 2)[0] < READ_NS < ends(True, 2)[1]


def test_one_thread_waits_as_long_and_pays_for_the_events(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its other client is not served meanwhile. The vCPU halts, and has to wake up."""
    fault_ns = one_fault_ns(monkeypatch)
    found = []
    for async_pf in (False, True):
        work = ([FAR_PAGE], JOB_NS, 0), ([0], JOB_NS, 0)
        stage = stage_of(*work, clients=2, threads=1, times=1)
        found.append(watched(monkeypatch, stage, FAR_PAGE, async_pf=async_pf))
    waiting, asleep = found
    assert asleep.fetched_ns == waiting.fetched_ns, "the page takes as long"
    (absent_ns,), (ready_ns,) = asleep.absent_ns, asleep.ready_ns
    lookup_ns = ready_ns - absent_ns - WAKEUP_NS - asleep.fetched_ns[0]
    assert COSTS.fault.vma_ns < lookup_ns < COSTS.fault.vma_ns + US, "the kworker looks it up"
    end_ns = ready_ns + WAKEUP_NS + SWITCH_NS + JOB_NS + fault_ns
    assert [end for end, _ in asleep.answers] == [end_ns, end_ns + JOB_NS]
    extra_ns = asleep.answers[0][0] - waiting.answers[0][0]
    least_ns = 2 * WAKEUP_NS + SWITCH_NS + lookup_ns
    assert least_ns < extra_ns < least_ns + fault_ns, "and a part of a second fault"


def test_no_job_of_the_thread_that_waits_goes_first(monkeypatch: pytest.MonkeyPatch) -> None:
    """Clients 0 and 2 have the first thread, 1 and 3 the second."""
    work = [([FAR_PAGE], JOB_NS, 0), *[([0], JOB_NS, 0)] * 3]
    seen = watched(monkeypatch, stage_of(*work, clients=4, threads=2, times=1), FAR_PAGE)
    arrivals = [end - latency for end, latency in seen.answers]
    assert arrivals == [1, 3, 0, 2]
    ends = [end for end, _ in seen.answers]
    assert ends[1] < READ_NS < ends[2]
    assert ends[3] == ends[2] + JOB_NS


def test_a_job_may_wait_more_than_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Across the end of its batch, with the rest of its touches in order."""
    work = jobs(([6, FAR_PAGE, 0, 7], 20 * US, 0), ([0], JOB_NS, 0))
    more = jobs(*[([1], JOB_NS, 0)] * 3)
    first = jobs(([0], JOB_NS, 0))
    batches = [first, work, more]
    object.__setattr__(first, "last", False)
    object.__setattr__(work, "last", False)
    stage = Stage(iter(batches), first_ns=(0, 1), each=3, requests=True, threads=2)
    seen = watched(monkeypatch, stage, FAR_PAGE, 6, 7)
    assert len(seen.answers) == 6
    assert len(seen.ready_ns) == 3
    assert seen.summary["touches"] == 4 + 5
    ends = [end for end, _ in seen.answers]
    assert ends == sorted(ends)
    assert seen.finished_ns == ends[-1]


def test_who_touches_a_page_that_is_on_its_way_halts_the_vcpu(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """KVM_REQ_APF_HALT: the third thread waits with it."""
    work = [([FAR_PAGE], JOB_NS, 0)] * 2 + [([0], JOB_NS, 0)]
    seen = watched(monkeypatch, stage_of(*work, clients=3, threads=3, times=1), FAR_PAGE)
    assert len(seen.absent_ns) == 1
    assert [end - latency for end, latency in seen.answers] == [1, 0, 2]
    assert seen.answers[0][0] > READ_NS
    assert seen.summary["pgmajfault"] == 1


def test_a_vcpu_has_so_many_pages_on_their_way(monkeypatch: pytest.MonkeyPatch) -> None:
    number = PER_VCPU + 1
    pages = list(range(10, 10 + number))
    work = [([page], 100, 0) for page in pages]
    stage = stage_of(*work, clients=number, threads=number, times=1)
    monkeypatch.setattr(f"{__name__}.READ_NS", 10 * MS)
    seen = watched(monkeypatch, stage, *pages)
    assert len(seen.absent_ns) == PER_VCPU
    assert len(seen.answers) == number
    first, _ = seen.answers[0]
    assert first > 10 * MS


def test_parked_jobs_die_with_the_vm(monkeypatch: pytest.MonkeyPatch) -> None:
    """By the OOM killer, with a job parked, whether the vCPU has halted or not."""
    for others, kill_ns in ((0, 50 * US), (1, 50 * US), (1, 20 * US)):
        work = [([FAR_PAGE], JOB_NS, 0), *[([0], JOB_NS, 0)] * (3 * others)]
        stage = Stage(
            iter([jobs(*work)]), first_ns=(0, 1)[: 1 + others], each=3, requests=True, threads=2
        )
        seen = watched(monkeypatch, stage, FAR_PAGE, kill_ns=kill_ns)
        assert seen.finished_ns == kill_ns
        assert seen.summary["oom_kills"] == 1
        assert not seen.ready_ns
        assert all(latency < READ_NS for _, latency in seen.answers)


@pytest.mark.parametrize("done_ns", [0, 5 * US])
def test_a_page_that_comes_while_a_job_goes_on_again(
    monkeypatch: pytest.MonkeyPatch, done_ns: int
) -> None:
    """Before, at and after the moment at which the first thread is switched to."""
    fault_ns = one_fault_ns(monkeypatch)
    kinds = set()
    for later_ns in range(-4 * US, 9 * US, 100):
        each = [0, FAR_PAGE] if done_ns else [FAR_PAGE], [6], [0]
        work = jobs(*[(pages, JOB_NS, 0) for pages in each], step=5 * US)
        stage = Stage(iter([work]), first_ns=(0, 1, 2), each=1, requests=True, threads=2)
        reads_ns = (READ_NS, READ_NS + later_ns)
        seen = watched(monkeypatch, stage, FAR_PAGE, 6, reads_ns=reads_ns)
        ends = {end - latency: end for end, latency in seen.answers}
        first_ns, second_ns = seen.ready_ns
        ran_ns = seen.ran_ns[1]
        assert sorted(ends) == [0, 1, 2]
        if ends[0] > ends[1]:
            continue  # the other page was first
        due_ns = first_ns + WAKEUP_NS + SWITCH_NS + JOB_NS - done_ns + fault_ns
        extra_ns = ends[0] - due_ns
        assert extra_ns in (0, ran_ns, ran_ns + COSTS.kick_ns)
        kinds.add((extra_ns, first_ns + WAKEUP_NS < second_ns < first_ns + WAKEUP_NS + SWITCH_NS))
        assert ends[1] >= second_ns
        assert ends[2] > ends[0]
    assert {where for _, where in kinds} == {True, False}
    assert len({extra for extra, _ in kinds}) == 3


def test_a_vcpu_that_idles_is_woken_by_a_page(monkeypatch: pytest.MonkeyPatch) -> None:
    """It would have had nothing to do before the other client asks."""
    fault_ns = one_fault_ns(monkeypatch)
    work = jobs(([FAR_PAGE], JOB_NS, 0), ([0], JOB_NS, 0))
    stage = Stage(iter([work]), first_ns=(0, MS), each=1, requests=True, threads=2)
    seen = watched(monkeypatch, stage, FAR_PAGE)
    (ready_ns,) = seen.ready_ns
    end_ns = ready_ns + WAKEUP_NS + SWITCH_NS + JOB_NS + fault_ns
    assert [end for end, _ in seen.answers] == [end_ns, MS + WAKEUP_NS + JOB_NS]


def test_a_parked_job_is_done_though_no_other_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    """A client waits for nothing: there are two jobs for three."""
    work = ([FAR_PAGE], JOB_NS, 0), ([0], JOB_NS, 0)
    seen = watched(monkeypatch, stage_of(*work, clients=3, threads=3, times=1), FAR_PAGE)
    assert [end - latency for end, latency in seen.answers] == [1, 0]


def test_hot_pages_are_counted_once_if_a_job_is_parked(monkeypatch: pytest.MonkeyPatch) -> None:
    """A job of 100 us, a quarter before a fault, a quarter before it is parked, and the rest.

    Settled at the fault, at its parking, when the page comes, and after 1 ms.

    A working vCPU comes by 8 hot pages a microsecond, and the flushes were of more than that.
    """

    def found(flushes: int) -> Seen:
        work = ([0, 9, FAR_PAGE], 100 * US, 10**9), *[([0], 100 * US, 0)] * 30
        stage = Stage(
            iter([jobs(*work, step=25 * US)]), first_ns=(0, 1), each=30, requests=True, threads=2
        )
        return watched(
            monkeypatch, stage, FAR_PAGE, zapped=(9,), flushed=flushes, reads_ns=(60 * US,)
        )

    calm, flushed = found(0), found(1000)
    (ready_ns,) = flushed.ready_ns
    ends = [end for end, _ in flushed.answers]
    begins = [end - latency == 0 for end, latency in flushed.answers]
    assert begins.index(True) == 1, "the parked job is the second to end"
    settled = next(number for number, end in enumerate(ends) if end >= MS)
    assert ready_ns < ends[0]
    assert flushed.ready_ns[0] - calm.ready_ns[0] < US
    refills = 8 * 25 + 8 * (100 * settled + 50)
    assert ends[-1] - calm.answers[-1][0] == refills * REFILL_NS


# -- runs -------------------------------------------------------------------------------------


def pressed(
    threads: int = 4,
    program: str = "memcached",
    limit: int = 64,
    async_pf: bool = True,
    duration: int | None = 12 * MS,
    kind: str = "optane",
    **keys: Any,
) -> Record:
    access = dict(PROGRAMS[program], **keys.pop("access", {}))
    if program == "memcached":
        access["threads"] = threads
    guest = {"vcpus": 3, "memory": 48 * MIB, "mapped": True, "access": access}
    guest |= {"async_pf": async_pf, **keys.pop("guest", {})}
    host = {"memory": {"size": 36 * MIB, "watermark_scale": 100}, "swap": {"kind": kind}}
    made = world(guest=guest, host=host, duration=duration, **keys)
    for vcpu in made.kvms[0].vcpus:
        vcpu._jobs_ahead = limit  # type: ignore[attr-defined]
    return made.run()


RUNS: dict[str, dict[str, Any]] = {
    "threads": {},
    "one thread": {"threads": 1},
    "nvme": {"kind": "nvme", "threads": 13},
    "sort": {"program": "sort", "access": {"data": 20 * MIB}},
    "interactive": {
        "program": "interactive",
        "access": {"tab_size": 12 * MIB},
    },
    "x86": {"kernel": "linux-6.12-x86", "machine": "x86-icelake-64c"},
    "shadow": {"kernel": "linux-6.12-x86-shadow", "machine": "x86-icelake-64c"},
    "file": {"guest": {"backing": "file", "mapped": False}, "duration": 30 * MS},
}


@pytest.mark.parametrize("name", RUNS)
def test_how_far_is_planned_ahead_changes_nothing(name: str) -> None:
    one, few, many = (pressed(limit=limit, **RUNS[name]) for limit in (1, 3, 64))
    assert int(one.summary["async_page_faults"]) > 50
    for other in (few, many):
        assert other.fingerprint == one.fingerprint
        same = {**other.summary, "events": one.summary["events"]}
        assert repr(same) == repr(one.summary)


def test_without_the_switch_threads_are_all_one() -> None:
    one, many = (pressed(threads, async_pf=False) for threads in (1, 5))
    assert one.fingerprint == many.fingerprint
    assert one.summary["async_page_faults"] == 0


def test_no_request_is_lost() -> None:
    access = {**SERVER, "requests": 40}
    for threads in (1, 3):
        found = pressed(threads, access=access, duration=None).summary
        assert found["requests"] == 13 * 40
        assert int(found["async_page_faults"]) > 50


def test_more_threads_serve_more() -> None:
    served = [int(pressed(threads, kind="nvme").summary["requests"]) for threads in (1, 2, 13)]
    blocking = int(pressed(kind="nvme", async_pf=False).summary["requests"])
    assert served[0] < blocking < served[1] < served[2]


@pytest.mark.parametrize(("async_pf", "full"), [(False, 1), (True, 0)])
def test_all_stall_if_all_threads_do(async_pf: bool, full: int) -> None:
    """Of a vCPU with two threads one stalls, all the time."""
    access = {**SERVER, "threads": 2}
    guest = {"memory": 32 * MIB, "mapped": True, "access": access, "async_pf": async_pf}
    made = world(guest=guest, host=HOST, duration=MS)
    assert made.pgdat is not None
    made.pgdat.stalled(0, MS)
    summary = made.run().summary
    assert (summary["psi_some_ratio"], summary["psi_full_ratio"]) == (1, full)


def test_a_device_that_the_vcpu_reads_itself_leaves_nothing_to_wait_for() -> None:
    with_it, without = (pressed(kind="zram", async_pf=each) for each in (True, False))
    assert int(without.summary["pgmajfault"]) > 50
    assert with_it.summary["async_page_faults"] == 0
    assert with_it.fingerprint == without.fingerprint


# -- refused ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("guest", "host", "message"),
    [
        ({"access": {"pattern": "uniform", "touches": 9}}, HOST, "not for uniform"),
        ({}, {}, "memory does not run out"),
        ({}, {"memory": {"size": 64 * MIB}}, "no swap"),
        ({}, {**HOST, "scheduler": "fair"}, "not for host.scheduler fair"),
    ],
)
def test_where_it_is_not_modelled_it_is_refused(
    guest: dict[str, Any], host: dict[str, Any], message: str
) -> None:
    keys = {"memory": 32 * MIB, "access": SERVER, "async_pf": True, **guest}
    with pytest.raises(InputError, match=message) as caught:
        scenario(guest=keys, host=host, duration=MS)
    assert "guests.vm0.async_pf" in str(caught.value)
