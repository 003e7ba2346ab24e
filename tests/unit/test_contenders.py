"""Who else takes memory back: how often, what, and in which order."""

from __future__ import annotations

from typing import Any, get_args

import numpy as np
import pytest
from bench import Bench
from lab import world

from simkvm import contenders
from simkvm.kernel.cacheline import CacheLine
from simkvm.scenario import contenders as schema
from simkvm.units import GIB, KIB, MIB

MS, SECOND = 1_000_000, 1_000_000_000


def madvise(**keys: Any) -> schema.MadviseDontneed:
    given = {"guest": "vm", "range": 2 * MIB, "rate": 1000.0} | keys
    return schema.MadviseDontneed.model_validate(given)


def balloon(**keys: Any) -> schema.Balloon:
    given = {"guest": "vm", "target": 64 * KIB, "rate": 1e6} | keys
    return schema.Balloon.model_validate(given)


def reporting(**keys: Any) -> schema.FreePageReporting:
    given = {"guest": "vm", "delay": MS, "idle": 10 * MS} | keys
    return schema.FreePageReporting.model_validate(given)


# -- what they share --------------------------------------------------------------------------


def test_every_kind_of_the_schema_can_be_built() -> None:
    models = get_args(get_args(schema.Contender)[0])
    assert {model.model_fields["kind"].default for model in models} == set(contenders.KINDS)


def test_a_call_is_one_range_under_mmap_lock_whatever_its_size() -> None:
    """madvise_dontneed_single_vma(): one start and one end."""
    bench = Bench(madvise(range=8 * MIB, order="sequential"), memory=8 * MIB)
    lock = bench.lab.kvm.host.mmap_lock
    assert isinstance(lock, CacheLine)
    (call,) = bench.run(900_000)[:1]
    assert call[1:] == (0, 2048)
    bench.lab.env.run(4 * MS)
    assert lock.owner == bench.lab.task.cpu.id
    sites = bench.lab.acquisitions()
    assert sites["range_start", "write"] == sites["range_end", "write"] >= 1


def test_a_range_is_widened_to_whole_leaves() -> None:
    bench = Bench(madvise(range=6 * MIB, align=MIB, order="sequential"), mapping=2 * MIB)
    assert [call[1:] for call in bench.run(3 * MS)][:3] == [(0, 3), (0, 4), (1, 4)]


def test_no_call_after_the_guest_died() -> None:
    bench = Bench(madvise(range=4 * KIB))
    bench.run(10 * MS)
    before = bench.contender.calls
    bench.lab.kvm.alive = False
    bench.lab.env.run(bench.process)
    assert bench.contender.calls == before


# -- madvise ----------------------------------------------------------------------------------


def test_periodic_calls_come_at_the_rate() -> None:
    times = Bench(madvise(range=4 * KIB, start=5 * MS), fill=False).begins(20 * MS)
    assert len(times) == 15
    # Taking mmap_lock: its count, for which the first call fetches the line, and its owner. What
    # is told of a call is when it has the lock, less the 6 of an atomic on a line that is there.
    expected = [5 * MS + n * MS for n in range(15)]
    assert times[1:] == [t_ns + 6 for t_ns in expected[1:]]
    assert times[0] - expected[0] == 45


def test_a_call_that_is_late_comes_at_once_and_the_next_in_time() -> None:
    """2 MiB cost more than 100 us: each call begins when the one before is over."""
    bench = Bench(madvise(range=8 * MIB, rate=10_000.0, order="sequential", stop=2 * MS))
    bench.run(50 * MS)
    assert bench.contender.calls == 20, "one each 100 us up to the stop, all late"
    begins = np.array([t_ns for t_ns, _, _ in bench.calls])
    busy = np.diff(begins)
    assert (busy[:2] > MS).all(), "the pages were there"
    assert (np.diff(begins[2:]) < 20_000).all(), "then it caught up"


def test_poisson_calls_are_exponential_apart() -> None:
    bench = Bench(madvise(range=4 * KIB, arrivals="poisson", rate=1e5), memory=MIB, fill=False)
    gaps = np.diff(bench.begins(40 * MS))
    assert len(gaps) == pytest.approx(4000, rel=0.06)
    assert gaps.std() == pytest.approx(gaps.mean(), rel=0.1)


@pytest.mark.parametrize(
    ("align", "starts"),
    [(None, [0, 512, 1024, 1536]), (MIB, [0, 256, 512, 768, 1024, 1280, 1536])],
)
def test_sequential_ranges_go_round(align: int | None, starts: list[int]) -> None:
    bench = Bench(madvise(align=align, order="sequential"), memory=8 * MIB, fill=False)
    seen = [first for _, first, last in bench.run(20 * MS) if last - first == 512]
    assert seen[: 2 * len(starts)] == 2 * starts


def test_random_ranges_are_aligned_and_everywhere() -> None:
    bench = Bench(madvise(range=MIB, rate=50_000.0), memory=8 * MIB, fill=False)
    calls = bench.run(20 * MS)
    counts = np.bincount([first // 256 for _, first, _ in calls], minlength=8)
    assert all(first % 256 == 0 and last == first + 256 for _, first, last in calls)
    assert len(counts) == 8
    assert counts.min() > 0.7 * len(calls) / 8


def test_start_and_stop() -> None:
    times = Bench(madvise(range=4 * KIB, start=3 * MS, stop=7 * MS), fill=False).begins(20 * MS)
    assert [round(t_ns / MS) for t_ns in times] == [3, 4, 5, 6], "none at the stop itself"


# -- balloon ----------------------------------------------------------------------------------


def test_a_balloon_takes_single_pages_from_the_end_down() -> None:
    """VIRTIO_BALLOON_ARRAY_PFNS_MAX pages a request; the VMM drops each by itself."""
    bench = Bench(balloon(target=40 * KIB, batch=4), memory=4 * MIB)
    bench.lab.env.run(bench.process)
    pages = [first for _, first, _ in bench.calls]
    assert pages == [1020, 1021, 1022, 1023, 1016, 1017, 1018, 1019, 1014, 1015]
    assert all(last == first + 1 for _, first, last in bench.calls)
    assert bench.contender.calls == 10


def test_a_vmm_may_join_the_pages_of_a_request() -> None:
    bench = Bench(balloon(target=2 * MIB, merge=True), memory=4 * MIB)
    bench.lab.env.run(bench.process)
    assert [call[1:] for call in bench.calls] == [(768, 1024), (512, 768)]


def test_requests_come_at_the_rate_of_pages() -> None:
    bench = Bench(balloon(target=64 * KIB, batch=4, rate=1000.0, merge=True, start=MS))
    bench.run(40 * MS)
    assert [round(t_ns / MS) for t_ns, _, _ in bench.calls] == [1, 5, 9, 13]


def test_a_balloon_has_its_size_then_and_stops() -> None:
    bench = Bench(balloon(target=MIB), memory=4 * MIB)
    bench.lab.env.run(bench.process)
    assert np.flatnonzero(bench.lab.kvm.host.state == 0).tolist() == list(range(768, 1024))
    assert not bench.process.is_alive


# -- free page reporting ----------------------------------------------------------------------


def touched(bench: Bench, block: int, t_ns: int, pages: int = 512) -> None:
    bench.lab.kvm.last_touch_ns[block * pages + 5] = t_ns


def test_what_was_not_touched_for_long_enough_is_reported_after_the_delay() -> None:
    bench = Bench(reporting(start=30 * MS), memory=16 * MIB)
    bench.lab.kvm.last_touch_ns[:] = 0
    touched(bench, 1, 21 * MS)
    touched(bench, 2, 21 * MS + 1)
    (calls, times) = ([], [])
    for t_ns, first, last in bench.run(31 * MS + 20 * MS):
        calls.append((first // 512, last - first))
        times.append(t_ns)
    assert times[0] >= 31 * MS
    assert [block for block, _ in calls] == [0, 1, 3, 4, 5, 6, 7, 2]
    assert {size for _, size in calls} == {512}
    assert times[-1] >= times[-2] + MS, "block 2 was idle for a nanosecond too short: next pass"


def test_only_blocks_that_are_backed_and_were_used_are_reported() -> None:
    bench = Bench(reporting(), memory=8 * MIB, fill=False)
    bench.lab.fill([600, 1100])
    bench.lab.kvm.last_touch_ns[600] = 0
    bench.lab.kvm.last_touch_ns[0] = 0
    assert [call[1:] for call in bench.run(30 * MS)] == [(512, 1024)]


def test_a_pass_takes_a_sixteenth_in_whole_requests() -> None:
    """DIV_ROUND_UP(nr_free, PAGE_REPORTING_CAPACITY * 16) requests of PAGE_REPORTING_CAPACITY."""
    bench = Bench(reporting(block=64 * KIB, batch=4, delay=20 * MS), memory=10 * MIB)
    bench.lab.kvm.last_touch_ns[:] = 0
    bench.run(200 * MS)
    begins = np.array([t_ns for t_ns, _, _ in bench.calls])
    passes = np.split(begins, np.flatnonzero(np.diff(begins) > 15 * MS) + 1)
    # 160 blocks free: 3 requests of 4; 148: 3; 136: 3; 124: 2...
    assert [len(part) for part in passes][:6] == [12, 12, 12, 8, 8, 8]


def test_blocks_are_reported_in_ascending_order() -> None:
    bench = Bench(reporting(block=64 * KIB), memory=4 * MIB)
    bench.lab.kvm.last_touch_ns[:] = 0
    firsts = [first for _, first, _ in bench.run(80 * MS)]
    assert firsts[:32] == [16 * n for n in range(32)]


def test_a_block_that_memory_cuts_off_is_never_free() -> None:
    bench = Bench(reporting(), memory=3 * MIB)
    bench.lab.kvm.last_touch_ns[:] = 0
    assert [call[1:] for call in bench.run(40 * MS)] == [(0, 512)]


def test_leaves_larger_than_the_block_go_whole() -> None:
    """A block cannot be smaller than what stage 2 maps it with."""
    bench = Bench(reporting(), memory=3 * GIB, mapping=GIB)
    bench.lab.kvm.last_touch_ns[:] = [10 * SECOND, 0, 10 * SECOND]
    assert [call[1:] for call in bench.run(40 * MS)] == [(1, 2)]


# -- in a world -------------------------------------------------------------------------------


def test_contenders_draw_from_streams_of_their_own() -> None:
    """Another contender shifts nobody's draws."""
    drawn = []
    for more in ({}, {"z": {"kind": "madvise_dontneed", "guest": "vm", "range": 4096, "rate": 10}}):
        built = world(
            contenders={
                "a": {
                    "kind": "madvise_dontneed",
                    "guest": "vm",
                    "range": 4096,
                    "rate": 1e5,
                    "arrivals": "poisson",
                },
                **more,
            },
            duration=MS,
        )
        drawn.append([built.contenders[0].rng.random() for _ in range(5)])
    assert drawn[0] == drawn[1]
    assert drawn[0] != [built.contenders[1].rng.random() for _ in range(5)]


def test_every_contender_has_a_cpu_to_itself() -> None:
    spec = {"kind": "balloon", "guest": "vm", "target": 4096, "rate": 1}
    built = world(contenders={"a": spec, "b": spec}, ageing={}, duration=MS)
    cpus = [contender.task.cpu.id for contender in built.contenders]
    used = [built.kvms[0].vcpus[0].cpu.id, *cpus]
    assert len(set(used)) == len(used) == 3
