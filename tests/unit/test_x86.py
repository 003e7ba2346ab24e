"""x86: what its MMUs do differently, each rule by a count or a time worked out by hand.

Sources: arch/x86/kvm/mmu/{mmu.c,tdp_mmu.c}, virt/kvm/kvm_main.c, kernel/rcu/tree.c, v6.12; for the
bit lock of reverse-map chains v6.15.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from lab import Lab, account, world

from simkvm.kernel.geometry import X86Geometry
from simkvm.kernel.rcu_segcblist import SegmentedCallbackList
from simkvm.kernel.rmap import Held, RmapLocks, chain_ns
from simkvm.kernel.sites import AGE, FAULT, RANGE_END, RANGE_START, TEARDOWN
from simkvm.kernel.stage2 import VALID, WRITE
from simkvm.kernel.task import acquired
from simkvm.kernel.yielding_walk import tree
from simkvm.kernel.zap_roots import ZapRoots
from simkvm.units import GIB, KIB, MIB

TDP, SHADOW = "linux-6.12-x86", "linux-6.12-x86-shadow"
ICELAKE = "x86-icelake-64c"


def lab(memory: int = 4 * MIB, guest: dict[str, Any] | None = None, **keys: Any) -> Lab:
    return Lab(memory, guest, **{"machine": ICELAKE, "kernel": TDP, **keys})


def rows(made: Lab, site: int) -> list[dict[str, int]]:
    return [row for row in account(made.kvm.mmu_lock.rows) if row["site"] == site]


# -- geometry ---------------------------------------------------------------------------------


@pytest.mark.parametrize(("bits", "start"), [(36, 0), (40, 0), (48, 0), (49, -1), (52, -1)])
def test_four_levels_or_five_and_one_root_page(bits: int, start: int) -> None:
    """kvm_mmu_get_tdp_level(): by MAXPHYADDR; nothing is concatenated."""
    geometry = X86Geometry(4 * KIB, bits)
    assert (geometry.start_level, geometry.root_pages, geometry.entries) == (start, 1, 512)
    assert geometry.leaf_sizes() == [4 * KIB, 2 * MIB, GIB]
    assert geometry.cache_minimum == 5, "PT64_ROOT_MAX_LEVEL"


@pytest.mark.parametrize(("bits", "tables"), [(48, 3), (52, 4)])
def test_a_first_fault_installs_a_table_for_each_level_below_the_root(
    bits: int, tables: int
) -> None:
    made = lab(guest={"ipa_bits": bits})
    made.touch((0, True, 0))
    made.env.run(made.kvm.vcpus[0].process)
    assert made.kvm.tables_allocated == tables


# -- faults -----------------------------------------------------------------------------------


def test_a_host_page_that_is_there_is_found_without_mmap_lock() -> None:
    """Fast GUP; the slow path, a host fault, takes the lock for read."""
    made = lab()
    made.kvm.host.install(7, True)
    made.touch((7, True, 0))
    made.env.run(made.kvm.vcpus[0].process)
    assert made.kvm.host.mmap_lock.owner == -1
    made = lab()
    made.touch((7, True, 0))
    made.env.run(made.kvm.vcpus[0].process)
    assert made.kvm.host.mmap_lock.owner == 0


@pytest.mark.parametrize(("there", "total"), [(True, "s2_map4k"), (False, "s2_fault4k_alloc")])
def test_the_parts_of_a_fault_add_up_to_what_was_measured(there: bool, total: str) -> None:
    made = lab()
    made.fill()
    made.drop(24 * KIB, 8 * KIB)
    if there:
        made.kvm.host.install(7, True)
    vcpu = made.touch((6, True, 1_000_000), (7, True, 0))  # the first one fetches the lines
    vcpu.fault.cached = 40
    made.env.run(vcpu.process)
    costs = made.kvm.costs
    first = rows(made, FAULT)[0]
    entered = first["entry"] + first["hold"] + costs.fault.enter_ns
    spent = vcpu.finished_ns - (entered + costs.touch_ns + 1_000_000) - 2 * costs.touch_ns
    unlock = costs.line.same_ns  # of mmu_lock: not waited for
    assert spent + unlock == pytest.approx(made.world.machine[f"{total}_total_ns"], abs=3)


def in_progress(made: Lab, *ranges: tuple[int, int]) -> None:
    for first, last in ranges:
        made.kvm.notifier._begin(first, last)


@pytest.mark.parametrize(
    ("kernel", "leaf", "gives_up"),
    [(TDP, 150, True), (TDP, 199, True), (TDP, 200, False), (TDP, 99, False), (TDP, 700, False)],
)
def test_a_fault_gives_up_for_its_own_page_only(kernel: str, leaf: int, gives_up: bool) -> None:
    """mmu_invalidate_retry_gfn(): [start, end) of what is in progress."""
    made = lab(kernel=kernel)
    in_progress(made, (100, 200))
    assert made.kvm.notifier.stale(leaf, 0) == gives_up


def test_the_envelope_covers_the_gap_and_grows_until_nothing_runs() -> None:
    """kvm_mmu_invalidate_range_add(): lowest start to highest end, reset by the next first one."""
    made = lab()
    notifier = made.kvm.notifier
    in_progress(made, (100, 200), (500, 600))
    assert notifier.stale(300, 0)
    notifier.in_progress -= 1  # one of them ends: which, it does not know
    assert notifier.stale(150, 0)
    assert notifier.stale(550, 0)
    notifier.in_progress -= 1
    in_progress(made, (500, 600))
    assert not notifier.stale(150, 0)


def test_a_sequence_that_moved_stales_every_page() -> None:
    made = lab()
    made.kvm.notifier.moved_ns = 1000
    assert made.kvm.notifier.stale(5, 999)
    assert not made.kvm.notifier.stale(5, 1000)


def test_arm64_gives_up_for_any_page() -> None:
    made = Lab()
    in_progress(made, (100, 200))
    assert made.kvm.notifier.stale(700, 0)


def test_a_fault_that_gives_up_does_not_join_the_line() -> None:
    """kvm_mmu_faultin_pfn() looks before and after GUP, without the lock."""
    made = lab()
    in_progress(made, (0, 10))

    def end() -> Iterator[Any]:
        yield made.env.timeout(100_000)
        made.kvm.notifier.in_progress = 0

    made.env.process(end())
    vcpu = made.touch((5, True, 0))
    made.env.run(vcpu.process)
    assert vcpu.fault.retries > 20
    assert len(rows(made, FAULT)) == 1, "the one that mapped"


def test_the_loser_of_a_race_for_a_table_frees_what_it_brought() -> None:
    """kvm_tdp_mmu_map(): tdp_mmu_free_sp() if the cmpxchg on the upper entry fails."""
    made = lab()
    for page in (1, 2):
        made.kvm.host.install(page, True)  # so that mmap_lock does not bring one before the other
        made.touch((page, True, 0))
    for vcpu in made.kvm.vcpus:
        made.env.run(vcpu.process)
    cached = sorted(vcpu.fault.cached for vcpu in made.kvm.vcpus)
    first = min(rows(made, FAULT), key=lambda row: row["entry"])
    beaten = [
        row
        for row in rows(made, FAULT)
        if first["entry"] < row["entry"] < first["entry"] + 3 * made.kvm.costs.fault.table_ns
    ]
    assert len(beaten) == 1
    assert cached == [40 - 3, 40 - 1]
    assert beaten[0]["hold"] == made.kvm.costs.fault.hold_ns + made.kvm.costs.free.free_ns
    assert len(rows(made, FAULT)) == 3


# -- unmap ------------------------------------------------------------------------------------


def test_the_walk_visits_entries_of_linked_tables_and_each_hole_once() -> None:
    """tdp_iter_next(): a hole is passed at the level at which it begins."""
    made = lab(4 * GIB, {"ipa_base": GIB})
    made.fill([0, 600, 3 * 262144])  # two tables of the first GiB, one of the fourth
    stage2 = made.kvm.stage2
    leaves, reached, spent = tree(stage2, 3, 0, made.kvm.leaves, 1, 1000)
    # Linked: 512 entries each. In the first and the fourth GiB 510 and 511 empty entries for 2 MiB,
    # in the root's child two for 1 GiB.
    assert int(reached.sum()) == 3 * 512
    assert len(leaves) == 3 * 512 + 510 + 511 + 2
    assert leaves[-1] == 3 * 262144 + 511 * 512
    # On the way: the root's entry, two of its child, three of theirs; each visited and entered.
    assert int(spent.sum()) == len(leaves) + 6 * (1 + 1000)


def test_unmapping_leaves_every_table_and_faults_find_them() -> None:
    made = lab(8 * MIB)
    made.fill()
    tables = made.kvm.stage2.all_tables()
    made.drop()
    assert not (made.kvm.stage2.leaf.entries & VALID).any()
    assert made.kvm.stage2.all_tables() == tables
    assert made.kvm.stage2.linked_tables == len(tables) == 4 + 2
    before = made.kvm.tables_allocated
    made.touch((5, True, 0), (1500, True, 0))
    made.env.run(made.kvm.vcpus[0].process)
    assert made.kvm.tables_allocated == before
    assert made.kvm.tables_freed == 0


def test_arm64_could_keep_its_tables_too() -> None:
    made = Lab(8 * MIB, kernel={"base": "linux-6.12", "set": {"unmap_tables": "keep"}})
    made.fill()
    made.drop()
    assert not (made.kvm.stage2.leaf.entries & VALID).any()
    assert made.kvm.stage2.linked_tables == 5


def test_the_hold_of_a_range_is_its_entries_and_one_flush() -> None:
    made = lab(4 * MIB)
    made.fill(range(100))
    made.drop(0, 2 * MIB)
    (start,), (end,) = rows(made, RANGE_START), rows(made, RANGE_END)
    steps = made.kvm.costs.unmap
    walk = 512 * steps.visit_ns + 3 * (steps.visit_ns + steps.descend_ns) + 100 * steps.leaf_ns
    flush = 0  # nobody to ask: no vCPU was started
    assert start["hold"] == steps.bookkeeping_ns + walk + flush
    assert end["hold"] == steps.bookkeeping_ns
    assert (made.world.remote_flush.flushes, made.world.remote_flush.interrupts) == (1, 0)


def test_an_empty_range_is_not_flushed() -> None:
    made = lab()
    made.drop()
    assert made.world.remote_flush.flushes == 0


def waiter(made: Lab, t_ns: int, hold_ns: int = 50, cpu: int = 5) -> list[int]:
    """Somebody who wants to read at ``t``; filled in with when he got in."""
    inside: list[int] = []

    def section(entry_ns: int) -> tuple[int, int]:
        inside.append(entry_ns)
        return hold_ns, entry_ns + hold_ns

    def steps() -> Iterator[Any]:
        yield made.env.timeout(t_ns)
        yield from acquired(made.kvm.mmu_lock.read(t_ns, cpu, AGE, section))

    made.env.process(steps())
    return inside


def test_a_walk_that_somebody_waits_for_lets_go_after_its_entry() -> None:
    """tdp_mmu_iter_cond_resched(): tested before each entry; zapped ones are flushed first."""
    made = lab(4 * MIB)
    made.fill()
    steps, costs = made.kvm.costs.unmap, made.kvm.costs
    entered = costs.ageing.call_ns + costs.line.transfer_ns  # nobody had the lock's line before
    begun = entered + steps.bookkeeping_ns + 3 * (steps.visit_ns + steps.descend_ns)
    each = steps.visit_ns + steps.leaf_ns
    inside = waiter(made, begun + 10 * each + 1)  # during the eleventh
    made.drop()
    first, second = rows(made, RANGE_START)
    assert first["entry"] == entered
    assert first["entry"] + first["hold"] == begun + 11 * each
    assert inside[0] > first["entry"] + first["hold"]
    assert second["entry"] > inside[0] + 50
    left = (1024 - 11) * each + steps.visit_ns + steps.descend_ns
    assert second["hold"] == left, "where it was, and only one more table to enter"
    assert made.world.remote_flush.flushes == 2


def test_a_walk_gets_past_one_entry_however_many_wait() -> None:
    """iter->yielded_gfn: forward progress before the next yield."""
    made = lab(64 * KIB)
    made.fill()
    for number in range(200):
        waiter(made, 50 + number, cpu=1 + number % 40)
    again: list[int] = []

    def crowd(cpu: int) -> Iterator[Any]:
        t_ns = 100
        yield made.env.timeout(100)
        while made.kvm.stage2.leaf.entries.any():
            grant = made.kvm.mmu_lock.write(t_ns, cpu, AGE, lambda at: (30, at + 30))
            t_ns = grant if isinstance(grant, int) else (yield grant)
            again.append(t_ns)
            if t_ns > made.env.now:
                yield made.env.timeout(t_ns - made.env.now)

    for cpu in (50, 51):
        made.env.process(crowd(cpu))
    made.drop()
    holds = [row["hold"] for row in rows(made, RANGE_START)]
    steps = made.kvm.costs.unmap
    assert len(holds) == 16, "an entry a hold"
    assert set(holds[1:]) == {steps.visit_ns + steps.leaf_ns}
    assert len(again) > 16


@pytest.mark.parametrize("how", ["not blockable", "not preemptible"])
def test_who_may_not_let_go_does_not(how: str) -> None:
    made = lab(4 * MIB, host={"preemption": "none" if how == "not preemptible" else "full"})
    made.fill()
    waiter(made, 5000)
    made.drop(blockable=how != "not blockable")
    assert len(rows(made, RANGE_START)) == 1
    assert made.world.remote_flush.flushes == 1


def test_a_walk_alone_costs_no_event_for_its_entries() -> None:
    made = lab(64 * MIB)
    made.fill()
    before = made.world.events
    made.drop()
    assert made.world.events - before < 12


# -- remote flush -----------------------------------------------------------------------------


def guests_running(made: Lab, count: int) -> None:
    """``count`` vCPUs that touch one page each for a long time."""
    for page in range(count):
        made.touch((page, True, 50_000_000), (page, True, 0))
    made.env.run(40_000)
    made.t_ns = 40_000


@pytest.mark.parametrize("running", [0, 1, 5])
def test_a_flush_costs_by_who_runs_and_interrupts_them(running: int) -> None:
    """kvm_make_all_cpus_request(): an IPI for each vCPU in guest mode, and a wait."""
    made = lab(4 * MIB)
    made.fill()
    guests_running(made, running)
    sleeper = made.touch((0, True, 0))  # done at once: its CPU is idle
    made.env.run(sleeper.process)
    made.t_ns = max(made.t_ns, sleeper.finished_ns)
    flush, machine = made.world.remote_flush, made.world.machine
    t_ns = int(made.env.now)
    done = flush.flush(made.kvm, t_ns)
    if running:
        cost = machine["remote_flush_base_ns"] + running * machine["remote_flush_per_cpu_ns"]
    else:
        cost = 1 * machine["atomic_uncontended_ns"]
    assert done - t_ns == cost
    assert flush.interrupts == running
    usual = made.kvm.costs.touch_ns * 2 + 50_000_000
    for vcpu in made.kvm.vcpus[:running]:
        made.env.run(vcpu.process)
        lost = machine["exit_roundtrip_ns"] + made.kvm.costs.tlb_refill_ns
        assert vcpu.finished_ns == usual + lost, "an exit and its one translation"


def test_who_is_out_of_the_guest_loses_translations_only() -> None:
    made = lab(4 * MIB)
    made.fill(range(1))
    vcpu = made.touch((0, True, 0), (9, True, 0))
    made.env.run(1500)  # in its fault
    assert made.world.cpus[0].state(1500) != 1
    made.world.remote_flush.flush(made.kvm, 1500)
    assert made.world.remote_flush.interrupts == 0
    made.env.run(vcpu.process)
    other = lab(4 * MIB)
    other.fill(range(1))
    undisturbed = other.touch((0, True, 0), (9, True, 0))
    other.env.run(undisturbed.process)
    refill_ns = made.kvm.costs.tlb_refill_ns
    assert vcpu.finished_ns == undisturbed.finished_ns + 2 * refill_ns, "of the new page as well"


# -- ageing -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kernel", "modes"),
    [(TDP, {1}), ("linux-6.15-x86", set()), (SHADOW, {1}), ("linux-6.15-x86-shadow", set())],
)
def test_who_ages_under_mmu_lock(kernel: str, modes: set[int]) -> None:
    made = lab(kernel=kernel)
    made.fill()
    report = made.age()
    assert (report.scanned, report.young, report.calls) == (1024, 1024, 1024)
    assert {row["mode"] for row in rows(made, AGE)} == modes
    assert made.young() == 0
    assert made.age().young == 0
    assert made.world.remote_flush.flushes == 0, "kvm_mmu_notifier_clear_young() flushes nothing"


@pytest.mark.parametrize(
    ("length", "misses"), [(1, 2), (2, 4), (14, 16), (15, 18), (28, 31), (29, 33)]
)
def test_a_chain_is_a_miss_for_its_head_each_entry_and_each_chunk_of_14(
    length: int, misses: int
) -> None:
    """struct pte_list_desc; a single entry sits in the head itself."""
    assert chain_ns(length, 1000, 1) == misses * 1000 + 2


def test_the_length_of_the_chain_is_what_an_ageing_call_costs() -> None:
    spent = {}
    for length in (1, 20):
        made = lab(kernel=SHADOW, guest={"rmap_chain": length})
        made.fill()
        made.age()
        spent[length] = {row["hold"] for row in rows(made, AGE)}
    miss, visit = made.kvm.costs.unmap.descend_ns, made.kvm.costs.unmap.visit_ns
    assert spent == {1: {2 * miss + 2 * visit}, 20: {(1 + 20 + 2) * miss + 2 * visit}}


def test_faults_take_the_lock_for_write_without_tdp() -> None:
    for kernel, mode in ((TDP, 0), (SHADOW, 1)):
        made = lab(kernel=kernel)
        made.touch((3, True, 0))
        made.env.run(made.kvm.vcpus[0].process)
        assert {row["mode"] for row in rows(made, FAULT)} == {mode}


def test_whoever_changes_a_chain_waits_for_its_bit() -> None:
    locks = RmapLocks()
    locks.hold(Held(np.array([10, 11, 15]), start_ns=1000, period_ns=100, busy_ns=60))
    assert locks.wait_ns(10, 1000) == 60
    assert locks.wait_ns(10, 1059) == 1
    assert locks.wait_ns(10, 1060) == 0
    assert locks.wait_ns(15, 1230) == 30
    assert locks.wait_ns(11, 1030) == 0, "another chain's turn"
    assert locks.wait_ns(12, 1230) == 0
    waits = locks.waits_of(np.array([9, 10, 11]), np.array([990, 1010, 1090]))
    assert waits.tolist() == [0, 50, 0]


def test_a_zap_waits_for_a_chain_that_is_being_aged() -> None:
    holds = {}
    for held in (False, True):
        made = lab(kernel="linux-6.15-x86-shadow")
        made.fill()
        if held:
            start = made.kvm.costs.ageing.call_ns + made.kvm.costs.line.transfer_ns
            start += made.kvm.costs.unmap.bookkeeping_ns
            made.kvm.rmap.hold(Held(np.array([7]), start - 5, 100, 90))
        made.drop(28 * KIB, 4 * KIB)
        holds[held] = rows(made, RANGE_START)[0]["hold"]
    assert holds[True] - holds[False] == 85


def test_a_fault_waits_for_the_chain_to_which_it_adds() -> None:
    holds = {}
    for until in (0, 50_000):
        made = lab(kernel="linux-6.15-x86-shadow")
        made.kvm.rmap.hold(Held(np.array([7]), 0, 100, until))
        made.touch((7, True, 0))
        made.env.run(made.kvm.vcpus[0].process)
        (row,) = rows(made, FAULT)
        holds[until] = row["hold"], row["entry"]
    (usual, entry), (longer, _) = holds.values()
    assert longer == usual + 50_000 - entry


def test_the_shadow_mmu_zaps_each_entry_of_a_chain() -> None:
    made = lab(kernel=SHADOW, guest={"rmap_chain": 3})
    made.fill(range(10))
    made.drop(0, 2 * MIB)
    steps = made.kvm.costs.unmap
    hold = rows(made, RANGE_START)[0]["hold"]
    assert hold == steps.bookkeeping_ns + 512 * steps.visit_ns + 10 * 3 * steps.leaf_ns


# -- the end of a VM --------------------------------------------------------------------------


def test_roots_are_zapped_pass_by_pass_under_the_lock() -> None:
    """tdp_mmu_zap_root(): 4 KiB, 2 MiB, 1 GiB, root; handle_removed_pt() walks what it removes."""
    made = lab(4 * MIB)
    made.fill(range(700))
    teardown = made.destroy()
    (row,) = rows(made, TEARDOWN)
    steps, costs = made.kvm.costs.unmap, made.kvm.costs
    enter = steps.visit_ns + steps.descend_ns
    removed = steps.descend_ns + 512 * steps.visit_ns + costs.free.call_rcu_ns
    # Two leaf tables, one table of 2 MiB entries, one of 1 GiB entries, the root above them.
    pages = 1024 * steps.visit_ns + 4 * enter + 700 * steps.leaf_ns
    tables = 2 * (steps.visit_ns + removed) + 2 * enter
    tables += steps.visit_ns + removed + enter
    tables += steps.visit_ns + removed
    assert row["hold"] == pages + tables
    assert row["mode"] == 1
    assert teardown.visits == 1024 + 2 + 1 + 1 + 4 * 512
    assert teardown.longest_ns == steps.visit_ns + removed + 2 * enter
    assert (made.kvm.tables_freed, made.kvm.stage2.linked_tables) == (4, 0)


def test_the_pass_over_pages_leaves_a_guest_of_blocks_as_it_is() -> None:
    made = lab(4 * MIB, {"mapping": 2 * MIB})
    made.fill()
    made.destroy()
    (row,) = rows(made, TEARDOWN)
    steps, costs = made.kvm.costs.unmap, made.kvm.costs
    enter = steps.visit_ns + steps.descend_ns
    removed = steps.descend_ns + 512 * steps.visit_ns + costs.free.call_rcu_ns
    blocks = 2 * (2 * steps.visit_ns + 2 * enter) + 2 * steps.leaf_ns
    assert row["hold"] == blocks + steps.visit_ns + removed + enter + steps.visit_ns + removed
    assert made.kvm.tables_freed == 2


def mixed(kernel: str) -> Lab:
    """A block, a table of 100 pages, a hole: 2 MiB each."""
    log = {"kind": "dirty_log", "guest": "vm"}
    made = lab(6 * MIB, {"mapping": 2 * MIB}, kernel=kernel, contenders={"log": log})
    made.kvm.host.install_huge(0, 512)
    made.kvm.tables_linked(made.kvm.stage2.map_block(0, WRITE), 0)
    made.fill(range(512, 612))
    return made


def test_each_pass_zaps_leaves_of_its_own_level() -> None:
    """tdp_mmu_zap_root(): what the pass over 4 KiB finds above it is left to the next one."""
    made = mixed(TDP)
    teardown = made.destroy()
    (row,) = rows(made, TEARDOWN)
    steps, costs = made.kvm.costs.unmap, made.kvm.costs
    enter = steps.visit_ns + steps.descend_ns
    removed = steps.descend_ns + 512 * steps.visit_ns + costs.free.call_rcu_ns
    pages = (1 + 512 + 1) * steps.visit_ns + 3 * enter + 100 * steps.leaf_ns
    blocks = 3 * steps.visit_ns + 2 * enter + steps.leaf_ns + removed
    above = steps.visit_ns + removed + enter + steps.visit_ns + removed
    assert row["hold"] == pages + blocks + above
    assert teardown.visits == 514 + 3 + 1 + 1 + 3 * 512
    assert made.kvm.tables_freed == 3


def test_a_block_is_there_until_the_pass_over_its_level(monkeypatch: pytest.MonkeyPatch) -> None:
    made, seen, zap = mixed(TDP), [], ZapRoots._zap

    def zapped(end: ZapRoots, *args: Any) -> None:
        zap(end, *args)
        entries = made.kvm.stage2.leaf.entries
        seen.append((bool(entries[0]), bool(entries[512])))

    monkeypatch.setattr(ZapRoots, "_zap", zapped)
    made.destroy()
    assert seen == [(True, False), (False, False), (False, False), (False, False)]


def test_a_shadow_page_goes_with_the_blocks_that_it_maps() -> None:
    """kvm_mmu_page_unlink_children(): one of 100 pages, one of a block, one above them."""
    made = mixed(SHADOW)
    made.destroy()
    steps, free_ns = made.kvm.costs.unmap, made.kvm.costs.free.free_ns
    (row,) = rows(made, TEARDOWN)
    page = steps.descend_ns + 512 * steps.visit_ns
    assert row["hold"] == 3 * page + (100 + 1) * steps.leaf_ns + 3 * free_ns
    levels = made.kvm.stage2.levels.values()
    assert not any(level.entries.any() or level.counts.any() for level in levels)
    assert made.kvm.tables_freed == 3


def test_every_table_and_the_root_have_a_callback_and_the_vm_waits_for_all() -> None:
    """kvm_mmu_uninit_tdp_mmu(): rcu_barrier()."""
    made = lab(8 * MIB)
    made.fill()
    made.destroy()
    batches = made.world.recorder.batches
    assert sum(batch[2] for batch in batches) == 6 + 1 + 1, "tables, root, the barrier's own"
    assert made.world.rcu.idle
    assert int(made.env.now) >= max(t_ns + spent for _, t_ns, _, spent in batches)
    made.kvm.oracle.finished(int(made.env.now))
    assert not made.kvm.oracle.violations
    assert made.world.memory.timeline(int(made.env.now))["table_bytes"][-1] == 0


def test_zapping_roots_lets_waiters_in() -> None:
    made = lab(16 * MIB)
    made.fill()
    inside = waiter(made, 20_000)
    made.destroy()
    first, second = rows(made, TEARDOWN)
    assert first["entry"] + first["hold"] < inside[0] < second["entry"]
    assert first["entry"] + first["hold"] - 20_000 < 1000, "at the end of its entry"


def test_shadow_pages_are_freed_under_the_lock_after_one_flush() -> None:
    """kvm_mmu_zap_all(), kvm_mmu_commit_zap_page()."""
    made = lab(4 * MIB, kernel=SHADOW)
    made.fill()
    made.destroy()
    steps, free_ns = made.kvm.costs.unmap, made.kvm.costs.free.free_ns
    (row,) = rows(made, TEARDOWN)
    page = steps.descend_ns + 512 * steps.visit_ns
    assert row["hold"] == 4 * page + 1024 * steps.leaf_ns + 4 * free_ns
    assert not made.world.recorder.batches
    assert made.world.remote_flush.flushes == 1
    assert made.kvm.tables_freed == 4


@pytest.mark.parametrize("kernel", ["linux-6.12-x86", SHADOW])
def test_two_ends_at_once_zap_each_page_once(kernel: str) -> None:
    """kvm_mmu_zap_all() starts again after it let go of the lock; each end frees its own list."""
    access = {"pattern": "populate"}
    teardown = {"order": "both", "at": 20_000_000}
    built = world(
        machine=ICELAKE,
        kernel=kernel,
        guest={"memory": 16 * MIB, "access": access, "teardown": teardown},
    )
    record = built.run()
    (kvm,) = built.kvms
    assert not record.violations
    assert kvm.tables_freed == kvm.tables_allocated >= 8
    assert len(built.teardowns) == 2


@pytest.mark.parametrize("order", ["close_vm", "process_exit"])
@pytest.mark.parametrize("kernel", ["linux-6.15-x86", "linux-6.15-x86-shadow"])
def test_ageing_without_mmu_lock_survives_the_end(kernel: str, order: str) -> None:
    for at in range(220_000, 250_000, 9_100):
        built = world(
            machine=ICELAKE,
            kernel=kernel,
            guest={
                "memory": 256 * KIB,
                "access": {"pattern": "populate", "repeat": 100_000, "think": 300},
                "teardown": {"order": order, "at": at},
            },
            ageing={"start": 200_000},
        )
        record = built.run()
        assert all(teardown.done for teardown in built.teardowns)
        assert not record.violations


def test_inline_frees_by_a_zapped_root_are_found() -> None:
    """The negative control: the TDP MMU's tables are safe because of RCU, and nothing else.

    With slow walkers, still inside when the pass over the pages is done.
    """
    found: set[str] = set()
    for at in range(600_000, 640_000, 3_900):
        built = world(
            machine={"base": ICELAKE, "set": {"age_walk_ns": 500}},
            kernel={"base": "linux-6.15-x86", "set": {"table_free": "inline"}},
            guest={
                "memory": 256 * KIB,
                "access": {"pattern": "populate", "repeat": 100_000, "think": 300},
                "teardown": {"order": "close_vm", "at": at},
            },
            ageing={"start": 500_000},
        )
        found |= {violation["kind"] for violation in built.run().violations}
    assert found
    assert found <= {"use_after_free", "root_freed_under_walker"}


# -- rcu_barrier() ----------------------------------------------------------------------------


def test_the_barrier_goes_behind_the_last_callback_in_its_segment() -> None:
    """rcu_segcblist_entrain(): it waits for no grace period of its own."""
    callbacks = SegmentedCallbackList()
    assert not callbacks.entrain(5, lambda t: 0), "a CPU without callbacks is left out"
    callbacks.enqueue(10, lambda t: 0)
    assert callbacks.entrain(20, lambda t: 0)
    callbacks.see(30)
    assert callbacks.unnumbered == 2
    callbacks.accelerate(1)
    assert callbacks.entrain(40, lambda t: 0)
    assert (callbacks.wait, callbacks.unnumbered) == (3, 0)
    callbacks.advance(1)
    assert callbacks.entrain(50, lambda t: 0)
    assert callbacks.ready == 4


def test_the_barrier_waits_for_each_cpu_that_has_callbacks() -> None:
    made = lab()
    rcu, invoked = made.world.rcu, []
    for cpu in (3, 9):
        made.world.cpus[cpu].enter_kernel(0)
        rcu.call_rcu(0, cpu, lambda t: invoked.append(t) or 5)
    made.env.run(1)
    waited = rcu.barrier(1)
    made.env.run(waited)
    assert len(invoked) == 2
    assert int(made.env.now) >= max(invoked)
    at = int(made.env.now)
    made.env.run(rcu.barrier(at))
    assert int(made.env.now) == at, "nothing to wait for"


# -- the count of mapped pages ----------------------------------------------------------------


def counted_holds(made: Lab, *touches: tuple[int, bool, int]) -> list[int]:
    """Holds of faults of one vCPU, beyond the work, tables set aside."""
    made.env.run(made.touch(*touches).process)
    return [row["hold"] - made.kvm.costs.fault.hold_ns for row in rows(made, FAULT)]


def test_a_mapped_leaf_is_counted_in_a_word_of_the_vm() -> None:
    """kvm_update_page_stats(): one atomic; the first fetches the line, later ones find it there."""
    made = lab()
    made.fill([0])  # so that the tables are there
    for page in (1, 2, 3):
        made.kvm.host.install(page, True)
    line = made.kvm.costs.line
    holds = counted_holds(made, *((page, True, 1000) for page in (1, 2, 3)))
    assert holds == [line.transfer_ns, line.same_ns, line.same_ns]


def test_faults_of_two_vcpus_take_the_count_from_one_another() -> None:
    made = lab()
    made.fill([0])
    for page in (1, 2, 3, 4):
        made.kvm.host.install(page, True)
    one, other = (
        made.touch((1, True, 9000), (2, True, 0)),
        made.touch((3, True, 9000), (4, True, 0)),
    )
    made.env.run(one.process)
    made.env.run(other.process)
    line, work = made.kvm.costs.line, made.kvm.costs.fault.hold_ns
    assert [row["hold"] - work for row in rows(made, FAULT)] == [line.transfer_ns] * 4


def test_a_fault_that_maps_nothing_counts_nothing() -> None:
    made = lab()
    made.fill([0])
    made.kvm.host.install(1, True)
    first, second = made.touch((1, True, 0)), made.touch((1, True, 0))
    made.env.run(first.process)
    made.env.run(second.process)
    line, work = made.kvm.costs.line, made.kvm.costs.fault.hold_ns
    assert [row["hold"] - work for row in rows(made, FAULT)] == [line.transfer_ns, 0]


def test_under_logging_a_leaf_is_counted_too() -> None:
    made = lab(contenders={"l": {"kind": "dirty_log", "guest": "vm"}})
    made.fill([0])
    made.kvm.host.install(1, True)
    made.kvm.host.install(2, True)
    holds = counted_holds(made, (1, True, 1000), (2, True, 0))
    assert holds == [made.kvm.costs.line.transfer_ns, made.kvm.costs.line.same_ns]


def test_arm64_has_no_such_count() -> None:
    assert Lab().kvm.pages_stat is None
