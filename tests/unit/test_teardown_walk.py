"""The forms of the walk that frees a tree, and two ends of one VM at once.

Source: arch/arm64/kvm/mmu.c (kvm_stage2_destroy, stage2_destroy_range, kvm_uninit_stage2_mmu) and
arch/arm64/kvm/hyp/pgtable.c (stage2_free_walker), v6.12 and the postings named below.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from lab import Lab, fill_sparsely, world
from worlds import journal

from simkvm.kernel.stage2 import WRITE, TableId
from simkvm.kernel.teardown_walk import WALKS
from simkvm.units import GIB, KIB, MIB

CHUNKED = ["chunked", "chunked_whole_range"]
US = 1_000


def lab(walk: str, memory: int = 16 * MIB, machine: str = "graviton3-64c", **guest: Any) -> Lab:
    return Lab(
        memory,
        guest,
        machine=machine,
        kernel={"base": "linux-6.12", "set": {"teardown_walk": walk}},
    )


def freed(made: Lab) -> list[tuple[TableId, int]]:
    """Tables in the order in which the end of the VM frees them, each with its time."""
    told: list[tuple[TableId, int]] = []
    done = made.kvm.table_freed

    def table_freed(table: TableId, t_ns: int, deferred: bool) -> None:
        told.append((table, t_ns))
        done(table, t_ns, deferred)

    made.kvm.table_freed = table_freed  # type: ignore[method-assign]
    made.destroy()
    return told


# -- what every form does --------------------------------------------------------------------------


@pytest.mark.parametrize("walk", CHUNKED)
@pytest.mark.parametrize(
    ("page", "bits", "mapping"),
    [
        (4 * KIB, 32, 4 * KIB),
        (4 * KIB, 40, 4 * KIB),
        (4 * KIB, 40, 2 * MIB),
        (4 * KIB, 48, GIB),
        (4 * KIB, 48, 4 * KIB),
        (16 * KIB, 40, 16 * KIB),
        (16 * KIB, 48, 16 * KIB),
        (16 * KIB, 52, 32 * MIB),
        (64 * KIB, 48, 64 * KIB),
    ],
)
def test_chunks_free_what_one_walk_frees(walk: str, page: int, bits: int, mapping: int) -> None:
    keys = {"page_size": page, "ipa_bits": bits, "mapping": mapping, "mapped": True}
    once, cut = (lab(form, 2 * GIB, **keys) for form in ("single", walk))
    tables = freed(cut)
    assert [table for table, _ in tables] == [table for table, _ in freed(once)]
    times = [t_ns for _, t_ns in tables]
    assert times == sorted(times)
    assert not cut.kvm.oracle.violations
    end = int(cut.env.now)
    assert cut.world.memory.timeline(end)["table_bytes"][-1] == 0
    cut.kvm.oracle.finished(end)
    assert not cut.kvm.oracle.violations


def test_a_root_above_the_chunks_is_walked_once_in_all() -> None:
    """40 bits: an entry of the root is a chunk, so all chunks together look at it once."""
    once, cut = (lab(form, 2 * GIB, mapped=True).destroy() for form in ("single", "chunked"))
    assert cut.visits == once.visits


# -- what empty chunks cost ------------------------------------------------------------------------


def test_the_cost_of_an_empty_address_space() -> None:
    """48 bits are 2^18 chunks of 1 GiB; one page lies in the second of them."""
    made = lab("chunked", ipa_bits=48)
    made.fill([0])
    teardown = made.destroy()
    costs = made.kvm.costs
    visit, resched = costs.unmap.visit_ns, costs.ageing.resched_ns
    put, free, descend = costs.line.same_ns, costs.free.free_ns, costs.unmap.descend_ns
    first = 2 * visit + descend + costs.unmap.table_visit_ns  # empty, but level 1 is shared
    table = 512 * visit + descend + put + free
    second = 2 * visit + descend + 2 * table + put  # down, levels 3 and 2, the entry's put
    second += costs.unmap.table_visit_ns + put + free  # and level 1 is empty now
    others = (2**18 - 2) * visit
    expected = first + second + others + (2**18 - 1) * resched + free
    assert teardown.walk_ns == expected
    assert teardown.visits == 2 + 2 + 2 * 512 + 2**18 - 2
    assert teardown.longest_ns == second


def test_empty_chunks_cost_by_their_number_and_no_event() -> None:
    ends = {bits: lab("chunked", ipa_bits=bits) for bits in (46, 47, 48)}
    for made in ends.values():
        made.fill([0])
    before = {bits: repr(made.env._eid) for bits, made in ends.items()}
    took = {bits: made.destroy().walk_ns for bits, made in ends.items()}
    assert took[48] - took[47] == 2 * (took[47] - took[46])
    assert len(set(before.values())) == 1
    assert len({repr(made.env._eid) for made in ends.values()}) == 1


def test_a_sweep_of_all_addresses_takes_minutes_however_small_the_vm() -> None:
    """Some 140 s on an Ampere Altra (CAJHc60wBNTP9SSt_skEXXv9N+tF_1RoV6vcQQx4hWphJF6EmkQ)."""
    made = lab("chunked_whole_range", machine="ampere-altra-80c")
    made.fill([0])
    teardown = made.destroy()
    costs = made.kvm.costs
    each = costs.unmap.visit_ns + costs.ageing.resched_ns
    assert teardown.walk_ns == pytest.approx(2**34 * each, rel=1e-5)
    assert 140e9 / 2 < teardown.walk_ns < 140e9 * 2


def test_one_walk_of_a_large_vm_keeps_a_cpu_for_long() -> None:
    """More than 100 ms for 128 GB (20250724235144.2428795-1-rananta@google.com)."""
    teardown = lab("single", 128 * GIB, "ampere-altra-80c", mapped=True).destroy()
    assert 100e6 < teardown.longest_ns < 1000e6
    assert teardown.longest_ns > 0.999 * teardown.walk_ns


def test_a_chunk_keeps_it_for_one_largest_block() -> None:
    once, cut = (lab(form, 3 * GIB, mapped=True).destroy() for form in ("single", "chunked"))
    assert once.longest_ns / cut.longest_ns == pytest.approx(3, rel=0.01)


# -- the form of August 2025 -----------------------------------------------------------------------


def test_what_the_first_form_in_chunks_does_to_page_counts() -> None:
    """48 bits: the level-1 table has one entry, so its page count is 2; so is the root's.

    The first chunk is empty, yet its visit of the table puts both. The second puts the table for
    the entry that it frees, which is its last reference; then the visit of the table puts the root
    for the last time, and the table once too often. The third reads both.
    """
    made = lab("chunked_early", 8 * MIB, ipa_bits=48)
    made.fill()
    made.destroy()
    found = made.kvm.oracle.violations
    table = "L1 table 0 (incarnation 1)"
    assert [(v.kind, v.message) for v in found[:3]] == [
        ("double_free", f"{table} was free already"),
        ("use_after_free", "teardown reads the root after its page was freed"),
        ("use_after_free", f"teardown reads {table} after its page was freed"),
    ]
    assert [v.time_ns for v in found] == sorted(v.time_ns for v in found)
    told = [line.partition(": ")[2] for line in found[2].timeline]
    assert told == [f"{table} linked", f"{table} freed", f"use_after_free: {found[2].message}"]


def test_a_table_with_more_chunks_lives_a_little_longer() -> None:
    """Two references go with each chunk that has something: of 6 + 1 the fourth takes the last."""
    made = lab("chunked_early", 6 * GIB, ipa_bits=48)
    fill_sparsely(made, GIB)
    tables = freed(made)
    order = [table for table, _ in tables]
    assert [table.level for table in order] == [3, 2, 3, 2, 3, 2, 1, 3, 2, 3, 2, 3, 2]


@pytest.mark.parametrize("page", [4 * KIB, 16 * KIB, 64 * KIB])
def test_it_needs_a_table_that_chunks_share(page: int) -> None:
    """With 40 bits, KVM's default, a chunk has all tables below the root to itself."""
    made = lab("chunked_early", GIB, page_size=page, ipa_bits=40)
    fill_sparsely(made, 32 * MIB)
    made.destroy()
    made.kvm.oracle.finished(int(made.env.now))
    assert not made.kvm.oracle.violations


# -- two ends at once ------------------------------------------------------------------------------


def both(close_at: int, split_cache: int = 64, **policies: str) -> list[str]:
    """Messages of the violations when the owner exits at 1 ms and another closes ``close_at``."""
    end = {"order": "both", "at": 1000 * US, "close_at": close_at, "split_cache": split_cache}
    built = world(
        kernel={"base": "linux-6.12", "set": policies},
        guest={"memory": 256 * KIB, "teardown": end},
        duration=3000 * US,
    )
    with journal() as notes:
        record = built.run()
    assert all(teardown.done for teardown in built.teardowns)
    assert len(notes.roots_freed) == 1, "one of the two finds the root"
    assert record.summary["tables_freed"] == record.summary["tables_allocated"] == 2
    assert not built.kvms[0].notifier.subscribed
    return [violation.message for violation in built.kvms[0].oracle.violations]


CLOSE = range(1000 * US, 1016 * US, 1 * US)


def test_two_ends_free_the_split_cache_twice() -> None:
    """kvm_arch_flush_shadow_all() under SRCU only (20260504224213.1049426-1-jthoughton)."""
    found = {at: both(at) for at in CLOSE}
    assert any(found.values())
    for messages in found.values():
        assert all("split cache, which is free" in message for message in messages)
    assert not both(2000 * US), "long after the first"


def test_mmu_lock_around_the_flush_is_enough() -> None:
    for at in CLOSE:
        assert not both(at, flush_shadow="mmu_lock")


def test_a_cache_that_was_never_filled_cannot_be_freed_twice() -> None:
    for at in CLOSE:
        assert not both(at, split_cache=0)


def test_who_destroys_the_vm_frees_alone() -> None:
    """After unregistering, the hook is empty and only the last reference's owner frees."""
    for at in CLOSE:
        assert not both(at, root_free="after_unregister")


def test_under_the_lock_it_is_held_for_the_whole_walk() -> None:
    """What the proposal costs: mmu_lock is held while the tree is walked, chunks or not."""
    policies = {"flush_shadow": "mmu_lock", "teardown_walk": "chunked"}
    made = Lab(16 * MIB, kernel={"base": "linux-6.12", "set": policies})
    made.fill()
    teardown = made.destroy()
    (row,) = made.lock_rows("teardown")
    assert row["hold"] == made.kvm.costs.unmap.bookkeeping_ns + teardown.walk_ns
    assert teardown.longest_ns == teardown.walk_ns


# -- a VM that begins mapped -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("page", "memory", "base"), [(4 * KIB, 10 * MIB + 12 * KIB, GIB), (16 * KIB, 64 * MIB, 0)]
)
def test_mapped_is_as_if_every_page_had_been_written_to(page: int, memory: int, base: int) -> None:
    keys = {"page_size": page, "ipa_base": base, "ipa_bits": 44}
    begun, filled = lab("single", memory, **keys, mapped=True), lab("single", memory, **keys)
    filled.fill()
    a, b = begun.kvm, filled.kvm
    for number, level in a.stage2.levels.items():
        other = b.stage2.levels[number]
        for column in ("entries", "counts", "incarnations"):
            assert np.array_equal(getattr(level, column), getattr(other, column))
    assert a.stage2.leaf.entries[0] & WRITE
    assert a.stage2.linked_tables == b.stage2.linked_tables
    assert a.tables_allocated == b.tables_allocated
    assert np.array_equal(a.host.state, b.host.state)
    assert a.host.present == b.host.present
    assert a.host.lru.sizes == b.host.lru.sizes


def test_every_form_is_a_policy() -> None:
    from simkvm.scenario.kernel import POLICIES

    assert set(POLICIES["teardown_walk"]) == {*WALKS, "zap_roots"}
