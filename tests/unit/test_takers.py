"""Takers of ``mmu_lock`` beyond a VMM that drops memory: what each call takes, and what it leaves.

Each rule is one of Linux v6.12, read from the file that the taker's module names. In all of them
an invalidation is two write acquisitions, start and end, and on arm64 unmaps whatever the host
does in between.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from bench import Bench
from lab import Lab, fill_sparsely

from simkvm import contenders
from simkvm.contenders.ksm import Ksm
from simkvm.contenders.memslot import Memslot
from simkvm.contenders.migration import PageMover
from simkvm.contenders.numa_balancing import NumaBalancing
from simkvm.contenders.pre_fault import PreFault
from simkvm.kernel.host_change import MERGED, arrive, depart
from simkvm.kernel.host_memory import MIGRATION, OWN, PRESENT, PROT_NONE, WRPROTECT, YOUNG
from simkvm.kernel.sites import MEMSLOT, PRE_FAULT
from simkvm.kernel.stage2 import VALID, WRITE
from simkvm.scenario import contenders as schema
from simkvm.scenario import load
from simkvm.scenario.contenders import ContenderModel
from simkvm.scenario.errors import InputError
from simkvm.scenario.load import require_possible
from simkvm.units import GIB, KIB, MIB

MS, SECOND = 1_000_000, 1_000_000_000
WORKLOADS = Path(__file__).parents[2] / "workloads" / "takers"
READ, WROTE = False, True
START, END = ("range_start", "write"), ("range_end", "write")
MODELS: dict[str, type[ContenderModel]] = {
    "madvise_dontneed": schema.MadviseDontneed,
    "free_page_reporting": schema.FreePageReporting,
    "balloon": schema.Balloon,
    "ksm": schema.Ksm,
    "migration": schema.Migration,
    "compaction": schema.Compaction,
    "numa_balancing": schema.NumaBalancing,
    "mprotect": schema.Mprotect,
    "fork": schema.Fork,
    "oom_reaper": schema.OomReaper,
    "memslot": schema.Memslot,
    "pre_fault": schema.PreFault,
}
SIZES = {"dirty_log", "khugepaged", "thp_split"}  #: those of tests of their own


def spec(kind: str, **keys: Any) -> Any:
    return MODELS[kind].model_validate({"guest": "vm", **keys})


def bench(kind: str, memory: int = 4 * MIB, fill: bool = True, guest: Any = None, **keys: Any):
    return Bench(spec(kind, **keys), memory, fill, **(guest or {}))


def ranges(made: Bench) -> list[tuple[int, int]]:
    return [(first, last) for _, first, last in made.calls]


def finish(made: Bench) -> None:
    made.lab.env.run(made.process)


def clock(made: Bench, until_ns: int, step_ns: int = 100) -> None:
    """Events to go by: an actor that is alone runs ahead of the clock."""
    for t_ns in range(step_ns, until_ns, step_ns):
        made.lab.env.timeout(t_ns)


def done_ns(made: Bench) -> int:
    """When the taker's thread went to sleep for good."""
    since, _, _ = made.lab.task.cpu._told[-1]
    return since


def entry(made: Bench, leaf: int) -> int:
    return made.lab.kvm.stage2.leaf.fast[leaf]


def host(made: Bench, leaf: int) -> int:
    """The host's entry, its own accessed flag apart."""
    return made.lab.kvm.host.fast[leaf] & ~YOUNG


def folios(made: Bench) -> int:
    lru = made.lab.kvm.host.lru
    assert lru.total == np.count_nonzero(made.lab.kvm.host.state & OWN)
    return lru.total


# -- what they share --------------------------------------------------------------------------


def test_every_kind_is_registered_and_ships_a_workload() -> None:
    assert set(contenders.KINDS) == set(MODELS) | SIZES
    for kind in MODELS:
        (point,) = load.load(str(WORKLOADS / f"{kind}.yaml")).points
        (taker,) = point.scenario.contenders.values()
        assert taker.kind == kind
        assert point.scenario.description.rstrip().endswith((".", "?"))


def test_the_defaults_are_those_of_linux() -> None:
    ksm, numa = spec("ksm"), spec("numa_balancing")
    assert (ksm.pages_to_scan, ksm.sleep, ksm.smart_scan) == (100, 20 * MS, True)
    assert (numa.scan_size, numa.period, numa.delay) == (256 * MIB, SECOND, SECOND)
    assert spec("migration").batch == 512, "NR_MAX_BATCHED_MIGRATION"
    assert spec("compaction", pages=1).batch == 32, "COMPACT_CLUSTER_MAX"
    assert spec("compaction", pages=1).interval == 500 * MS, "HPAGE_FRAG_CHECK_INTERVAL_MSEC"
    assert spec("oom_reaper").delay == 2 * SECOND, "OOM_REAPER_DELAY"


def test_what_the_models_refuse() -> None:
    def refused(**keys: Any) -> str:
        lab = Lab().world.scenario.model_dump(mode="json")
        lab["guests"]["vm"] |= {"memory": "64 MiB"} | keys.pop("vm", {})
        lab["contenders"] = {"c": {"guest": "vm", **keys}}
        lab["duration"] = "1 ms"
        with pytest.raises(InputError) as caught:
            require_possible(type(Lab().world.scenario).model_validate(lab))
        return str(caught.value)

    blocks = {"mapping": "2 MiB", "folio": "2 MiB"}
    assert "works on pages, vm is mapped by 2 MiB" in refused(kind="ksm", vm=blocks)
    assert "vm has memslots 0 to 3" in refused(kind="memslot", slot=4, vm={"memslots": 4})
    assert "16385 is more than the guest has, 16384" in refused(kind="compaction", pages=16385)
    assert "6 KiB is not a multiple" in refused(kind="mprotect", range="6 KiB")
    assert "more than the guest's memory" in refused(kind="pre_fault", range="1 GiB")
    assert "20 ms is longer than interval" in refused(kind="fork", child="20 ms", interval="10 ms")


def huge(kind: str, **keys: Any) -> Bench:
    """A guest of two huge pages, which somebody might split."""
    return SplitBench(spec(kind, **keys), fill=False)


class SplitBench(Bench):
    """As :class:`Bench`, on a guest of 4 MiB whose huge pages can be split and be made again."""

    def lab_of(self, memory: int, guest: dict[str, Any]) -> Lab:
        split = {"kind": "thp_split", "guest": "vm", "rate": 1.0, "start": 10**12}
        lab = Lab(4 * MIB, {"mapping": 2 * MIB}, contenders={"split": split})
        lab.kvm.host.install_huge(0, 1024)
        for leaf in (0, 512):
            lab.kvm.tables_linked(lab.kvm.stage2.map_block(leaf, WRITE) or [], 0)
        return lab


# -- KSM --------------------------------------------------------------------------------------


def same(made: Bench, *leaves: int) -> Ksm:
    """Have exactly ``leaves`` contain the same; nobody touched them since before the run."""
    ksm = made.contender
    assert isinstance(ksm, Ksm)
    ksm.content[:] = -1
    ksm.content[list(leaves)] = 0
    ksm._sharers = [list(leaves)]
    return ksm


def test_ksm_looks_at_a_batch_of_pages_and_sleeps() -> None:
    made = bench("ksm", memory=MIB, pages_to_scan=64, sleep=2 * MS, duplicates=0)
    ksm = same(made)
    made.lab.env.timeout(7 * MS)
    made.lab.env.run(7 * MS)
    assert ksm._cursor == 3 * 64 + 64 - 256, "64 pages at 0, 2, 4 and 6 ms: once round"
    assert ksm.full_scans == 1
    assert not made.calls


def test_a_page_costs_two_invalidations_the_first_of_its_kind_one() -> None:
    """The first becomes KSM's page where it is; another is protected, compared and replaced."""
    made = bench("ksm", memory=40 * KIB, pages_to_scan=10, sleep=MS)
    ksm = same(made, 3, 6, 8)
    made.run(MS // 2)
    assert not made.calls, "first scan: checksums are noted"
    made.lab.env.run(MS + MS // 2)
    # 3 waits in the unstable tree; 6 finds it: 6 becomes KSM's, 3 is merged into it; 8 finds 6.
    assert ranges(made) == [(6, 7), (3, 4), (3, 4), (8, 9), (8, 9)]
    assert ksm.merged == 3
    assert [host(made, leaf) for leaf in (3, 6, 8)] == 3 * [MERGED]
    assert folios(made) == 7
    sites = made.lab.acquisitions()
    assert sites == {START: 5, END: 5}


def test_a_page_whose_content_changes_is_not_merged() -> None:
    """Its checksum differs from that of the last scan (cmp_and_merge_page)."""
    made = bench("ksm", memory=40 * KIB, pages_to_scan=10, sleep=MS)
    ksm = same(made, 3, 6)
    made.run(MS // 2)
    made.lab.kvm.last_touch_ns[6] = MS // 2
    made.lab.env.timeout(2 * MS)
    made.lab.env.run(MS + MS // 2)
    assert not made.calls
    made.lab.env.run(2 * MS + MS // 2)
    assert ksm.merged == 2, "left alone for a scan, it is"


def test_a_page_like_a_merged_one_is_merged_at_first_sight() -> None:
    """The stable tree is searched before the checksum is looked at."""
    made = bench("ksm", memory=40 * KIB, pages_to_scan=10, sleep=MS)
    same(made, 3, 6, 8)
    made.run(MS // 2)
    made.lab.kvm.last_touch_ns[8] = MS // 2
    made.lab.env.timeout(2 * MS)
    made.lab.env.run(MS + MS // 2)
    assert ranges(made)[-2:] == [(8, 9), (8, 9)]


def test_ksm_frees_no_table_before_the_last_page_of_it() -> None:
    made = bench("ksm", memory=2 * MIB, pages_to_scan=512, sleep=MS, duplicates=1.0, copies=512)
    made.lab.env.timeout(30 * MS)
    made.lab.env.run(30 * MS)
    ksm = made.contender
    assert isinstance(ksm, Ksm)
    assert ksm.merged == 512
    assert len(made.calls) == 1 + 2 * 511
    assert made.lab.kvm.tables_freed == 2, "with the last page: its table and the one above"


def test_pages_that_failed_are_passed_over_more_and_more() -> None:
    """Looked at in scans 0, 1, 2, 3; then 1, 2, 4, 8 and 8 scans are left out (skip_age)."""
    made = bench("ksm", memory=4 * KIB, duplicates=0)
    ksm = made.contender
    assert isinstance(ksm, Ksm)
    looked = [scan for scan in range(32) if not ksm._passed_over(0)]
    assert looked == [0, 1, 2, 3, 5, 8, 13, 22, 31]


def test_a_write_to_a_merged_page_copies_it_with_an_invalidation() -> None:
    """wp_page_copy(): the copy is the guest's own again, the others keep sharing."""
    made = bench("ksm", memory=40 * KIB, pages_to_scan=10, sleep=MS)
    same(made, 3, 6)
    made.run(MS + MS // 2)
    assert entry(made, 3) == 0
    made.lab.acquisitions()
    made.calls.clear()
    vcpu = made.lab.touch((3, READ, 1000), (3, WROTE, 1000))
    made.lab.env.run(vcpu.process)
    assert ranges(made) == [(3, 4)]
    assert host(made, 3) == PRESENT | OWN
    assert host(made, 6) == MERGED
    assert entry(made, 3) & WRITE
    assert made.lab.acquisitions()["fault", "read"] == 3, "read, write, and after the copy"
    assert folios(made) == 9


# -- migration and compaction -----------------------------------------------------------------


def test_each_page_is_one_invalidation_and_stays_the_guests() -> None:
    made = bench("migration", memory=2 * MIB, range=40 * KIB)
    finish(made)
    assert ranges(made) == [(n, n + 1) for n in range(10)]
    assert made.lab.acquisitions() == {START: 10, END: 10}
    assert [host(made, n) for n in range(11)] == 11 * [PRESENT | OWN]
    assert [entry(made, n) & VALID for n in range(11)] == [*[0] * 10, VALID]
    assert made.lab.kvm.tables_freed == 0, "502 pages are left in the table"
    assert folios(made) == 512


def test_a_batch_is_unmapped_before_its_first_page_is_copied() -> None:
    made = bench("migration", memory=64 * KIB, batch=4)
    clock(made, MS)
    state = made.lab.kvm.host.state
    away = []
    while made.process.is_alive:
        made.lab.env.step()
        away.append(int(np.count_nonzero(state & MIGRATION)))
    assert max(away) == 4
    steps = [a for a, b in pairwise(away) if a != b]
    assert steps[:8] == [0, 1, 2, 3, 4, 3, 2, 1]


def test_a_large_folio_goes_in_one_invalidation() -> None:
    made = bench("migration", memory=MIB, guest={"folio": 64 * KIB}, range=128 * KIB, batch=16)
    finish(made)
    assert ranges(made) == [(0, 16), (16, 32)]


def test_a_fault_on_a_page_that_moves_waits_until_it_is_there() -> None:
    made = bench("migration", memory=64 * KIB, batch=16)
    lab = made.lab
    mover = made.contender
    assert isinstance(mover, PageMover)
    vcpu = lab.touch((0, WROTE, 30_000), (0, WROTE, 0))
    finish(made)
    arrived = int(lab.env.now)
    lab.env.run(vcpu.process)
    copies = lab.kvm.costs.takers.migrate_ns
    waited_from = lab.lock_rows("fault")[-1]["arrival"]
    back = arrived - 15 * copies - lab.kvm.costs.ageing.resched_ns  # page 0 is the first to arrive
    assert waited_from >= back + lab.kvm.costs.wakeup_ns
    assert vcpu.fault.retries <= 1
    assert host(made, 0) == PRESENT | OWN


def test_what_is_dropped_while_it_moves_stays_dropped() -> None:
    made = bench("migration", memory=16 * KIB)
    lab = made.lab
    clock(made, MS)
    while not lab.kvm.host.state[2] & MIGRATION:
        lab.env.step()
    lab.kvm.host.zap(2, 3)
    finish(made)
    assert [host(made, n) for n in range(4)] == [3, 3, 0, 3]
    assert lab.kvm.host.present == [3]
    assert folios(made) == 3


def test_compaction_moves_the_wanted_number_of_present_pages_in_clusters() -> None:
    made = bench("compaction", memory=MIB, fill=False, pages=70, interval=None)
    made.lab.fill(range(0, 256, 2))
    clock(made, MS)
    state, away = made.lab.kvm.host.state, []
    while made.process.is_alive:
        made.lab.env.step()
        away.append(int(np.count_nonzero(state & MIGRATION)))
    assert len({first for first, _ in ranges(made)}) == len(made.calls) == 70
    assert all(first % 2 == 0 and last == first + 1 for first, last in ranges(made))
    assert max(away) == 32


def test_compaction_goes_on_where_it_stopped() -> None:
    made = bench("compaction", memory=64 * KIB, pages=6, interval=MS)
    made.run(2 * MS + MS // 2)
    assert sorted(first for first, _ in ranges(made)[:16]) == list(range(16))


def test_a_huge_page_moves_as_one_folio() -> None:
    made = huge("migration")
    finish(made)
    assert ranges(made) == [(0, 512), (512, 1024)]
    assert made.lab.kvm.host.huge.tolist() == [True, True]
    assert {host(made, n) for n in range(1024)} == {PRESENT | OWN}
    assert folios(made) == 1024


# -- NUMA balancing ---------------------------------------------------------------------------


def test_a_scan_is_one_invalidation_of_a_window_whose_tables_all_go() -> None:
    """change_pud_range(): one start and end for all of a VMA inside one P4D."""
    made = bench("numa_balancing", memory=16 * MIB, scan_size=8 * MIB, delay=MS, start=MS)
    (call,) = made.run(20 * MS)
    assert call[0] >= 2 * MS
    assert call[1:] == (0, 2048)
    assert made.lab.acquisitions() == {START: 1, END: 1}
    assert made.lab.kvm.tables_freed == 4
    assert {host(made, n) for n in range(2048)} == {PRESENT | OWN | PROT_NONE}
    assert {host(made, n) for n in range(2048, 4096)} == {PRESENT | OWN}


def test_the_next_access_takes_a_hinting_fault_once() -> None:
    made = bench("numa_balancing", scan_size=4 * MIB, delay=0, start=1000)
    vcpu = made.lab.touch((9, READ, MS), (5, READ, 1000), (5, WROTE, 0))
    made.lab.env.timeout(2 * MS)
    made.lab.env.run(vcpu.process)
    assert vcpu.fault.faults == 1, "the page was writable and still is"
    assert host(made, 5) == PRESENT | OWN
    assert host(made, 6) == PRESENT | OWN | PROT_NONE
    assert entry(made, 5) & WRITE


def test_windows_follow_one_another_and_start_again() -> None:
    made = bench(
        "numa_balancing", memory=16 * MIB, scan_size=6 * MIB, period=MS, delay=0, fill=True
    )
    made.run(400 * MS)
    # The third ends with memory. The fourth changes nothing, so it passes on, up to the end.
    assert ranges(made)[:3] == [(0, 1536), (1536, 3072), (3072, 4096)]
    assert ranges(made)[3:6] == [(0, 1536), (1536, 3072), (3072, 4096)]
    numa = made.contender
    assert isinstance(numa, NumaBalancing)
    begins = [t_ns for t_ns, _, _ in made.calls]
    assert begins[4] - begins[3] < MS, "one scan"


def test_a_scan_that_changes_nothing_passes_over_eight_times_its_size() -> None:
    made = bench("numa_balancing", memory=24 * MIB, scan_size=2 * MIB, period=MS, delay=0)
    made.lab.kvm.host.state[:] |= np.uint8(PROT_NONE)
    made.run(20 * MS)
    assert ranges(made) == [(512 * n, 512 * (n + 1)) for n in range(8)]


def test_what_a_scan_took_is_held_against_it_32_times() -> None:
    made = bench("numa_balancing", memory=16 * MIB, scan_size=8 * MIB, period=MS, delay=0)
    made.run(200 * MS)
    first, second = (t_ns for t_ns, _, _ in made.calls[:2])
    ends = made.lab.lock_rows("range_end")
    costs = made.lab.kvm.costs
    took = ends[0]["entry"] + ends[0]["hold"] + costs.ageing.resched_ns
    local = 2 * costs.line.same_ns  # count and owner of mmap_lock, whose line is where it was
    assert second == MS + 32 * took + local
    assert first < 100


def test_a_huge_page_is_one_entry_and_its_hinting_fault_settles_all_of_it() -> None:
    """change_huge_pmd(), do_huge_pmd_numa_page()."""
    made = huge("numa_balancing", delay=0, start=1000)
    lab = made.lab
    vcpu = lab.touch((700, READ, MS), (5, WROTE, 0))
    lab.env.timeout(2 * MS)
    lab.env.run(MS // 2)
    end = lab.lock_rows("range_end")[0]["arrival"]
    start = lab.lock_rows("range_start")[0]
    costs = lab.kvm.costs
    assert end == start["entry"] + start["hold"] + 2 * costs.takers.pte_ns + costs.ageing.call_ns
    assert {host(made, n) for n in range(1024)} == {PRESENT | OWN | PROT_NONE}
    lab.env.run(vcpu.process)
    assert {host(made, n) for n in range(512)} == {PRESENT | OWN}
    assert lab.kvm.stage2.is_block(5)
    assert lab.kvm.host.huge.tolist() == [True, True]


# -- mprotect ---------------------------------------------------------------------------------


def test_each_mprotect_is_one_range_and_both_ways_unmap() -> None:
    made = bench("mprotect", cycles=2)
    finish(made)
    assert ranges(made) == 4 * [(0, 1024)]
    assert made.lab.acquisitions() == {START: 4, END: 4}
    assert made.lab.kvm.unmapped_pages == 1024, "nobody mapped anything in between"
    assert not made.lab.kvm.refusals
    assert {host(made, n) for n in range(1024)} == {PRESENT | OWN}


def test_a_range_in_two_p4ds_is_two_invalidations() -> None:
    guest = {"mapping": GIB, "ipa_bits": 44}
    made = bench("mprotect", memory=1024 * GIB, guest=guest, cycles=1)
    finish(made)
    assert ranges(made)[:2] == [(0, 512), (512, 1024)]
    assert len(made.calls) == 4


def test_a_huge_page_that_is_protected_in_part_is_split() -> None:
    made = huge("mprotect", range=2 * MIB + 64 * KIB, cycles=1)
    finish(made)
    assert made.lab.kvm.host.huge.tolist() == [True, False]


def test_while_read_only_reads_map_and_writes_go_to_user_space_until_they_succeed() -> None:
    made = bench("mprotect", range=64 * KIB, read_only=3 * MS, cycles=1)
    lab = made.lab
    lab.env.timeout(2 * MS)
    reader = lab.touch((40, READ, MS), (4, READ, 0))
    writer = lab.touch((40, READ, MS), (3, WROTE, 0))
    lab.env.run(2 * MS)
    assert host(made, 3) == PRESENT | OWN | WRPROTECT
    assert entry(made, 4) & (VALID | WRITE) == VALID
    assert (reader.touches, reader.fault.user_exits) == (2, 0)
    assert writer.touches == 1
    lab.env.run(writer.process)
    assert writer.touches == 2
    assert writer.finished_ns > 3 * MS
    assert entry(made, 3) & WRITE
    costs, line = lab.kvm.costs, lab.kvm.costs.line
    each = costs.touch_ns + costs.fault.exit_ns + 3 * line.same_ns + costs.fault.vma_ns
    each += costs.fault.gup_hit_ns + costs.fault.user_ns + costs.fault.enter_ns
    assert writer.fault.user_exits == pytest.approx(2 * MS / each, rel=0.02)


def test_a_fault_sleeps_while_mprotect_holds_mmap_lock_for_write() -> None:
    """It does not come to mmu_lock and retry, as during madvise(), which only reads."""
    made = bench("mprotect", memory=16 * MIB, cycles=1, read_only=0)
    lab = made.lab
    start = lab.touch((10, READ, 40_000), (11, READ, 0))
    finish(made)
    lab.env.run(start.process)
    assert start.fault.retries == 0
    ends = lab.lock_rows("range_end")
    last = lab.lock_rows("fault")[-1]
    assert last["arrival"] >= ends[0]["entry"] + ends[0]["hold"]


# -- fork -------------------------------------------------------------------------------------


def test_a_fork_is_one_range_over_all_memory() -> None:
    made = bench("fork", child=0)
    finish(made)
    assert ranges(made) == [(0, 1024)]
    assert made.lab.kvm.tables_freed == 3
    assert {host(made, n) for n in range(1024)} == {PRESENT | OWN | WRPROTECT}
    assert made.lab.kvm.host.children == 0


def test_a_write_copies_while_the_child_lives_and_reuses_the_page_after() -> None:
    made = bench("fork", child=20 * MS, start=MS)
    lab = made.lab
    vcpu = lab.touch(
        *((9, READ, 10 * MS), (3, READ, 0), (3, WROTE, 15 * MS)),
        *((4, READ, 0), (4, WROTE, 0)),
    )
    made.run(12 * MS)
    assert ranges(made) == [(0, 1024), (3, 4)]
    assert lab.acquisitions() == {("fault", "read"): 3, START: 2, END: 2}
    finish(made)
    lab.env.run(vcpu.process)
    assert len(made.calls) == 2, "no other invalidation"
    assert lab.acquisitions() == {("fault", "read"): 2}
    assert host(made, 3) == host(made, 4) == PRESENT | OWN
    assert folios(made) == 1024


def test_a_write_to_a_huge_page_that_a_child_shares_splits_it() -> None:
    """do_huge_pmd_wp_page() falls back to __split_huge_pmd() and a copy of the one page."""
    made = huge("fork", child=20 * MS, start=1000)
    lab = made.lab
    vcpu = lab.touch((700, READ, MS), (5, READ, 0), (5, WROTE, 0))
    lab.env.timeout(2 * MS)
    lab.env.run(vcpu.process)
    assert ranges(made) == [(0, 1024), (0, 512), (5, 6)], "__split_huge_pmd(), then the page"
    assert lab.kvm.host.huge.tolist() == [False, True]
    assert host(made, 5) == PRESENT | OWN
    assert host(made, 6) == PRESENT | OWN | WRPROTECT
    assert not lab.kvm.stage2.is_block(5)
    assert entry(made, 5) & WRITE


# -- OOM reaper -------------------------------------------------------------------------------


def reaped(kind: str) -> dict[tuple[str, str], int]:
    """A sparse guest of two chunks is taken, while somebody else comes for the lock, once."""
    lab = Lab(2 * GIB)
    fill_sparsely(lab, 2 * MIB)
    if kind == "reaper":
        lab.env.process(
            contenders.build(
                lab.kvm, lab.task, np.random.default_rng(1), spec("oom_reaper", delay=0)
            ).run()
        )
    else:
        lab.env.process(lab.kvm.notifier.invalidate(lab.task, 0, 0, lab.kvm.leaves))

    def other() -> Iterator[Any]:
        yield lab.env.timeout(1000)
        task = type(lab.task)("other", lab.world.cpus[-2])
        yield from lab.kvm.notifier.invalidate(task, 1000, 0, 1)

    lab.run(other())
    lab.env.run()
    return dict(lab.acquisitions())


def test_the_reaper_never_breaks_the_lock() -> None:
    """mmu_notifier_invalidate_range_start_nonblock(): others wait for all chunks."""
    assert reaped("reaper") == {START: 2, END: 2}
    assert reaped("madvise") == {START: 3, END: 2}, "the blockable one lets the other in"


def test_the_reaper_comes_after_its_delay_to_a_guest_that_does_not_run() -> None:
    made = bench("oom_reaper", start=2 * MS, delay=5 * MS)
    lab = made.lab
    vcpu = lab.touch(*[(n % 1024, READ, 1000) for n in range(20_000)])
    finish(made)
    assert 2 * MS <= vcpu.finished_ns < 2 * MS + 10_000
    ((t_ns, first, last),) = made.calls
    assert 7 * MS <= t_ns < 7 * MS + 1000
    assert (first, last) == (0, 1024)
    assert not lab.kvm.host.state.any()


# -- memslot ----------------------------------------------------------------------------------


def test_deleting_a_slot_is_one_hold_for_everything() -> None:
    """As traced on 6.12: 8 MiB by pages, one write acquisition, five tables freed, pages kept."""
    made = bench("memslot", memory=8 * MIB)
    lab = made.lab
    finish(made)
    assert lab.acquisitions() == {("memslot", "write"): 1}
    assert lab.kvm.tables_freed == 5
    assert lab.kvm.notifier.sequence == lab.kvm.notifier.in_progress == 0
    assert {host(made, n) for n in range(2048)} == {PRESENT | OWN}
    assert not made.calls


@pytest.mark.parametrize(("operation", "waits"), [("delete", 3), ("move", 2)])
def test_a_slot_is_swapped_twice_to_go_and_once_to_come(operation: str, waits: int) -> None:
    made = bench("memslot", operation=operation)
    finish(made)
    slot = made.contender
    assert isinstance(slot, Memslot)
    assert slot.update.grace_periods == waits
    (row,) = made.lab.lock_rows("memslot")
    idle_ns = 2 * made.lab.kvm.costs.wakeup_ns
    assert row["arrival"] == idle_ns, "the first grace period comes before the lock"
    assert done_ns(made) == row["entry"] + row["hold"] + (waits - 1) * idle_ns


def test_an_update_waits_for_invalidations_that_are_active() -> None:
    """mn_active_invalidate_count, from the start's call to the end's return."""
    made = bench("memslot", start=1000)
    lab = made.lab
    task = type(lab.task)("other", lab.world.cpus[-2])
    other = lab.env.process(lab.kvm.notifier.invalidate(task, 0, 0, 1024))
    lab.env.timeout(10 * MS)
    lab.env.run(other)
    over = other.value
    finish(made)
    wakeup_ns = lab.kvm.costs.wakeup_ns
    assert lab.lock_rows("memslot")[0]["arrival"] == over + wakeup_ns + 2 * wakeup_ns


def test_a_fault_that_saw_the_slot_is_waited_for_and_undone() -> None:
    made = bench("memslot", memory=MIB, fill=False, pause=MS, start=6500)
    lab = made.lab
    vcpu = lab.touch((0, WROTE, 0), (1, WROTE, 0))
    lab.env.timeout(MS)
    lab.env.run(MS)
    fault, slot = lab.lock_rows("fault")[0], lab.lock_rows("memslot")[0]
    assert fault["entry"] + fault["hold"] > 6500
    assert fault["entry"] + fault["hold"] <= slot["arrival"]
    assert entry(made, 0) == 0
    assert host(made, 0) == PRESENT | OWN
    lab.env.run(vcpu.process)
    assert vcpu.finished_ns > MS


def test_a_fault_that_takes_long_is_waited_for() -> None:
    """The expedited grace period of kvm->srcu looks at its readers again every 5 us."""
    made = bench("memslot", memory=MIB, start=10_000)
    lab = made.lab
    kvm = lab.kvm
    depart(kvm.host, 0, 1)
    kvm.stage2.leaf.entries[0] = 0

    def back() -> Iterator[Any]:
        yield lab.env.timeout(60_000)
        arrive(kvm.host, lab.env, 0, 1, 60_000)

    lab.env.process(back())
    vcpu = lab.touch((0, WROTE, 0))
    finish(made)
    fault, slot = lab.lock_rows("fault")[0], lab.lock_rows("memslot")[0]
    left = fault["entry"] + fault["hold"]
    assert left > 60_000 + kvm.costs.wakeup_ns
    assert left <= slot["arrival"] <= left + 5000
    assert (slot["arrival"] - 10_000 - 2 * kvm.costs.wakeup_ns) % 5000 == 0
    lab.env.run(vcpu.process)
    assert vcpu.touches == 1


def test_without_a_slot_every_access_goes_to_user_space() -> None:
    made = bench("memslot", start=MS, pause=2 * MS)
    lab = made.lab
    lab.env.timeout(3 * MS)
    vcpu = lab.touch((9, READ, 2 * MS), (3, READ, 0))
    lab.env.run(3 * MS)
    costs = lab.kvm.costs
    each = costs.touch_ns + costs.fault.exit_ns + costs.fault.user_ns + costs.fault.enter_ns
    assert vcpu.fault.user_exits == pytest.approx(MS / each, rel=0.02)
    assert lab.acquisitions() == {("memslot", "write"): 1}, "they do not come to mmu_lock"
    lab.env.run(vcpu.process)
    assert lab.acquisitions() == {("fault", "read"): 1}
    assert entry(made, 3) & VALID


def test_without_a_slot_the_notifier_takes_no_lock() -> None:
    """kvm_handle_hva_range() finds nothing; the host's mappings go all the same."""
    made = bench("memslot", pause=20 * MS)
    lab = made.lab
    lab.env.timeout(30 * MS)
    lab.env.run(MS)
    lab.acquisitions()
    lab.t_ns = MS
    lab.drop(0, MIB)
    assert not lab.acquisitions()
    assert lab.kvm.notifier.sequence == 0
    assert not lab.kvm.host.state[:256].any()
    report = lab.age()
    assert report.scanned == 768
    assert not lab.acquisitions()


def test_a_slot_above_the_chunk_is_let_go_of_between_chunks_if_others_wait() -> None:
    made = bench("memslot", memory=2 * GIB, fill=False)
    lab = made.lab
    fill_sparsely(lab, 2 * MIB)

    def other() -> Iterator[Any]:
        yield lab.env.timeout(50_000)
        task = type(lab.task)("other", lab.world.cpus[-2])
        yield from lab.kvm.notifier.invalidate(task, 50_000, 0, 1)

    lab.env.process(other())
    finish(made)
    lab.env.run()
    assert lab.acquisitions()["memslot", "write"] == 2


def test_of_several_slots_only_one_goes() -> None:
    made = bench("memslot", memory=16 * MIB, guest={"memslots": 4}, slot=2, pause=20 * MS)
    lab = made.lab
    lab.env.timeout(30 * MS)
    lab.env.run(MS)
    valid = (lab.kvm.stage2.leaf.entries & VALID) != 0
    assert np.flatnonzero(~valid).tolist() == list(range(2048, 3072))
    lab.acquisitions()
    lab.t_ns = MS
    lab.drop(8 * MIB, 4 * MIB)
    assert not lab.acquisitions(), "nothing there"
    lab.drop(6 * MIB, 4 * MIB)
    assert lab.acquisitions() == {START: 1, END: 1}, "a part is"


# -- pre-fault --------------------------------------------------------------------------------


def test_pre_fault_maps_a_page_at_a_time_under_the_read_lock() -> None:
    made = bench("pre_fault", memory=MIB, fill=False, range=512 * KIB, populated=True)
    finish(made)
    assert made.lab.acquisitions() == {("pre_fault", "read"): 128}
    assert np.flatnonzero(made.lab.kvm.stage2.leaf.entries).tolist() == list(range(128))
    assert entry(made, 7) & WRITE
    assert made.lab.kvm.tables_allocated == 2


def test_a_page_costs_what_a_fault_costs_without_exit_and_entry() -> None:
    made = bench("pre_fault", memory=MIB, fill=False, populated=True)
    finish(made)
    rows = made.lab.lock_rows("pre_fault")
    costs = made.lab.kvm.costs
    fault, line = costs.fault, costs.line
    each = fault.exit_ns - fault.enter_ns + 3 * line.same_ns + fault.vma_ns + fault.gup_hit_ns
    each += line.same_ns + fault.hold_ns + costs.ageing.resched_ns
    apart = np.diff([row["arrival"] for row in rows])
    assert set(apart[100:].tolist()) == {each}


def test_memory_that_is_not_populated_gets_the_zero_page_and_is_copied_on_write() -> None:
    made = bench("pre_fault", memory=MIB, fill=False)
    finish(made)
    assert {host(made, n) for n in range(256)} == {PRESENT}
    assert not (made.lab.kvm.stage2.leaf.entries & WRITE).any()
    vcpu = made.lab.touch((9, WROTE, 0))
    made.lab.env.run(vcpu.process)
    assert ranges(made) == [(9, 10)]


def test_a_call_says_how_far_it_came_and_the_next_goes_on() -> None:
    made = bench("pre_fault", memory=MIB, fill=False, call=384 * KIB, populated=True)
    finish(made)
    taker = made.contender
    assert isinstance(taker, PreFault)
    assert taker.ioctls == 3
    assert not taker.calls, "it invalidates nothing"
    assert taker.mapped == 256


def test_a_page_that_an_invalidation_touches_is_tried_again() -> None:
    made = bench("pre_fault", memory=MIB, fill=False, populated=True)
    lab = made.lab
    task = type(lab.task)("other", lab.world.cpus[-2])
    lab.env.process(lab.kvm.notifier.invalidate(task, 3000, 0, 256))
    finish(made)
    assert lab.acquisitions()["pre_fault", "read"] > 256
    taker = made.contender
    assert isinstance(taker, PreFault)
    assert taker.mapped == 256
    assert taker._fault.retries > 0


def test_sites_are_the_takers_own() -> None:
    assert (MEMSLOT, PRE_FAULT) == (11, 12)
