"""A guest's stage-2 table: entries and counts in arrays, tables with an identity.

Source of the rules: arch/arm64/kvm/hyp/pgtable.c, v6.12. An entry that is not zero is counted in
the table that holds it; the page of a table has one reference from its allocation and one for
each counted entry, so a count of one means "empty, may be unlinked". The root is allocated with
the VM and never freed when empty.

Arrays cover the memory slot only. At ``level`` entry *i* maps guest page
``i << (index_bits * (3 - level))`` on; the table that holds it is table
``(i + phase) >> index_bits`` of that level, where the phase is what the slot's start is off a
table's start.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from simkvm.kernel.geometry import LAST_LEVEL, Geometry

VALID: Final = 1  #: a leaf: page or block
AF: Final = 2  #: accessed
WRITE: Final = 4  #: writable
TABLE: Final = 8  #: points to a table of the next level

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
    start of the slot.
    """

    def __init__(self, geometry: Geometry, ipa_base: int, pages: int, mapping_bytes: int) -> None:
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
        # (upper level, the level below it, leaves an upper entry covers as a shift, slot's phase)
        parent = self.levels.get(self.leaf_level - 1)
        self._leaf_parents = parent.fast if parent is not None else None
        self.steps = [self._step(n) for n in range(geometry.start_level, self.leaf_level)]

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

    def _grow(self, leaf: int) -> list[TableId]:
        made: list[TableId] = []
        for upper, lower, down, phase in self.steps:
            entry = (leaf + phase) >> down
            if not upper.fast[entry] & TABLE:
                upper.fast[entry] = TABLE
                upper.fast_counts[(entry + upper.phase) >> self._bits] += 1
                lower.incarnations[entry] += 1
                made.append(self.identity(lower.number, entry))
        self.linked_tables += len(made)
        return made

    def map_all(self, flags: int) -> list[TableId]:
        """Map every leaf of an empty tree, with AF set; returns all tables below the root."""
        for level in self.levels.values():
            is_leaf = level is self.leaf
            level.entries[:] = VALID | AF | flags if is_leaf else TABLE
            ends = np.arange(1, len(level.counts) + 1) << self._bits
            ends = np.minimum(ends - level.phase, len(level.entries))
            level.counts[:] = np.diff(ends, prepend=0)
        for _, lower, _, _ in self.steps:
            lower.incarnations += 1
        tables = self.all_tables()
        self.linked_tables = len(tables)
        return tables

    # -- ageing -------------------------------------------------------------------------------

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
        return int(np.count_nonzero(level.entries[max(0, first) : first + (1 << self._bits)]))

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
