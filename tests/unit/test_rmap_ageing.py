"""Ageing a folio at a time: idle page tracking, and the check that eviction makes.

Source: mm/page_idle.c, mm/rmap.c (folio_referenced_one) and mm/vmscan.c (lru_gen_look_around),
v6.12; counts of real runs of a Linux 6.12 under QEMU where a test names one.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from lab import Lab, account

from simkvm.kernel.aging import METHODS
from simkvm.kernel.folio_referenced import FolioReferenced
from simkvm.kernel.host_memory import IDLE, OWN, PRESENT, YOUNG
from simkvm.kernel.sites import AGE
from simkvm.kernel.stage2 import AF
from simkvm.scenario.schema import Ageing
from simkvm.units import KIB, MIB


def lab(memory: int = 2 * MIB, hw_af: bool = True, kernel: Any = "linux-6.12", **guest: Any) -> Lab:
    """A guest that has everything mapped and used nothing."""
    machine = {"base": "graviton3-64c", "set": {"hw_af": hw_af}}
    made = Lab(memory, guest, machine=machine, kernel=kernel)
    made.fill()
    made.kvm.stage2.leaf.entries[:] &= np.uint8(~AF & 0xFF)
    made.kvm.host.state[:] &= np.uint8(PRESENT | OWN)
    return made


def use(made: Lab, *leaves: int) -> None:
    made.kvm.stage2.leaf.entries[list(leaves)] |= np.uint8(AF)


def test_every_method_of_a_scenario_is_a_class() -> None:
    choices = Ageing.model_json_schema()["properties"]["method"]["enum"]
    assert set(choices) == set(METHODS)
    assert all(method.name == name for name, method in METHODS.items())


# -- idle page tracking ----------------------------------------------------------------------------


@pytest.mark.parametrize("hw_af", [True, False])
@pytest.mark.parametrize("kernel", ["linux-6.4", "linux-6.12", "linux-7.1"])
def test_one_call_marks_a_page_and_one_reads_it_back(kernel: str, hw_af: bool) -> None:
    """Whatever MGLRU's walk does in that kernel, and without the flag in hardware too."""
    made = lab(hw_af=hw_af, kernel=kernel)
    first = made.age("page_idle")
    assert (first.scanned, first.calls, first.idle) == (512, 512, 0)
    assert made.acquisitions() == {("age", "write"): 512}
    use(made, 5, 200, 300)
    second = made.age("page_idle")
    # Read back: 512 calls. Three are not idle any more and are marked again.
    assert (second.calls, second.idle, second.young) == (512 + 3, 509, 3)
    assert made.young() == 0
    assert not made.broadcasts()
    assert (made.kvm.host.state & IDLE).all()


def test_what_the_host_used_is_not_idle_either() -> None:
    made = lab()
    made.age("page_idle")
    made.kvm.host.state[[7, 8]] |= YOUNG
    report = made.age("page_idle")
    assert (report.idle, report.young) == (510, 2)
    assert not (made.kvm.host.state & YOUNG).any()


def test_a_large_folio_is_one_walk_with_a_call_for_each_entry() -> None:
    """page_idle_get_folio() skips tail pages; page_vma_mapped_walk() stops at every entry."""
    made = lab(folio=64 * KIB)
    costs = made.kvm.costs.ageing
    small = lab()
    lengths = [m.age("page_idle") for m in (made, small)]
    assert [report.calls for report in lengths] == [512, 512]
    saved = lengths[1].end_ns - lengths[0].end_ns
    assert saved == (512 - 32) * (costs.rmap_ns + costs.resched_ns)
    use(made, 17)
    report = made.age("page_idle")
    assert (report.idle, report.young) == (512 - 16, 16)


def test_a_page_that_came_back_is_not_idle() -> None:
    """The flag belongs to the page, and the new one is another."""
    made = lab()
    made.age("page_idle")
    made.drop(4 * KIB * 9, 4 * KIB)
    made.fill([9])
    made.kvm.stage2.leaf.entries[9] &= np.uint8(~AF & 0xFF)
    made.kvm.host.state[9] &= np.uint8(~YOUNG & 0xFF)
    assert made.age("page_idle").idle == 511


def test_its_cost_on_an_idle_machine() -> None:
    """The reverse map, SRCU and memslot, one atomic, the walk, cond_resched."""
    made = lab()
    costs, line = made.kvm.costs.ageing, made.kvm.costs.line
    made.age("page_idle")
    arrivals = [row["arrival"] for row in account(made.kvm.mmu_lock.rows)]
    each = costs.rmap_ns + costs.call_ns + line.same_ns + costs.walk_ns + costs.resched_ns
    assert set(np.diff(arrivals)[1:].tolist()) == {each}


def test_without_mmu_lock_it_takes_none() -> None:
    made = lab(kernel="linux-7.1-lockless")
    use(made, 3)
    assert made.age("page_idle").calls == 512
    assert not made.acquisitions()
    assert made.kvm.young_calls.lockless == 512
    assert made.young() == 0


def test_between_two_folios_the_host_table_is_free() -> None:
    """A fault waits for one call, not for 512."""
    waits = {}
    for method in ("lru_gen", "page_idle"):
        made = lab(4 * MIB)
        made.drop(0, 4 * KIB)
        start = made.t_ns
        vcpu = made.touch((1, True, 30_000), (0, True, 0))
        report = made.age(method)
        made.env.run(vcpu.process)
        assert start < vcpu.finished_ns
        waits[method] = vcpu.finished_ns
        assert report.end_ns > 60_000
    assert waits["page_idle"] < 40_000 < waits["lru_gen"]


# -- eviction's check ------------------------------------------------------------------------------


def test_a_cold_page_costs_one_call() -> None:
    """Traces: one clear_young a page, whichever form the kernel has."""
    for kernel in ("linux-6.4", "linux-6.12"):
        made = lab(kernel=kernel)
        report = made.age("folio_referenced")
        assert (report.scanned, report.calls, report.young) == (512, 512, 0)
        assert not made.broadcasts()


def test_a_young_page_is_flushed_under_the_lock() -> None:
    """v6.4: kvm_flush_remote_tlbs() inside the notifier's write section."""
    made = lab(kernel="linux-6.4")
    use(made, 7, 9)
    report = made.age("folio_referenced")
    assert (report.calls, report.young) == (512, 2)
    costs = made.kvm.costs
    holds = [row["hold"] for row in account(made.kvm.mmu_lock.rows)]
    assert made.broadcasts() == 2
    assert [at for at, hold in enumerate(holds) if hold != costs.ageing.walk_ns] == [7, 9]
    assert holds[7] == holds[9] == costs.ageing.walk_ns + costs.tlbi_all_ns


def test_a_look_around_makes_64_calls_and_no_flush() -> None:
    """Traces: 122 look-arounds made 7802 calls (MIN_LRU_BATCH)."""
    made = lab()
    use(made, *range(0, 512))
    report = made.age("folio_referenced")
    # Page 0 asks for 1..63, which are promoted and not checked, page 64 for 32..95 without itself,
    # 96 for 64..127 and so on; the last is 480.
    assert not made.broadcasts()
    assert made.young() == 0
    assert (report.young, report.scanned, report.calls) == (512, 15, 15 * 64)
    rows = account(made.kvm.mmu_lock.rows)
    assert {(row["site"], row["hold"]) for row in rows} == {(AGE, made.kvm.costs.ageing.walk_ns)}


@pytest.mark.parametrize(
    ("leaf", "first", "last"),
    [(0, 0, 64), (31, 0, 64), (32, 0, 64), (33, 1, 65), (200, 168, 232), (500, 448, 512)],
)
def test_the_window_is_centred_and_clipped_to_the_table(leaf: int, first: int, last: int) -> None:
    made = lab(4 * MIB)
    around = METHODS["folio_referenced"](made.kvm, made.task)
    assert isinstance(around, FolioReferenced)
    for table in (0, 512):
        found = around.window(table + leaf).tolist()
        assert found == [table + n for n in range(first, last) if n != leaf]


def test_a_window_asks_as_the_page_table_walk_does() -> None:
    """v7.1: once for each large folio in it; the series of 2023: one test and one clear."""
    calls = {}
    for kernel in ("linux-7.1", "linux-6.4-yuzhao-v2"):
        made = lab(256 * KIB, kernel=kernel, folio=64 * KIB)
        use(made, 0)
        calls[kernel] = made.age("folio_referenced").calls
    # 16 entries of each of 4 folios; around page 0: its folio's other 15 in one call, and 3 more.
    assert calls["linux-7.1"] == 64 + 4
    # Nothing else is young in the window: a test, no clear.
    assert calls["linux-6.4-yuzhao-v2"] == 64 + 1


def test_a_block_is_flushed_in_either_form() -> None:
    """folio_referenced_one(): pmdp_clear_flush_young_notify()."""
    made = lab(64 * MIB, mapping=2 * MIB)
    use(made, 3)
    report = made.age("folio_referenced")
    assert (report.calls, report.young, made.broadcasts()) == (32, 1, 1)


# -- falling back ----------------------------------------------------------------------------------


def test_the_series_of_2023_falls_back_where_software_sets_the_flag() -> None:
    """kvm_arch_has_test_clear_young(): a single call takes the lock, a bitmap gets no answer."""
    made = lab(hw_af=False, kernel="linux-6.4-yuzhao-v2")
    use(made, *range(64))
    report = made.age("folio_referenced")
    assert (report.calls, report.young, report.scanned) == (512, 64, 512)
    calls = made.kvm.young_calls
    assert (calls.locked, calls.lockless, calls.fallback) == (512, 0, 512)
    assert made.acquisitions() == {("age", "write"): 512}


def test_with_the_flag_in_hardware_it_does_not() -> None:
    made = lab(kernel="linux-6.4-yuzhao-v2")
    use(made, *range(64))
    report = made.age("folio_referenced")
    calls = made.kvm.young_calls
    assert (calls.locked, calls.lockless, calls.fallback) == (0, report.calls, 0)
    # Page 0, a test and a clear for its window; what it found is promoted, the rest is checked.
    assert report.calls == 512 - 63 + 2
    assert not made.acquisitions()


def test_a_kernel_that_never_locks_for_ageing_does_not_fall_back() -> None:
    """KVM_MMU_LOCKLESS_AGING is a compile-time option of the generic code."""
    made = lab(hw_af=False, kernel="linux-7.1-lockless")
    made.age("page_idle")
    calls = made.kvm.young_calls
    assert (calls.locked, calls.lockless, calls.fallback) == (0, 512, 0)


@pytest.mark.parametrize(("early_ns", "calls"), [(1, 1), (-1, 2)])
def test_a_page_that_goes_while_the_one_before_it_is_asked_for_is_not_asked_for(
    early_ns: int, calls: int
) -> None:
    """The next entry of a folio is looked at when the last call, here without a lock, is over."""
    kernel = "linux-7.1-lockless"
    made = lab(8 * KIB, kernel=kernel, folio=8 * KIB)
    costs = made.kvm.costs.ageing
    over_ns = costs.rmap_ns + costs.call_ns + costs.walk_ns

    def zap() -> Any:
        yield made.env.timeout(over_ns - early_ns)
        made.kvm.host.zap(1, 2)

    made.env.process(zap())
    assert made.age("page_idle").calls == calls
