"""A guest's stage-2 table: entries and counts in arrays, tables with an identity.

Source of the rules: arch/arm64/kvm/hyp/pgtable.c, v6.12. An entry that is not zero is counted in
the table that holds it; the page of a table has one reference from its allocation and one for
each counted entry, so a count of one means "empty, may be unlinked". The root is allocated with
the VM and never freed when empty.

A guest whose leaves differ in size has arrays for pages, and blocks one or two levels above. Under
a block each page's place holds the block's flags and :data:`BLOCK`, so that who only asks what a
page allows need not look for blocks; the block's accessed flag is set if any of its pages' is.

Arrays cover the memory slot only. At ``level`` entry *i* maps guest page
``i << (index_bits * (3 - level))`` on; the table that holds it is table
``(i + phase) >> index_bits`` of that level, where the phase is what the slot's start is off a
table's start.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from simkvm.kernel.geometry import LAST_LEVEL, Geometry

if TYPE_CHECKING:
    from simkvm.kernel.unmap import UnmapWalk

VALID: Final = 1  #: a leaf: page or block
AF: Final = 2  #: accessed
WRITE: Final = 4  #: writable
TABLE: Final = 8  #: points to a table of the next level
BLOCK: Final = 16  #: in a leaf's place: mapped by the block above it, whose flags these are

Bytes = NDArray[np.uint8]


class TableId(NamedTuple):
    """Identity of a table: where it hangs, and which of the tables that hung there it is."""

    level: int
    index: int  # type: ignore[assignment]  # nobody searches an identity for a value
    incarnation: int


@dataclass
class Level:
    """Entries of one level and the tables that hold them.

    ``phase``: how many entries the slot's first one is off the start of its table.
    """

    number: int
    phase: int
    entries: Bytes
    counts: NDArray[np.int32]  #: counted entries of each table
    incarnations: NDArray[np.int32]  #: tables that have hung in each place so far
    fast: memoryview = field(init=False)  #: ``entries``, for single items
    fast_counts: memoryview = field(init=False)

    def __post_init__(self) -> None:
        self.fast = memoryview(self.entries)  # type: ignore[arg-type]  # arrays are buffers
        self.fast_counts = memoryview(self.counts)  # type: ignore[arg-type]


class Stage2:
    """The table of one guest.

    ``pages``: guest pages of the memory slot, which begins at ``ipa_base``; ``mapping_bytes``: the
    size of the leaves that faults install. A *leaf* is counted in units of that size from the
    start of the slot. ``block_bytes``: the size of blocks, if there may be some beside leaves of a
    page; the slot then has to begin at a multiple of it.
    """

    def __init__(
        self,
        geometry: Geometry,
        ipa_base: int,
        pages: int,
        mapping_bytes: int,
        block_bytes: int | None = None,
    ) -> None:
        self.geometry = geometry
        self.leaf_level = geometry.leaf_level(mapping_bytes)
        self._bits = geometry.index_bits
        self._first_page = ipa_base >> geometry.page_shift
        self.leaf_bytes = mapping_bytes
        self.first_leaf = ipa_base // mapping_bytes
        self._leaf_pages = mapping_bytes // geometry.page_bytes
        self._pages = pages
        self.levels = {
            number: self._level(number)
            for number in range(geometry.start_level, self.leaf_level + 1)
        }
        self.leaf = self.levels[self.leaf_level]
        self.linked_tables = 0
        self.attached = True  #: the VM still has its root (``mmu->pgt``)
        self.on_unmap: Callable[[UnmapWalk], None] | None = None  #: told of every unmap walk
        # (upper level, the level below it, leaves an upper entry covers as a shift, slot's phase)
        parent = self.levels.get(self.leaf_level - 1)
        self._leaf_parents = parent.fast if parent is not None else None
        self.steps = [self._step(n) for n in range(geometry.start_level, self.leaf_level)]
        #: The level that holds blocks, and the leaves that one covers; None if all are alike.
        self.blocks = None if block_bytes is None else self.levels[geometry.leaf_level(block_bytes)]
        self.block_leaves = 1 if block_bytes is None else block_bytes // mapping_bytes

    def _level(self, number: int) -> Level:
        down = self._bits * (LAST_LEVEL - number)
        first, last = self._first_page >> down, (self._first_page + self._pages - 1) >> down
        phase = first & (self.geometry.entries - 1)
        entries = last - first + 1
        tables = ((entries - 1 + phase) >> self._bits) + 1
        return Level(
            number,
            phase,
            np.zeros(entries, np.uint8),
            np.zeros(tables, np.int32),
            np.zeros(tables, np.int32),
        )

    def _step(self, number: int) -> tuple[Level, Level, int, int]:
        down = self._bits * (self.leaf_level - number)
        phase = self.first_leaf & ((1 << down) - 1)
        return self.levels[number], self.levels[number + 1], down, phase

    # -- what is there ------------------------------------------------------------------------

    def leaf_of(self, page: int) -> int:
        """The leaf that maps guest page ``page``."""
        return (page + self._first_page) // self._leaf_pages - self.first_leaf

    def leaves_of(self, pages: NDArray[np.int64]) -> NDArray[np.int64]:
        """As :meth:`leaf_of`, for many pages."""
        return (pages + self._first_page) // self._leaf_pages - self.first_leaf

    def holder(self, level: Level, entry: int) -> int:
        """Index, at its level, of the table that holds ``entry``."""
        return (entry + level.phase) >> self._bits

    def first_entry(self, number: int) -> int:
        """Number of the first entry of level ``number`` that the arrays have, from address 0."""
        return self._first_page >> (self._bits * (LAST_LEVEL - number))

    def leaf_table(self, leaf: int) -> int:
        """Index of the leaf-level table that holds ``leaf``."""
        return (leaf + self.leaf.phase) >> self._bits

    def table_linked(self, table: int) -> bool:
        """Whether leaf-level table ``table`` hangs in the tree."""
        return not self.steps or bool(self.steps[-1][0].fast[table] & TABLE)

    def identity(self, level: int, table: int) -> TableId:
        """Identity of the table that hangs (or hung last) at place ``table`` of ``level``."""
        return TableId(level, table, int(self.levels[level].incarnations[table]))

    def path(self, leaf: int) -> list[TableId]:
        """Tables below the root that a walk to ``leaf`` would go through now, top down."""
        found: list[TableId] = []
        for upper, lower, down, phase in self.steps:
            entry = (leaf + phase) >> down
            if not upper.fast[entry] & TABLE:
                break
            found.append(self.identity(lower.number, entry))
        return found

    def places(self, leaf: int) -> list[tuple[int, int]]:
        """(level, index) of each table below the root on the way to ``leaf``, linked or not."""
        return [(lower.number, (leaf + phase) >> down) for _, lower, down, phase in self.steps]

    # -- mapping ------------------------------------------------------------------------------

    def missing(self, leaf: int) -> int:
        """Tables that a map of ``leaf`` would have to allocate."""
        lacking = 0
        for upper, _, down, phase in self.steps:
            if not upper.fast[(leaf + phase) >> down] & TABLE:
                lacking += 1
        return lacking

    def map_leaf(self, leaf: int, flags: int) -> list[TableId] | None:
        """Install a leaf with AF set, and the tables that lack; returns these, top down, if any."""
        made = None
        level = self.leaf
        table = (leaf + level.phase) >> self._bits
        if self._leaf_parents is not None and not self._leaf_parents[table]:
            made = self._grow(leaf)
        entries = level.fast
        if not entries[leaf]:
            level.fast_counts[table] += 1
        entries[leaf] = VALID | AF | flags
        return made

    def unlink(self, number: int, entry: int) -> TableId:
        """Take the table away that hangs at ``entry`` of level ``number``."""
        level = self.levels[number]
        level.fast[entry] = 0
        level.fast_counts[self.holder(level, entry)] -= 1
        self.linked_tables -= 1
        return self.identity(number + 1, entry)

    def _grow(self, leaf: int, bottom: int = LAST_LEVEL) -> list[TableId]:
        """Link the tables that lack on the way to ``leaf``, down to level ``bottom``."""
        made: list[TableId] = []
        for upper, lower, down, phase in self.steps:
            if upper.number >= bottom:
                break
            entry = (leaf + phase) >> down
            if not upper.fast[entry] & TABLE:
                upper.fast[entry] = TABLE
                upper.fast_counts[(entry + upper.phase) >> self._bits] += 1
                lower.incarnations[entry] += 1
                made.append(self.identity(lower.number, entry))
        self.linked_tables += len(made)
        return made

    def map_all(self, flags: int, by_blocks: bool = False) -> list[TableId]:
        """Map every leaf of an empty tree, with AF set; returns all tables below the root.

        ``by_blocks``: of a tree that may have some; its leaves are then a whole number of them.
        """
        lowest = self.blocks if by_blocks and self.blocks is not None else self.leaf
        for level in self.levels.values():
            if level.number > lowest.number:
                continue
            level.entries[:] = VALID | AF | flags if level is lowest else TABLE
            ends = np.arange(1, len(level.counts) + 1) << self._bits
            ends = np.minimum(ends - level.phase, len(level.entries))
            level.counts[:] = np.diff(ends, prepend=0)
        for _, lower, _, _ in self.steps:
            if lower.number <= lowest.number:
                lower.incarnations += 1
        if lowest is not self.leaf:
            lowest.entries[:] = VALID | flags
            self.leaf.entries[:] = VALID | AF | BLOCK | flags
        tables = self.all_tables()
        self.linked_tables = len(tables)
        return tables

    # -- blocks among pages -------------------------------------------------------------------

    def block_span(self, leaf: int) -> tuple[int, int]:
        """The first leaf of the block that covers, or could cover, ``leaf``, and the one behind."""
        first = leaf - leaf % self.block_leaves
        return first, min(first + self.block_leaves, len(self.leaf.entries))

    def is_block(self, leaf: int) -> bool:
        """Whether a block maps ``leaf``."""
        return bool(self.leaf.fast[leaf] & BLOCK)

    def table_below(self, leaf: int) -> bool:
        """Whether a table hangs where a block for ``leaf`` would."""
        assert self.blocks is not None
        return bool(self.blocks.fast[leaf // self.block_leaves] & TABLE)

    def map_block(self, leaf: int, flags: int) -> list[TableId]:
        """Install, where nothing hangs, the block that covers ``leaf``, accessed.

        Returns new tables above.
        """
        level = self.blocks
        assert level is not None
        entry = leaf // self.block_leaves
        made = self._grow(leaf, level.number)
        if not level.fast[entry]:
            level.fast_counts[self.holder(level, entry)] += 1
        self._set_block(level, entry, flags)
        return made

    def _set_block(self, level: Level, entry: int, flags: int) -> None:
        level.fast[entry] = VALID | flags
        first, last = self.block_span(entry * self.block_leaves)
        self.leaf.entries[first:last] = VALID | AF | BLOCK | flags

    def break_block(self, leaf: int) -> None:
        """Remove the block that maps ``leaf``."""
        level = self.blocks
        assert level is not None
        entry = leaf // self.block_leaves
        level.fast[entry] = 0
        level.fast_counts[self.holder(level, entry)] -= 1
        first, last = self.block_span(leaf)
        self.leaf.entries[first:last] = 0

    def fill_block(self, leaf: int) -> list[TableId]:
        """Split the block that maps ``leaf`` into pages of the same rights; returns new tables."""
        first, last = self.block_span(leaf)
        flags = self.leaf.fast[leaf] & WRITE
        self.break_block(leaf)
        made: list[TableId] = []
        entries = self.geometry.entries
        for start in range(first, last, entries):
            made += self.map_leaf(start, flags) or []
            self.leaf.counts[self.leaf_table(start)] = min(entries, last - start)
        self.leaf.entries[first:last] = VALID | AF | flags
        return made

    def subtree(self, leaf: int) -> tuple[list[TableId], int]:
        """The tables where a block for ``leaf`` would hang, children first, and their entries."""
        assert self.blocks is not None
        first, last = self.block_span(leaf)
        tables: list[TableId] = []
        entries = 0
        for upper, lower, down, phase in reversed(self.steps):
            if upper.number < self.blocks.number:
                break
            low, high = (first + phase) >> down, ((last - 1 + phase) >> down) + 1
            linked = low + np.flatnonzero(upper.entries[low:high] & TABLE)
            tables += [self.identity(lower.number, int(table)) for table in linked]
            entries += int(lower.counts[linked].sum())
        return tables, entries

    def collapse(self, leaf: int, flags: int) -> None:
        """Put a block in the place of the table below which ``leaf`` is; drops the subtree."""
        assert self.blocks is not None
        first, last = self.block_span(leaf)
        for upper, lower, down, phase in self.steps:
            if upper.number < self.blocks.number:
                continue
            low, high = (first + phase) >> down, ((last - 1 + phase) >> down) + 1
            self.linked_tables -= int(np.count_nonzero(upper.entries[low:high] & TABLE))
            lower.counts[low:high] = 0
            upper.entries[low:high] = 0
        # The holder's count does not change: it had the table, now it has the block.
        self._set_block(self.blocks, leaf // self.block_leaves, flags)

    def allow_write(self, leaf: int) -> None:
        """Make ``leaf``, or the block that maps it, writable."""
        if not self.is_block(leaf):
            self.leaf.fast[leaf] |= WRITE
            return
        assert self.blocks is not None
        self.blocks.fast[leaf // self.block_leaves] |= WRITE
        first, last = self.block_span(leaf)
        self.leaf.entries[first:last] |= np.uint8(WRITE)

    def write_protect(self, first: int, last: int) -> tuple[int, int]:
        """Take WRITE from the leaves ``first`` up to ``last``; entries visited, and changed.

        A block that the range only touches loses it as a whole. Entries are visited as in any walk
        over leaves: all of a table, one for a block, one for what is not there.
        """
        changed = 0
        if self.blocks is not None:
            low, high = first // self.block_leaves, (last - 1) // self.block_leaves + 1
            changed = self._write_protect_blocks(np.arange(low, high))
        part = self.leaf.entries[first:last]
        changed += int(np.count_nonzero(part & WRITE))
        part &= np.uint8(~WRITE & 0xFF)
        return self.leaf_visits(first, last), changed

    def _write_protect_blocks(self, among: NDArray[np.int64]) -> int:
        assert self.blocks is not None
        writable = among[(self.blocks.entries[among] & WRITE) != 0]
        self.blocks.entries[writable] &= np.uint8(~WRITE & 0xFF)
        for entry in writable.tolist():
            begin, end = self.block_span(entry * self.block_leaves)
            self.leaf.entries[begin:end] &= np.uint8(~WRITE & 0xFF)
        return len(writable)

    def write_protect_words(
        self, lows: NDArray[np.int64], highs: NDArray[np.int64]
    ) -> tuple[int, int]:
        """As :meth:`write_protect` for ranges ``lows`` up to ``highs``, each within one leaf table.

        The ranges are in order and do not meet.
        """
        linked = np.ones(len(lows), np.bool_)
        if self.steps:
            linked = (
                self.steps[-1][0].entries[(lows + self.leaf.phase) >> self._bits] & TABLE
            ) != 0
        visits = int((highs - lows)[linked].sum()) + int(np.count_nonzero(~linked))
        changed = 0
        if self.blocks is not None:
            touched = np.unique(lows // self.block_leaves)
            changed = self._write_protect_blocks(touched)
        begin, end = int(lows[0]), int(highs[-1])
        edges = np.zeros(end - begin + 1, np.int8)
        edges[lows - begin] += 1
        edges[highs - begin] -= 1
        part = self.leaf.entries[begin:end]
        writable = (np.cumsum(edges[:-1]) > 0) & ((part & WRITE) != 0)
        part[writable] &= np.uint8(~WRITE & 0xFF)
        return visits, changed + int(np.count_nonzero(writable))

    def leaf_visits(self, first: int, last: int) -> int:
        """Entries that a walk over the leaves ``first`` up to ``last`` visits.

        All of a leaf table; else one for each entry that is no table, whatever it spans.
        """
        visits, above = 0, None
        for upper, _, down, phase in self.steps:
            low, high = (first + phase) >> down, ((last - 1 + phase) >> down) + 1
            tables = (upper.entries[low:high] & TABLE) != 0
            visits += high - low - int(np.count_nonzero(tables))
            if above is not None:  # what hangs nowhere is not visited
                holders = (np.arange(low, high) + upper.phase) >> self._bits
                visits -= int(np.count_nonzero((above.entries[holders] & TABLE) == 0))
            above = upper
        if above is None:
            return last - first
        down, phase = self._bits, self.leaf.phase
        linked = low + np.flatnonzero(tables)
        begin = np.maximum((linked << down) - phase, first)
        end = np.minimum(((linked + 1) << down) - phase, last)
        return visits + int((end - begin).sum())

    # -- ageing -------------------------------------------------------------------------------

    def set_young(self, leaf: int) -> None:
        """Set AF of ``leaf``, or of the block that maps it."""
        if not self.is_block(leaf):
            self.leaf.fast[leaf] |= AF
            return
        first, last = self.block_span(leaf)
        self.leaf.entries[first:last] |= np.uint8(AF)

    def test_clear_young(self, leaf: int, clear: bool = True) -> bool:
        """One ageing walk to ``leaf``: whether it was young; clears AF if asked."""
        entry = self.leaf.fast[leaf]
        young = entry & (VALID | AF) == (VALID | AF)
        if young and clear:
            self.leaf.fast[leaf] = entry & ~AF
        return young

    def young(self, first: int, last: int) -> NDArray[np.bool_]:
        """Which leaves of ``first`` up to ``last`` are valid and accessed."""
        found: NDArray[np.bool_] = (self.leaf.entries[first:last] & (VALID | AF)) == (VALID | AF)
        return found

    def clear_young(self, leaves: NDArray[np.int64]) -> None:
        """Clear AF of ``leaves`` (distinct leaf numbers)."""
        self.leaf.entries[leaves] &= np.uint8(~AF & 0xFF)

    # -- the whole ----------------------------------------------------------------------------

    def all_tables(self) -> list[TableId]:
        """Every linked table, children before parents; the root is not among them."""
        found: list[TableId] = []
        for upper, lower, _, _ in reversed(self.steps):
            linked = np.flatnonzero(upper.entries & TABLE)
            found += [self.identity(lower.number, int(table)) for table in linked]
        return found

    def entries_in(self, table: TableId) -> int:
        """Entries that are not zero in ``table``: what its count should say, counted again."""
        level = self.levels[table.level]
        first = (table.index << self._bits) - level.phase
        entries = level.entries[max(0, first) : first + (1 << self._bits)]
        return int(np.count_nonzero((entries != 0) & ((entries & BLOCK) == 0)))

    def end_of(self, table: TableId) -> int:
        """The leaf behind the last one that ``table`` covers, as a guest-physical leaf number."""
        for _, lower, down, _ in self.steps:
            if lower.number == table.level:
                first = (self.first_leaf >> down) + table.index
                return (first + 1) << down
        raise ValueError(f"no tables hang at level {table.level}")

    def clear(self) -> None:
        """Forget everything below the root (after the tree was destroyed)."""
        for level in self.levels.values():
            level.entries[:] = 0
            level.counts[:] = 0
        self.linked_tables = 0
