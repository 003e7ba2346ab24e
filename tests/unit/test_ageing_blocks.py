"""Ageing and access flags where one entry maps a block: one call, one flag, one fault.

Source: mm/page_idle.c and mm/rmap.c (``pmdp_clear_young_notify``, ``pmdp_clear_flush_young_notify``
over the whole PMD), arch/arm64/kvm/mmu.c (``handle_access_fault``), v6.12.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from lab import Lab, account

from simkvm.kernel.cmpxchg_race import Loads
from simkvm.kernel.host_change import depart
from simkvm.kernel.host_memory import IDLE
from simkvm.kernel.stage2 import AF, BLOCK, VALID, WRITE, TableId
from simkvm.units import KIB, MIB

SIZED = {"log": {"kind": "dirty_log", "guest": "vm"}}
THINK = 1000


def lab(memory: int = 4 * MIB, hw_af: bool = True, kernel: Any = "linux-6.12", **guest: Any) -> Lab:
    """A guest that is mapped by blocks and may have pages as well, nothing of it used."""
    machine = {"base": "graviton3-64c", "set": {"hw_af": hw_af, "tlb_l2_entries": 16}}
    guest = {"mapping": 2 * MIB, "mapped": True, "vcpus": 2, **guest}
    made = Lab(memory, guest, machine=machine, kernel=kernel, contenders=SIZED)
    made.kvm.stage2.leaf.entries[:] &= np.uint8(~AF & 0xFF)
    made.kvm.host.state[:] &= np.uint8(3)
    return made


# -- mapped from the beginning --------------------------------------------------------------------


def test_a_guest_on_huge_pages_begins_with_blocks() -> None:
    kvm = lab().kvm
    assert (kvm.stage2.leaf.entries == VALID | WRITE | BLOCK).all()
    assert kvm.stage2.levels[2].counts.tolist() == [2]
    assert kvm.stage2.levels[3].counts.tolist() == [0, 0]
    assert kvm.stage2.all_tables() == [TableId(2, 0, 1)]
    assert kvm.tables_allocated == 1
    assert kvm.host.huge.all()
    assert all(kvm.maps_blocks(leaf) for leaf in (0, 1023))


def test_blocks_that_would_cross_memslots_are_pages() -> None:
    """fault_supports_stage2_huge_mapping()."""
    khugepaged = {"thp": {"kind": "khugepaged", "guest": "vm"}}
    made = Lab(6 * MIB, {"memslots": 2}, contenders=khugepaged)
    made.kvm.host.install_huge(0, 1536)
    assert [made.kvm.maps_blocks(leaf) for leaf in (0, 600, 800, 1100)] == [
        True,
        False,
        False,
        True,
    ]


# -- one call -------------------------------------------------------------------------------------


def test_a_huge_page_that_is_idle_is_one_call() -> None:
    made = lab()
    first = made.age("page_idle")
    assert (first.scanned, first.calls, first.idle) == (2, 2, 0)
    holds = [row["hold"] for row in made.lock_rows("age")]
    assert holds == [made.kvm.costs.ageing.walk_ns] * 2
    assert (made.kvm.host.state & IDLE).all()
    made.kvm.stage2.leaf.entries[700] |= np.uint8(AF)
    second = made.age("page_idle")
    assert (second.calls, second.idle, second.young) == (2 + 1, 1, 1)
    assert made.young() == 0


def test_eviction_asks_for_a_huge_page_with_a_flush_and_not_around() -> None:
    made = lab()
    made.kvm.stage2.leaf.entries[700] |= np.uint8(AF)
    report = made.age("folio_referenced")
    assert (report.scanned, report.calls, report.young) == (2, 2, 1)
    assert made.broadcasts() == 1
    assert made.young() == 0


@pytest.mark.parametrize("flush", ["none", "per_call"])
@pytest.mark.parametrize("lock", ["write", "read"])
def test_mglru_asks_once_and_flushes_if_its_kernel_does(lock: str, flush: str) -> None:
    made = lab(kernel={"base": "linux-6.12", "set": {"ageing_lock": lock, "ageing_flush": flush}})
    made.kvm.stage2.leaf.entries[700] |= np.uint8(AF)
    report = made.age()
    assert (report.scanned, report.calls, report.young) == (2, 2, 1)
    assert made.kvm.young_calls.locked == 2
    assert made.acquisitions() == {("age", lock): 2}
    assert made.broadcasts() == (flush == "per_call")
    assert made.young() == 0


def test_a_huge_page_that_stage_2_maps_by_pages_is_walked_page_by_page() -> None:
    made = lab(memory=2 * MIB)
    made.kvm.stage2.fill_block(0)
    made.age("page_idle")
    (row,) = account(made.kvm.mmu_lock.rows)
    costs = made.kvm.costs.ageing
    assert row["hold"] == costs.walk_ns + 511 * costs.visit_ns
    assert made.young() == 0


# -- one flag -------------------------------------------------------------------------------------


def test_one_access_fault_sets_the_flag_of_the_whole_block() -> None:
    made = lab(hw_af=False)
    vcpu = made.touch(*((page, True, THINK) for page in (3, 4, 500, 600, 5)))
    made.env.run(vcpu.process)
    assert (vcpu.access_faults, vcpu.fault.faults, vcpu.touches) == (2, 0, 5)
    assert made.young() == 1024


def test_whoever_was_about_to_fault_in_the_same_block_does_not() -> None:
    made = lab(hw_af=False)
    first = made.touch((3, True, 0))
    second = made.touch((800, True, 0), (400, True, 0))
    for vcpu in (first, second):
        made.env.run(vcpu.process)
    assert (first.access_faults, second.access_faults) == (1, 1)


def test_a_clear_of_the_block_is_felt_at_each_of_its_pages() -> None:
    made = lab(hw_af=False)
    vcpu = made.touch((3, True, 50 * THINK), (400, True, THINK), (3, True, THINK))
    made.env.run(20 * THINK)
    assert made.young() == 512
    made.age("page_idle")
    assert made.young() == 0
    made.env.run(vcpu.process)
    assert (vcpu.access_faults, vcpu.touches) == (2, 3)


def test_a_write_whose_flag_went_takes_two_faults() -> None:
    """kvm_pgtable_stage2_relax_perms() changes rights, not the flag."""
    made = lab(hw_af=False)
    made.kvm.stage2.write_protect(0, 512)
    vcpu = made.touch((3, True, THINK))
    made.env.run(vcpu.process)
    assert (vcpu.access_faults, vcpu.fault.faults, vcpu.touches) == (1, 1, 1)


# -- compare-and-swaps ----------------------------------------------------------------------------


def raced(change: str) -> int:
    """Swaps that fail if a block is loaded just before something else changes it."""
    made = lab(kernel="linux-7.1-lockless")
    kvm = made.kvm
    kvm.stage2.leaf.entries[:512] |= np.uint8(AF)
    assert kvm.races is not None
    if change == "unmap":
        kvm.unmap_chunk(0, 1000, 5, 6)
    elif change == "protect":
        kvm.leaves_changed(kvm.leaves_change(5, 6, WRITE), 1000, 2)
    else:
        kvm.leaf_changes(5, 1001)
    (stored, times) = kvm.races._stores[0]
    assert stored.tolist() == [0], "a block is one entry"
    batch = Loads(np.array([0]), lambda: times - 1, int(times[0]) - 1, int(times[0]) + 1)
    kvm.races.loaded(batch, np.array([True]))
    return kvm.races.failed


@pytest.mark.parametrize("change", ["unmap", "protect", "fault"])
def test_a_block_is_one_swap_that_fails(change: str) -> None:
    assert raced(change) == 1


def test_on_x86_the_flag_is_cleared_by_an_and_that_cannot_fail() -> None:
    made = Lab(2 * MIB, machine="x86-icelake-64c", kernel="linux-6.15-x86")
    assert made.kvm.kernel["ageing_lock"] == "none"
    assert made.kvm.races is None


def test_a_failed_swap_leaves_the_flag_of_the_block() -> None:
    kvm = lab(kernel="linux-7.1-lockless").kvm
    kvm.stage2.leaf.entries[7] |= np.uint8(AF)
    assert kvm.races is not None
    batch = Loads(np.array([0]), lambda: np.array([100]), 100, 101)
    kvm.races.stored(np.array([0]), np.array([101]))
    assert kvm.age_block_lockless(batch, 100).tolist() == [0]
    assert kvm.stage2.leaf.entries[7] & AF
    later = Loads(np.array([0]), lambda: np.array([9000]), 9000, 9001)
    assert kvm.age_block_lockless(later, 9000).tolist() == [7]
    assert not kvm.stage2.leaf.entries[7] & AF


# -- x86's fast page fault ------------------------------------------------------------------------


def test_the_fast_path_leaves_the_zero_page_alone() -> None:
    """is_mmu_writable_spte(): what the host may not write is none of fast_page_fault()'s."""
    log = {"log": {"kind": "dirty_log", "guest": "vm"}}
    made = Lab(256 * KIB, machine="x86-icelake-64c", kernel="linux-6.12-x86", contenders=log)
    assert made.kvm.kernel["permission_fault_lock"] == "none"
    vcpu = made.touch((3, False, THINK), (3, True, THINK))
    made.env.run(vcpu.process)
    assert made.kvm.host.fast[3] & 2, "the zero page was copied"
    assert made.kvm.stage2.leaf.fast[3] & WRITE


# -- a part of a huge page ------------------------------------------------------------------------


def test_a_huge_page_of_which_a_part_goes_is_invalidated_as_a_whole_first() -> None:
    """__split_huge_pmd(): a range of its own, start and end, inside the one that asked for it."""
    made = lab()
    made.drop(first=64 * KIB, size=16 * KIB)
    assert made.kvm.host.huge.tolist() == [False, True]
    assert made.acquisitions() == {("range_start", "write"): 2, ("range_end", "write"): 2}
    assert made.kvm.notifier.in_progress == 0
    made.drop(first=2 * MIB, size=2 * MIB)
    assert made.acquisitions() == {("range_start", "write"): 1, ("range_end", "write"): 1}


def test_a_fault_beside_the_range_may_not_keep_a_block_over_it() -> None:
    """x86 retries by range: between the outer start and the split a block can be mapped again."""
    made = Lab(
        2 * MIB,
        {"mapping": 2 * MIB, "mapped": True},
        machine="x86-icelake-64c",
        kernel="linux-6.12-x86",
        contenders=SIZED,
    )
    kvm = made.kvm
    split_huge = kvm.notifier.split_huge

    def mapped_meanwhile(*args: Any) -> Any:
        kvm.notifier.split_huge = split_huge  # type: ignore[method-assign]
        kvm.stage2.map_block(0, WRITE)
        return split_huge(*args)

    kvm.notifier.split_huge = mapped_meanwhile  # type: ignore[method-assign]
    made.drop(first=64 * KIB, size=16 * KIB)
    assert not (kvm.stage2.leaf.entries & VALID).any()


def test_a_huge_page_that_is_on_its_way_takes_no_time_to_zap() -> None:
    host = lab().kvm.host
    assert depart(host, 0, 512) == 1
    assert host.zap(0, 1024) == 1, "the one that is there"
    assert host.present == [0, 0]
