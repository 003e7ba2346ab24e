"""Which observation gives which constant of a machine profile, and how.

A rule names a parameter, what has to be observed (``what``, one of several keys, in which phase),
and a formula over the observed time and other constants of the profile. Rules are applied in order,
and a rule sees the constants that those before it have set. What no rule names cannot be had from
such measurements and stays as shipped.

What a function does was read in Linux v6.12 (arch/arm64/kvm/mmu.c, arch/arm64/kvm/hyp/pgtable.c,
virt/kvm/kvm_main.c, mm/mmu_notifier.c); what a parameter stands for, in `simkvm.kernel.costs`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Final

PHASES: Final = {
    "fault_present": "a guest touches each 4 KiB page once; the host has the pages already",
    "fault_alloc": "a guest touches each 4 KiB page once; the host allocates them",
    "fault_huge": "a guest touches each 2 MiB block once; the host allocates huge pages",
    "fault_permission": "a guest writes to pages that dirty logging made read-only",
    "fault_access": "a guest touches pages whose accessed flag is clear, without hardware AF",
    "unmap_page": "full 4 KiB ranges of a guest are invalidated, one page a call",
    "unmap_table": "full 2 MiB ranges of a guest in 4 KiB pages are invalidated, one a call",
    "age_page": "pages of a guest are aged, one 4 KiB page a notifier call",
}
"""What the host does while it is measured, where a function's name alone does not tell."""

Constants = Mapping[str, float]
Formula = Callable[[float, Constants], float]

FAULTS: Final = ("kvm_handle_guest_abort", "handle_ept_violation", "npf_interception")
MAPS: Final = ("kvm_pgtable_stage2_map", "kvm_tdp_mmu_map")


@dataclass(frozen=True)
class Rule:
    """How one parameter follows from one observation.

    ``keys`` are alternatives, the first that is there counts; several names in one key, joined by
    ``+``, are added. ``phase`` is where it must have been observed; "" anywhere. ``also`` names
    another observation by ``(key, phase)`` that the formula needs: its median is the constant
    ``key@phase``. ``needs`` are the other constants, ``about`` says it in words.
    """

    parameter: str
    what: str
    keys: tuple[str, ...]
    about: str
    phase: str = ""
    also: tuple[str, str] | None = None
    needs: tuple[str, ...] = ()
    formula: Formula = field(default=lambda ns, constants: ns)


def _around_exit(ns: float, constants: Constants) -> float:
    return ns + constants["exit_roundtrip_ns"]


def _without_cleaning(ns: float, constants: Constants) -> float:
    return ns - constants["dcache_clean_4k_ns"]


def _a_page_of_a_table(ns: float, constants: Constants) -> float:
    flush = constants["tlbi_s2_page_ns"]
    table = constants["free_page_ns"] + flush
    page = (ns - constants["kvm_unmap_gfn_range@unmap_page"] - table) / 511
    by_range = constants["tlbirange"] and constants["fwb"]
    return page - constants["stage2_leaf_visit_ns"] - (0 if by_range else flush)


def _bookkeeping(ns: float, constants: Constants) -> float:
    return ns - constants["srcu_ns"] - constants["memslot_lookup_ns"] - _lock_pair(constants)


def _lock_pair(constants: Constants) -> float:
    return 2 * constants["atomic_uncontended_ns"]


def _notifier(ns: float, constants: Constants) -> float:
    inner = ("age_walk_ns", "srcu_ns", "memslot_lookup_ns")
    return ns - sum(constants[name] for name in inner) - _lock_pair(constants)


def _lookup(ns: float, constants: Constants) -> float:
    return ns - constants["age_walk_ns"] - constants["srcu_ns"] - _lock_pair(constants)


RULES: Final = (
    Rule("zero_4k_ns", "function", ("clear_page", "clear_page_erms"), "clearing one 4 KiB page"),
    Rule("copy_4k_ns", "function", ("copy_page",), "copying one 4 KiB page"),
    Rule(
        "dcache_clean_4k_ns",
        "function",
        ("dcache_clean_inval_poc", "__clean_dcache_guest_page"),
        "cleaning one 4 KiB page",
        phase="fault_present",
    ),
    Rule(
        "srcu_ns",
        "function",
        ("__srcu_read_lock+__srcu_read_unlock",),
        "entering and leaving an SRCU section",
    ),
    Rule("call_rcu_ns", "function", ("call_rcu", "__call_rcu_common"), "queueing one callback"),
    Rule(
        "free_page_ns",
        "function",
        ("free_frozen_pages", "free_unref_page"),
        "freeing one page to the per-CPU lists",
    ),
    Rule(
        "mmap_lock_vma_lookup_ns",
        "function",
        ("find_vma", "vma_lookup"),
        "looking up a VMA",
    ),
    Rule(
        "tlbi_s2_page_ns",
        "function",
        ("__kvm_tlb_flush_vmid_ipa",),
        "invalidating one guest page on all CPUs, barriers included",
    ),
    Rule(
        "tlbi_vmid_all_ns",
        "function",
        ("__kvm_tlb_flush_vmid",),
        "invalidating everything of a VMID",
    ),
    Rule(
        "fault_hold_ns",
        "function",
        MAPS,
        "one walk and map under mmu_lock, less dcache_clean_4k_ns",
        phase="fault_present",
        needs=("dcache_clean_4k_ns",),
        formula=_without_cleaning,
    ),
    Rule(
        "fault_hold_ns",
        "hold",
        ("fault",),
        "the hold of mmu_lock by a fault, less dcache_clean_4k_ns",
        needs=("dcache_clean_4k_ns",),
        formula=_without_cleaning,
    ),
    Rule("age_walk_ns", "function", ("kvm_age_gfn",), "one walk to one leaf", phase="age_page"),
    Rule("age_walk_ns", "hold", ("age",), "the hold of mmu_lock by one ageing call"),
    Rule(
        "memslot_lookup_ns",
        "function",
        ("kvm_mmu_notifier_clear_young",),
        "KVM's part of an ageing call, less the walk, an SRCU section and the lock's two atomics",
        phase="age_page",
        needs=("age_walk_ns", "srcu_ns", "atomic_uncontended_ns"),
        formula=_lookup,
    ),
    Rule(
        "notifier_call_ns",
        "function",
        ("__mmu_notifier_clear_young",),
        "a notifier call, less what KVM does in it",
        phase="age_page",
        needs=("age_walk_ns", "srcu_ns", "memslot_lookup_ns", "atomic_uncontended_ns"),
        formula=_notifier,
    ),
    Rule(
        "range_bookkeeping_ns",
        "function",
        ("kvm_mmu_notifier_invalidate_range_end",),
        "a range end, less an SRCU section, the memslot look-up and the lock's two atomics",
        needs=("srcu_ns", "memslot_lookup_ns", "atomic_uncontended_ns"),
        formula=_bookkeeping,
    ),
    Rule("range_bookkeeping_ns", "hold", ("range_end",), "the hold of mmu_lock by a range end"),
    Rule(
        "unmap_s2_4k_noflush_ns",
        "function",
        ("kvm_unmap_gfn_range",),
        "a 511th of what 512 pages take longer than one and a table's end, less "
        "stage2_leaf_visit_ns and, without range invalidation, tlbi_s2_page_ns",
        phase="unmap_table",
        also=("kvm_unmap_gfn_range", "unmap_page"),
        needs=("tlbi_s2_page_ns", "free_page_ns", "stage2_leaf_visit_ns", "tlbirange", "fwb"),
        formula=_a_page_of_a_table,
    ),
    Rule(
        "s2_map4k_total_ns",
        "function",
        FAULTS,
        "the handler of a fault plus exit_roundtrip_ns",
        phase="fault_present",
        needs=("exit_roundtrip_ns",),
        formula=_around_exit,
    ),
    Rule(
        "s2_fault4k_alloc_total_ns",
        "function",
        FAULTS,
        "the handler of a fault plus exit_roundtrip_ns",
        phase="fault_alloc",
        needs=("exit_roundtrip_ns",),
        formula=_around_exit,
    ),
    Rule(
        "s2_fault2m_total_ns",
        "function",
        FAULTS,
        "the handler of a fault plus exit_roundtrip_ns",
        phase="fault_huge",
        needs=("exit_roundtrip_ns",),
        formula=_around_exit,
    ),
    Rule(
        "perm_fault_total_ns",
        "function",
        FAULTS,
        "the handler of a fault plus exit_roundtrip_ns",
        phase="fault_permission",
        needs=("exit_roundtrip_ns",),
        formula=_around_exit,
    ),
    Rule(
        "af_fault_total_ns",
        "function",
        FAULTS,
        "the handler of a fault plus exit_roundtrip_ns",
        phase="fault_access",
        needs=("exit_roundtrip_ns",),
        formula=_around_exit,
    ),
)
