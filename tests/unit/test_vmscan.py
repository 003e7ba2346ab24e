"""Eviction and the ageing it asks for, rule by rule (mm/vmscan.c, v6.12; counts of real runs)."""

from __future__ import annotations

import errno
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import worlds
from click.testing import CliRunner
from pressed import MS, Pressed, ScanControl

from simkvm import cli
from simkvm.kernel import memcg_lru
from simkvm.kernel.aging import AgeingThread
from simkvm.kernel.aging_call import Pass
from simkvm.kernel.bloom import BLOOM_FILTER_SHIFT, BloomFilters, keys
from simkvm.kernel.host_memory import OWN, PRESENT, WRPROTECT, YOUNG
from simkvm.kernel.lru_gen_file import LruGenFile, generations
from simkvm.kernel.lru_walk import ReclaimWalk
from simkvm.kernel.memcg_lru import MEMCG_NR_GENS, MemcgLru
from simkvm.kernel.mglru import MAX_NR_GENS, suitable_to_scan
from simkvm.kernel.mm_list import MmList
from simkvm.kernel.sites import AGE, RANGE_START
from simkvm.kernel.swappable import SLOT
from simkvm.kernel.vmstat import Vmstat
from simkvm.scenario.errors import InputError
from simkvm.scenario.schema import Ageing
from simkvm.units import MIB

PAGES = 4096


def rows(made: Pressed, site: int) -> int:
    """Acquisitions of mmu_lock at one site."""
    return made.kvms[0].mmu_lock.rows[::6].count(site)


# -- counts of a real kernel -----------------------------------------------------------------------


def test_cold_pages_cost_one_question_and_one_range_each() -> None:
    """evict-cold: 2,043 of the guest's pages: as many clear_young calls and ranges; batches of 64.

    The second eviction empties the generation, so only its last batch leaves shadows that count.
    """
    made = Pressed(16 * MIB)
    assert made.evict(2048) == 0
    vmstat = made.pgdat.vmstat
    assert (vmstat.pgscan_direct, vmstat.pgsteal_direct, vmstat.look_arounds) == (2048, 2048, 0)
    assert (rows(made, AGE), rows(made, RANGE_START)) == (2048, 2048)
    oldest, youngest = made.lruvec.min_seqs[0], made.lruvec.max_seq
    assert made.evict(2048, oldest) == 0
    assert made.lruvec.min_seqs[0] == youngest - 1
    back = [made.host.lru.refault(leaf) for leaf in range(PAGES)]  # type: ignore[attr-defined]
    assert (vmstat.workingset_refault, sum(back)) == (4096, 64)
    assert (vmstat.workingset_activate, vmstat.workingset_restore) == (64, 64)


def test_hot_pages_are_found_by_looks_around() -> None:
    """evict-hot: 120 looks around with 65 calls each, 64 batches, nothing but cold pages taken."""
    made = Pressed(16 * MIB)
    made.use(*range(PAGES))
    assert made.evict(2048) == 0
    vmstat = made.pgdat.vmstat
    assert vmstat.look_arounds == 120
    assert rows(made, AGE) == 120 * 65
    assert (vmstat.pgscan_direct, vmstat.pgsteal_direct) == (PAGES, 0)
    assert made.lruvec.min_seqs[0] == made.lruvec.max_seq - 1
    assert made.evict(2048, made.lruvec.min_seqs[0]) == errno.EINVAL


def test_a_page_that_a_look_around_saw_is_not_asked_for_again() -> None:
    """Isolated folios are marked (PG_referenced), those on lists are sorted when their turn comes.

    Up to v6.13. Leaf 0's look around covers leaves 0 to 63, leaf 64's 32 to 95, and so on.
    """
    made = Pressed(2 * MIB)
    made.use(0, 10, 63, 70)
    assert made.evict(128) == 0
    assert made.pgdat.vmstat.look_arounds == 2
    there = np.flatnonzero(made.host.state & OWN)
    assert {0, 10, 63, 70} <= set(there.tolist())
    # The first batch: 0 looks around, 10 and 63 are not asked. The second: 70 looks around and
    # finds what is left of 38 to 101: itself, 63 and 71 to 101. 124 pages went: a third, all cold.
    assert rows(made, AGE) == (1 + 64 + 61) + (6 + 1 + 33 + 57) + 64


@pytest.mark.parametrize("kernel", ["linux-6.4", "linux-6.12"])
def test_a_fault_before_it_was_isolated_saves_no_page_from_the_question(kernel: str) -> None:
    """isolate_folio() clears PG_referenced for shrink_folio_list()."""
    made = Pressed(2 * MIB, kernel)
    for leaf in range(64):
        made.host.lru.accessed(leaf, 2)  # type: ignore[attr-defined]
    made.evict(1)
    assert np.flatnonzero(made.host.state & OWN).tolist() == list(range(64, 512))
    assert rows(made, AGE) == 64


def test_pages_under_writeback_are_what_they_were() -> None:
    """evict_folios() restores LRU_REFS_FLAGS of folios of the workingset."""
    made = Pressed(2 * MIB, swap="nvme")
    lru, states = made.host.lru, made.lruvec.states
    for leaf in (3, 4):
        lru.accessed(leaf, 3 if leaf == 3 else 1)  # type: ignore[attr-defined]
    states[4] |= 2  # a workingset folio without PG_referenced: nothing to restore
    before = int(states[3])
    ids, _ = made.lruvec.isolate(60)
    made.lruvec.settle(ids[:0], ids[:0], ids[ids < 5])
    assert states[:5].tolist() == [0, 0, 0, before, 3]


def test_before_2023s_series_eviction_looks_around_by_the_hosts_own_flags() -> None:
    """folio_referenced_one() of v6.4: a young host PTE, then clear_flush_young in any case."""
    made = Pressed(2 * MIB, "linux-6.4")
    made.host.state[[5, 20, 64]] |= np.uint8(YOUNG)
    made.use(1, 30, 31)  # of these the host knows nothing until it asks
    made.evict(1)
    vmstat = made.pgdat.vmstat
    # Leaf 5 looks at 0 to 63 and finds 20, which is then known to be used and not asked for.
    assert vmstat.look_arounds == 1
    assert rows(made, AGE) == 63
    assert vmstat.pgsteal_direct == 64 - 5
    assert not (made.host.state[[5, 20]] & YOUNG).any()
    assert made.host.state[64] & YOUNG


def test_what_cannot_be_evicted_is_not_walked() -> None:
    """should_skip_vma(): anonymous memory, with swappiness 0."""
    made = Pressed(2 * MIB)
    made.use(*range(512))
    lruvec = made.lruvec
    walk = ReclaimWalk(made.kvms[0], made.task)
    report = made.do(walk.walk(lruvec.max_seq, True, made.now(), swappiness=0))
    assert (report.scanned, rows(made, AGE)) == (0, 0)
    report = made.do(walk.walk(lruvec.max_seq, True, made.now(), swappiness=1))
    assert (report.scanned, rows(made, AGE)) == (512, 512)


@pytest.mark.parametrize(("kernel", "counted"), [("linux-6.12", 0), ("linux-7.1", 512)])
def test_folios_that_a_new_generation_moves_up_count_as_protected_since_the_rework(
    kernel: str, counted: int
) -> None:
    made = Pressed(2 * MIB, kernel)
    lruvec = made.lruvec
    positions: list[int] = []
    controller = lruvec.controllers[0]
    carry_over = controller.carry_over

    def note() -> None:
        positions.append(sum(controller.protected))
        carry_over()

    controller.carry_over = note  # type: ignore[method-assign]
    lruvec.inc_min_seq(0)
    assert positions == [counted]


def test_a_batch_is_64_whatever_is_wanted() -> None:
    made = Pressed()
    made.evict(1)
    assert made.pgdat.vmstat.pgsteal_direct == 64


# -- Bloom filters ---------------------------------------------------------------------------------


def test_an_absent_filter_lets_everything_pass() -> None:
    filters = BloomFilters(Vmstat())
    assert filters.passes(3, 0, 7)
    filters.add(3, 0, 7)  # nothing to add to
    filters.reset(3)
    assert not filters.passes(3, 0, 7)
    assert filters.passes(4, 0, 7)


def test_two_filters_take_turns() -> None:
    filters = BloomFilters(Vmstat())
    filters.reset(4)
    filters.reset(5)
    filters.add(4, 0, 1)
    assert filters.passes(4, 0, 1)
    assert not filters.passes(5, 0, 1)
    filters.reset(6)
    assert not filters.passes(4, 0, 1)


def test_false_positives_are_as_frequent_as_two_bits_make_them() -> None:
    """About a fifth at 10,000 tables, the half at 20,000 (vmscan.c, on BLOOM_FILTER_SHIFT)."""
    assert all(0 <= key < 1 << BLOOM_FILTER_SHIFT for table in range(9) for key in keys(1, table))
    for tables, expected in ((10_000, 0.2093), (20_000, 0.4967)):
        exact = (1 - np.exp(-2 * tables / 2**BLOOM_FILTER_SHIFT)) ** 2
        assert exact == pytest.approx(expected, abs=1e-3)
        vmstat = Vmstat()
        filters = BloomFilters(vmstat)
        filters.reset(0)
        rng, asked = np.random.default_rng(1), 4000
        drawn = rng.choice(1 << 26, tables + asked, replace=False).tolist()
        for table in drawn[:tables]:
            filters.add(0, 0, table)
        passed = sum(filters.passes(0, 0, table) for table in drawn[tables:])
        assert vmstat.lru_gen_false_positives == passed
        assert vmstat.lru_gen_tables_skipped == asked - passed
        assert passed / asked == pytest.approx(exact, abs=4 * np.sqrt(exact / asked))


def test_dense_is_one_young_entry_a_cache_line() -> None:
    assert suitable_to_scan(512, 64)
    assert not suitable_to_scan(512, 63)


def test_a_walk_fills_the_next_filter_with_dense_tables() -> None:
    made = Pressed(8 * MIB)  # four tables
    made.use(*range(0, 512, 8), *range(512, 512 + 63), 1024)
    lruvec = made.lruvec
    seq = lruvec.max_seq
    assert made.age() == 0
    filters = lruvec.mms.filters
    assert [filters.passes(seq + 1, 0, table) for table in range(4)] == [True, False, False, False]
    before = made.pgdat.vmstat.lru_gen_tables_skipped
    walk = ReclaimWalk(made.kvms[0], made.task)
    report: Pass = made.do(walk.walk(seq + 1, False, made.now()))
    assert report.scanned == 512
    assert made.pgdat.vmstat.lru_gen_tables_skipped == before + 3


def test_a_look_around_puts_its_table_into_the_present_filter() -> None:
    """The feedback by which a later walk finds it; eight of 64 were young."""
    for young, dense in ((8, True), (7, False)):
        made = Pressed()
        lruvec = made.lruvec
        lruvec.mms.filters.reset(lruvec.max_seq)
        made.use(*range(0, 2 * young, 2))
        made.evict(64)
        assert lruvec.mms.filters.passes(lruvec.max_seq, 0, 0) is dense


@pytest.mark.parametrize(("kernel", "kept"), [("linux-6.12", False), ("linux-7.1", True)])
def test_a_table_that_was_locked_is_kept_in_mind_since_the_rework(kernel: str, kept: bool) -> None:
    made = Pressed(4 * MIB, kernel)
    lruvec, host = made.lruvec, made.host
    lruvec.mms.filters.reset(lruvec.max_seq + 1)
    host.lock_table(1, made.now())
    made.do(ReclaimWalk(made.kvms[0], made.task).walk(lruvec.max_seq, True, made.now()))
    assert lruvec.mms.filters.passes(lruvec.max_seq + 1, 0, 1) is kept


# -- walkers that share a list ---------------------------------------------------------------------


def take(mms: MmList, seq: int, ran: set[int], forced: bool = False) -> tuple[object, bool, bool]:
    return mms.next(seq, forced, lambda number, by_force: by_force or number in ran)


def test_the_first_iteration_looks_at_everybody_and_later_ones_at_who_ran() -> None:
    mms = MmList(3, Vmstat())
    assert [take(mms, 3, set())[:2] for _ in range(4)] == [
        (0, False), (1, False), (2, False), (None, True),
    ]  # fmt: skip
    assert mms.seq == 3
    assert take(mms, 3, {0}) == (None, False, False), "that iteration is over"
    assert take(mms, 4, {1})[:2] == (1, False)
    assert take(mms, 4, {1})[:2] == (None, True)
    assert take(mms, 5, set(), forced=True)[0] == 0


def test_walkers_take_different_ones_and_the_one_that_comes_to_the_end_ends_it() -> None:
    mms = MmList(2, Vmstat())
    assert take(mms, 3, {0, 1})[0] == 0
    assert take(mms, 3, {0, 1})[0] == 1
    assert take(mms, 3, {0, 1})[:2] == (None, True)
    assert take(mms, 3, {0, 1})[:2] == (None, False), "the other one opens nothing"


def test_a_walk_is_given_up_when_the_generation_is_not_the_youngest_any_more() -> None:
    made = Pressed()
    made.use(5)
    seq = made.lruvec.max_seq
    made.lruvec.inc_max_seq()
    report = made.do(ReclaimWalk(made.kvms[0], made.task).walk(seq, True, made.now()))
    assert report.scanned == 0
    assert made.pgdat.vmstat.lru_gen_walks_given_up == 1


def test_what_a_walk_finds_goes_to_the_generation_it_walks_for() -> None:
    made = Pressed()
    lru = made.host.lru
    seq = made.lruvec.max_seq
    made.lruvec.inc_max_seq()
    lru.promote(np.array([5]), seq)  # type: ignore[call-arg]
    assert made.by_age() == [0, 1, 0, 511]


def test_two_walkers_of_one_guest_open_one_generation() -> None:
    """The second comes to the end at once, opens it, and the first gives up or finds it open."""
    made = Pressed(4 * MIB)
    seq = made.lruvec.max_seq
    ageing = made.reclaimer.lru_gen.ageing
    other = type(ageing)(made.pgdat, made.task)
    env = made.world.env
    both = [
        env.process(a.try_to_inc_max_seq(0, seq, 60, True, made.now())) for a in (ageing, other)
    ]
    env.run(env.all_of(both))
    assert [process.value[0] for process in both] == [False, True]
    assert made.lruvec.max_seq == seq + 1


# -- when ageing runs ------------------------------------------------------------------------------


def test_the_first_go_only_evicts() -> None:
    made = Pressed()
    made.lruvec.min_seqs[:] = [made.lruvec.max_seq - 1] * 2
    made.shrink(ScanControl(32, False))
    assert made.pgdat.vmstat.lru_gen_walks == 0
    made.shrink(ScanControl(64, False, priority=11))
    assert made.pgdat.vmstat.lru_gen_walks == 1


def test_without_walks_a_generation_is_just_opened() -> None:
    made = Pressed(host={"lru_gen": 0x1})
    made.use(*range(512))
    seq = made.lruvec.max_seq
    assert made.age() == 0
    assert made.lruvec.max_seq == seq + 1
    assert made.kvms[0].young_calls.locked == 0


# -- memcgs ----------------------------------------------------------------------------------------


def test_memcgs_go_through_three_slots() -> None:
    lru = MemcgLru(3, np.random.default_rng(1))
    old = lru.old
    assert lru.members(old) == 3
    lru.rotate(0, memcg_lru.YOUNG)
    lru.rotate(2, memcg_lru.TAIL)
    assert (lru.members(old), lru.segments) == (2, [0, 0, memcg_lru.TAIL])
    lru.rotate(1, memcg_lru.YOUNG)
    lru.rotate(0, memcg_lru.OLD)
    assert (lru.seq, lru.gens[0]) == (MEMCG_NR_GENS, old)
    lru.rotate(0, memcg_lru.YOUNG)
    lru.rotate(2, memcg_lru.YOUNG)
    assert lru.seq == MEMCG_NR_GENS + 1, "the old one is empty: the young one takes its place"
    assert lru.members(lru.old) == 3


def test_who_was_aged_is_not_reclaimed_from_again_in_that_round() -> None:
    made = Pressed(guests=3)
    for lruvec in made.pgdat.generations:
        lruvec.min_seqs[:] = [lruvec.max_seq - 1] * 2  # nothing to evict
    made.shrink(ScanControl(10_000, False, priority=3))
    assert [lruvec.max_seq for lruvec in made.pgdat.generations] == [4, 4, 4]
    assert made.pgdat.memcg_lru.seq == MEMCG_NR_GENS + 1


def test_reclaim_is_fair_to_memcgs() -> None:
    """Each is reclaimed from once in a go, and a go ends when there is enough."""
    made = Pressed(guests=4)
    made.shrink(ScanControl(4 * 64, False, priority=3))
    stolen = [512 - made.pgdat.memory(n, 0).page_count for n in range(4)]
    assert stolen == [64] * 4


# -- min_ttl ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(("min_ttl_ns", "killed"), [(0, 0), (500 * MS, 1), (100 * MS, 0)])
def test_somebody_is_killed_if_everything_is_young(min_ttl_ns: int, killed: int) -> None:
    made = Pressed(guests=2, host={"min_ttl": min_ttl_ns})
    for lruvec in made.pgdat.generations:
        lruvec.birth_ns = [0] * MAX_NR_GENS
    made.world.env.run(200 * MS)
    made.do(made.reclaimer.age_node(ScanControl(64, True), made.now()))
    assert made.pgdat.vmstat.oom_kills == killed


def test_memory_that_was_there_before_is_old_enough() -> None:
    made = Pressed(host={"min_ttl": 500 * MS})
    made.do(made.reclaimer.age_node(ScanControl(64, True), made.now()))
    assert not made.pgdat.vmstat.oom_kills


# -- on command ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("command", "error"),
    [
        ("+ 1 0 3", 0),
        ("+ 1 0 2", 0),  # an old one: nothing to do
        ("+ 1 0 4", errno.EINVAL),
        ("+ 1 0 3 60 0", errno.ERANGE),  # not by force, with four generations
        ("+ 2 0 3", errno.EINVAL),
        ("+ 1 1 3", errno.EINVAL),
        ("+ 1 0", errno.EINVAL),
        ("+ 1 0 3 60 1 7", errno.EINVAL),
        ("+ 1 0 3 201", errno.EINVAL),
        ("* 1 0 3", errno.EINVAL),
        ("- 1 0 1 60 64", 0),
        ("- 1 0 2", errno.EINVAL),
        ("+ 1 0 3; + 1 0 9, + 1 0 4", errno.EINVAL),
    ],
)
def test_commands_fail_as_the_kernels(command: str, error: int) -> None:
    made = Pressed()
    found, _ = made.do(LruGenFile(made.pgdat, made.task).write(command, made.now()))
    assert found == error
    if command.startswith("+ 1 0 3;"):
        assert made.lruvec.max_seq == 4, "what came before the failure was done"


def test_the_file_reads_as_the_kernels() -> None:
    """seq_printf(" %10lu %10u"), then " %10lu%c" for each type."""
    made = Pressed(guests=2)
    made.world.env.run(250 * MS)
    lines = generations(made.pgdat, made.now())
    assert lines[:2] == ["memcg     1 /vm0", " node     0"]
    assert lines[2] == "          0    3600250        512           0 "
    assert lines[6] == "memcg     2 /vm1"
    assert len(lines) == 2 * (2 + 4)
    assert generations(Pressed(kernel="linux-7.1").pgdat, 0)[0] == "memcg 1 /vm0"


# -- files -----------------------------------------------------------------------------------------


def of_a_file() -> Pressed:
    """A guest whose pages have all been read, and none written; old ones."""
    made = Pressed(2 * MIB, backing="file", mapped=False)
    lru = made.host.lru
    for leaf in range(512):
        made.host.swapped_in(leaf, write=False)
        made.host.install(leaf, own=True)
        made.pgdat.pages.take()
    made.host.state[:] = OWN | PRESENT | WRPROTECT
    lru.all_old()  # type: ignore[attr-defined]
    return made


def test_clean_pages_of_a_file_are_dropped() -> None:
    made = of_a_file()
    free = made.pgdat.pages.free
    assert made.evict(64) == 0
    vmstat = made.pgdat.vmstat
    assert (vmstat.pgsteal_direct, vmstat.pswpout, vmstat.nr_written) == (64, 0, 0)
    assert made.pgdat.pages.free == free + 64
    assert (made.host.swap[:64] == SLOT).all(), "the file has them"


def test_dirty_pages_of_a_file_are_passed_by_until_they_are_written_back() -> None:
    """sort_folio(): to the next generation; the flusher takes the right to write, page by page."""
    made = of_a_file()
    for leaf in range(100):
        made.host.written(leaf)
    assert made.evict(64) == 0
    assert (made.host.state[:100] & OWN).all()
    assert not (made.host.state[100:164] & OWN).any()
    made.world.env.process(made.world.flusher.run())  # type: ignore[union-attr]
    made.world.env.run(1)
    made.pgdat.wake_flusher()
    made.world.env.run(20 * MS)
    assert made.pgdat.vmstat.nr_written == 100
    assert made.host.dirty == 0
    assert rows(made, RANGE_START) == 64 + 100
    assert (made.host.state[:100] & WRPROTECT).all()
    made.evict(1000)
    assert made.host.page_count == 0


def test_without_swap_only_files_are_evicted() -> None:
    made = Pressed(2 * MIB, backing="file", mapped=False)
    made.pgdat.swap = None
    assert made.pgdat.swappiness_now() == 0


# -- scenarios -------------------------------------------------------------------------------------

IDLE_FILE = {
    "memory": 2 * MIB,
    "backing": "file",
    "access": {"pattern": "uniform", "touches": 9},
}
MEMORY = {"size": 64 * MIB}
DONTNEED = {"kind": "madvise_dontneed", "guest": "vm0", "range": MIB, "rate": 1.0}


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"guest": IDLE_FILE}, "needs a host whose memory can run out"),
        ({"guest": {**IDLE_FILE, "mapped": True}, "host": {"memory": MEMORY}}, "first used"),
        (
            {"host": {"memory": {**MEMORY, "lru_gen": 0, "commands": [{"at": 0, "write": "+"}]}}},
            "nothing to command",
        ),
        ({"host": {"memory": {**MEMORY, "lru_gen": 0}}, "ageing": {}}, "lru_gen is off"),
        (
            {
                "guest": IDLE_FILE,
                "host": {"memory": MEMORY},
                "contenders": {"vmm": DONTNEED},
            },
            "not that of a file",
        ),
    ],
)
def test_what_a_scenario_may_not_ask_for(keys: dict[str, Any], said: str) -> None:
    with pytest.raises(InputError, match=said):
        worlds.scenario(**keys)


def test_writes_of_a_scenario_and_the_file_at_the_end() -> None:
    """A write that fails is said; the run goes on."""
    record = worlds.run(
        guest={"memory": 4 * MIB, "access": {"pattern": "populate", "write": True}},
        host={
            "memory": {
                **MEMORY,
                "commands": [
                    {"at": 20 * MS, "write": "+ 1 0 3"},
                    {"at": 10 * MS, "write": "- 1 0 3 60 64"},
                ],
            },
            "swap": {"kind": "zram"},
        },
        duration=40 * MS,
    )
    lines = dict(zip(record.phases["name"], record.phases["line"], strict=True))
    said = [line for line in record.phases["line"] if "Invalid argument" in line]
    assert said == ["lru_gen: '- 1 0 3 60 64': Invalid argument"]
    assert record.summary["lru_gen_walks"] == 1
    assert lines["lru_gen"].split()[0] == "4", "the youngest generation comes last"


def test_run_prints_the_file(tmp_path: Path) -> None:
    file = tmp_path / "pressed.yaml"
    file.write_text(
        "{name: pressed, machine: ampere-altra-80c, kernel: linux-6.12, host: {memory: {size: 64 "
        "MiB}}, guests: {vm0: {memory: 1 MiB, access: {pattern: populate, write: true}}}}"
    )
    said = CliRunner().invoke(cli.main, ["run", str(file), "--lru-gen"])
    assert said.exit_code == 0, said.output
    assert said.output.splitlines()[-6:-4] == ["memcg     1 /vm0", " node     0"]
    assert "lru_gen" not in CliRunner().invoke(cli.main, ["run", str(file)]).output


def test_ageing_by_a_scenario_fills_filters_too() -> None:
    """The command's walk is forced, but tells the next one what was dense."""
    made = Pressed(4 * MIB)
    made.use(*range(512, 1024))
    seq = made.lruvec.max_seq
    thread = AgeingThread(made.kvms, made.task, Ageing(passes=1))
    made.do(thread.run(lambda: True))
    assert made.lruvec.max_seq == seq + 1
    assert made.by_age() == [0, 512, 0, 512]
    filters = made.lruvec.mms.filters
    assert [filters.passes(seq + 1, 0, table) for table in (0, 1)] == [False, True]
