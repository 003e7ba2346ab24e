"""The unmap walker, step by step against a walk over tables that are plain objects.

Source: arch/arm64/kvm/hyp/pgtable.c (kvm_pgtable_walk, stage2_unmap_walker) and
arch/arm64/kvm/mmu.c (stage2_apply_range), v6.12.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import numpy as np
import pytest
from test_stage2 import recount, stage2

from simkvm.kernel.stage2 import AF, VALID, Stage2
from simkvm.kernel.unmap import UnmapCosts, UnmapWalk, chunks

K, M, G = 1 << 10, 1 << 20, 1 << 30
COSTS = UnmapCosts(
    visit_ns=1,
    descend_ns=100,
    table_visit_ns=10_000,
    leaf_ns=1_000_000,
    leaf_flush_ns=100_000_000,
    table_flush_ns=10_000_000_000,
    table_free_ns=1_000_000_000_000,
)
"""Powers of a hundred: a total shows how often each step was taken (up to 99 times)."""


def digits(elapsed_ns: int) -> tuple[int, ...]:
    """How often each step of :data:`COSTS` was taken."""
    return tuple(elapsed_ns // 100**power % 100 for power in range(7))


# -- rule by rule -----------------------------------------------------------------------------


def test_every_entry_of_a_present_table_is_visited_and_the_table_after_them() -> None:
    tree = stage2(4 * M)
    tree.map_leaf(0, 0)
    tree.map_leaf(512, 0)
    walk = UnmapWalk(tree, 0, 512, COSTS)
    assert walk.visits == 512 + 1 + 1, "the entries, their table, and the table above, still used"
    assert (walk.leaves, len(walk.tables)) == (1, 1)
    recount(tree)


def test_a_hole_is_one_visit_at_the_level_where_it_begins() -> None:
    tree = stage2(4 * G)
    assert UnmapWalk(tree, 0, 4 * G // (4 * K), COSTS).visits == 4, "four root entries of 1 GiB"
    tree.map_leaf(0, 0)
    assert UnmapWalk(tree, 512, 262144, COSTS).visits == 511 + 1, "holes of 2 MiB, then their table"


def test_one_page_in_a_present_table_is_three_visits() -> None:
    """The page, its table, the table above."""
    tree = stage2(4 * M)
    tree.map_leaf(0, 0)
    tree.map_leaf(1, 0)
    walk = UnmapWalk(tree, 0, 1, COSTS)
    assert (walk.visits, walk.leaves, walk.tables) == (3, 1, [])
    assert digits(walk.elapsed_ns) == (1, 2, 2, 1, 1, 0, 0)


def test_the_last_page_takes_its_tables_along_children_first() -> None:
    tree = stage2(4 * M, bits=48)
    tree.map_leaf(0, 0)
    walk = UnmapWalk(tree, 0, 1, COSTS)
    assert [table.level for table in walk.tables] == [3, 2, 1]
    assert digits(walk.elapsed_ns) == (1, 3, 3, 1, 1, 3, 3)
    assert tree.linked_tables == 0
    recount(tree)


def test_a_table_goes_only_when_its_count_is_one() -> None:
    """mm_ops->page_count(childp) != 1: anything counted keeps it, however little."""
    tree = stage2(4 * M)
    for leaf in range(512):
        tree.map_leaf(leaf, 0)
    assert UnmapWalk(tree, 0, 511, COSTS).tables == []
    assert len(UnmapWalk(tree, 511, 512, COSTS).tables) == 2
    recount(tree)


@pytest.mark.parametrize(("first", "last"), [(8, 9), (0, 512), (8, 1000), (0, 1024)])
def test_an_empty_table_in_the_range_is_removed_too(first: int, last: int) -> None:
    """Its count is what decides, not whether this walk removed something."""
    tree = stage2(4 * M)
    tree.map_leaf(0, 0)
    tree.leaf.entries[0] = 0
    tree.leaf.counts[0] = 0
    walk = UnmapWalk(tree, first, last, COSTS)
    assert (walk.leaves, len(walk.tables)) == (0, 2)


def test_each_table_is_unlinked_when_the_walk_leaves_it() -> None:
    tree = stage2(6 * M)
    for leaf in (0, 512, 1024):
        tree.map_leaf(leaf, 0)
    costs = replace(COSTS, visit_ns=2, descend_ns=7, leaf_flush_ns=0)
    walk = UnmapWalk(tree, 0, 1536, costs)
    each = 7 + 512 * 2 + costs.leaf_ns
    each += costs.table_visit_ns + costs.table_flush_ns + costs.table_free_ns
    leave = costs.table_visit_ns + costs.table_flush_ns + costs.table_free_ns
    expected = [7 + each, 7 + 2 * each, 7 + 3 * each, 7 + 3 * each + leave]
    assert walk.unlinked_ns == expected
    assert walk.elapsed_ns == expected[-1]


def test_an_old_leaf_and_a_read_only_one_are_removed_alike() -> None:
    tree = stage2(2 * M)
    tree.map_leaf(0, 0)
    tree.map_leaf(1, 4)
    tree.test_clear_young(0)
    assert UnmapWalk(tree, 0, 512, COSTS).leaves == 2
    assert not tree.leaf.entries.any()


# -- blocks -----------------------------------------------------------------------------------


def test_blocks_hang_one_level_higher() -> None:
    tree = stage2(64 * M, mapping=2 * M)
    for leaf in range(32):
        tree.map_leaf(leaf, 0)
    walk = UnmapWalk(tree, 0, 32, COSTS)
    assert (walk.visits, walk.leaves, len(walk.tables)) == (32 + 1, 32, 1)


def test_blocks_in_the_root_leave_no_table_to_free() -> None:
    tree = stage2(4 * G, mapping=G)
    for leaf in (0, 2):
        tree.map_leaf(leaf, 0)
    walk = UnmapWalk(tree, 0, 4, COSTS)
    assert (walk.visits, walk.leaves, walk.tables) == (4, 2, [])
    assert digits(walk.elapsed_ns) == (4, 0, 0, 2, 2, 0, 0)
    recount(tree)


# -- chunks -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("page", "chunk", "bits"), [(4 * K, G, 40), (16 * K, 32 * M, 40), (64 * K, 512 * M, 40)]
)
def test_chunks_end_at_multiples_of_the_largest_block(page: int, chunk: int, bits: int) -> None:
    """stage2_range_addr_end(): of guest-physical addresses, not of the range."""
    tree = stage2(4 * chunk, base=2 * chunk, page=page, bits=bits)
    size = chunk // page
    assert chunks(tree, 0, 4 * size) == [(n * size, (n + 1) * size) for n in range(4)]
    third = size // 4
    assert chunks(tree, third, third + size) == [(third, size), (size, size + third)]
    assert chunks(tree, 0, size) == [(0, size)]
    assert chunks(tree, size - 1, size + 1) == [(size - 1, size), (size, size + 1)]
    assert chunks(tree, 5, 6) == [(5, 6)]


def test_chunks_go_by_guest_physical_addresses_even_if_the_slot_does_not() -> None:
    tree = stage2(2 * G, base=G + 512 * M)
    half = 512 * M // (4 * K)
    assert chunks(tree, 0, 4 * half) == [(0, half), (half, 3 * half), (3 * half, 4 * half)]


def test_chunks_of_blocks_are_counted_in_blocks() -> None:
    tree = stage2(4 * G, mapping=2 * M)
    assert chunks(tree, 100, 1100) == [(100, 512), (512, 1024), (1024, 1100)]


# -- against tables that are plain objects ----------------------------------------------------


@dataclass
class Table:
    """A table of the plain walker: entries by index; a leaf is True."""

    level: int
    entries: dict[int, Table | bool] = field(default_factory=dict)


class PlainTree:
    """The walker as the kernel runs it: recursive, an entry at a time, reference counts by need."""

    def __init__(self, tree: Stage2) -> None:
        self.tree, self.geometry = tree, tree.geometry
        self.roots = Table(self.geometry.start_level)
        self.base = tree.first_leaf * tree.leaf_bytes
        self.visits = self.elapsed = self.removed = 0
        self.unlinked: list[tuple[int, int, int]] = []  # level, guest-physical start, when

    def index(self, address: int, level: int) -> int:
        above = 0 if level == self.geometry.start_level else self.geometry.span_bytes(level - 1)
        within = address % above if above else address
        return within >> self.geometry.shift(level)

    def map(self, leaf: int) -> None:
        address, table = self.base + leaf * self.tree.leaf_bytes, self.roots
        for level in range(self.geometry.start_level, self.tree.leaf_level):
            found = table.entries.setdefault(self.index(address, level), Table(level + 1))
            assert isinstance(found, Table)
            table = found
        table.entries[self.index(address, self.tree.leaf_level)] = True

    def unmap(self, first: int, last: int) -> None:
        self.visits = self.elapsed = self.removed = 0
        self.unlinked = []
        size = self.tree.leaf_bytes
        self.walk(self.roots, self.base + first * size, self.base + last * size)

    def walk(self, table: Table, start: int, end: int) -> None:
        span = self.geometry.span_bytes(table.level)
        for low in range(start - start % span, end, span):
            self.entry(table, self.index(low, table.level), max(start, low), min(end, low + span))

    def entry(self, table: Table, index: int, start: int, end: int) -> None:
        found = table.entries.get(index)
        if not isinstance(found, Table):
            self.visits += 1
            self.elapsed += COSTS.visit_ns
            if found:
                del table.entries[index]
                self.removed += 1
                self.elapsed += COSTS.leaf_ns + COSTS.leaf_flush_ns
            return
        self.elapsed += COSTS.descend_ns
        self.walk(found, start, end)
        self.visits += 1
        self.elapsed += COSTS.table_visit_ns
        if not found.entries:
            del table.entries[index]
            self.elapsed += COSTS.table_flush_ns + COSTS.table_free_ns
            span = self.geometry.span_bytes(table.level)
            self.unlinked.append((found.level, start - start % span, self.elapsed))


SHAPES = [  # page, IPA bits, leaf, slot's base, leaves
    (4 * K, 40, 4 * K, G, 1600),
    (4 * K, 40, 4 * K, 2 * G - 3 * M - 4 * K, 2000),
    (4 * K, 48, 4 * K, 512 * G - M, 1300),
    (4 * K, 32, 4 * K, 4 * K, 1500),
    (4 * K, 40, 2 * M, G + 2 * M, 1300),
    (4 * K, 44, G, 300 * G, 500),
    (4 * K, 40, G, 2 * G, 30),
    (16 * K, 40, 16 * K, 64 * M - 16 * K, 5000),
    (64 * K, 48, 64 * K, 4 << 40, 20_000),
]


@pytest.mark.parametrize(("page", "bits", "mapping", "base", "leaves"), SHAPES)
def test_same_as_a_plain_walk(page: int, bits: int, mapping: int, base: int, leaves: int) -> None:
    rng = np.random.default_rng(5)
    tree = stage2(leaves * mapping, base, page, bits, mapping)
    plain = PlainTree(tree)
    for _ in range(40):
        first = int(rng.integers(leaves))
        stretch = int(rng.choice([1, 3, 600, leaves]))
        for leaf in range(first, min(leaves, first + stretch), int(rng.choice([1, 1, 7, 513]))):
            tree.map_leaf(leaf, 0)
            plain.map(leaf)
        low, high = sorted(rng.integers(0, leaves + 1, 2).tolist())
        if low == high:
            continue
        walk = UnmapWalk(tree, low, high, COSTS)
        plain.unmap(low, high)
        assert (walk.visits, walk.leaves) == (plain.visits, plain.removed)
        assert walk.elapsed_ns == plain.elapsed
        shape = tree.geometry
        unlinked = [
            (t.level, (base >> shape.shift(t.level - 1)) + t.index << shape.shift(t.level - 1), at)
            for t, at in zip(walk.tables, walk.unlinked_ns, strict=True)
        ]
        assert unlinked == plain.unlinked
        assert not (tree.leaf.entries[low:high] & (VALID | AF)).any()
        recount(tree)
