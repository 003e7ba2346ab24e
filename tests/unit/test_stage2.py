"""The stage-2 table: which tables exist, what they count, what ageing sees.

Source of the rules: arch/arm64/kvm/hyp/pgtable.c, v6.12.
"""

from __future__ import annotations

import numpy as np
import pytest

from simkvm.kernel.geometry import Geometry
from simkvm.kernel.stage2 import AF, TABLE, VALID, WRITE, Stage2, TableId
from simkvm.kernel.unmap import UnmapCosts, UnmapWalk

K, M, G = 1 << 10, 1 << 20, 1 << 30
FREE = UnmapCosts(0, 0, 0, 0, 0, 0, 0)


def stage2(
    memory: int, base: int = G, page: int = 4 * K, bits: int = 40, mapping: int = 0
) -> Stage2:
    return Stage2(Geometry(page, bits), base, memory // page, mapping or page)


def recount(tree: Stage2) -> None:
    """What the rules say about every table, from the entries alone."""
    tables = 0
    for level in tree.levels.values():
        used = np.flatnonzero(level.entries)
        holders = (used + level.phase) >> tree.geometry.index_bits
        counted = np.bincount(holders, minlength=len(level.counts))
        np.testing.assert_array_equal(counted, level.counts)
    for upper, lower, _, _ in tree.steps:
        linked = (upper.entries & TABLE) != 0
        tables += int(linked.sum())
        assert not lower.counts[: len(linked)][~linked].any(), "entries in no table"
    assert tables == tree.linked_tables == len(tree.all_tables())


# -- mapping ----------------------------------------------------------------------------------


def test_the_first_leaf_brings_a_table_for_each_level_top_down() -> None:
    """stage2_map_walk_leaf(): allocate, install, descend, once a level."""
    tree = stage2(2 * G, bits=48)
    assert tree.missing(5) == 3
    assert tree.map_leaf(5, WRITE) == [TableId(1, 0, 1), TableId(2, 0, 1), TableId(3, 0, 1)]
    assert tree.missing(5) == tree.missing(6) == 0
    assert not tree.map_leaf(6, WRITE)
    assert tree.missing(512) == 1
    assert tree.map_leaf(512, 0) == [TableId(3, 1, 1)]
    assert tree.map_leaf(262144, 0) == [TableId(2, 1, 1), TableId(3, 512, 1)]
    assert tree.linked_tables == 6
    recount(tree)


@pytest.mark.parametrize(
    ("page", "bits", "mapping", "memory", "tables"),
    [
        (4 * K, 40, 4 * K, 32 * M, 16 + 1),
        (4 * K, 32, 4 * K, 32 * M, 16),
        (4 * K, 48, 4 * K, 32 * M, 16 + 1 + 1),
        (4 * K, 40, 2 * M, 64 * M, 1),
        (4 * K, 40, G, 4 * G, 0),
        (4 * K, 44, G, 4 * G, 1),
        (16 * K, 40, 16 * K, 64 * M, 2),
        (16 * K, 40, 32 * M, 64 * M, 0),
        (64 * K, 40, 64 * K, G, 2),
        (64 * K, 48, 64 * K, G, 3),
    ],
)
def test_tables_of_a_full_guest(
    page: int, bits: int, mapping: int, memory: int, tables: int
) -> None:
    tree = stage2(memory, 0, page, bits, mapping)
    made = [table for leaf in range(memory // mapping) for table in tree.map_leaf(leaf, 0) or ()]
    assert len(made) == len(set(made)) == tree.linked_tables == tables
    recount(tree)


def test_a_new_leaf_is_accessed_and_counted_once() -> None:
    """kvm_init_stage2 attributes set AF; stage2_pte_is_counted() counts what is not zero."""
    tree = stage2(4 * M)
    tree.map_leaf(3, 0)
    assert tree.leaf.entries[3] == VALID | AF
    tree.map_leaf(3, WRITE)
    assert tree.leaf.entries[3] == VALID | AF | WRITE
    assert tree.leaf.counts[0] == 1
    recount(tree)


def test_a_table_that_hangs_again_is_another_table() -> None:
    tree = stage2(4 * M)
    tree.map_leaf(0, 0)
    UnmapWalk(tree, 0, 1, FREE)
    assert tree.path(0) == []
    assert tree.map_leaf(0, 0) == [TableId(2, 0, 2), TableId(3, 0, 2)]
    assert tree.path(0) == [TableId(2, 0, 2), TableId(3, 0, 2)]


def test_a_path_ends_where_nothing_hangs() -> None:
    tree = stage2(2 * G)
    tree.map_leaf(0, 0)
    assert tree.path(0) == [TableId(2, 0, 1), TableId(3, 0, 1)]
    assert tree.path(512) == [TableId(2, 0, 1)]
    assert tree.path(262144) == []
    assert tree.places(262144) == [(2, 1), (3, 512)]
    assert tree.table_linked(0)
    assert not tree.table_linked(1)


# -- where the slot begins --------------------------------------------------------------------


@pytest.mark.parametrize("offset", [0, 4 * K, M, 2 * M - 4 * K])
def test_tables_lie_at_guest_physical_addresses(offset: int) -> None:
    """A slot that begins inside a table's span shares that table with nobody, but cuts it there."""
    tree = stage2(4 * M, base=G + offset)
    leaves = 4 * M // (4 * K)
    for leaf in range(leaves):
        tree.map_leaf(leaf, 0)
    cut = (-offset % (2 * M)) // (4 * K) or 512
    assert tree.leaf_table(cut - 1) == 0
    assert tree.leaf_table(cut) == 1
    assert tree.leaf.counts[0] == cut
    assert len(tree.leaf.counts) == (3 if offset else 2)
    recount(tree)


def test_a_slot_across_the_borders_of_all_levels() -> None:
    tree = stage2(8 * M, base=512 * G - 4 * M, bits=48)
    for leaf in range(8 * M // (4 * K)):
        tree.map_leaf(leaf, 0)
    assert [level.counts.tolist() for level in tree.levels.values()] == [
        [2],
        [1, 1],
        [2, 2],
        [512] * 4,
    ]
    assert tree.linked_tables == 2 + 2 + 4


def test_leaves_and_pages() -> None:
    """With blocks, a page belongs to the block around its guest-physical address."""
    tree = stage2(8 * M, base=G, mapping=2 * M)
    assert [tree.leaf_of(page) for page in (0, 511, 512, 2047)] == [0, 0, 1, 3]
    pages = np.arange(2048)
    assert tree.leaves_of(pages).tolist() == [tree.leaf_of(page) for page in range(2048)]


def test_where_a_table_ends() -> None:
    """In leaves of the guest-physical space, as the walk of a destroyed tree needs it."""
    tree = stage2(4 * M, base=G)
    tree.map_leaf(0, 0)
    assert tree.end_of(TableId(3, 0, 1)) == G // (4 * K) + 512
    assert tree.end_of(TableId(3, 1, 1)) == G // (4 * K) + 1024
    assert tree.end_of(TableId(2, 0, 1)) == 2 * G // (4 * K)
    with pytest.raises(ValueError, match="level 1"):
        tree.end_of(TableId(1, 0, 1))


# -- ageing -----------------------------------------------------------------------------------


def test_a_test_leaves_the_flag_and_a_clear_takes_it() -> None:
    """stage2_age_walker(): nothing but AF changes, and only in a valid leaf."""
    tree = stage2(4 * M)
    tree.map_leaf(7, WRITE)
    assert tree.test_clear_young(7, clear=False)
    assert tree.test_clear_young(7)
    assert not tree.test_clear_young(7)
    assert tree.leaf.entries[7] == VALID | WRITE
    assert not tree.test_clear_young(8), "nothing mapped"
    tree.leaf.entries[9] = AF
    assert not tree.test_clear_young(9), "AF of an invalid entry means something else"
    assert tree.leaf.entries[9] == AF


def test_many_at_once() -> None:
    tree = stage2(4 * M)
    for leaf in (1, 2, 5):
        tree.map_leaf(leaf, WRITE)
    tree.leaf.entries[6] = AF
    assert np.flatnonzero(tree.young(0, 10)).tolist() == [1, 2, 5]
    assert tree.young(2, 4).tolist() == [True, False]
    tree.clear_young(np.array([2, 5]))
    assert np.flatnonzero(tree.young(0, 10)).tolist() == [1]
    assert tree.leaf.entries[5] == VALID | WRITE


# -- the whole --------------------------------------------------------------------------------


def test_all_tables_children_before_parents() -> None:
    tree = stage2(4 * G, bits=48)
    for leaf in (0, 512, 262144):
        tree.map_leaf(leaf, 0)
    tables = tree.all_tables()
    assert [table.level for table in tables] == [3, 3, 3, 2, 2, 1]
    assert {(t.level, t.index) for t in tables} == {
        (1, 0),
        (2, 0),
        (2, 1),
        (3, 0),
        (3, 1),
        (3, 512),
    }


def test_a_destroyed_tree_is_empty() -> None:
    tree = stage2(4 * M)
    tree.map_leaf(0, 0)
    tree.clear()
    assert not tree.all_tables()
    assert not tree.young(0, 1024).any()
    recount(tree)


def test_a_large_guest_is_small_in_memory() -> None:
    """256 GiB in 4 KiB pages: one byte a page and some for the tables."""
    tree = stage2(256 * G)
    held = sum(
        level.entries.nbytes + level.counts.nbytes + level.incarnations.nbytes
        for level in tree.levels.values()
    )
    assert held < 70 * M
