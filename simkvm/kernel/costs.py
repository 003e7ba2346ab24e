"""What each step of the simulated kernel costs on one machine, in whole nanoseconds.

Everything comes from the machine's table (``simkvm machines NAME``); a cost that is measured only
as a total is split here, once, so that its parts add up to that total on an idle machine.
"""

from __future__ import annotations

from dataclasses import dataclass

from simkvm.kernel.cacheline import LineCosts
from simkvm.kernel.mmap_lock import LOCK, UNLOCK
from simkvm.scenario.machine import Machine


@dataclass(frozen=True)
class FaultCosts:
    """The path of one stage-2 fault around the walk (arch/arm64/kvm/mmu.c, ``user_mem_abort``)."""

    slot_miss_ns: int  #: searching the tree if the memslot is not the one that the vCPU used last
    exit_ns: int  #: exit, SRCU and memslot look-up: up to taking ``mmap_lock``
    vma_ns: int  #: look-up of the VMA under ``mmap_lock``
    gup_hit_ns: int  #: resolving a host page that is there
    relax_hit_ns: int  #: the same for a fault that only changes rights
    gup_zero_ns: int  #: installing the zero page for a read
    gup_alloc_ns: int  #: allocating, clearing and installing a host page (or block)
    gup_swap_ns: int  #: allocating and installing a page that is read instead of cleared
    gup_copy_ns: int  #: replacing the zero page for a write
    gup_cow_ns: int  #: replacing any other shared page for a write: its content has to be copied
    ptl_ns: int  #: how long that holds the host's page-table lock, at its end
    hold_ns: int  #: the walk and the map, under ``mmu_lock``
    relax_hold_ns: int  #: the walk and the change of rights: nothing to clean
    table_ns: int  #: each table installed on the way
    retry_ns: int  #: finding, under the lock, that an invalidation runs or ran
    enter_ns: int  #: from the unlock to the guest's next instruction
    user_ns: int  #: what a visit to user space adds to an exit
    object_ns: int  #: allocating and clearing one page for the memory cache


@dataclass(frozen=True)
class AccessFaultCosts:
    """An access-flag fault (arch/arm64/kvm/mmu.c, ``handle_access_fault``)."""

    exit_ns: int  #: exit, SRCU and memslot look-up: up to ``mmu_lock``
    hold_ns: int  #: one walk that sets the flag
    enter_ns: int  #: from the unlock to the guest's next instruction
    lock_ns: int  #: what taking the lock costs a CPU that had it last


@dataclass(frozen=True)
class AgeingCosts:
    """The page-table walk of MGLRU (mm/vmscan.c) and the notifier call it makes."""

    scan_ns: int  #: one host PTE
    call_ns: int  #: one notifier call up to the table walk: SRCU twice, memslot look-up
    walk_ns: int  #: one walk from the root to one leaf
    visit_ns: int  #: each further leaf of the same table
    promote_ns: int  #: moving one folio to the youngest generation
    folio_move_ns: int  #: moving one folio up when the oldest generation is emptied
    resched_ns: int  #: a ``cond_resched`` that does not switch
    lru_lock_ns: int  #: taking and releasing the lruvec lock
    rmap_ns: int  #: finding the one mapping of a folio and locking its table
    cmpxchg_ns: int  #: between the load and the compare-and-swap of a walk without lock


@dataclass(frozen=True)
class UnmapStepCosts:
    """Stage-2 and host side of an invalidation."""

    visit_ns: int
    descend_ns: int
    table_visit_ns: int
    leaf_ns: int
    host_page_ns: int  #: removing and freeing one host mapping between range start and end
    bookkeeping_ns: int  #: range start and end: counters and the interval, under the lock


@dataclass(frozen=True)
class FreeCosts:
    """Freeing a table page: now or by RCU."""

    free_ns: int
    call_rcu_ns: int
    callback_ns: int  #: freeing one page in a callback, its dispatch apart
    visit_ns: int  #: one entry of a table that is walked again
    count_test_ns: int  #: reading the page's count first


@dataclass(frozen=True)
class TakerCosts:
    """What others do with host pages between range start and end, and before."""

    pte_ns: int  #: changing one host entry in place
    ksm_scan_ns: int  #: one page: checksum and search
    migrate_ns: int  #: one leaf, its unmapping apart
    migrate_huge_ns: int  #: one huge page that stands for a whole table of leaves
    isolate_ns: int  #: what compaction adds for a page: finding it, and a place for it


@dataclass(frozen=True)
class ReclaimCosts:
    """Eviction of one folio, apart from asking, unmapping and writing (mm/vmscan.c)."""

    isolate_ns: int  #: taking it off its list, or sorting it, under the lruvec's lock
    scan_ns: int  #: looking at it, its lock, and putting it back if it stays
    free_ns: int  #: taking it out of the swap cache, and freeing its page


@dataclass(frozen=True)
class Costs:
    """All costs of one guest's geometry on one machine."""

    line: LineCosts
    handoff_ns: int
    next_ns: int
    fault: FaultCosts
    access_fault: AccessFaultCosts
    ageing: AgeingCosts
    unmap: UnmapStepCosts
    free: FreeCosts
    takers: TakerCosts
    reclaim: ReclaimCosts
    tlbi_ns: int  #: broadcasts of arm64; 0 where there are none
    tlbi_all_ns: int
    tlbi_service_ns: int
    split_entry_ns: int
    copy_page_ns: int
    touch_ns: int
    tlb_entries: int
    tlb_refill_ns: int
    wakeup_ns: int
    switch_ns: int
    kick_ns: int  #: an exit of a vCPU for an interrupt, and its entry

    @classmethod
    def of(cls, machine: Machine, leaf_bytes: int, page_bytes: int, memslots: int = 1) -> Costs:
        """Costs for leaves of ``leaf_bytes`` in a guest whose host pages have ``page_bytes``.

        Memslots hang in two balanced trees, by address of the host and of the guest
        (``struct kvm_memslots``, v6.12): the machine's look-up is one of a single slot, and each
        further level costs as much again.
        """
        deeper_ns = (memslots.bit_length() - 1) * machine["memslot_lookup_ns"]
        line = LineCosts.of(machine)
        return cls(
            line=line,
            handoff_ns=round(machine["lock_handoff_ns"]),
            next_ns=round(machine["c2c_same_ns"]),
            fault=_fault(machine, line, leaf_bytes, deeper_ns),
            access_fault=_access_fault(machine, line),
            ageing=_ageing(machine, deeper_ns),
            unmap=_unmap(machine, leaf_bytes),
            free=_free(machine),
            takers=_takers(machine, leaf_bytes, page_bytes),
            reclaim=_reclaim(machine),
            split_entry_ns=round(machine["split_entry_ns"]),
            copy_page_ns=round(machine["copy_4k_ns"] * page_bytes / 4096),
            **_tlbi(machine),
            touch_ns=round(machine["page_touch_ns"]),
            tlb_entries=round(machine["tlb_l2_entries"]),
            tlb_refill_ns=round(machine["tlb_miss_nested_warm_ns"]),
            wakeup_ns=round(machine["wakeup_ns"]),
            switch_ns=round(machine["context_switch_ns"]),
            kick_ns=round(machine["exit_roundtrip_ns"]),
        )


def _tlbi(machine: Machine) -> dict[str, int]:
    names = {
        "tlbi_ns": "tlbi_s2_page_ns",
        "tlbi_all_ns": "tlbi_vmid_all_ns",
        "tlbi_service_ns": "tlbi_global_service_ns",
    }
    if machine.arch == "x86":
        return dict.fromkeys(names, 0)
    return {cost: round(machine[name]) for cost, name in names.items()}


def _fault(machine: Machine, line: LineCosts, leaf_bytes: int, deeper_ns: float) -> FaultCosts:
    half_exit = machine["exit_roundtrip_ns"] / 2
    around = machine["memslot_lookup_ns"] + machine["srcu_ns"]
    vma = machine["mmap_lock_vma_lookup_ns"]
    atomics = LOCK + UNLOCK + 2  # mmap_lock around the VMA's look-up, and mmu_lock
    lock_of_gup, header = LOCK * line.same_ns, 0.0  # GUP's slow path takes mmap_lock
    if machine.arch == "x86":  # fast GUP looks up no VMA
        vma, atomics = 0, 3  # mmu_lock, and the count of mapped pages
        header = machine["slab_alloc_or_free_ns"]  # each table has a struct kvm_mmu_page
    clean = _clean(machine, leaf_bytes)
    hold = machine["fault_hold_ns"]
    parts = 2 * half_exit + around + vma + hold + machine["dcache_clean_4k_ns"]
    parts += atomics * line.same_ns
    # A machine whose parts are dearer than their sum has nothing left: no step takes less than 0.
    gup_hit = max(0.0, machine["s2_map4k_total_ns"] - parts)
    alloc = machine["s2_fault4k_alloc_total_ns"] - machine["s2_map4k_total_ns"] - lock_of_gup
    clear = machine["zero_4k_ns"] + machine["page_alloc_free_ns"]
    alloc = max(0.0, alloc)
    zero_page = max(0.0, alloc - clear)
    if leaf_bytes >= 2 << 20:
        block = machine["s2_fault2m_total_ns"] - parts - machine["dcache_clean_2m_ns"]
        alloc = max(0.0, block) * (leaf_bytes / (2 << 20))
    elif leaf_bytes > 4096:
        alloc += machine["zero_4k_ns"] * (leaf_bytes / 4096 - 1)
    return FaultCosts(
        slot_miss_ns=round(deeper_ns),
        exit_ns=round(half_exit + around),
        vma_ns=round(vma),
        gup_hit_ns=round(gup_hit),
        relax_hit_ns=round(
            max(
                0,
                gup_hit
                + machine["dcache_clean_4k_ns"]
                + machine["perm_fault_total_ns"]
                - machine["s2_map4k_total_ns"],
            )
        ),
        gup_zero_ns=round(gup_hit + zero_page),
        gup_alloc_ns=round(gup_hit + alloc),
        gup_swap_ns=round(gup_hit + max(0.0, alloc - machine["zero_4k_ns"] * leaf_bytes / 4096)),
        gup_copy_ns=round(gup_hit + alloc),
        gup_cow_ns=round(max(gup_hit, gup_hit + alloc + _copied_not_cleared(machine, leaf_bytes))),
        ptl_ns=round(machine["host_ptl_hold_ns"]),
        hold_ns=round(hold + clean),
        relax_hold_ns=round(hold),
        table_ns=round(machine["stage2_cmpxchg_ns"] + machine["stage2_descend_ns"]),
        retry_ns=round(machine["retry_check_ns"]),
        enter_ns=round(half_exit),
        user_ns=round(machine["exit_to_user_ns"] - machine["exit_roundtrip_ns"]),
        object_ns=round(machine["zero_4k_ns"] + machine["page_alloc_free_ns"] + header),
    )


def _copied_not_cleared(machine: Machine, leaf_bytes: int) -> float:
    """How much dearer a copy of a leaf is than clearing it."""
    return (machine["copy_4k_ns"] - machine["zero_4k_ns"]) * leaf_bytes / 4096


def _takers(machine: Machine, leaf_bytes: int, page_bytes: int) -> TakerCosts:
    migrate = machine["migrate_4k_ns"] + (leaf_bytes / 4096 - 1) * machine["copy_4k_ns"]
    if leaf_bytes >= 2 << 20:
        migrate = machine["migrate_2m_ns"] * leaf_bytes / (2 << 20)
    return TakerCosts(
        pte_ns=round(machine["pte_scan_young_ns"]),
        ksm_scan_ns=round(machine["ksm_scan_ns"]),
        migrate_ns=round(migrate - machine["unmap_s1_4k_ns"]),
        migrate_huge_ns=round(
            machine["migrate_2m_ns"] * (page_bytes * page_bytes // 8) / (2 << 20)
        ),
        isolate_ns=round(machine["compaction_ns"] - machine["migrate_4k_ns"]),
    )


def _reclaim(machine: Machine) -> ReclaimCosts:
    scan = machine["folio_scan_ns"]
    return ReclaimCosts(
        isolate_ns=round(machine["folio_move_ns"]),
        scan_ns=round(scan),
        free_ns=round(max(0.0, machine["kswapd_clean_page_ns"] - scan - machine["folio_move_ns"])),
    )


def _access_fault(machine: Machine, line: LineCosts) -> AccessFaultCosts:
    enter = round(machine["exit_roundtrip_ns"] / 2)
    before = machine["exit_roundtrip_ns"] / 2 + machine["memslot_lookup_ns"] + machine["srcu_ns"]
    hold = round(machine["af_fault_total_ns"]) - round(before) - enter - line.same_ns
    # Without an exit to pay for, the walk is the least there is.
    least = round(machine["age_walk_ns"] + machine["stage2_cmpxchg_ns"])
    return AccessFaultCosts(round(before), max(hold, least), enter, line.same_ns)


def _ageing(machine: Machine, deeper_ns: float) -> AgeingCosts:
    return AgeingCosts(
        scan_ns=round(machine["pte_scan_old_ns"]),
        call_ns=round(
            machine["notifier_call_ns"]
            + machine["srcu_ns"]
            + machine["memslot_lookup_ns"]
            + deeper_ns
        ),
        walk_ns=round(machine["age_walk_ns"]),
        visit_ns=round(machine["stage2_leaf_visit_ns"]),
        promote_ns=round(machine["lru_promote_ns"]),
        folio_move_ns=round(machine["folio_move_ns"]),
        resched_ns=round(machine["cond_resched_ns"]),
        lru_lock_ns=round(2 * machine["atomic_uncontended_ns"]),
        rmap_ns=round(machine["rmap_check_single_ns"]),
        cmpxchg_ns=round(machine["stage2_cmpxchg_ns"]),
    )


def _clean(machine: Machine, leaf_bytes: int) -> float:
    """Cache maintenance on what a leaf maps: none where stage 2 forces write-back."""
    if leaf_bytes >= 2 << 20:
        return machine["dcache_clean_2m_ns"] * leaf_bytes / (2 << 20)
    return machine["dcache_clean_4k_ns"] * leaf_bytes / 4096


def _unmap(machine: Machine, leaf_bytes: int) -> UnmapStepCosts:
    # The page whose removal was measured was cleaned; so is all of a larger leaf.
    leaf = machine["unmap_s2_4k_noflush_ns"] - machine["dcache_clean_4k_ns"]
    return UnmapStepCosts(
        visit_ns=round(machine["stage2_leaf_visit_ns"]),
        descend_ns=round(machine["stage2_descend_ns"]),
        table_visit_ns=round(machine["stage2_table_visit_ns"]),
        leaf_ns=round(leaf + _clean(machine, leaf_bytes)),
        host_page_ns=round(machine["unmap_s1_4k_ns"]),
        bookkeeping_ns=round(machine["range_bookkeeping_ns"]),
    )


def _free(machine: Machine) -> FreeCosts:
    return FreeCosts(
        free_ns=round(machine["free_page_ns"]),
        call_rcu_ns=round(machine["call_rcu_ns"]),
        callback_ns=max(
            0, round(machine["table_page_free_rcu_ns"] - machine["callback_invoke_ns"])
        ),
        visit_ns=round(machine["stage2_leaf_visit_ns"]),
        count_test_ns=round(machine["llc_ns"]),
    )
