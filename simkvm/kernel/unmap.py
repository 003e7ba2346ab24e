"""The unmap walker: what removing a range costs, and which tables it leaves empty.

Source: arch/arm64/kvm/hyp/pgtable.c (``stage2_unmap_walker``, ``kvm_pgtable_stage2_unmap``) and
arch/arm64/kvm/mmu.c (``stage2_apply_range``), v6.12. The walk is depth first. Every entry of every
linked table in the range is visited, empty ones too; an entry that is no table ends the walk of
its whole span; a table is visited once more after its entries, and if its count shows that
nothing is left it is unlinked there, which may in turn empty the table above.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import pairwise

import numpy as np

from simkvm.kernel.stage2 import TABLE, VALID, Level, Stage2, TableId


@dataclass(frozen=True)
class UnmapCosts:
    """Integer nanoseconds of the walker's steps."""

    visit_ns: int
    descend_ns: int  #: entering a table: a dependent miss
    table_visit_ns: int  #: looking at a table's count on the way up
    leaf_ns: int  #: removing one valid leaf, invalidation apart
    leaf_flush_ns: int  #: invalidation for that leaf; 0 if left to the end of the walk
    table_flush_ns: int  #: invalidation for an unlinked table, never left to the end
    table_free_ns: int  #: what the free policy does with it under the lock
    block_ns: int = 0  #: as ``leaf_ns``, for a block among pages


@dataclass
class UnmapWalk:
    """One walk over the leaves ``first`` up to (not including) ``last``, done on construction.

    Afterwards: ``visits`` of the walker's callback, ``leaves`` removed (a block is one), the
    ``pages`` that they mapped in units of a leaf, ``elapsed_ns`` it takes, ``tables`` unlinked
    (children first) and, for each, ``unlinked_ns`` after the start. A block that the range only
    touches is removed whole.
    """

    stage2: Stage2
    first: int
    last: int
    costs: UnmapCosts
    keep: bool = False  #: tables stay linked, however empty (``unmap_tables``)
    visits: int = 0
    leaves: int = 0
    pages: int = 0
    elapsed_ns: int = 0
    tables: list[TableId] = field(default_factory=list)
    unlinked_ns: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        if self.stage2.steps:
            self._walk(0, self.first, self.last)
        else:
            self._remove_leaves(self.first, self.last)
        self.stage2.linked_tables -= len(self.tables)
        if self.stage2.on_unmap is not None:
            self.stage2.on_unmap(self)

    def _walk(self, depth: int, first: int, last: int) -> None:
        """Walk the entries of one level that cover leaves ``first`` up to ``last``."""
        upper, lower, down, phase = self.stage2.steps[depth]
        low, high = (first + phase) >> down, ((last - 1 + phase) >> down) + 1
        if upper is self.stage2.blocks:
            self._among_blocks(depth, first, last)
            return
        if depth == len(self.stage2.steps) - 1:
            if high - low == 1:
                self._leaf_table(upper, lower, low, first, last)
            else:
                self._leaf_tables(upper, lower, low, high, first, last)
            return
        for entry in range(low, high):
            if upper.fast[entry] & TABLE:
                # A table is not visited on the way down, only entered.
                self.elapsed_ns += self.costs.descend_ns
                start = (entry << down) - phase
                self._walk(depth + 1, max(first, start), min(last, start + (1 << down)))
                self._leave(upper, lower, entry)
            else:
                self._visit()

    def _among_blocks(self, depth: int, first: int, last: int) -> None:
        """As :meth:`_walk`, at the level where an entry may be a block, a table or nothing."""
        upper, lower, down, phase = self.stage2.steps[depth]
        for entry in range((first + phase) >> down, ((last - 1 + phase) >> down) + 1):
            start = (entry << down) - phase
            low, high = max(first, start), min(last, start + (1 << down))
            if upper.fast[entry] & VALID:
                self._visit()
                self._remove_block(start)
            elif depth == len(self.stage2.steps) - 1:
                self._leaf_table(upper, lower, entry, low, high)
            elif upper.fast[entry] & TABLE:
                self.elapsed_ns += self.costs.descend_ns
                self._walk(depth + 1, low, high)
                self._leave(upper, lower, entry)
            else:
                self._visit()

    def _remove_block(self, leaf: int) -> None:
        leaf = max(leaf, 0)
        first, last = self.stage2.block_span(leaf)
        self.stage2.break_block(leaf)
        self.leaves += 1
        self.pages += last - first
        self.elapsed_ns += self.costs.block_ns + self.costs.leaf_flush_ns

    def _visit(self) -> None:
        self.visits += 1
        self.elapsed_ns += self.costs.visit_ns

    def _leave(self, upper: Level, lower: Level, entry: int) -> None:
        """The visit of a table after its entries: unlink it if its count says empty."""
        self.visits += 1
        self.elapsed_ns += self.costs.table_visit_ns
        if not (lower.counts[entry] or self.keep):
            self.elapsed_ns += self.costs.table_flush_ns + self.costs.table_free_ns
            self._unlink(upper, lower, entry, self.elapsed_ns)

    def _unlink(self, upper: Level, lower: Level, entry: int, at_ns: int) -> None:
        upper.fast[entry] = 0
        upper.counts[self.stage2.holder(upper, entry)] -= 1
        self.tables.append(self.stage2.identity(lower.number, entry))
        self.unlinked_ns.append(at_ns)

    def _leaf_table(self, upper: Level, lower: Level, table: int, first: int, last: int) -> None:
        """One leaf-level table: most invalidations are of a page."""
        costs = self.costs
        if not upper.fast[table] & TABLE:
            self._visit()
            return
        if last - first == 1:
            removed = lower.fast[first] & VALID
            lower.fast[first] = 0
        else:
            removed = int(np.count_nonzero(lower.entries[first:last] & VALID))
            lower.entries[first:last] = 0
        lower.fast_counts[table] -= removed
        self.visits += last - first
        self.leaves += removed
        self.pages += removed
        self.elapsed_ns += costs.descend_ns + (last - first) * costs.visit_ns
        self.elapsed_ns += removed * (costs.leaf_ns + costs.leaf_flush_ns)
        self._leave(upper, lower, table)

    def _leaf_tables(
        self, upper: Level, lower: Level, low: int, high: int, first: int, last: int
    ) -> None:
        """The leaf-level tables ``low`` up to ``high`` at once: same steps, as arrays."""
        costs, entries = self.costs, self.stage2.geometry.entries
        linked = (upper.entries[low:high] & TABLE) != 0
        starts = np.arange(low, high, dtype=np.int64) * entries - lower.phase
        begin = np.maximum(starts, first)
        overlap = np.minimum(starts + entries, last) - begin
        valid = (lower.entries[first:last] & VALID).astype(np.int64)
        removed = np.add.reduceat(valid, begin - first)
        lower.entries[first:last] = 0
        lower.counts[low:high] -= removed.astype(np.int32)
        empty = linked & (lower.counts[low:high] == 0) & (not self.keep)
        spent = np.where(
            linked,
            costs.descend_ns + overlap * costs.visit_ns + costs.table_visit_ns,
            costs.visit_ns,
        )
        spent += removed * (costs.leaf_ns + costs.leaf_flush_ns)
        spent += empty * (costs.table_flush_ns + costs.table_free_ns)
        done = self.elapsed_ns + np.cumsum(spent)
        for table in np.flatnonzero(empty):
            self._unlink(upper, lower, low + int(table), int(done[table]))
        self.visits += int(overlap[linked].sum()) + len(linked)
        self.leaves += int(removed.sum())
        self.pages += int(removed.sum())
        self.elapsed_ns = int(done[-1])

    def _remove_leaves(self, first: int, last: int) -> None:
        """Leaves that sit in the root itself: nothing to unlink."""
        level = self.stage2.leaf
        gone = np.flatnonzero(level.entries[first:last] & VALID)
        level.entries[first:last] = 0
        tables = (first + gone + level.phase) >> self.stage2.geometry.index_bits
        level.counts -= np.bincount(tables, minlength=len(level.counts)).astype(np.int32)
        removed = len(gone)
        self.visits += last - first
        self.leaves += removed
        self.pages += removed
        self.elapsed_ns += (last - first) * self.costs.visit_ns
        self.elapsed_ns += removed * (self.costs.leaf_ns + self.costs.leaf_flush_ns)


def chunks(stage2: Stage2, first: int, last: int) -> list[tuple[int, int]]:
    """Cut the leaves ``first`` up to ``last`` where ``stage2_apply_range`` does.

    Chunks end at multiples of the largest block, counted in guest-physical addresses.
    """
    size = stage2.geometry.chunk_bytes // stage2.leaf_bytes
    offset = stage2.first_leaf
    cuts = [first]
    while cuts[-1] < last:
        cuts.append(min(last, ((cuts[-1] + offset) // size + 1) * size - offset))
    return list(pairwise(cuts))
