"""Memslots that come, go and move: grace periods, one hold for the unmap, faults that wait."""

from __future__ import annotations

from lab import GIB, MIB, Lab, account

from simkvm.kernel.memory_region import MemoryRegions
from simkvm.kernel.sites import MEMSLOT
from simkvm.kernel.stage2 import VALID


def holds(lab: Lab) -> list[dict[str, int]]:
    return [row for row in account(lab.kvm.mmu_lock.rows) if row["site"] == MEMSLOT]


def test_a_new_memslot_takes_one_expedited_grace_period_and_no_lock() -> None:
    lab = Lab()
    end = lab.run(MemoryRegions(lab.kvm).create(lab.task, lab.t_ns))
    assert end == 2 * lab.kvm.costs.wakeup_ns
    assert not holds(lab)


def test_a_deleted_memslot_is_unmapped_in_one_hold_between_two_grace_periods() -> None:
    lab = Lab(memory=4 * MIB)
    lab.fill()
    regions = MemoryRegions(lab.kvm)
    start = lab.t_ns
    end = lab.run(regions.delete(lab.task, start, 0, 512))
    (hold,) = holds(lab)
    wait_ns = 2 * lab.kvm.costs.wakeup_ns
    assert hold["arrival"] == start + wait_ns
    assert end == hold["entry"] + hold["hold"] + wait_ns
    valid = (lab.kvm.stage2.leaf.entries & VALID) != 0
    assert not valid[:512].any()
    assert valid[512:].all()
    assert regions.absent(0)
    assert regions.absent(511)
    assert not regions.absent(512)


def test_without_contention_several_chunks_are_one_hold() -> None:
    lab = Lab(memory=3 * GIB)
    lab.fill_sparsely(2 * MIB)
    lab.run(MemoryRegions(lab.kvm).delete(lab.task, lab.t_ns, 0, lab.kvm.leaves))
    assert len(holds(lab)) == 1
    assert lab.kvm.unmapped_leaves == 3 * 512


def test_the_unmap_waits_for_a_fault_that_has_looked_the_memslot_up() -> None:
    lab = Lab(memory=4 * MIB)
    lab.fill()
    regions = MemoryRegions(lab.kvm)
    token = regions.srcu.enter(lab.t_ns)
    late_ns = lab.t_ns + 100_000

    def leave() -> object:
        yield lab.env.timeout(late_ns)
        regions.srcu.leave(token, late_ns)

    lab.env.process(leave())  # type: ignore[arg-type]
    lab.run(regions.delete(lab.task, lab.t_ns, 0, 512))
    (hold,) = holds(lab)
    assert hold["arrival"] == late_ns + lab.kvm.costs.wakeup_ns


def test_a_memslot_that_moves_back_is_there_again_and_its_other_place_was_empty() -> None:
    lab = Lab(memory=4 * MIB)
    lab.fill()
    regions = MemoryRegions(lab.kvm)
    away = lab.run(regions.move(lab.task, lab.t_ns, 0, 512, back=False))
    assert regions.absent(100)
    unmapped = lab.kvm.unmapped_leaves
    lab.run(regions.move(lab.task, away, 0, 512, back=True))
    assert not regions.absent(100)
    assert lab.kvm.unmapped_leaves == unmapped == 512
    assert len(holds(lab)) == 2
    assert holds(lab)[1]["hold"] == lab.kvm.costs.unmap.visit_ns
