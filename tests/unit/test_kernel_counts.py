"""Exact counts of a real kernel, reproduced under the variant linux-6.12.

Counted on Linux 6.12.117 arm64 (Debian) running KVM guests in emulation, by function and event
tracing; the id of each case is the run that it was counted in. Times of those runs are not those of
a machine and are not used here.

The guests counted had, besides their memory, one page of code in a memory slot of its own, 1 GiB
below: two more tables, one more page. Where that matters the guest here begins a page early, in
the GiB below. Their vCPUs ended every command with one exit to user space, which the kernel counts
as an abort too; it is left out here.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
from lab import GIB, KIB, MIB, Lab, Tally, scenario

from simkvm.kernel.host_memory import OWN, PRESENT
from simkvm.kernel.memslot import MemslotUpdate
from simkvm.kernel.stage2 import AF
from simkvm.kernel.unmap import UnmapWalk
from simkvm.kernel.world import World
from simkvm.scenario.kernel import load_kernel
from simkvm.scenario.machine import load_machine

CODE_PAGE = {"ipa_base": 2 * GIB - 4 * KIB}
BLOCKS = {"mapping": 2 * MIB}
MS = 1_000_000
START, END = ("range_start", "write"), ("range_end", "write")


@pytest.fixture
def tally(monkeypatch: pytest.MonkeyPatch) -> Tally:
    return Tally().listen(monkeypatch)


# -- taking memory back -----------------------------------------------------------------------

UNMAPS = {
    # run: memory, filled each, ((first, length, piece)...), visits, calls, pages, tables freed
    "unmap-c/1 32 MiB at once": (32 * MIB, 0, [(0, 0, 0)], 8209, 1, 8192, 17),
    "unmap-c/5 in 64 KiB": (32 * MIB, 0, [(0, 0, 64 * KIB)], 9216, 512, 8192, 17),
    "unmap-c/7 in 2 MiB": (32 * MIB, 0, [(0, 0, 2 * MIB)], 8224, 16, 8192, 17),
    "unmap-c/9 in 2 MiB, off by 1": (
        *(32 * MIB, 0, [(MIB, 30 * MIB, 2 * MIB)]),
        *(7725, 15, 7680, 14),
    ),
    "munmapdestroy-m16-c/1 16 MiB": (16 * MIB, 0, [(0, 0, 0)], 4105, 1, 4096, 9),
    "thp-c/7 64 MiB of pages": (64 * MIB, 0, [(0, 0, 0)], 16417, 1, 16384, 33),
    "sparse512-c/1 a page a table": (512 * MIB, 2 * MIB, [(0, 0, 0)], 131329, 1, 256, 257),
    "sparse512-c/3 in 2 MiB": (512 * MIB, 2 * MIB, [(0, 0, 2 * MIB)], 131584, 256, 256, 257),
    "sparse-c/3 3 of 4 GiB, off by 1 MiB": (
        *(4 * GIB, 2 * MIB, [(MIB, 3 * GIB, 0)]),
        *(787973, 4, 1536, 1538),
    ),
    "sparse-c/6 a page in 64 MiB": (4 * GIB, 64 * MIB, [(0, 0, 0)], 34820, 4, 64, 68),
    "sparse2-c/8 a page a GiB": (4 * GIB, GIB, [(0, 0, 0)], None, 4, 4, 8),
    "sparse2-c/1 4 GiB, a page a table": (4 * GIB, 2 * MIB, [(0, 0, 0)], None, 4, 2048, 2052),
}


@pytest.mark.parametrize("run", UNMAPS)
def test_unmap(run: str, tally: Tally) -> None:
    """kvm_pgtable_stage2_unmap() calls, stage2_unmap_walker() visits, kvm_s2_put_page() puts.

    An invalidation for each freed table (__kvm_tlb_flush_vmid_ipa) and one for each call.
    """
    memory, stride, ranges, visits, calls, pages, tables = UNMAPS[run]
    lab = Lab(memory)
    lab.fill_sparsely(stride or 4 * KIB)
    linked = lab.kvm.tables_allocated
    for first, length, piece in ranges:
        if piece:
            lab.drop_in_pieces(piece, first, length)
        else:
            lab.drop(first, length)
    found = tally.take()
    assert found == {
        "calls": calls,
        "visits": visits or found["visits"],
        "leaves": pages,
        "tables": tables,
    }
    assert lab.broadcasts() == tables + calls
    assert lab.kvm.tables_freed == tables
    assert lab.kvm.stage2.linked_tables == linked - tables
    assert lab.world.rcu.idle, "freed at once, not by RCU"


def test_unmap_page_by_page(tally: Tally) -> None:
    """unmap-c/3, 32 MiB in 4 KiB ranges: 3 visits each, two acquisitions each, 17 tables."""
    lab = Lab(32 * MIB)
    lab.fill()
    lab.drop_in_pieces(4 * KIB)
    assert tally.take() == {"calls": 8192, "visits": 24576, "leaves": 8192, "tables": 17}
    assert lab.broadcasts() == 8192 + 17
    assert lab.acquisitions() == {START: 8192, END: 8192}


def test_single_pages_the_rest_and_nothing(tally: Tally) -> None:
    """unmap-c/11 to 13: 200 random pages (two of them twice), what is left, an empty range."""
    lab = Lab(32 * MIB)
    lab.fill()
    for page in [*(37 * n % 8192 for n in range(198)), 37, 74]:
        lab.drop(page * 4 * KIB, 4 * KIB)
    assert tally.take() == {"calls": 200, "visits": 600, "leaves": 198, "tables": 0}
    assert lab.broadcasts() == 200
    lab.drop()
    rest = tally.take()
    assert rest == {"calls": 1, "visits": 8209, "leaves": 8192 - 198, "tables": 17}
    assert rest["leaves"] + 2 * rest["tables"] == 8028, "kvm_s2_put_page()"
    assert lab.broadcasts() == 200 + 18
    lab.drop()
    assert tally.take() == {"calls": 1, "visits": 1, "leaves": 0, "tables": 0}
    assert lab.broadcasts() == 200 + 18 + 1, "an empty range is invalidated too"


@pytest.mark.parametrize(
    ("pieces", "ranges", "visits"), [(0, 1, 33), (2 * MIB, 32, 64)], ids=["thp-c/1", "thp-c/3"]
)
def test_unmap_blocks(pieces: int, ranges: int, visits: int, tally: Tally) -> None:
    """64 MiB in blocks: the table that holds them goes with the last one."""
    lab = Lab(64 * MIB, BLOCKS)
    lab.fill()
    lab.drop_in_pieces(pieces or 64 * MIB)
    assert tally.take() == {"calls": ranges, "visits": visits, "leaves": 32, "tables": 1}
    assert lab.broadcasts() == ranges + 1
    assert lab.acquisitions() == {START: ranges, END: ranges}


def test_unmap_pages_of_blocks() -> None:
    """thp-c/5: the host splits its huge page first (a range of 2 MiB), which takes the block."""
    lab = Lab(64 * MIB, BLOCKS)
    lab.fill()
    costs = lab.kvm.unmap_costs(0)
    walks = [
        UnmapWalk(lab.kvm.stage2, block, block + 1, costs)
        for block in range(32)
        for _ in range(1 + 512)  # the split, then page after page where nothing is left
    ]
    assert len(walks) == 16416
    assert sum(walk.visits for walk in walks) == 32320
    assert sum(len(walk.tables) for walk in walks) == 1


@pytest.mark.parametrize(
    ("memory", "piece", "acquisitions"),
    [
        *((4 * MIB, 0, 2), (8 * MIB, 0, 2), (8 * MIB, 4 * KIB, 4096), (8 * MIB, 64 * KIB, 256)),
        *((8 * MIB, 2 * MIB, 8), (32 * MIB, 16 * KIB, 4096), (32 * MIB, 256 * KIB, 256)),
        *((32 * MIB, 8 * MIB, 8), (32 * MIB, 0, 2)),
    ],
    ids=[
        *("locks-fault/1", "locks-unmap/1", "locks-unmap/3", "locks-unmap/5"),
        *("locks-unmap/7", "unmap2-h/5", "unmap2-h/9", "unmap2-h/13", "unmap2-h/1"),
    ],
)
def test_two_write_acquisitions_a_range(memory: int, piece: int, acquisitions: int) -> None:
    """One in range start, one in range end, whatever lies between."""
    lab = Lab(memory)
    lab.fill()
    lab.drop_in_pieces(piece or memory)
    assert lab.acquisitions() == {START: acquisitions // 2, END: acquisitions // 2}


@pytest.mark.parametrize(
    ("first", "length", "chunks"),
    [
        (0, 4 * GIB, [1048576] * 4),
        (MIB, 3 * GIB, [1047552, 1048576, 1048576, 1024]),
    ],
    ids=["sparse2-c/1", "sparse2-c/3"],
)
def test_chunks_of_a_range(first: int, length: int, chunks: list[int], tally: Tally) -> None:
    """Calls of kvm_pgtable_stage2_unmap() by size in KiB: cut at guest-physical 1 GiB."""
    lab = Lab(4 * GIB)
    lab.drop(first, length)
    assert [(walk.last - walk.first) * 4 for walk in tally.walks] == chunks


@pytest.mark.parametrize(
    ("preemption", "waiter", "entries"),
    [("full", False, 1), ("full", True, 2), ("lazy", True, 2), ("none", True, 1)],
)
def test_the_lock_is_let_go_only_with_a_reason(
    preemption: str, waiter: bool, entries: int, tally: Tally
) -> None:
    """sparse2-c/1: __cond_resched_rwlock_write() is called 3 times in 4 GiB; only some let go.

    In locks-sparse/1 one of the three did, because the only CPU had another thread to run: three
    write acquisitions for the range instead of two. Here CPUs have one thread, so contention is
    the one reason, and only for a kernel that is preemptible at run time (rwlock_needbreak()).
    """
    lab = Lab(4 * GIB, host={"preemption": preemption})
    lab.fill_sparsely(2 * MIB)
    if waiter:
        lab.env.process(read_at(lab, 5000))
    lab.drop()
    assert tally.take()["calls"] == 4
    assert lab.acquisitions()[START] == entries


def read_at(lab: Lab, t_ns: int) -> Iterator[Any]:
    yield lab.env.timeout(t_ns)
    grant = lab.kvm.mmu_lock.read(t_ns, 5, 0, lambda at: (10, at + 10))
    assert not isinstance(grant, int), "the lock was not held"


# -- faults -----------------------------------------------------------------------------------


def run_world(**keys: Any) -> tuple[World, dict[str, Any], Counter[tuple[str, str]]]:
    """A run to its end: the world, its summary, acquisitions by site and mode."""
    spec = scenario(**keys)
    built = World(spec, load_machine(spec.machine), load_kernel(spec.kernel))
    record = built.run()
    sites = zip(record.locks["site"], record.locks["mode"], strict=True)
    counts = dict(zip(sites, record.locks["acquisitions"], strict=True))
    return built, record.summary, Counter(counts)


POPULATE = {"pattern": "populate"}
READS = {"pattern": "populate", "write": False}


@pytest.mark.parametrize(
    ("memory", "vcpus", "aborts", "tables"),
    [
        *((4 * MIB, 1, 1024, 3), (8 * MIB, 1, 2048, 5), (16 * MIB, 1, 4096, 9)),
        *((16 * MIB, 2, 4096, 9), (16 * MIB, 4, 4096, 9), (64 * MIB, 4, 16384, 33)),
    ],
    ids=[
        *("locks-fault/0", "locks-unmap/0", "fault-4k-v1-c/0"),
        *("fault-4k-v2-c/0", "fault-4k-v4-c/0", "fault-4k-m64-v4-c/0"),
    ],
)
def test_fault_in(memory: int, vcpus: int, aborts: int, tables: int) -> None:
    """One abort, one map, one read acquisition a page; ceil(pages / 512) tables and those above."""
    guest = {"memory": memory, "vcpus": vcpus, "access": POPULATE}
    world, summary, locks = run_world(guest=guest)
    assert (summary["faults"], summary["fault_retries"]) == (aborts, 0)
    assert locks == {("fault", "read"): aborts}
    assert summary["tables_allocated"] == tables == world.kvms[0].stage2.linked_tables
    assert len(world.kvms[0].stage2.levels) == 3, "stage2_map_walker() visits a page"


def test_touching_again_faults_no_more() -> None:
    """fault-4k-v1-c/1: no abort in the second pass."""
    _, summary, _ = run_world(guest={"memory": 16 * MIB, "access": POPULATE | {"repeat": 3}})
    assert (summary["faults"], summary["touches"]) == (4096, 3 * 4096)


def test_read_first_then_written() -> None:
    """fault-read-v1-c: 4096 aborts for the reads, then 8192, of which 4096 map.

    The write's permission fault takes the zero page back, an invalidation, so the fault itself has
    to be taken again.
    """
    access = {"pattern": "phases", "phases": [READS, POPULATE]}
    world, summary, locks = run_world(guest={"memory": 16 * MIB, "access": access})
    assert summary["faults"] == 4096 + 8192
    assert summary["faults"] - summary["fault_retries"] == 4096 + 4096
    assert locks[START] == locks[END] == 4096
    assert world.kvms[0].host.lru.total == 4096


def test_fault_in_sparsely() -> None:
    """fault-sparse-v1-c: a page each 2 MiB of 2 GiB, 1024 aborts and 1026 tables."""
    lab = Lab(2 * GIB)
    vcpu = lab.touch(*((page, True, 0) for page in range(0, lab.kvm.leaves, 512)))
    lab.env.run(vcpu.process)
    assert vcpu.fault.faults == 1024
    assert lab.kvm.tables_allocated == 1026
    assert lab.acquisitions() == {("fault", "read"): 1024}


def test_fault_in_what_the_host_touched_first() -> None:
    """fault-host-v1-c: as many aborts for pages that the host's tables have already."""
    lab = Lab(16 * MIB)
    for page in range(4096):
        lab.kvm.host.install(page, True)
    lab.touch_all()
    assert lab.vcpus[0].fault.faults == 4096
    assert lab.kvm.tables_allocated == 9
    assert lab.acquisitions() == {("fault", "read"): 4096}


def test_fault_in_blocks() -> None:
    """fault-thp-v1-c: 32 aborts for 64 MiB, one table, two levels to walk."""
    guest = {"memory": 64 * MIB, "access": POPULATE, **BLOCKS}
    world, summary, locks = run_world(guest=guest)
    assert (summary["faults"], summary["tables_allocated"]) == (32, 1)
    assert locks == {("fault", "read"): 32}
    assert len(world.kvms[0].stage2.levels) == 2


def test_fault_in_again_after_an_unmap(tally: Tally) -> None:
    """locks-fault/0 to 3: 1024 read acquisitions, 2 write, 1024 read."""
    lab = Lab(4 * MIB)
    touches = [(page, True, 0) for page in range(1024)]
    vcpu = lab.touch(*touches[:1023], (1023, True, 10_000_000), *touches)
    lab.env.run(8_000_000)
    assert lab.acquisitions() == {("fault", "read"): 1024}
    lab.t_ns = 8_000_000
    lab.drop()
    assert lab.acquisitions() == {START: 1, END: 1}
    assert tally.take()["tables"] == 3
    lab.env.run(vcpu.process)
    assert lab.acquisitions() == {("fault", "read"): 1024}
    assert lab.kvm.tables_allocated == 6


# -- ageing -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("memory", "calls"),
    [(8 * MIB, 2049), (16 * MIB, 4097), (32 * MIB, 8193), (64 * MIB, 16385)],
    ids=["locks-age", "age-c", "agerun-v1-h", "age64-c"],
)
def test_one_write_acquisition_for_each_present_page_in_each_pass(memory: int, calls: int) -> None:
    """kvm_mmu_notifier_clear_young(), kvm_age_gfn(): young or not, and never a flush.

    The host's own pages of the process (19 or so) make calls too, but belong to no slot.
    """
    lab = Lab(memory + 4 * KIB, CODE_PAGE)
    lab.fill()
    touched = {0: calls, 1: 0, 2: 256, 3: 0}
    for number, young in touched.items():
        if number == 2:
            lab.kvm.stage2.leaf.entries[1:512:2] |= np.uint8(AF)
        lab.kvm.host.state[:] &= np.uint8(PRESENT | OWN)  # the host itself touches nothing
        report = lab.age()
        assert (report.calls, report.scanned, report.young) == (calls, calls, young)
        assert lab.acquisitions() == {("age", "write"): calls}
        assert lab.young() == 0
    assert lab.broadcasts() == 0


def test_one_call_for_each_block() -> None:
    """cost-age-thp: 33 calls for 64 MiB in blocks, of which one is for the page of code."""
    lab = Lab(64 * MIB, BLOCKS)
    lab.fill()
    for _ in range(2):
        assert lab.age().calls == 33 - 1
        assert lab.acquisitions() == {("age", "write"): 33 - 1}


def test_generations_of_a_new_group() -> None:
    """locks-age: "+" makes min 0, 1, 2 and max 4, 5, 6; pages count as active for two generations.

    Pass 1 finds all young, pass 2 none (2048 pages leave the active lists), then all are touched
    and pass 3 brings them back.
    """
    lab = Lab(8 * MIB)
    lab.fill()
    lru = lab.kvm.host.lru
    assert (lru.min_seq, lru.max_seq) == (0, 3)
    seen = []
    for number in range(3):
        if number == 2:
            lab.kvm.stage2.leaf.entries[:] |= np.uint8(AF)
        lab.age()
        active = lru.sizes[lru.max_seq % 4] + lru.sizes[(lru.max_seq - 1) % 4]
        seen.append((lru.min_seq, lru.max_seq, active))
    assert seen == [(1, 4, 2048), (2, 5, 0), (3, 6, 2048)]


def test_ranges_while_vcpus_run() -> None:
    """locks-run2/3 and 8: 8 ranges of 2 MiB are 16 write acquisitions, one of 16 MiB is 2."""
    touching = {"pattern": "uniform", "touches": None, "write_ratio": 1.0, "think": 300}
    access = {"pattern": "phases", "phases": [POPULATE, touching]}
    takes = {"kind": "madvise_dontneed", "guest": "vm", "order": "sequential"}
    _, summary, locks = run_world(
        guest={"memory": 16 * MIB, "vcpus": 2, "access": access},
        contenders={
            "pieces": takes | {"range": 2 * MIB, "rate": 5000, "start": 8 * MS, "stop": 9_500_000},
            "whole": takes | {"range": 16 * MIB, "rate": 100, "start": 12 * MS, "stop": 13 * MS},
        },
        duration=20 * MS,
    )
    assert locks[START] == locks[END] == 8 + 1
    assert summary["unmap_calls"] == 8 + 1
    assert locks["fault", "read"] == summary["faults"] > 4096
    assert summary["safety"] == "clean"


def test_ageing_while_vcpus_run() -> None:
    """locks-run2/5 and 7: as many acquisitions with two vCPUs that touch pages all the time."""
    phases = [POPULATE, {"pattern": "uniform", "touches": 40_000, "write_ratio": 1.0, "think": 100}]
    guest = {"memory": 16 * MIB, "vcpus": 2, "access": {"pattern": "phases", "phases": phases}}
    world, summary, locks = run_world(guest=guest, ageing={"start": 8_000_000, "passes": 2})
    assert (summary["faults"], summary["tlbi_broadcasts"]) == (4096, 0)
    assert [(p.scanned, p.calls) for p in world.ageing.passes] == [(4096, 4096)] * 2
    assert locks == {("fault", "read"): 4096, ("age", "write"): 2 * 4096}


# -- the end of a VM --------------------------------------------------------------------------

ENDS: dict[str, tuple[int, int, int, Callable[[Lab], None]]] = {
    # run: memory, visits, references dropped, what was done before
    "destroy-m16-c": (16 * MIB, 6656, 4119, lambda lab: lab.fill()),
    "exit-m16-c": (16 * MIB, 6656, 4119, lambda lab: lab.fill()),
    "destroy-sparse-c": (2 * GIB, 527360, 3081, lambda lab: fill_sparsely(lab, 512)),
    "munmapdestroy-m16-c/2": (16 * MIB, 2048, 5, lambda lab: lab.fill([0])),
    "destroy-m4-h": (4 * MIB, 7 * 512, 1025 + 2 * 5, lambda lab: lab.fill()),
    "destroy-m64-h": (64 * MIB, 37 * 512, 16385 + 2 * 35, lambda lab: lab.fill()),
}


def fill_sparsely(lab: Lab, pages: int) -> None:
    """The page of code, and one each ``pages`` of the memory behind it."""
    lab.fill([0, *range(1, lab.kvm.leaves, pages)])


@pytest.mark.parametrize("run", ENDS)
def test_destroy(run: str) -> None:
    """stage2_free_walker(): every entry of every table and root page, tables freed on the spot.

    The lock is held once, to detach; the walk runs without it and without an invalidation.
    """
    memory, visits, puts, prepare = ENDS[run]
    lab = Lab(memory + 4 * KIB, CODE_PAGE)
    prepare(lab)
    tables = lab.kvm.stage2.linked_tables
    counted = sum(int(level.counts.sum()) for level in lab.kvm.stage2.levels.values())
    teardown = lab.destroy("process_exit" if run.startswith("exit") else "close_vm")
    assert teardown.visits == visits == (tables + 2) * 512
    assert counted + tables == puts, "kvm_s2_put_page()"
    assert lab.acquisitions() == {("teardown", "write"): 1}
    assert lab.broadcasts() == 0
    assert lab.kvm.tables_freed == tables
    assert lab.world.rcu.idle, "nothing was deferred"
    assert not lab.kvm.oracle.violations


# -- blocks and pages in one guest --------------------------------------------------------------

LOG = {"log": {"kind": "dirty_log", "guest": "vm"}}
PAUSE = 1_000_000_000


class Phases:
    """16 MiB of huge pages and a vCPU that touches in phases, a pause apart."""

    def __init__(self, *phases: list[tuple[int, bool]], memory: int = 16 * MIB) -> None:
        self.lab = Lab(memory, BLOCKS, contenders=LOG)
        self.slot = range(self.lab.kvm.leaves)
        touches = [(page, write, 0) for phase in phases for page, write in phase]
        ends = np.cumsum([len(phase) for phase in phases]) - 1
        for end in ends.tolist():
            touches[end] = (*touches[end][:2], PAUSE)
        self.vcpu = self.lab.touch(*touches)
        self.done = 0

    def touch(self) -> dict[str, int]:
        """The next phase: aborts, tables allocated, invalidations, reads of the lock."""
        lab, fault = self.lab, self.vcpu.fault
        before = (fault.faults, lab.kvm.tables_allocated, lab.broadcasts())
        lab.acquisitions()
        lab.t_ns = self.done * PAUSE + PAUSE // 2
        lab.env.run(lab.t_ns)
        self.done += 1
        after = (fault.faults, lab.kvm.tables_allocated, lab.broadcasts())
        names = ("aborts", "tables", "tlbi")
        found = {name: b - a for name, a, b in zip(names, before, after, strict=True)}
        return found | {"reads": sum(n for (_, m), n in lab.acquisitions().items() if m == "read")}

    def log(self, on: bool) -> None:
        lab = self.lab
        ask = lab.kvm.dirty_log.enable if on else lab.kvm.dirty_log.disable
        lab.t_ns = lab.run(ask(lab.task, lab.t_ns, self.slot))


EVERY = [(page, True) for page in range(4096)]


def counted(aborts: int, tables: int, tlbi: int) -> dict[str, int]:
    return {"aborts": aborts, "tables": tables, "tlbi": tlbi, "reads": aborts}


def test_dirty_logging_splits_and_the_blocks_do_not_come_back(tally: Tally) -> None:
    """dirty-c, and dirty2-c/6 to 11: every page written under logging, nothing faults afterwards.

    kvm_handle_guest_abort() less the exit; stage2_memcache_zalloc_page();
    __kvm_tlb_flush_vmid_ipa() or __kvm_tlb_flush_vmid_range().
    """
    made = Phases(EVERY, EVERY, EVERY, [(page, False) for page, _ in EVERY])
    kvm = made.lab.kvm
    assert made.touch() == counted(8, 1, 0)
    flushes = made.lab.broadcasts()
    made.log(True)
    assert made.lab.broadcasts() == flushes + 1, "dirty-c/1: one range"
    assert made.touch() == counted(4096, 8, 8)
    made.lab.acquisitions()
    made.log(False)
    assert not made.lab.acquisitions()
    assert made.touch() == counted(0, 0, 0)
    assert made.touch() == counted(0, 0, 0)
    assert kvm.stage2.linked_tables == 9
    flushes = made.lab.broadcasts()
    made.lab.run(MemslotUpdate(kvm, made.lab.task).delete(made.lab.t_ns))
    found = tally.take()
    assert found == {"calls": 1, "visits": 4105, "leaves": 4096, "tables": 9}
    assert found["leaves"] + 2 * found["tables"] == 4114, "kvm_s2_put_page()"
    assert made.lab.broadcasts() == flushes + 9 + 1


def test_blocks_come_back_where_pages_lack() -> None:
    """dirty2-c/0 to 5: a page in 64 KiB written under logging, then all: 8 collapses.

    stage2_free_unlinked_table() 8 times, as many callbacks, which put 256 entries and 8 tables.
    """
    made = Phases(EVERY, EVERY[::16], EVERY)
    kvm = made.lab.kvm
    made.touch()
    made.log(True)
    assert made.touch() == counted(256, 8, 8)
    assert int(kvm.stage2.leaf.counts.sum()) == 256
    made.log(False)
    subtrees = [kvm.stage2.subtree(512 * block) for block in range(8)]
    puts = sum(entries + len(tables) for tables, entries in subtrees)
    assert puts == 264, "kvm_s2_put_page() of the callbacks"
    assert made.touch() == counted(8, 0, 8)
    assert kvm.collapses == 8
    assert (kvm.tables_called_back, kvm.tables_freed) == (8, 8)
    assert kvm.stage2.linked_tables == 1
    assert made.lab.world.rcu.idle


def test_many_subtrees_at_once() -> None:
    """unlink-c: 128 tables of 256 MiB unlinked within a millisecond or so, run in batches of 10."""
    pages = 65536
    made = Phases(
        [(page, True) for page in range(0, pages, 512)],
        [(page, True) for page in range(0, pages, 512)],
        [(page + 1, True) for page in range(0, pages, 512)],
        memory=256 * MIB,
    )
    made.touch()
    made.log(True)
    assert made.touch() == counted(128, 128, 128)
    made.log(False)
    batches = len(made.lab.world.recorder.batches)
    assert made.touch() == counted(128, 0, 128)
    assert made.lab.kvm.tables_called_back == 128
    assert len(made.lab.world.recorder.batches) - batches == 13


def test_ageing_calls_once_a_huge_page(tally: Tally) -> None:
    """thp-c and README: one kvm_mmu_notifier_clear_young() a block, 32 for 64 MiB without the code.

    So, too, while stage 2 maps the huge page by pages: the call is the host's PMD's.
    """
    made = Phases([(page, True) for page in range(0, 16384, 512)], [(7, True)], memory=64 * MIB)
    made.touch()
    assert made.lab.age().calls == 32
    assert made.lab.acquisitions() == {("age", "write"): 32}
    assert made.lab.young() == 0
    made.log(True)
    made.touch()
    made.lab.acquisitions()
    report = made.lab.age()
    assert (report.calls, report.young) == (32, 1)
    assert made.lab.broadcasts() == 1 + 1, "ageing never flushes"


def test_a_huge_page_collapsed_by_the_host_frees_its_table_in_the_unmap(tally: Tally) -> None:
    """README: MADV_COLLAPSE frees the table in the unmap, not by RCU; 512 visits and one after."""
    lab = Lab(4 * MIB, contenders={"k": {"kind": "khugepaged", "guest": "vm"}})
    lab.fill()
    lab.drop(0, 2 * MIB)
    assert tally.take() == {"calls": 1, "visits": 513 + 1, "leaves": 512, "tables": 1}
    assert lab.world.rcu.idle
