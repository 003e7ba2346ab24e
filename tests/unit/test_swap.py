"""Swap devices: slots, whose CPU does the work, who waits for what, and what lies in memory.

Source: mm/page_io.c, mm/memory.c (do_swap_page), mm/swapfile.c, drivers/block/zram, v6.12.
"""

from __future__ import annotations

from collections.abc import Generator
from typing import Any

import numpy as np
import pytest
from lab import events
from pydantic import TypeAdapter
from simpy import Environment, Event, Resource

from simkvm.kernel.cpu import Cpu, CpuState
from simkvm.kernel.dram import Dram
from simkvm.kernel.drive import Drive, Media, Tags
from simkvm.kernel.latency import TAIL, Latencies, LatencyLaw
from simkvm.kernel.swap import ENDLESS, SwapDevice
from simkvm.kernel.task import Task
from simkvm.kernel.zram import Zram
from simkvm.scenario.machine import Machine, load_machine
from simkvm.scenario.swap import MOST_SPREAD, Swap
from simkvm.units import KIB, MIB

ALTRA = "ampere-altra-80c"
GB_S = 10**9
EXACT = {"read_latency": 90_000, "read_p9999": 90_000, "write_latency": 20_000}
EXACT |= {"write_p9999": 20_000}  # nothing left to chance


class Bench:
    """A device, an environment and as many tasks as are asked for."""

    def __init__(self, machine: dict[str, float] | None = None, page: int = 4 * KIB, **spec: Any):
        self.env = Environment()
        self.machine: Machine = load_machine({"base": ALTRA, "set": machine or {}})
        self.device = SwapDevice.of(
            self.env,
            TypeAdapter(Swap).validate_python(spec),
            self.machine,
            np.random.default_rng(7),
            Dram.of(self.machine),
            page,
        )
        self.ends: list[Any] = []

    def task(self) -> Task:
        made = Task("vcpu", Cpu(len(self.ends)))
        made.cpu.enter_kernel(0)
        return made

    def start(self, steps: Generator[Event, Any, Any]) -> None:
        at = len(self.ends)
        self.ends.append(None)

        def process() -> Generator[Event, Any, None]:
            self.ends[at] = yield from steps

        self.env.process(process())

    def read(self, *at_ns: int) -> list[int]:
        """When readers of these times go on, each on a CPU of its own."""
        return self._each(self._read_at(t_ns) for t_ns in at_ns)

    def write(self, *batches: tuple[int, int]) -> list[Any]:
        """What writers, each a time and a number of pages, get."""
        return self._each(self._write_at(*batch) for batch in batches)

    def _each(self, steps: Any) -> list[Any]:
        for one in steps:
            self.start(one)
        self.env.run()
        found, self.ends = self.ends, []
        return found

    def _read_at(self, t_ns: int) -> Generator[Event, Any, int]:
        task = self.task()
        yield self.env.timeout(t_ns - self.env.now)
        return (yield from self.device.read(task, t_ns))

    def _write_at(self, t_ns: int, pages: int) -> Generator[Event, Any, Any]:
        task = self.task()
        yield self.env.timeout(t_ns - self.env.now)
        return (yield from self.device.write(task, t_ns, pages))

    def ns(self, *names: str) -> int:
        return round(sum(self.machine[name] for name in names))


# -- slots ------------------------------------------------------------------------------------


def test_a_full_device_gives_what_is_left() -> None:
    device = Bench(kind="zram", size=10 * 4 * KIB).device
    assert [device.allocate(n) for n in (4, 4, 4, 1)] == [4, 4, 2, 0]
    device.free(3)
    assert (device.used, device.free_slots, device.most_used) == (7, 3, 10)
    assert device.allocate(2) == 2
    assert (device.used, device.most_used) == (9, 10)
    assert device.allocate(5) == 1


def test_more_cannot_be_freed_than_is_used() -> None:
    device = Bench(kind="nvme", size=1 * MIB).device
    device.allocate(2)
    with pytest.raises(ValueError, match="3 slots freed, 2 in use"):
        device.free(3)
    with pytest.raises(ValueError, match="-1 slots"):
        device.free(-1)


def test_without_a_size_it_never_gets_full() -> None:
    device = Bench(kind="optane").device
    assert device.allocate(1 << 40) == 1 << 40
    assert not device.full
    assert device.capacity == ENDLESS


def test_slots_are_scarce_above_half() -> None:
    device = Bench(kind="nvme", size=8 * 4 * KIB).device
    device.allocate(4)
    assert not device.full, "half is not above half"
    device.allocate(1)
    assert device.full


@pytest.mark.parametrize(
    ("kind", "write", "used", "keeps"),
    [
        ("nvme", False, 4, True),
        ("nvme", True, 4, False),  # the page will differ from what is stored
        ("nvme", False, 5, False),  # scarce
        ("zram", False, 4, False),  # never was in the swap cache
    ],
)
def test_who_keeps_its_slot(kind: str, write: bool, used: int, keeps: bool) -> None:
    device = Bench(kind=kind, size=8 * 4 * KIB).device
    device.allocate(used)
    assert device.keeps_slot(write) is keeps


# -- zram -------------------------------------------------------------------------------------


@pytest.mark.parametrize("algorithm", ["lz4", "zstd"])
def test_zram_takes_the_callers_cpu_and_nothing_else(algorithm: str) -> None:
    bench = Bench(kind="zram", algorithm=algorithm)
    fault_ns = bench.ns("s2_fault4k_alloc_total_ns") - bench.ns("s2_map4k_total_ns", "zero_4k_ns")
    read_ns = bench.ns(f"zram_in_{algorithm}_ns") - fault_ns
    out_ns = bench.ns(f"zram_out_{algorithm}_ns")
    assert bench.read(0, 0, 500) == [read_ns, read_ns, 500 + read_ns], "no queue"
    assert bench.write((1_000_000, 3)) == [
        (1_000_000 + 3 * out_ns, [1_000_000 + k * out_ns for k in (1, 2, 3)])
    ]
    device = bench.device
    assert device.synchronous
    assert (device.reads, device.read_ns) == (3, 3 * read_ns)
    assert (device.writes, device.write_ns) == (3, 6 * out_ns)
    assert device.latencies.largest == read_ns
    assert device.largest_queue == 0


def test_zram_stays_in_the_kernel() -> None:
    bench = Bench(kind="zram")
    task = bench.task()
    bench.start(bench.device.read(task, 0))
    bench.env.run()
    assert task.cpu.state(1000) is CpuState.KERNEL


def test_a_larger_page_takes_longer_to_compress() -> None:
    small, large = Bench(kind="zram"), Bench(kind="zram", page=16 * KIB)
    assert large.write((0, 1))[0][0] == 4 * small.write((0, 1))[0][0]
    assert large.read(10**6)[0] - 10**6 == 4 * (small.read(10**6)[0] - 10**6)


def test_decompressing_takes_no_less_than_a_copy() -> None:
    """Whatever the machine says that a whole swap-in takes."""
    bench = Bench({"zram_in_lz4_ns": 1300}, kind="zram")
    assert bench.read(0) == [bench.ns("copy_4k_ns")]


def test_decompressing_is_bound_by_memory() -> None:
    """At 1 GB/s a page is 4096 ns of the memory: longer than the CPU needs."""
    bench = Bench({"dram_bw_total_bytes_per_s": GB_S}, kind="zram")
    assert bench.read(0, 0, 0) == [4096, 8192, 12_288]


def test_compressing_writes_only_what_is_stored() -> None:
    bench = Bench({"dram_bw_total_bytes_per_s": 10**7}, kind="zram", ratio=0.25)
    ((end_ns, ends_ns),) = bench.write((0, 2))
    assert (end_ns, ends_ns) == (204_800, [102_400, 204_800])


def test_the_pool_holds_what_is_stored_in_whole_pages() -> None:
    device = Bench(kind="zram", ratio=0.25, incompressible=0.2).device  # 0.2 + 0.8 / 4 of a page
    assert device.pool_pages == 0
    for pages, pool in ((1, 1), (1, 1), (1, 2), (997, 400)):
        device.allocate(pages)
        assert device.pool_pages == pool, device.used
    device.free(998)
    assert device.pool_pages == 1, "of two pages"


def test_a_drive_holds_nothing_in_memory() -> None:
    device = Bench(kind="nvme").device
    device.allocate(1000)
    assert device.pool_pages == 0


def test_zram_costs_no_event() -> None:
    bench = Bench(kind="zram")
    bench.start(bench.device.write(bench.task(), 0, 512))
    before = events(bench.env)
    bench.env.run()
    assert events(bench.env) - before == 1, "the end of the process"


# -- drives: one request ----------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["nvme", "optane"])
def test_a_lone_read_takes_what_was_published_and_the_swap_cache(kind: str) -> None:
    latency_ns = {"nvme": 90_000, "optane": 10_000}[kind]
    bench = Bench(kind=kind, read_latency=latency_ns, read_p9999=latency_ns)
    assert bench.read(0) == [latency_ns + bench.ns("swap_cache_ns")]


def test_the_reader_sleeps_while_the_drive_works() -> None:
    bench = Bench(kind="nvme", **EXACT)
    task = bench.task()
    bench.start(bench.device.read(task, 0))
    bench.env.run()
    asleep_ns = bench.ns("swap_cache_ns", "bio_ns", "block_request_ns", "context_switch_ns")
    (end_ns,) = bench.ends
    states = [task.cpu.state(t) for t in (asleep_ns - 1, asleep_ns, end_ns - 1, end_ns)]
    assert states == [CpuState.KERNEL, CpuState.IDLE, CpuState.IDLE, CpuState.KERNEL]


def test_a_fast_drive_is_not_felt_before_the_reader_sleeps() -> None:
    """It is done before the CPU has switched away: the wake-up comes after that."""
    bench = Bench(
        {"context_switch_ns": 50_000}, kind="optane", read_latency=7_000, read_p9999=7_000
    )
    asleep_ns = bench.ns("swap_cache_ns", "bio_ns", "block_request_ns", "context_switch_ns")
    assert bench.read(0) == [asleep_ns + bench.ns("wakeup_ns")]


@pytest.mark.parametrize(("other_ns", "more"), [(None, 0), (40_000, 1), (95_000, 0)])
def test_a_read_costs_an_event_only_if_something_comes_before_it(
    other_ns: int | None, more: int
) -> None:
    bench = Bench(kind="nvme", **EXACT)
    if other_ns is not None:
        bench.env.timeout(other_ns)
    bench.start(bench.device.read(bench.task(), 0))
    before = events(bench.env)
    bench.env.run()
    assert events(bench.env) - before == 1 + more, "the end of the process, and the sleep"


def test_who_writes_does_not_wait() -> None:
    bench = Bench(kind="nvme", **EXACT)
    ((end_ns, ends_ns),) = bench.write((0, 1))
    cpu_ns = bench.ns("swap_slot_ns", "swap_cache_ns", "bio_ns", "block_request_ns")
    around_ns = bench.ns("bio_ns", "block_request_ns", "block_interrupt_ns", "wakeup_ns")
    assert end_ns == cpu_ns
    assert ends_ns == [cpu_ns + 20_000 - around_ns]
    assert not bench.device.synchronous


def test_the_interrupt_is_taken_from_the_writers_cpu() -> None:
    bench = Bench(kind="nvme", **EXACT)
    task = bench.task()
    bench.start(bench.device.write(task, 0, 33))
    bench.env.run()
    assert task.cpu.take_stolen() == 2 * bench.ns("block_interrupt_ns"), "two requests"


def test_a_plug_sends_32_pages_at_once() -> None:
    bench = Bench(kind="nvme", write_bandwidth=GB_S, **EXACT)
    ((end_ns, ends_ns),) = bench.write((0, 40))
    page_ns = bench.ns("swap_slot_ns", "swap_cache_ns", "bio_ns")
    request_ns = bench.ns("block_request_ns")
    around_ns = bench.ns("bio_ns", "block_request_ns", "block_interrupt_ns", "wakeup_ns")
    assert end_ns == 40 * page_ns + 2 * request_ns
    first_ns = 32 * page_ns + request_ns + 20_000 - around_ns + 31 * 4096
    assert ends_ns[:32] == [first_ns] * 32
    assert len(ends_ns) == 40
    assert set(ends_ns[32:]) != {first_ns}


@pytest.mark.parametrize(("page", "together"), [(4 * KIB, 32), (16 * KIB, 8), (64 * KIB, 2)])
def test_a_plug_has_a_size_not_a_number(page: int, together: int) -> None:
    bench = Bench(kind="nvme", page=page, **EXACT)
    ((_, ends_ns),) = bench.write((0, 2 * together))
    assert [ends_ns.count(end_ns) for end_ns in sorted(set(ends_ns))] == [together, together]


# -- drives: many requests --------------------------------------------------------------------


def test_channels_serve_in_parallel_and_in_turn() -> None:
    media = Media(channels=2)
    ends = [media.serve(1000, 500, 10, 10**12) for _ in range(5)]
    assert ends == [1500, 1500, 2000, 2000, 2500]
    assert media.largest_queue == 3
    assert media.serve(2500, 500, 10, 10**12) == 3000, "free again exactly then"
    assert media.largest_queue == 3


def test_a_queue_shrinks_when_channels_are_free() -> None:
    media = Media(channels=1)
    media.serve(0, 100, 1, 10**12)
    assert media.largest_queue == 0, "it found the channel free"
    media.serve(10, 100, 1, 10**12)
    media.serve(100, 100, 1, 10**12)
    assert media.largest_queue == 1, "the second has just begun"
    media.serve(100, 100, 1, 10**12)
    assert media.largest_queue == 2

    media = Media(channels=1)
    for t_ns in (0, 10, 20):
        media.serve(t_ns, 100, 1, 10**12)
    media.serve(150, 100, 1, 10**12)  # the second is being served, the third waits
    assert media.largest_queue == 2
    media.serve(151, 100, 1, 10**12)
    assert media.largest_queue == 3


def test_the_free_channel_is_taken_and_not_the_next() -> None:
    media = Media(channels=2)
    assert media.serve(0, 1000, 1, 10**12) == 1000
    assert media.serve(0, 100, 1, 10**12) == 100
    assert media.serve(50, 100, 1, 10**12) == 200
    assert media.serve(60, 100, 1, 10**12) == 300


def test_all_channels_together_get_the_bandwidth() -> None:
    """1 byte a ns: 4096 ns a page, however many channels; a lone one does not feel it."""
    media = Media(channels=64)
    ends = [media.serve(0, 10_000, 4096, GB_S) for _ in range(6)]
    assert ends == [10_000, 10_000, 12_288, 16_384, 20_480, 24_576]


def test_bandwidth_that_nobody_used_is_lost() -> None:
    media = Media(channels=64)
    media.serve(0, 10_000, 4096, GB_S)
    ends = [media.serve(1_000_000, 1000, 4096, GB_S) for _ in range(2)]
    assert ends == [1_004_096, 1_008_192]


def test_data_move_when_a_channel_has_them() -> None:
    media = Media(channels=2)
    assert [media.serve(0, 10_000, 4096, GB_S) for _ in range(2)] == [10_000, 10_000]
    assert media.serve(0, 500, 4096, GB_S) == 14_096, "not before the channel was free"


def test_reads_and_writes_move_at_their_own_pace() -> None:
    """2 and 1 GB/s, through one server: a page is 2048 ns and 4096 ns of it."""
    paces = {"read_bandwidth": 2 * GB_S, "write_bandwidth": GB_S}
    bench = Bench(kind="nvme", channels=1024, **paces, **EXACT)
    reads = sorted(bench.read(*[0] * 100))
    assert set(np.diff(reads[50:])) == {2048}
    writes = sorted(ends_ns[0] for _, ends_ns in bench.write(*[(10**7, 1)] * 100))
    assert set(np.diff(writes[50:])) == {4096}


def test_what_lies_beyond_the_measured_size_takes_its_transfer() -> None:
    assert Media(1).serve(0, 10_000, 4096 + 5000, GB_S) == 15_000


def test_readers_of_one_moment_wait_for_a_channel() -> None:
    bench = Bench(kind="nvme", channels=2, **EXACT)
    served_ns = 90_000 - bench.ns("bio_ns", "block_request_ns", "block_interrupt_ns", "wakeup_ns")
    ends = sorted(bench.read(*[0] * 6))
    assert np.diff(ends).tolist() == [0, served_ns, 0, served_ns, 0]
    assert bench.device.largest_queue == 4
    assert bench.device.latencies.number == bench.device.reads == 6
    assert bench.device.read_ns == sum(ends)


def test_a_reader_that_comes_while_a_batch_is_sent_is_not_behind_all_of_it() -> None:
    """Requests come to the drive in the order of their times, not in that of the callers."""
    bench = Bench(kind="nvme", channels=1, write_bandwidth=10**12, read_bandwidth=10**12, **EXACT)
    bench.start(bench.device.write(bench.task(), 0, 64))
    at_ns = 32 * bench.ns("swap_slot_ns", "swap_cache_ns", "bio_ns") + 3000

    def reader() -> Generator[Event, Any, int]:
        yield bench.env.timeout(at_ns)
        return (yield from bench.device.read(bench.task(), at_ns))

    bench.start(reader())
    bench.env.run()
    (_, ends_ns), end_ns = bench.ends
    assert ends_ns[31] < end_ns < ends_ns[32]


def test_memory_takes_what_a_drive_reads() -> None:
    bench = Bench({"dram_bw_total_bytes_per_s": 10**7}, kind="nvme", **EXACT)
    first_ns, second_ns = bench.read(0, 0)
    assert second_ns - first_ns == 409_600


def test_reads_are_in_the_account_from_asking_on() -> None:
    bench = Bench(kind="nvme", **EXACT)
    began_ns = 1_000_000
    (end_ns,) = bench.read(began_ns)
    assert bench.device.read_ns == bench.device.latencies.total == end_ns - began_ns
    assert bench.device.latencies.number == 1, "however often one asks"


@pytest.mark.parametrize("seed", range(12))
def test_the_recurrence_is_what_events_say(seed: int) -> None:
    """Channels as a resource that requests queue for, the data as a server behind it."""
    rng = np.random.default_rng(seed)
    channels, number = int(rng.integers(1, 6)), 300
    arrivals = np.cumsum(rng.integers(0, 2000, number)).tolist()
    latencies = rng.integers(0, 3000 * channels, number).tolist()
    sizes = (4096 * rng.choice([1, 1, 1, 32], number)).tolist()
    paces = rng.choice([GB_S, 5 * GB_S, 100 * GB_S], number).tolist()
    env, moved_ns, ends = Environment(), 0, [0] * number
    free = Resource(env, channels)

    def request(at: int) -> Generator[Event, Any, None]:
        nonlocal moved_ns
        yield env.timeout(arrivals[at])
        with free.request() as granted:
            yield granted
            begin_ns = int(env.now)
            move_ns = round(sizes[at] * 10**9 / paces[at])
            moved_ns = max(moved_ns, begin_ns) + move_ns
            alone_ns = latencies[at] + round((sizes[at] - 4096) * 10**9 / paces[at])
            ends[at] = max(begin_ns + alone_ns, moved_ns)
            yield env.timeout(ends[at] - begin_ns)

    for at in range(number):
        env.process(request(at))
    env.run()
    media = Media(channels)
    assert [
        media.serve(*one) for one in zip(arrivals, latencies, sizes, paces, strict=True)
    ] == ends


# -- requests in flight -----------------------------------------------------------------------


def test_a_cpu_has_so_many_requests_in_flight_and_then_sleeps() -> None:
    """16 tags are woken for by twos: the 17th request comes after the second is complete."""
    bench = Bench(kind="nvme", queue_depth=16, channels=1, page=128 * KIB, **EXACT)
    task = bench.task()
    bench.start(bench.device.write(task, 0, 17))
    bench.env.run()
    ((end_ns, ends_ns),) = bench.ends
    assert end_ns == ends_ns[1] + bench.ns("block_interrupt_ns", "wakeup_ns")
    sent_ns = 16 * bench.ns("swap_slot_ns", "swap_cache_ns", "bio_ns", "block_request_ns")
    states = [task.cpu.state(t_ns) for t_ns in (sent_ns, ends_ns[1], end_ns)]
    assert states == [CpuState.KERNEL, CpuState.IDLE, CpuState.KERNEL]


@pytest.mark.parametrize(("depth", "freed"), [(1, 1), (8, 1), (16, 2), (40, 5), (100, 8)])
def test_sleepers_are_woken_by_an_eighth_of_the_tags_or_eight(depth: int, freed: int) -> None:
    tags = Tags(depth)
    for end_ns in range(1000, 1000 + depth):
        assert tags.free_ns(0, 0) == 0
        tags.take(0, end_ns)
    assert tags.free_ns(0, 999) == 999 + freed
    assert tags.free_ns(0, 1000) == 1000
    assert tags.sleeps == 1


def test_each_cpu_has_tags_of_its_own() -> None:
    tags = Tags(1)
    assert tags.free_ns(0, 0) == 0
    tags.take(0, 1000)
    assert [tags.free_ns(cpu, 10) for cpu in (0, 1)] == [1000, 10]


# -- the law of latencies ---------------------------------------------------------------------


def test_the_law_has_the_mean_and_the_quantile() -> None:
    law = LatencyLaw.of(90_000, 225_000)
    assert law.floor_ns + law.tail_ns == pytest.approx(90_000)
    assert law.floor_ns + TAIL * law.tail_ns == pytest.approx(225_000)


def test_what_is_outside_the_drive_is_no_part_of_its_floor() -> None:
    law, less = LatencyLaw.of(90_000, 225_000), LatencyLaw.of(90_000, 225_000, 6_000)
    assert less.floor_ns == pytest.approx(law.floor_ns - 6_000)
    assert less.tail_ns == law.tail_ns
    assert LatencyLaw.of(10_000, 30_000, 9_000).floor_ns == 0, "nothing takes less than none"


@pytest.mark.parametrize("p9999_ns", [89_999, 829_000])
def test_a_tail_that_no_exponential_has_is_refused(p9999_ns: int) -> None:
    with pytest.raises(ValueError, match="no exponential tail"):
        LatencyLaw.of(90_000, p9999_ns)


def test_times_one_by_one_are_those_of_the_stream() -> None:
    law = LatencyLaw.of(90_000, 225_000)
    one, other = (Latencies(law, np.random.default_rng(3)) for _ in range(2))
    assert [one.next() for _ in range(600)] == [
        time for _ in range(3) for time in other.draw(256).tolist()
    ][:600]


def test_writes_do_not_shift_the_times_of_reads() -> None:
    quiet, busy = Bench(kind="nvme"), Bench(kind="nvme")
    busy.write((0, 64))
    later = 10_000_000
    assert quiet.read(later) == busy.read(later)


# -- what the machines say --------------------------------------------------------------------


@pytest.mark.parametrize("name", [ALTRA, "graviton3-64c", "x86-icelake-64c"])
@pytest.mark.parametrize("kind", ["zram", "nvme", "optane"])
def test_every_machine_has_every_kind(name: str, kind: str) -> None:
    machine = load_machine(name)
    device = SwapDevice.of(
        Environment(),
        TypeAdapter(Swap).validate_python({"kind": kind}),
        machine,
        np.random.default_rng(1),
        Dram.of(machine),
    )
    assert isinstance(device, Zram if kind == "zram" else Drive)


@pytest.mark.parametrize("name", [ALTRA, "graviton3-64c", "x86-icelake-64c"])
def test_the_kernels_part_of_swapping_out_is_2_us(name: str) -> None:
    """The same as in the machines' zram_out_...: what they are less the compression."""
    machine = load_machine(name)
    parts = ("swap_slot_ns", "swap_cache_ns", "bio_ns", "block_request_ns")
    assert sum(machine[part] for part in parts) == pytest.approx(2000, rel=0.13)


@pytest.mark.parametrize("name", [ALTRA, "graviton3-64c", "x86-icelake-64c"])
@pytest.mark.parametrize("figures", ["nvme_in", "nvme_out", "optane_in", "optane_out"])
def test_ends_of_ranges_are_possible_one_at_a_time(name: str, figures: str) -> None:
    parameters = load_machine(name).parameters
    mean, p9999 = (parameters[f"{figures}_{figure}_ns"] for figure in ("mean", "p9999"))
    pairs = [(mean.value, end) for end in (p9999.low, p9999.high)]
    pairs += [(end, p9999.value) for end in (mean.low, mean.high)]
    assert all(one <= other <= MOST_SPREAD * one for one, other in pairs)


def test_the_drives_give_the_requests_that_were_published() -> None:
    """637,000 and 550,000 reads of 4 KiB a second, by a tenth: see the machines' sources."""
    for kind, published in (("nvme", 637_000), ("optane", 550_000)):
        bench = Bench({"dram_bw_total_bytes_per_s": 10**15}, kind=kind)
        tasks, number = [bench.task() for _ in range(256)], 20_000

        def reads(task: Task, device: SwapDevice, each: int) -> Generator[Event, Any, int]:
            t_ns = 0
            for _ in range(each):
                t_ns = yield from device.read(task, t_ns)
            return t_ns

        for task in tasks:
            bench.start(reads(task, bench.device, number // 256))
        bench.env.run()
        per_s = bench.device.reads / float(np.mean(bench.ends)) * 1e9
        assert per_s == pytest.approx(published, rel=0.1)
