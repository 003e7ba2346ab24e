"""The walk that frees a stage-2 tree at the end of its VM, without lock and without invalidation.

Source: arch/arm64/kvm/hyp/pgtable.c (``stage2_free_walker``) and arch/arm64/kvm/mmu.c. Each form
is one value of ``teardown_walk``:

* ``single``: one walk over the IPA space, children before parents (up to v6.18);
* ``chunked``: a walk for each largest block of the IPA space, with ``cond_resched()`` between two
  of them; a table goes when its page count says that nothing hangs in it any more
  (message 20251113052452.975081-1-rananta@google.com);
* ``chunked_early``: the same without a look at the count. The visit of a table after its children
  drops one reference of the page that points to it and one of its own page, though the chunk
  walked only a part of it (message 20250724235144.2428795-1-rananta@google.com, reverted by
  20250910180930.3679473-1-oliver.upton@linux.dev);
* ``chunked_whole_range``: as ``chunked``, over all 2^64 bytes of address: what was tried for pKVM
  (message CAJHc60wBNTP9SSt_skEXXv9N+tF_1RoV6vcQQx4hWphJF6EmkQ@mail.gmail.com).

Chunks in which nothing is mapped are not stepped through: each costs the look at the entries on
its way and the reschedule point, and many of them cost that many times as much.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable
from typing import TYPE_CHECKING, ClassVar, Final, NamedTuple

import numpy as np

from simkvm.kernel.cpu import Cpu
from simkvm.kernel.stage2 import TableId
from simkvm.observe.oracle import ROOT

if TYPE_CHECKING:
    from simkvm.kernel.kvm import Kvm

WALKER: Final = "teardown"
ADDRESS_BITS: Final = 64


class Single:
    """One walk; the root's own entries and pages come last.

    ``visits``: entries looked at. ``longest_ns``: the longest stretch without a point to
    reschedule. ``elapsed_ns``: the whole walk.
    """

    name: ClassVar[str] = "single"

    def __init__(self, kvm: Kvm, cpu: Cpu) -> None:
        self.kvm = kvm
        self.cpu = cpu
        self.visits = 0
        self.longest_ns = 0
        self.elapsed_ns = 0
        self._atomic = False

    def run(self, t_ns: int, atomic: bool = False) -> int:
        """Free the whole tree from ``t_ns`` on; returns when that is done.

        ``atomic``: under a spinning lock, where no reschedule point reschedules.
        """
        self._atomic = atomic
        end = self._destroy(t_ns)
        self.elapsed_ns = end - t_ns
        if atomic:
            self.longest_ns = self.elapsed_ns
        self.kvm.stage2.clear()
        self.kvm.tree_freed = True
        return end

    def tables(self) -> list[tuple[TableId, int]]:
        """Every table below the root with its counted entries, in the order of a whole walk."""
        stage2 = self.kvm.stage2
        order = sorted(stage2.all_tables(), key=lambda t: (stage2.end_of(t), -t.level))
        return [(t, int(stage2.levels[t.level].counts[t.index])) for t in order]

    def _destroy(self, t_ns: int) -> int:
        began = t_ns
        for table, counted in self.tables():
            t_ns = self._free_table(table, counted, t_ns)
        self.longest_ns = t_ns - began
        kvm = self.kvm
        entries = kvm.stage2.geometry.root_pages * kvm.entries
        self.visits += entries
        return self._free_roots(t_ns + entries * kvm.costs.unmap.visit_ns)

    def _free_table(self, table: TableId, counted: int, t_ns: int) -> int:
        """Walk all entries of ``table``, put one reference for each counted one, and free it."""
        kvm = self.kvm
        self.visits += kvm.entries
        t_ns += kvm.entries * kvm.costs.unmap.visit_ns + counted * kvm.costs.line.same_ns
        t_ns += kvm.costs.unmap.descend_ns + kvm.costs.free.free_ns
        self._freed(table, t_ns)
        return t_ns

    def _freed(self, table: TableId, t_ns: int) -> None:
        kvm = self.kvm
        kvm.oracle.unlinked(table, t_ns)
        kvm.table_reported_free(t_ns)
        kvm.table_freed(table, t_ns, deferred=False)

    def _free_roots(self, t_ns: int) -> int:
        """``free_pages_exact`` of the root."""
        kvm = self.kvm
        pages = kvm.stage2.geometry.root_pages
        t_ns += pages * kvm.costs.free.free_ns
        kvm.oracle.root_freed(t_ns)
        kvm.memory.root_freed(t_ns, pages * kvm.table_bytes)
        return t_ns


class Span(NamedTuple):
    """A table that several chunks share: ``table`` has the chunks ``first`` up to ``last``."""

    first: int
    last: int
    table: TableId


class Chunked(Single):
    """A walk a chunk."""

    name: ClassVar[str] = "chunked"

    def __init__(self, kvm: Kvm, cpu: Cpu) -> None:
        super().__init__(kvm, cpu)
        geometry = kvm.stage2.geometry
        self._shift = geometry.chunk_bytes.bit_length() - 1
        #: Level of the entries that a chunk begins with: of one, or of a few of a low root.
        self._top = max(geometry.start_level, geometry.min_block_level)
        self._entries = 1 << (self._shift - geometry.shift(self._top))
        self._chunks = self._chunks_of(self.address_bits())
        self._shared: list[Span] = []  # top down
        self._hanging: Counter[TableId] = Counter()  # counted entries that are left in shared ones

    def address_bits(self) -> int:
        """How far the chunks go: the VM's IPA space (``BIT(pgt->ia_bits)``)."""
        return self.kvm.stage2.geometry.ipa_bits

    def _chunks_of(self, bits: int) -> int:
        return 1 << max(0, bits - self._shift)

    def _destroy(self, t_ns: int) -> int:
        below = self._below()
        at = 0
        for chunk in self._stops(below):
            t_ns = self._pass_empty(at, chunk, t_ns)
            began = t_ns = self._resched(chunk, t_ns)
            t_ns = self._chunk(chunk, below[chunk], t_ns)
            self.longest_ns = max(self.longest_ns, t_ns - began)
            at = chunk + 1
        t_ns = self._pass_empty(at, self._chunks, t_ns)
        return self._free_roots(t_ns)

    def _below(self) -> dict[int, list[tuple[TableId, int]]]:
        """Tables that lie within one chunk, by chunk; notes the others, and what hangs in them."""
        stage2 = self.kvm.stage2
        below: dict[int, list[tuple[TableId, int]]] = defaultdict(list)
        top = stage2.levels[self._top]
        first = stage2.first_leaf * stage2.leaf_bytes >> stage2.geometry.shift(self._top)
        for entry in np.flatnonzero(top.entries).tolist():
            below[(first + entry) // self._entries] = []
        for table, counted in self.tables():
            end = stage2.end_of(table) * stage2.leaf_bytes
            if table.level > self._top:
                below[(end - 1) >> self._shift].append((table, counted))
                continue
            size = stage2.geometry.span_bytes(table.level - 1)
            self._shared.append(Span((end - size) >> self._shift, end >> self._shift, table))
            self._hanging[table] = counted
        self._shared.sort(key=lambda span: (span.table.level, span.first))
        return below

    def _stops(self, below: Iterable[int]) -> list[int]:
        """Chunks that have to be gone through one by one, in order."""
        return sorted(below)

    def _path(self, chunk: int) -> list[TableId]:
        """Shared tables on the way to ``chunk``, top down."""
        return [span.table for span in self._shared if span.first <= chunk < span.last]

    def _resched(self, chunk: int, t_ns: int) -> int:
        """The reschedule point before every chunk but the first."""
        if chunk:
            t_ns += self.kvm.costs.ageing.resched_ns
            self._may_switch(t_ns)
        return t_ns

    def _may_switch(self, t_ns: int) -> None:
        if not self._atomic:
            self.cpu.context_switch(t_ns)

    def _pass_empty(self, first: int, last: int, t_ns: int) -> int:
        """The chunks ``first`` up to ``last``, in which nothing is mapped."""
        if first >= last:
            return t_ns
        costs = self.kvm.costs
        within = self._chunks_of(self.kvm.stage2.geometry.ipa_bits)
        inside = min(last, within) - min(first, within)
        visits = inside * self._entries + (last - first - inside)
        t_ns += visits * costs.unmap.visit_ns
        t_ns += (last - first - (not first)) * costs.ageing.resched_ns
        for span in self._shared:
            shared = max(0, min(last, span.last) - max(first, span.first))
            visits += shared
            t_ns += shared * (
                costs.unmap.descend_ns + costs.unmap.visit_ns + costs.unmap.table_visit_ns
            )
        self.visits += visits
        self._may_switch(t_ns)
        return t_ns

    def _chunk(self, chunk: int, tables: list[tuple[TableId, int]], t_ns: int) -> int:
        """One walk: down the shared tables, through what the chunk has to itself, up again."""
        costs = self.kvm.costs
        path = self._path(chunk)
        self.visits += self._entries + len(path)
        t_ns += (self._entries + len(path)) * costs.unmap.visit_ns
        t_ns += len(path) * costs.unmap.descend_ns
        for table, counted in tables:
            t_ns = self._free_table(table, counted, t_ns)
        if path:
            t_ns = self._leave(chunk, path, t_ns + costs.line.same_ns)
        return t_ns

    def _leave(self, chunk: int, path: list[TableId], t_ns: int) -> int:
        """Up through ``path``, from whose lowest table one entry is gone: free what is empty."""
        costs = self.kvm.costs
        gone = True
        for table in reversed(path):
            t_ns += costs.unmap.table_visit_ns
            self._hanging[table] -= gone
            gone = gone and not self._hanging[table]
            if gone:
                t_ns += costs.line.same_ns + costs.free.free_ns
                self._freed(table, t_ns)
                self._shared = [span for span in self._shared if span.table != table]
        return t_ns


class ChunkedWholeRange(Chunked):
    """Chunks of every address there is, whether the VM can have it or not."""

    name: ClassVar[str] = "chunked_whole_range"

    def address_bits(self) -> int:
        """All of them."""
        return ADDRESS_BITS


class ChunkedEarly(Chunked):
    """Chunks that drop references of tables which they walked only in part.

    Page counts are kept as Linux does: one for the allocation, one for each counted entry. When
    that comes to nothing the page is free, whatever hangs in it; what follows from it is for the
    oracle to say. The walk goes on as if the page's content were still there.
    """

    name: ClassVar[str] = "chunked_early"

    def __init__(self, kvm: Kvm, cpu: Cpu) -> None:
        super().__init__(kvm, cpu)
        self._counts: dict[TableId | int, int] = {}  # of shared tables, and of the root's pages
        self._mapped: set[int] = set()

    def _stops(self, below: Iterable[int]) -> list[int]:
        """Every chunk of a shared table: walking an empty one drops references, too."""
        stage2 = self.kvm.stage2
        self._mapped = set(below)
        roots = stage2.levels[stage2.geometry.start_level].counts.tolist()
        self._counts = {page: 1 + count for page, count in enumerate(roots)}
        self._counts |= {table: 1 + counted for table, counted in self._hanging.items()}
        shared = (chunk for span in self._shared for chunk in range(span.first, span.last))
        return sorted({*self._mapped, *shared})

    def _chunk(self, chunk: int, tables: list[tuple[TableId, int]], t_ns: int) -> int:
        for table in (ROOT, *self._path(chunk)):
            self.kvm.oracle.read(WALKER, table, t_ns)
        return super()._chunk(chunk, tables, t_ns)

    def _pass_empty(self, first: int, last: int, t_ns: int) -> int:
        if first < last:
            self.kvm.oracle.read(WALKER, ROOT, t_ns)
        return super()._pass_empty(first, last, t_ns)

    def _leave(self, chunk: int, path: list[TableId], t_ns: int) -> int:
        """Up through ``path``: each table's visit puts the page that points to it, and its own."""
        holders: list[TableId | int] = [self._root_page(chunk), *path]
        if chunk in self._mapped:
            t_ns = self._put(holders[-1], t_ns)
        for table, holder in zip(reversed(path), reversed(holders[:-1]), strict=True):
            t_ns = self._put(table, self._put(holder, t_ns + self.kvm.costs.unmap.table_visit_ns))
        return t_ns

    def _root_page(self, chunk: int) -> int:
        stage2 = self.kvm.stage2
        root = stage2.levels[stage2.geometry.start_level]
        shift = stage2.geometry.shift(root.number)
        first = stage2.first_leaf * stage2.leaf_bytes >> shift
        return stage2.holder(root, (chunk << self._shift >> shift) - first)

    def _put(self, page: TableId | int, t_ns: int) -> int:
        """``put_page``; the last one frees the page, and one more is the oracle's business."""
        kvm = self.kvm
        self._counts[page] -= 1
        t_ns += kvm.costs.line.same_ns
        if self._counts[page] > 0:
            return t_ns
        t_ns += kvm.costs.free.free_ns
        if isinstance(page, int):
            kvm.oracle.root_freed(t_ns)
        elif self._counts[page]:
            kvm.oracle.freed(page, t_ns, deferred=False)
        else:
            kvm.table_reported_free(t_ns)
            kvm.table_freed(page, t_ns, deferred=False)
        return t_ns


Walk = Single
WALKS: dict[str, type[Walk]] = {
    walk.name: walk for walk in (Single, Chunked, ChunkedEarly, ChunkedWholeRange)
}
