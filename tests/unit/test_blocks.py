"""Blocks among pages: split, collapse, rights and partial unmaps keep entries and counts in step.

Rules: arch/arm64/kvm/hyp/pgtable.c, v6.12. A table's count is its entries that are not zero; the
page reference on top of that is the allocation's.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import pytest

from simkvm.kernel.costs import FreeCosts
from simkvm.kernel.geometry import Geometry
from simkvm.kernel.stage2 import AF, BLOCK, TABLE, VALID, WRITE, Stage2, TableId
from simkvm.kernel.table_free import COLLAPSE
from simkvm.kernel.unmap import UnmapCosts, UnmapWalk
from simkvm.units import GIB, KIB, MIB


def tree(memory: int = 8 * MIB, block: int = 2 * MIB, page: int = 4 * KIB) -> Stage2:
    return Stage2(Geometry(page, 40), 0, memory // page, page, block)


def counts(stage2: Stage2, level: int) -> list[int]:
    return stage2.levels[level].counts.tolist()


def unmap(stage2: Stage2, first: int, last: int) -> UnmapWalk:
    return UnmapWalk(stage2, first, last, UnmapCosts(1, 10, 100, 1000, 10_000, 100_000, 10**6, 7))


# -- blocks ---------------------------------------------------------------------------------------


def test_a_block_needs_only_the_tables_above() -> None:
    stage2 = tree()
    made = stage2.map_block(5, WRITE)
    assert made == [TableId(2, 0, 1)]
    assert counts(stage2, 2) == [1]
    assert counts(stage2, 3) == [0] * 4
    assert stage2.linked_tables == 1
    assert (stage2.leaf.entries[:512] == VALID | AF | WRITE | BLOCK).all()
    assert not stage2.leaf.entries[512:].any()
    assert stage2.young(0, 512).all(), "accessed, all of it"
    assert stage2.path(5) == [TableId(2, 0, 1)]


def test_a_block_of_1_gib_hangs_from_the_root() -> None:
    stage2 = tree(2 * GIB, GIB)
    assert stage2.map_block(600, 0) == []
    assert counts(stage2, 1) == [1]
    assert stage2.block_span(300_000) == (262_144, 524_288)
    assert not stage2.is_block(262_144)


def test_a_split_by_a_fault_leaves_the_others_to_fault_back() -> None:
    """Break, install an empty table, fill in one page."""
    stage2 = tree()
    stage2.map_block(0, 0)
    stage2.break_block(7)
    assert counts(stage2, 2) == [0]
    assert stage2.map_leaf(7, WRITE) == [TableId(3, 0, 1)]
    assert counts(stage2, 2) == [1]
    assert counts(stage2, 3) == [1, 0, 0, 0]
    assert np.flatnonzero(stage2.leaf.entries).tolist() == [7]
    assert stage2.linked_tables == 2


@pytest.mark.parametrize("rights", [0, WRITE])
def test_an_eager_split_keeps_all_pages_and_their_rights(rights: int) -> None:
    stage2 = tree()
    stage2.map_block(0, rights)
    assert stage2.fill_block(3) == [TableId(3, 0, 1)]
    assert (counts(stage2, 2), counts(stage2, 3)) == ([1], [512, 0, 0, 0])
    assert (stage2.leaf.entries[:512] == VALID | AF | rights).all()


def test_an_eager_split_of_1_gib_makes_513_tables() -> None:
    stage2 = tree(GIB, GIB)
    stage2.map_block(0, WRITE)
    made = stage2.fill_block(0)
    assert len(made) == stage2.linked_tables == 513
    assert made[0] == TableId(2, 0, 1)
    assert counts(stage2, 2) == [512]
    assert counts(stage2, 3) == [512] * 512
    assert counts(stage2, 1) == [1]


def test_collapse_keeps_the_holders_count() -> None:
    """-1 for the table, +1 for the block."""
    stage2 = tree()
    for leaf in (0, 9, 600):
        stage2.map_leaf(leaf, WRITE)
    assert stage2.subtree(100) == ([TableId(3, 0, 1)], 2)
    stage2.collapse(100, WRITE)
    assert counts(stage2, 2) == [2]
    assert counts(stage2, 3) == [0, 1, 0, 0]
    assert stage2.linked_tables == 2
    assert stage2.is_block(511)
    assert not stage2.is_block(600)
    assert stage2.entries_in(TableId(3, 0, 1)) == 0, "shadows are no entries"
    # What hangs there next is another table.
    assert stage2.fill_block(0) == [TableId(3, 0, 2)]


def test_a_subtree_of_1_gib_goes_children_first() -> None:
    stage2 = tree(GIB, GIB)
    for leaf in (0, 1, 512, 5000):
        stage2.map_leaf(leaf, 0)
    tables, entries = stage2.subtree(0)
    assert tables == [*(TableId(3, n, 1) for n in (0, 1, 9)), TableId(2, 0, 1)]
    assert entries == 4 + 3
    stage2.collapse(0, 0)
    assert stage2.linked_tables == 0
    assert counts(stage2, 1) == [1]
    assert not stage2.levels[2].entries.any()


# -- unmapping ------------------------------------------------------------------------------------


def test_a_partial_unmap_removes_the_block_whole() -> None:
    stage2 = tree()
    stage2.map_block(0, WRITE)
    stage2.map_block(512, WRITE)
    walk = unmap(stage2, 500, 501)
    assert (walk.visits, walk.leaves, walk.pages, walk.tables) == (2, 1, 512, [])
    assert not stage2.leaf.entries[:512].any()
    assert counts(stage2, 2) == [1]
    # Enter the table, visit the block, remove and flush it, look at the table's count.
    assert walk.elapsed_ns == 10 + 1 + (7 + 10_000) + 100


def test_the_last_block_takes_its_table_along() -> None:
    stage2 = tree()
    stage2.map_block(0, WRITE)
    walk = unmap(stage2, 0, 2048)
    assert (walk.visits, walk.leaves) == (4 + 1, 1)
    assert walk.tables == [TableId(2, 0, 1)]
    assert stage2.linked_tables == 0


def test_blocks_tables_and_holes_side_by_side() -> None:
    """A block and a hole are one visit each, a table all of its entries and one for itself."""
    stage2 = tree()
    stage2.map_block(0, WRITE)
    stage2.map_leaf(512, 0)
    walk = unmap(stage2, 0, 2048)
    assert walk.visits == 1 + (512 + 1) + 1 + 1 + 1
    assert (walk.leaves, walk.pages) == (2, 513)
    assert walk.tables == [TableId(3, 1, 1), TableId(2, 0, 1)]


# -- rights ---------------------------------------------------------------------------------------


def test_write_protection_of_a_part_takes_the_whole_blocks_right() -> None:
    stage2 = tree()
    stage2.map_block(0, WRITE)
    stage2.map_block(512, WRITE)
    assert stage2.write_protect(10, 11) == (1, 1)
    assert not (stage2.leaf.entries[:512] & WRITE).any()
    assert (stage2.leaf.entries[512:1024] & WRITE).all()
    assert stage2.blocks is not None
    assert stage2.blocks.entries.tolist() == [VALID, VALID | WRITE, 0, 0]
    stage2.allow_write(300)
    assert (stage2.leaf.entries[:512] & WRITE).all()
    assert stage2.blocks.entries[0] == VALID | WRITE


def test_write_protection_by_words_is_write_protection_of_each() -> None:
    """Random trees: the arrays do what one walk after the other does."""
    dice = np.random.default_rng(5)
    for _ in range(50):
        one, other = tree(), tree()
        for leaf in dice.integers(0, 2048, 300).tolist():
            right = WRITE * int(dice.integers(2))
            for stage2 in (one, other):
                if leaf < 512 and not stage2.is_block(0):
                    stage2.map_block(0, WRITE)
                elif leaf >= 512:
                    stage2.map_leaf(leaf, right)
        words = np.flatnonzero(dice.random(32) < 0.4)
        if not len(words):
            continue
        lows = 64 * words + dice.integers(0, 40, len(words))
        highs = lows + dice.integers(1, 24, len(words))
        each = [
            one.write_protect(*span) for span in zip(lows.tolist(), highs.tolist(), strict=True)
        ]
        total = tuple(map(sum, zip(*each, strict=True)))
        assert other.write_protect_words(lows, highs) == total
        assert np.array_equal(one.leaf.entries, other.leaf.entries)
        assert np.array_equal(one.levels[2].entries, other.levels[2].entries)


def test_a_walk_visits_a_hole_once_whatever_it_spans() -> None:
    stage2 = tree(3 * GIB)
    assert stage2.leaf_visits(0, stage2._pages) == 3, "holes of 1 GiB at the root"
    stage2.map_block(0, 0)
    assert stage2.leaf_visits(0, stage2._pages) == 512 + 2
    stage2.map_leaf(512, 0)
    assert stage2.leaf_visits(0, stage2._pages) == 511 + 512 + 2
    assert stage2.leaf_visits(500, 600) == 1 + 88
    huge = tree(2 * GIB, GIB)
    huge.map_block(0, 0)
    assert huge.leaf_visits(0, huge._pages) == 2
    assert huge.leaf_visits(100, 5000) == 1


# -- the free policies of a collapse --------------------------------------------------------------


class Guest:
    """What a policy needs, writing down what it is told."""

    entries = 512
    free_costs = FreeCosts(free_ns=11, call_rcu_ns=13, callback_ns=17, visit_ns=3, count_test_ns=19)

    def __init__(self) -> None:
        self.reported: list[int] = []
        self.freed: list[tuple[TableId, bool]] = []
        self.queued: list[tuple[list[TableId], Callable[[int], int]]] = []
        self.lost: list[TableId] = []

    def table_reported_free(self, t_ns: int) -> None:
        self.reported.append(t_ns)

    def table_freed(self, table: TableId, t_ns: int, deferred: bool) -> None:
        self.freed.append((table, deferred))

    def call_rcu(self, t_ns: int, cpu: int, table: TableId) -> None:
        raise AssertionError

    def call_rcu_for(
        self, t_ns: int, cpu: int, tables: Sequence[TableId], callback: Callable[[int], int]
    ) -> None:
        self.queued.append((list(tables), callback))

    def leaked(self, table: TableId, t_ns: int) -> None:
        self.lost.append(table)


ONE = [TableId(3, 4, 1)]
MANY = [*(TableId(3, n, 1) for n in range(512)), TableId(2, 0, 1)]


def told(policy: str, tables: list[TableId]) -> tuple[Guest, int]:
    """The guest after an unlink, and what that costs under the lock."""
    guest, free = Guest(), COLLAPSE[policy]()
    free.unlinked(guest, tables, 100, 2)
    return guest, free.under_lock_ns(guest.free_costs, len(tables), 512 * len(tables))


@pytest.mark.parametrize("tables", [ONE, MANY])
def test_a_subtree_has_one_callback_that_visits_all_its_entries(tables: list[TableId]) -> None:
    guest, under_lock_ns = told("subtree", tables)
    assert under_lock_ns == 13
    ((queued, callback),) = guest.queued
    assert queued == tables
    assert not guest.freed
    assert callback(900) == len(tables) * (512 * 3 + 17)
    assert guest.freed == [(table, True) for table in tables]
    assert guest.reported == [900] * len(tables)


@pytest.mark.parametrize("tables", [ONE, MANY])
def test_the_leak_is_one_page_a_collapse(tables: list[TableId]) -> None:
    guest, _ = told("subtree_leak", tables)
    ((_, callback),) = guest.queued
    callback(900)
    assert guest.lost == tables[-1:]
    assert [table for table, _ in guest.freed] == tables[:-1]


def test_per_table_walks_at_once_and_has_a_callback_each() -> None:
    guest, under_lock_ns = told("per_table", MANY)
    assert under_lock_ns == 513 * (512 * 3 + 13)
    assert [tables for tables, _ in guest.queued] == [[table] for table in reversed(MANY)]
    assert guest.queued[0][1](900) == 17
    assert guest.freed == [(MANY[-1], True)]
    assert guest.reported == [100] * 513


def test_inline_frees_at_once() -> None:
    guest, under_lock_ns = told("inline", ONE)
    assert under_lock_ns == 512 * 3 + 11
    assert guest.freed == [(ONE[0], False)]
    assert not guest.queued


def test_tables_are_marked_as_such() -> None:
    stage2 = tree()
    stage2.map_leaf(0, 0)
    assert stage2.table_below(511)
    assert not stage2.table_below(512)
    assert stage2.levels[2].entries[0] == TABLE
