"""The stage-2 fault path (arch/arm64/kvm/mmu.c, user_mem_abort and callers, v6.12)."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from lab import Lab, account, events, world

from simkvm.kernel.aging import AgeingWalk
from simkvm.kernel.costs import Costs
from simkvm.kernel.fault import CACHE_CAPACITY
from simkvm.kernel.host_memory import OWN, PRESENT
from simkvm.kernel.kvm import Kvm
from simkvm.kernel.sites import AGE, FAULT, NAMES, RANGE_END
from simkvm.kernel.stage2 import AF, VALID, WRITE
from simkvm.scenario.machine import load_machine
from simkvm.units import KIB, MIB

READ, WROTE = VALID | AF, VALID | AF | WRITE


def rows(lab: Lab, site: int) -> list[dict[str, int]]:
    return [row for row in account(lab.kvm.mmu_lock.rows) if row["site"] == site]


def at(lab: Lab, t_ns: int, steps: Iterator[Any]) -> None:
    """Run ``steps`` from ``t`` on."""

    def later() -> Iterator[Any]:
        yield lab.env.timeout(t_ns)
        yield from steps

    lab.env.process(later())


def drop_at(lab: Lab, t_ns: int, first: int, last: int) -> None:
    at(lab, t_ns, lab.kvm.notifier.invalidate(lab.task, t_ns, first, last))


# -- what one fault costs ---------------------------------------------------------------------


@pytest.mark.parametrize("machine", ["graviton3-64c", "ampere-altra-80c"])
def test_the_parts_of_a_fault_add_up_to_the_measured_total(machine: str) -> None:
    """On an idle machine; the release of mmu_lock is not waited for, and each fault is a touch."""
    built = world(machine=machine, guest={"memory": 2 * MIB})
    summary = built.run().summary
    costs, total = built.kvms[0].costs, built.machine["s2_fault4k_alloc_total_ns"]
    once = CACHE_CAPACITY * costs.fault.object_ns + 2 * costs.fault.table_ns
    each = (int(summary["sim_ns"]) - once) / 512
    assert each == pytest.approx(total + costs.touch_ns, abs=2 * costs.line.same_ns)


def test_a_page_that_the_host_has_costs_less() -> None:
    """Nothing to allocate and clear (s2_map4k_total_ns)."""
    ends = {}
    for present in (False, True):
        lab = Lab(2 * MIB)
        for leaf in range(512 if present else 0):
            lab.kvm.host.install(leaf, True)
        lab.touch_all()
        ends[present] = lab.t_ns
        assert lab.vcpus[0].fault.faults == 512
        assert (lab.kvm.stage2.leaf.entries == WROTE).all()
    machine = lab.world.machine
    saved = machine["s2_fault4k_alloc_total_ns"] - machine["s2_map4k_total_ns"]
    same_ns = lab.kvm.costs.line.same_ns
    assert (ends[False] - ends[True]) / 512 == pytest.approx(saved, abs=2 * same_ns)


def test_the_hold_covers_the_walk_and_the_tables_it_installs() -> None:
    lab = Lab(8 * MIB, {"ipa_bits": 48})
    lab.touch((0, True, 0), (1, True, 0), (512, True, 0))
    lab.env.run()
    costs = lab.kvm.costs.fault
    holds = [row["hold"] for row in rows(lab, FAULT)]
    assert holds == [costs.hold_ns + made * costs.table_ns for made in (3, 0, 1)]


@pytest.mark.parametrize(("policy", "mode"), [("read", 0), ("write", 1)])
def test_the_lock_is_taken_as_the_kernel_does(policy: str, mode: int) -> None:
    """For write up to v6.1, for read since."""
    lab = Lab(2 * MIB, kernel={"base": "linux-6.12", "set": {"fault_lock": policy}})
    lab.touch_all()
    assert [row["mode"] for row in rows(lab, FAULT)] == [mode] * 512


# -- the memory cache -------------------------------------------------------------------------


@pytest.mark.parametrize(("bits", "minimum"), [(40, 2), (48, 3), (32, 1)])
def test_the_cache_is_filled_to_40_when_it_could_run_out(bits: int, minimum: int) -> None:
    """kvm_mmu_topup_memory_cache(): only below the minimum, and then to capacity."""
    held = 0
    for touched in range(1, 90):
        held = CACHE_CAPACITY if held < minimum else held
        held -= minimum if touched == 1 else 1  # the first fault needs every level's table
        if touched % 10 < 2 or held < minimum + 1 or held > CACHE_CAPACITY - 3:
            lab = Lab(200 * MIB, {"ipa_bits": bits})
            vcpu = lab.touch(*((512 * n, True, 0) for n in range(touched)))
            lab.env.run()
            assert vcpu.fault.cached == held, f"after {touched} tables"


def test_filling_the_cache_takes_time() -> None:
    lab = Lab(200 * MIB)
    lab.touch(*((512 * n, True, 0) for n in range(45)))
    lab.env.run()
    costs = lab.kvm.costs.fault
    arrivals = np.diff([row["arrival"] for row in rows(lab, FAULT)])
    usual = int(np.median(arrivals))
    late = np.flatnonzero(arrivals > usual + 100).tolist()
    assert late == [37], "38 left after the first fault, which takes two; 1 after 38 faults"
    assert arrivals[37] - usual == (CACHE_CAPACITY - 1) * costs.object_ns


# -- retry ------------------------------------------------------------------------------------


@pytest.mark.parametrize("far", [True, False])
def test_no_fault_maps_while_any_range_is_being_taken_back(far: bool) -> None:
    """mmu_invalidate_retry() without a range, on arm64: the whole VM goes again."""
    lab = Lab(64 * MIB)
    lab.fill(range(8192))
    page = 10_000 if far else 5
    vcpu = lab.touch((0, True, 20_000), (page, True, 0))
    drop_at(lab, 5_000, 0, 8192)
    lab.env.run()
    end = rows(lab, RANGE_END)[0]
    faults = [row for row in rows(lab, FAULT) if row["entry"] > 20_000]
    costs = lab.kvm.costs.fault
    assert vcpu.fault.retries == len(faults) - 1 > 0
    assert all(row["hold"] == costs.retry_ns for row in faults[:-1])
    assert faults[-1]["hold"] >= costs.hold_ns
    assert faults[-1]["entry"] >= end["entry"] + end["hold"]
    assert lab.kvm.stage2.leaf.entries[page] == WROTE
    assert vcpu.fault.faults == len(faults)


def test_a_sequence_that_moved_since_the_note_is_a_retry() -> None:
    """The range is over when the lock is taken, but the host page may have been looked up before.

    A fault of a 2 MiB block allocates for long enough to have a whole range in between.
    """
    lab = Lab(16 * MIB, {"mapping": 2 * MIB})
    vcpu = lab.touch((0, True, 0))
    drop_at(lab, 10_000, 4, 5)
    lab.env.run()
    first, second = rows(lab, FAULT)
    end = rows(lab, RANGE_END)[0]
    assert end["entry"] + end["hold"] < first["arrival"], "it was over, and the fault no retry"
    assert vcpu.fault.retries == 1
    assert (first["hold"], second["hold"] > first["hold"]) == (lab.kvm.costs.fault.retry_ns, True)


@pytest.mark.parametrize("late_ns", [0, 1])
def test_only_what_moved_after_the_note_counts(late_ns: int) -> None:
    """Noted in the same moment as the sequence moved: seen, no retry."""
    lab = Lab(16 * MIB, {"mapping": 2 * MIB})
    lab.kvm.notifier.moved_ns = noted_ns() + late_ns
    vcpu = lab.touch((0, True, 0))
    lab.env.run(1_000_000)
    assert vcpu.fault.retries == late_ns


def noted_ns() -> int:
    """When the first fault of such a guest has found the VMA, under mmap_lock.

    Five changes of its line: count, owner and count again, then count and owner for GUP.
    """
    lab = Lab(16 * MIB, {"mapping": 2 * MIB})
    costs = lab.kvm.costs
    arrival = costs.touch_ns + costs.fault.exit_ns + CACHE_CAPACITY * costs.fault.object_ns
    return arrival + costs.line.transfer_ns + 4 * costs.line.same_ns + costs.fault.vma_ns


def test_a_host_page_that_goes_between_look_up_and_lock_is_not_mapped() -> None:
    lab = Lab(2 * MIB)
    lab.kvm.host.install(3, True)
    vcpu = lab.touch((3, True, 0))
    costs = lab.kvm.costs
    looked_up = costs.touch_ns + costs.fault.exit_ns + CACHE_CAPACITY * costs.fault.object_ns

    def zap() -> Iterator[Any]:
        lab.kvm.host.zap(3, 4)
        yield lab.env.timeout(0)

    at(lab, looked_up + 100, zap())
    lab.env.run()
    first, second = rows(lab, FAULT)
    assert looked_up + 100 < first["arrival"]
    assert first["hold"] == costs.fault.retry_ns
    assert vcpu.fault.retries == 1
    assert second["hold"] >= costs.fault.hold_ns
    assert lab.kvm.host.state[3] & (PRESENT | OWN) == PRESENT | OWN


# -- several vCPUs ----------------------------------------------------------------------------


def test_a_fault_that_meets_an_entry_in_the_making_goes_again() -> None:
    """stage2_try_break_pte() up to stage2_make_pte(): the entry carries the lock marker.

    Two vCPUs need the same tables at about the same time. Whoever gets in while the other installs
    them has its fault taken again; one that comes a moment later finds the tables.
    """
    met = set()
    for pause in range(1150, 1450, 7):
        lab = Lab(1028 * MIB, {"ipa_bits": 48})
        lab.kvm.host.install(1, True)
        far = 1024 * MIB // (4 * KIB)
        lab.fill([far])
        one, other = lab.touch((0, True, 0)), lab.touch((far, True, pause), (1, True, 0))
        lab.env.run()
        first, second, *again = rows(lab, FAULT)
        installing = 2 * lab.kvm.costs.fault.table_ns
        assert first["hold"] == lab.kvm.costs.fault.hold_ns + installing
        conflict = second["entry"] < first["entry"] + installing
        assert len(again) == conflict
        assert one.fault.faults + other.fault.faults == 2 + conflict
        assert one.fault.retries == other.fault.retries == 0, "no invalidation, no retry"
        assert lab.kvm.stage2.leaf.counts[0] == 2
        met.add(conflict)
    assert met == {True, False}


def test_two_tables_do_not_meet() -> None:
    summary = world(guest={"memory": 4 * MIB, "vcpus": 2}).run().summary
    assert (summary["faults"], summary["tables_allocated"]) == (1024, 3)


def test_a_page_that_another_vcpu_was_faster_to_map_is_mapped_once() -> None:
    access = {"pattern": "uniform", "touches": 4000, "write_ratio": 1.0}
    built = world(guest={"memory": 2 * MIB, "vcpus": 8, "access": access})
    summary = built.run().summary
    kvm = built.kvms[0]
    assert int(summary["faults"]) > 512
    assert kvm.stage2.leaf.counts[0] == 512
    assert kvm.host.lru.total == sum(kvm.host.present) == 512
    assert summary["touches"] == 8 * 4000


# -- zero pages -------------------------------------------------------------------------------


def test_a_read_gets_the_zero_page_and_a_write_a_page_of_its_own() -> None:
    """do_anonymous_page(), then wp_page_copy(), which takes the zero page back first."""
    lab = Lab(2 * MIB)
    vcpu = lab.touch((7, False, 50_000), (7, True, 0))
    lab.env.run(40_000)
    assert lab.kvm.stage2.leaf.entries[7] == READ
    assert lab.kvm.host.state[7] & (PRESENT | OWN) == PRESENT
    assert lab.kvm.host.lru.total == 0, "the zero page is on no list"
    lab.env.run()
    assert lab.kvm.stage2.leaf.entries[7] == WROTE
    assert lab.kvm.host.state[7] & OWN
    assert lab.kvm.host.lru.total == 1
    assert (vcpu.fault.faults, vcpu.fault.retries) == (3, 1)
    sites = [NAMES[row["site"]] for row in account(lab.kvm.mmu_lock.rows)]
    assert sites == ["fault", "range_start", "range_end", "fault", "fault"]
    assert lab.kvm.tables_freed == 2, "the only page of its tables"


def test_a_read_of_a_page_that_may_be_written_maps_it_so() -> None:
    """The pfn is writable, so one fault is enough for both."""
    lab = Lab(2 * MIB)
    lab.kvm.host.install(7, True)
    vcpu = lab.touch((7, False, 50_000), (7, True, 0))
    lab.env.run()
    assert vcpu.fault.faults == 1
    assert lab.kvm.stage2.leaf.entries[7] == WROTE


# -- the host's page-table lock ---------------------------------------------------------------


def test_a_fault_waits_for_ageing_to_leave_the_host_table() -> None:
    """walk_pte_range() holds the lock for all of a table's entries."""
    lab = Lab(4 * MIB)
    lab.fill(range(511))
    vcpu = lab.touch((0, True, 20_000), (511, True, 50_000), (600, True, 0))
    at(lab, 1000, AgeingWalk(lab.kvm, lab.task).run(1000))
    lab.env.run()
    first, second = rows(lab, FAULT)
    last = rows(lab, AGE)[-1]
    assert last["entry"] > 20_000, "the fault began during the pass"
    # 511 pages are new, each a struct page, 64 lines of host entries, 64 of stage-2 entries.
    fetch_ns = (511 + 64 + 64) * lab.kvm.costs.line.transfer_ns
    over_ns = last["entry"] + last["hold"] + fetch_ns
    assert over_ns < first["arrival"] < over_ns + 2000
    assert second["arrival"] > first["arrival"]
    assert vcpu.fault.faults == 2


def arrival_beside_a_pass(pause: int) -> tuple[int, int]:
    """When a fault comes to mmu_lock, and when the pass left its table."""
    lab = Lab(2 * MIB)
    lab.fill(range(511))
    lab.touch((0, True, pause), (511, True, 0))
    walk = lab.env.process(AgeingWalk(lab.kvm, lab.task).run(1000))
    lab.env.run()
    costs = lab.kvm.costs.ageing
    return rows(lab, FAULT)[0]["arrival"], walk.value.end_ns - costs.lru_lock_ns - costs.resched_ns


def test_a_fault_waits_until_ageing_has_left_and_no_longer() -> None:
    """It wants the lock for the last ``ptl_ns`` of its way; if held then, the lock moves first."""
    costs = Lab(2 * MIB).kvm.costs
    late, left = arrival_beside_a_pass(200_000)
    undisturbed = late - 200_000
    for pause in range(left - undisturbed - 5, left - undisturbed + costs.fault.ptl_ns + 5):
        wanted = undisturbed + pause - costs.fault.ptl_ns
        if wanted < left:
            wanted = left + costs.line.transfer_ns
        assert arrival_beside_a_pass(pause) == (wanted + costs.fault.ptl_ns, left)


def test_a_read_that_waited_for_ageing_gets_the_zero_page_too() -> None:
    lab = Lab(4 * MIB)
    lab.fill(range(510))
    lab.touch((0, True, 20_000), (510, False, 0), (511, True, 0))
    at(lab, 1000, AgeingWalk(lab.kvm, lab.task).run(1000))
    lab.env.run()
    assert rows(lab, FAULT)[0]["arrival"] > 30_000, "it waited"
    assert lab.kvm.stage2.leaf.entries[510] == READ
    assert lab.kvm.host.lru.total == 510 + 1
    assert lab.kvm.host.present == [512, 0]


def test_a_table_of_zero_pages_keeps_nobody() -> None:
    """Ageing has the lock for no time there: zero pages are on no list (walk_pte_range)."""
    access = {
        "pattern": "phases",
        "phases": [
            {"pattern": "populate", "write": False, "think": 1000},
            {"pattern": "populate", "think": 1000},
        ],
    }
    built = world(
        guest={"memory": 2 * MIB, "access": access},
        ageing={"interval": 10_000},
        duration=50_000_000,
    )
    assert built.run().summary["touches"] == 1024


def test_ageing_skips_a_table_that_a_fault_has_locked() -> None:
    """The walk only tries the lock: one nanosecond after the fault let go, it gets it."""
    lab = Lab(2 * MIB)
    lab.fill(range(511))
    lab.touch((511, True, 0))
    lab.env.run()
    until = rows(lab, FAULT)[0]["arrival"]
    hold = lab.kvm.costs.fault.ptl_ns
    skipped = [start for start in range(until - 2 * hold - 60, until + 5) if skips(start)]
    assert len(skipped) == hold
    assert skipped == list(range(skipped[0], skipped[0] + hold))


def skips(start_ns: int) -> int:
    """Whether a pass that begins at ``start`` has to skip the one table."""
    lab = Lab(2 * MIB)
    lab.fill(range(511))
    lab.touch((511, True, 0))
    walk = lab.env.process(AgeingWalk(lab.kvm, lab.task).run(start_ns))
    report = lab.env.run(walk)
    assert report.scanned == (0 if report.skipped_tables else 511 + (report.scanned == 512))
    return int(report.skipped_tables)


# -- the end ----------------------------------------------------------------------------------


def ended_at(at_ns: int) -> Kvm:
    """A guest that was filling its memory when its VM was closed."""
    built = world(guest={"memory": MIB, "teardown": {"order": "close_vm", "at": at_ns}})
    built.run()
    return built.kvms[0]


@pytest.mark.parametrize("at_ns", [1, 100_000, 300_000])
def test_no_fault_begins_after_the_vm_died(at_ns: int) -> None:
    kvm = ended_at(at_ns)
    assert kvm.vcpus[0].finished_ns < at_ns + 10_000
    assert kvm.vcpus[0].touches < 256


def test_a_fault_in_flight_maps_nothing_into_a_dying_vm() -> None:
    """No vCPU runs any more when the tree goes: its file, or its process, is gone before."""
    found = [ended_at(at_ns) for at_ns in range(300_000, 303_000, 100)]
    assert not [kvm.oracle.violations for kvm in found if kvm.oracle.violations]
    assert not [kvm.stage2.linked_tables for kvm in found if kvm.stage2.linked_tables]


# -- events -----------------------------------------------------------------------------------


def events_a_fault(vcpus: int, guests: int, think: int, pages: int = 512, **keys: Any) -> float:
    """SimPy events for each abort of vCPUs that fill their memory.

    Apart from three a vCPU: its start, the end of its only chunk of touches, its end.
    """
    guest = {
        "memory": pages * 4 * KIB * vcpus,
        "vcpus": vcpus,
        "access": {"pattern": "populate", "think": think},
    }
    built = world(guests={f"vm{n}": guest for n in range(guests)}, **keys)
    running = [vcpu for kvm in built.kvms for vcpu in kvm.vcpus]
    for vcpu in running:
        built.env.process(vcpu.run())
    built.env.run()
    faults = sum(vcpu.fault.faults for vcpu in running)
    assert faults >= pages * len(running)
    return (events(built.env) - 3 * len(running)) / faults


@pytest.mark.parametrize("think", [0, 5000])
def test_a_lonely_fault_needs_no_event(think: int) -> None:
    assert events_a_fault(1, 1, think) <= 0


@pytest.mark.parametrize("think", [0, 700, 5000])
def test_an_uncontended_fault_needs_two_events_at_most(think: int) -> None:
    """Guests that share nothing but the clock."""
    assert 0 < events_a_fault(1, 6, think) <= 2


@pytest.mark.parametrize("policy", ["read", "write"])
@pytest.mark.parametrize("vcpus", [2, 8, 32])
def test_a_contended_fault_needs_three_events_at_most(policy: str, vcpus: int) -> None:
    kernel = {"base": "linux-6.12", "set": {"fault_lock": policy}}
    assert events_a_fault(vcpus, 1, 0, 256, kernel=kernel) <= 3


@pytest.mark.parametrize("base", ["ampere-altra-80c", "graviton3-64c", "x86-icelake-64c"])
@pytest.mark.parametrize("size", [4096, 65536, 2 << 20])
def test_no_step_of_a_fault_takes_less_than_nothing(base: str, size: int) -> None:
    """Whoever sets one part of a measured whole to more than the whole gets no time back."""
    dear = {"fault_hold_ns": 5000, "atomic_uncontended_ns": 20, "zero_4k_ns": 50_000}
    fault = Costs.of(load_machine({"base": base, "set": dear}), size, 4096).fault
    assert all(value >= 0 for value in dataclasses.astuple(fault))
