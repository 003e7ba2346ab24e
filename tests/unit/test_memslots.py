"""Several memslots: what a look-up costs, and how a notifier call goes over them."""

from __future__ import annotations

from collections.abc import Generator
from typing import Any

import numpy as np
import pytest
from lab import Lab, Tally
from simpy import Event

from simkvm.guest.pause import Pause
from simkvm.guest.vcpu import Vcpu
from simkvm.kernel.memslot import MemslotUpdate
from simkvm.kernel.memslots import Memslots
from simkvm.kernel.task import reach
from simkvm.kernel.unmap import chunks
from simkvm.units import GIB, KIB, MIB


def test_slots_are_equal_ranges_of_leaves() -> None:
    assert list(Memslots(12, 3)) == [(0, 4), (4, 8), (8, 12)]
    assert Memslots(12, 3).of(7) == 1


@pytest.mark.parametrize(
    ("first", "last", "parts"),
    [
        (0, 4, [(0, 4)]),
        (1, 3, [(1, 3)]),
        (3, 5, [(3, 4), (4, 5)]),
        (2, 12, [(2, 4), (4, 8), (8, 12)]),
    ],
)
def test_a_range_is_cut_where_slots_meet(
    first: int, last: int, parts: list[tuple[int, int]]
) -> None:
    slots = Memslots(12, 3)
    assert slots.overlapping(first, last) == parts
    assert slots.crossed(first, last) == len(parts) - 1
    assert Memslots(12, 1).overlapping(first, last) == [(first, last)]


def test_edges_inside_runs_are_told_from_edges_between_them() -> None:
    leaves = np.array([2, 3, 4, 5, 7, 8, 9])  # slots of 4: an edge before 4 and before 8
    assert Memslots(12, 3).crossed_by(leaves, np.array([0])) == 2
    assert Memslots(12, 3).crossed_by(leaves, np.array([0, 2, 4])) == 1


@pytest.mark.parametrize(("slots", "levels"), [(1, 0), (2, 1), (4, 2), (64, 6)])
def test_a_tree_of_more_slots_is_deeper(slots: int, levels: int) -> None:
    one, many = Lab(), Lab(guest={"memslots": slots})
    level_ns = round(one.world.machine["memslot_lookup_ns"])
    call_ns = many.kvm.costs.ageing.call_ns - one.kvm.costs.ageing.call_ns
    assert call_ns == levels * level_ns, "a notifier call searches from the root"
    assert many.kvm.costs.fault.slot_miss_ns == levels * level_ns


def times(slots: int, *pages: int) -> int:
    """When a vCPU is done that writes ``pages`` of 1 MiB one after the other."""
    lab = Lab(MIB, guest={"memslots": slots})
    vcpu = lab.touch(*((page, True, 0) for page in pages))
    lab.env.run(vcpu.process)
    return vcpu.finished_ns


def test_a_fault_searches_only_if_the_slot_is_not_the_one_used_last() -> None:
    """128 pages a slot: 0, 1, 2 stay in the first one, 0, 130, 3 change twice."""
    level_ns = round(Lab().world.machine["memslot_lookup_ns"])
    assert times(2, 0, 1, 2) == times(1, 0, 1, 2)
    assert times(2, 0, 130, 3) == times(1, 0, 130, 3) + 2 * level_ns
    assert times(2, 0, 130, 131) == times(1, 0, 130, 131) + level_ns


def test_one_invalidation_of_several_slots_is_one_hold_and_chunks_in_each() -> None:
    """3 GiB in 3 slots of 1 GiB are chunks anyhow; in 2 slots a chunk is cut at 1.5 GiB."""
    for slots, walks in ((1, 3), (3, 3), (2, 4)):
        lab = Lab(3 * GIB, guest={"memslots": slots, "mapping": 2 * MIB, "ipa_bits": 40})
        tally = Tally(lab)
        lab.drop()
        assert tally.take()["calls"] == walks
        assert lab.acquisitions() == {("range_start", "write"): 1, ("range_end", "write"): 1}


@pytest.mark.parametrize(("slots", "offers"), [(1, 2), (3, 0), (2, 2)])
def test_the_lock_is_offered_between_chunks_but_not_between_slots(
    slots: int, offers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """``stage2_apply_range`` looks at the lock only before another chunk of its own range."""
    lab = Lab(3 * GIB, guest={"memslots": slots, "mapping": 2 * MIB})
    asked: list[int] = []
    monkeypatch.setattr(lab.kvm, "lock_break", lambda cpu, t_ns: bool(asked.append(t_ns)))
    lab.drop()
    assert len(asked) == offers


def test_chunks_lie_in_slots() -> None:
    lab = Lab(3 * GIB, guest={"memslots": 2, "mapping": 2 * MIB})
    parts = [part for slot in lab.kvm.memslots for part in chunks(lab.kvm.stage2, slot[0], slot[1])]
    assert parts == [(0, 512), (512, 768), (768, 1024), (1024, 1536)]


def test_a_large_folio_in_two_slots_is_walked_twice_in_one_call() -> None:
    """Folios of 64 KiB, 16 pages: with slots of 8 pages each call of a folio walks two."""
    holds = []
    for slots in (1, 32):
        lab = Lab(MIB, guest={"memslots": slots, "folio": 64 * KIB}, kernel="linux-7.1")
        lab.fill()
        lab.age()
        rows = lab.lock_rows("age")
        assert len(rows) == 16
        holds.append({row["hold"] for row in rows})
    costs = lab.kvm.costs.ageing
    assert holds[0] == {costs.walk_ns + 15 * costs.visit_ns}
    assert holds[1] == {2 * costs.walk_ns + 14 * costs.visit_ns}


def test_the_same_without_the_lock_takes_as_much_longer() -> None:
    took = []
    for slots in (1, 32):
        kernel = "linux-7.1-lockless"
        lab = Lab(MIB, guest={"memslots": slots, "folio": 64 * KIB}, kernel=kernel)
        lab.fill()
        report = lab.age()
        took.append(report.end_ns - report.start_ns - report.calls * lab.kvm.costs.ageing.call_ns)
    costs = lab.kvm.costs.ageing
    assert report.calls == 16
    assert took[1] - took[0] == 16 * (costs.walk_ns - costs.visit_ns)


@pytest.mark.parametrize("slots", [1, 32])
def test_a_window_over_several_slots_is_walked_once_for_each(slots: int) -> None:
    """A window of 64 PTEs lies in 8 slots of 8 pages: both of its calls walk eight times."""
    lab = Lab(MIB, guest={"memslots": slots}, kernel="linux-6.4-yuzhao-v2")
    lab.fill()
    report = lab.age()
    costs, walks = lab.kvm.costs.ageing, 64 // min(64, 256 // slots)
    call_ns = costs.call_ns + walks * costs.walk_ns + (64 - walks) * costs.visit_ns
    rest_ns = 256 * (costs.scan_ns + costs.promote_ns)
    assert report.calls == 8
    spent_ns = report.end_ns - report.start_ns - 8 * call_ns - rest_ns
    line = lab.kvm.costs.line
    # 256 new pages: their struct pages, and 32 lines each of host and stage-2 entries. Around the
    # pass mmap_lock, its count and owner, and lru_lock.
    fetched_ns = (256 + 32 + 32) * line.transfer_ns
    around_ns = line.transfer_ns + line.same_ns + costs.lru_lock_ns + costs.resched_ns
    assert spent_ns == fetched_ns + around_ns


# -- slots that differ, come and move, as memslot_perf_test has them ----------------------------


def test_what_is_left_over_belongs_to_the_last_slot() -> None:
    slots = Memslots(14, 3)
    assert list(slots) == [(0, 4), (4, 8), (8, 14)]
    assert [slots.of(leaf) for leaf in (7, 8, 13)] == [1, 2, 2]
    assert slots.overlapping(7, 14) == [(7, 8), (8, 14)]
    assert slots.overlapping(9, 14) == [(9, 14)]
    assert slots.crossed(7, 14) == 1
    assert slots.crossed_by(np.arange(7, 14), np.array([0])) == 1


def test_a_slot_created_for_the_first_time_takes_one_grace_period_and_no_lock() -> None:
    lab = Lab(4 * MIB, guest={"memslots": 2})
    lab.kvm.memslots.gone.add(1)
    assert not lab.kvm.notifier.hears(512, 1024)
    end = lab.run(MemslotUpdate(lab.kvm, lab.task, 1).create(lab.t_ns))
    assert end == 2 * lab.kvm.costs.wakeup_ns
    assert not lab.acquisitions()
    assert lab.kvm.notifier.hears(512, 1024)


def test_a_slot_that_moved_away_is_mmio_and_its_other_place_is_empty() -> None:
    lab = Lab(4 * MIB, guest={"memslots": 2})
    lab.fill()
    update = MemslotUpdate(lab.kvm, lab.task, 0)
    lab.run(update.move_away(lab.t_ns))
    assert lab.kvm.no_memslot(511)
    assert not lab.kvm.no_memslot(512)
    assert lab.kvm.notifier.hears(0, 512), "its host memory is a slot's still"
    assert lab.kvm.unmapped_pages == 512
    start = lab.t_ns
    end = lab.run(update.move_back(start))
    assert not lab.kvm.no_memslot(511)
    assert lab.kvm.unmapped_pages == 512, "nothing was mapped over there"
    there, back = lab.lock_rows("memslot")
    assert back["hold"] == lab.kvm.costs.unmap.visit_ns < there["hold"]
    # Two swaps, each with an expedited grace period of two wake-ups, around the hold.
    assert end == start + 4 * lab.kvm.costs.wakeup_ns + back["wait"] + back["hold"]


def test_a_vcpu_that_is_in_user_space_does_not_hold_a_slot_s_update_up() -> None:
    lab = Lab(MIB)

    class Long(Pause):
        def spend(self, vcpu: Vcpu, t_ns: int) -> Generator[Event, Any, int]:
            return (yield from reach(lab.env, t_ns + 10**9))

    lab.vcpus[0]._chunks = iter([Long()])
    lab.kvm.vcpus.append(lab.vcpus[0])
    lab.vcpus[0].process = lab.env.process(lab.vcpus[0].run())
    end = lab.run(MemslotUpdate(lab.kvm, lab.task).delete(1000))
    assert end < 10**6


def test_the_vmm_decides_what_becomes_of_an_access_without_a_slot() -> None:
    lab = Lab(MIB)
    lab.run(MemslotUpdate(lab.kvm, lab.task).delete(0))
    asked: list[tuple[int, int]] = []

    def ignore(vcpu: Vcpu, t_ns: int) -> int:
        asked.append((vcpu.index, t_ns))
        vcpu.pass_over()
        return t_ns + 5_000

    lab.kvm.user_exit = ignore
    vcpu = lab.touch((0, True, 0), (1, True, 0))
    lab.env.run(vcpu.process)
    assert [index for index, _ in asked] == [0, 0]
    assert vcpu.touches == 0
    assert vcpu.fault.user_exits == 2
    assert vcpu.finished_ns == asked[1][1] + 5_000
