"""What must hold whatever happens: each rule looks at a guest's state, or at what was told.

State is looked at between two events. There the work of a critical section is already done as a
whole although its time may lie a little ahead, so what depends on *when* is checked on what was
told, with its times.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from itertools import pairwise

import numpy as np
from worlds import Acquisition, Journal

from simkvm.kernel.fault import CACHE_CAPACITY
from simkvm.kernel.host_memory import MIGRATION, OWN, PRESENT
from simkvm.kernel.kvm import Kvm
from simkvm.kernel.mglru import MAX_NR_GENS, MIN_NR_GENS
from simkvm.kernel.qrwlock import FAST
from simkvm.kernel.rcu import Rcu
from simkvm.kernel.rmap import WITHOUT_MMU_LOCK
from simkvm.kernel.sites import AGE, RANGE_END, RANGE_START
from simkvm.kernel.stage2 import AF, BLOCK, TABLE, VALID, WRITE, Stage2, TableId

# -- the stage-2 tree, between two events ---------------------------------------------------------


def counts_are_entries(stage2: Stage2) -> None:
    """The count of every table is the number of its entries that are not zero."""
    for level in stage2.levels.values():
        edges = np.arange(len(level.counts)) * stage2.geometry.entries - level.phase
        real = (level.entries != 0) & ((level.entries & BLOCK) == 0)
        entries = np.add.reduceat(real, np.maximum(edges, 0), dtype=np.int32)
        assert np.array_equal(level.counts, entries), f"level {level.number}"


def tree_hangs_together(stage2: Stage2, keeps: bool = False) -> None:
    """What holds entries is linked, by one entry; what is linked holds entries; the root stays.

    ``keeps``: unmap leaves empty tables where they are.
    """
    tables = 0
    for upper, lower, _, _ in stage2.steps:
        linked = (upper.entries & TABLE) != 0
        assert len(linked) == len(lower.counts), "one entry above for each table"
        assert linked[lower.counts > 0].all(), f"level {lower.number}"
        assert keeps or (lower.counts[linked] > 0).all(), f"level {lower.number}"
        assert not (upper.entries & VALID)[linked].any(), "an entry is a table or a leaf"
        tables += int(linked.sum())
    assert stage2.linked_tables == tables


def shadows_agree_with_blocks(stage2: Stage2) -> None:
    """A block's flags stand in the place of each of its leaves, and nowhere else; no table hangs.

    Its accessed flag stands at any of them.
    """
    if stage2.blocks is None:
        assert not (stage2.leaf.entries & BLOCK).any()
        return
    blocks = stage2.blocks.entries
    above = np.repeat(blocks, stage2.block_leaves)[: len(stage2.leaf.entries)]
    shadow = stage2.leaf.entries & np.uint8(~AF & 0xFF)
    mapped = (above & VALID) != 0
    assert np.array_equal(shadow[mapped], (above[mapped] & np.uint8(~AF & 0xFF)) | BLOCK)
    assert not (shadow[~mapped] & BLOCK).any()
    valid = (stage2.leaf.entries & VALID) != 0
    for upper, _, down, phase in stage2.steps[-1:]:
        linked = (upper.entries[(np.arange(len(valid)) + phase) >> down] & TABLE) != 0
        assert not (valid & ~mapped & ~linked).any(), "a leaf without a table"
        assert not (mapped & linked).any(), "a table under a block"


def a_block_has_one_flag(kvm: Kvm) -> None:
    """Where software sets and clears the accessed flag, it does so for a block as a whole."""
    stage2 = kvm.stage2
    if not kvm.software_af or stage2.blocks is None:
        return
    entries, first = stage2.leaf.entries, np.arange(len(stage2.leaf.entries))
    first -= first % stage2.block_leaves
    mapped = (entries & BLOCK) != 0
    assert not ((entries ^ entries[first]) & AF)[mapped].any()


def blocks_lie_in_huge_pages(kvm: Kvm) -> None:
    """A block maps what the host maps by a huge page, all of which is there, or on its way."""
    host, huge = kvm.host, np.repeat(kvm.host.huge, kvm.host.entries)[: kvm.leaves]
    assert ((host.state & (OWN | MIGRATION)) != 0)[huge].all()
    assert not ((host.state & MIGRATION) != 0)[(kvm.stage2.leaf.entries & BLOCK) != 0].any()
    if kvm.notifier.subscribed:
        assert not (((kvm.stage2.leaf.entries & BLOCK) != 0) & ~huge).any()


def nothing_maps_what_the_host_took(kvm: Kvm) -> None:
    """A valid leaf maps a page that the host maps, for writing only one that is the guest's own."""
    entries, host = kvm.stage2.leaf.entries, kvm.host.state
    if not kvm.notifier.subscribed:
        return  # the tree may outlive the host's mappings; no vCPU can run then
    assert not (((entries & VALID) != 0) & ((host & PRESENT) == 0)).any()
    assert not (((entries & WRITE) != 0) & ((host & OWN) == 0)).any()


def open_ranges_stay_empty(kvm: Kvm, notes: Journal) -> None:
    """No leaf appears in a range between the start and the end of its invalidation.

    Where faults give up only within the range, one beside it may map a block that reaches into it
    until the huge page is split, for which all of it is invalidated once more.
    """
    stage2, ranged = kvm.stage2, kvm.kernel["fault_retry"] == "range"
    if (
        not notes.open_ranges(kvm.name)
        or not ((notes.open_leaves[kvm.name] > 0) & ((stage2.leaf.entries & VALID) != 0)).any()
    ):
        return
    for first, last in notes.open_ranges(kvm.name):
        there = first + np.flatnonzero(stage2.leaf.entries[first:last] & VALID)
        if ranged and len(there):
            begins = there - there % stage2.block_leaves
            within = (begins >= first) & (begins + stage2.block_leaves <= last)
            there = there[within | ((stage2.leaf.entries[there] & BLOCK) == 0)]
        assert not len(there), f"{first}..{last - 1}"


def tables_are_conserved(kvm: Kvm, rcu: Rcu, notes: Journal) -> None:
    """Allocated = linked + waiting for a callback + freed; the memory caches stand apart."""
    linked = kvm.stage2.linked_tables
    waiting = notes.tables_queued - kvm.tables_called_back
    if kvm.kernel["mmu"] == "shadow" and not kvm.alive:
        # At its end shadow pages wait on a list for the one flush.
        waiting = len(notes.unlinked) - kvm.tables_freed - kvm.tables_leaked
        assert waiting >= 0
        assert kvm.tables_allocated == linked + len(notes.unlinked)
        return
    queued = sum(len(data.callbacks) for data in rcu.per_cpu)
    if kvm.kernel["root_free"] == "zap_rcu" and not kvm.stage2.attached:
        # Among the callbacks are now that of the root, and those of rcu_barrier().
        assert linked == 0
        assert kvm.tables_freed <= kvm.tables_allocated <= kvm.tables_freed + queued
        return
    if kvm.kernel["mmu"] == "shadow" and not kvm.alive:
        # Pages that were zapped stand on a list until the flush (``kvm_mmu_commit_zap_page``).
        zapped = len(notes.unlinked)
        assert kvm.tables_allocated == linked + zapped
        assert zapped >= waiting + kvm.tables_freed
    else:
        assert kvm.tables_allocated == linked + waiting + kvm.tables_freed + kvm.tables_leaked
    assert bool(waiting) <= bool(queued)
    for vcpu in kvm.vcpus:
        assert 0 <= vcpu.fault.cached <= CACHE_CAPACITY


def host_counts_its_entries(kvm: Kvm) -> None:
    """Each host table knows how many of its entries are present."""
    edges = np.arange(0, kvm.leaves, kvm.host.entries)
    present = np.add.reduceat(((kvm.host.state & PRESENT) != 0).astype(int), edges)
    assert kvm.host.present == present.tolist()


# -- notifier and generations, between two events --------------------------------------------------


def notifier_counts(kvm: Kvm, notes: Journal) -> None:
    """Nothing is in progress less than zero times; the sequence moves by one an end."""
    assert kvm.notifier.in_progress >= 0
    assert kvm.notifier.sequence == notes.ends.get(kvm.name, 0)


def generations_hold(kvm: Kvm) -> None:
    """Two to four generations, sizes that add up to the folios that are there."""
    lru = kvm.host.lru
    assert MIN_NR_GENS <= lru.max_seq - lru.min_seq + 1 <= MAX_NR_GENS
    assert lru.min_seq <= lru.max_seq - 1
    assert min(lru.sizes) >= 0
    assert sum(lru.sizes) == np.count_nonzero(kvm.host.state & OWN)
    live = {seq % MAX_NR_GENS for seq in range(lru.min_seq, lru.max_seq + 1)}
    assert all(size == 0 for slot, size in enumerate(lru.sizes) if slot not in live)


# -- the life of tables, as told -------------------------------------------------------------------


def every_table_lives_once(notes: Journal) -> None:
    """Linked once, then unlinked at most once, then freed at most once, in that order of time."""
    born = {(told.guest, told.table): told.t_ns for told in notes.linked}
    assert len(born) == len(notes.linked), "linked again after unlink"
    gone = {(told.guest, told.table): told.t_ns for told in notes.unlinked}
    assert len(gone) == len(notes.unlinked), "unlinked twice"
    free = {(told.guest, told.table): told.t_ns for told in notes.freed}
    assert len(free) == len(notes.freed), "freed twice"
    for table, t_ns in gone.items():
        assert born[table] <= t_ns
    for table, t_ns in free.items():
        assert gone[table] <= t_ns


def children_go_first(notes: Journal, entries: int) -> None:
    """Whenever a table is unlinked, no table below it is linked."""
    linked: set[tuple[str, int, int]] = set()
    told = [(t.t_ns, 0, t) for t in notes.linked] + [(t.t_ns, 1, t) for t in notes.unlinked]
    for _, unlink, (guest, table, _) in sorted(told, key=lambda item: item[:2]):
        place = (guest, table.level, table.index)
        if not unlink:
            assert place not in linked, "two tables in one place"
            linked.add(place)
            continue
        below = table.level + 1
        first = table.index * entries
        assert not any(
            (guest, below, child) in linked for child in range(first, first + entries)
        ), f"{table} goes before what hangs from it"
        linked.discard(place)


def frees_wait_for_a_grace_period(notes: Journal, periods: list[tuple[int, int, int, int]]) -> None:
    """Every callback runs once, in order on its CPU, after a grace period that began after it."""
    starts = [start for _, start, _, _ in periods]
    last: dict[int, int] = {}
    for callback in notes.callbacks:
        assert len(callback.invoked_ns) <= 1, "invoked twice"
        for t_ns in callback.invoked_ns:
            following = bisect_left(starts, callback.queued_ns)
            assert following < len(periods), "no grace period began"
            assert periods[following][2] <= t_ns, "invoked before its grace period ended"
            assert t_ns >= last.get(callback.cpu, 0), "out of order"
            last[callback.cpu] = t_ns


def grace_periods_follow_one_another(periods: list[tuple[int, int, int, int]]) -> None:
    """Numbered without a gap; one ends before the next begins."""
    assert [row[0] for row in periods] == list(range(1, len(periods) + 1))
    assert all(start < end for _, start, end, _ in periods)
    assert all(before[2] <= after[1] for before, after in pairwise(periods))


def offences(notes: Journal) -> Counter[str]:
    """Every read of a table that spans its free, by brute force: all walks against all frees."""
    found: Counter[str] = Counter()
    free: dict[tuple[str, TableId], int] = {(t.guest, t.table): t.t_ns for t in notes.freed}
    for guest, walk in notes.walks:
        for table in walk.tables:
            t_ns = free.get((guest, table))
            if t_ns is not None and any(
                begin < t_ns < begin + walk.busy_ns
                for begin in range(walk.start_ns, walk.end_ns, walk.period_ns)
            ):
                found["use_after_free"] += 1
        found["root_freed_under_walker"] += sum(
            walk.end_ns > t_ns for freed_in, t_ns in notes.roots_freed if freed_in == guest
        )
    return +found


# -- the lock, from its account --------------------------------------------------------------------


def writers_exclude_all(rows: list[Acquisition]) -> None:
    """Between a writer's entry and its release nobody else is inside."""
    inside_until = wrote_until = 0
    for row in sorted(rows, key=lambda row: row.entry):
        assert row.wait >= 0
        assert row.hold >= 0
        blockers = inside_until if row.mode else wrote_until
        assert row.entry >= blockers, f"{row} enters while somebody is inside"
        inside_until = max(inside_until, row.release)
        if row.mode:
            wrote_until = row.release


def the_line_is_fifo(rows: list[Acquisition]) -> None:
    """Those that joined the line enter in the order in which they came."""
    joined = [row for row in rows if row.met != FAST]
    for first, second in pairwise(joined):
        assert first.arrival <= second.arrival
        assert first.entry < second.entry


def waiting_writers_shut_the_door(rows: list[Acquisition]) -> None:
    """No reader that comes while a writer is head of the line gets in before it."""
    fast = sorted(row.arrival for row in rows if row.mode == 0 and row.met == FAST)
    for row in rows:
        if row.mode == 1 and row.met == 0:
            passed = bisect_left(fast, row.entry) - bisect_left(fast, row.arrival + 1)
            assert passed == 0, f"{passed} readers overtook {row}"


def ranges_take_the_lock_twice(kvm: Kvm, rows: list[Acquisition]) -> None:
    """Each invalidation takes the lock for write: once or more to start, once to end."""
    sites = Counter(row.site for row in rows)
    assert all(row.mode == 1 for row in rows if row.site in (RANGE_START, RANGE_END))
    assert sites[RANGE_END] == kvm.notifier.sequence
    assert sites[RANGE_START] >= kvm.notifier.sequence


def ageing_locks_as_its_kernel_says(kvm: Kvm, rows: list[Acquisition]) -> None:
    """A lock-free kernel never ages under the lock; the others in their one mode.

    Where the CPU does not set the flag the series of 2023 falls back to the lock, for write.
    """
    modes = [row.mode for row in rows if row.site == AGE]
    policy = kvm.kernel["ageing_lock"]
    if policy in WITHOUT_MMU_LOCK:
        calls = kvm.young_calls
        assert len(modes) <= calls.fallback == calls.locked
        assert not calls.fallback or not kvm.test_clear_young
    else:
        assert not kvm.young_calls.lockless
        assert not kvm.young_calls.fallback
    assert set(modes) <= {0 if policy == "read" else 1}
