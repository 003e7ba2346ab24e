"""When the page of an unlinked stage-2 table is free again, and who pays for it.

Four policies of the unmap path, from the mail that started it (May 2023) and what Linux does:

* ``inline``: ``put_page()`` in the walk, under the write lock (arch/arm64/kvm/hyp/pgtable.c, up to
  today). Not safe with walkers that hold no lock.
* ``put_page_rcu``: take the page out of the statistics, then free it by ``call_rcu()``
  (message 20230526234435.662652-1-yuzhao@google.com, patch 4 of 10).
* ``free_removed_table``: use the deferred free of collapsed subtrees. The callback walks the table
  again although unmap only unlinks empty ones (message ZHJHJPBF6euzOFdw@linux.dev).
* ``free_removed_table_count_test``: the same, but a page count of one ends the callback's walk
  before it begins (message ZHfWzX04GlcNngdU@linux.dev).

And four for a subtree that a block replaces, of which faults are the callers:

* ``inline``: the tables go at once; faults held the lock for write (arm64 up to v6.1);
* ``subtree``: one callback whatever the size; it walks all entries of the subtree, frees each table
  and at last the subtree's root (``stage2_free_unlinked_table``, v6.12);
* ``subtree_leak``: the same from v6.2 until commit f6a27d6dc51b: nobody dropped the root's last
  reference;
* ``per_table``: the subtree is walked where it is unlinked, and each table has a callback
  (arch/x86/kvm/mmu/tdp_mmu.c, ``handle_removed_pt``).

A new policy is a class with a ``name``, listed in :data:`POLICIES` or :data:`COLLAPSE`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import ClassVar, Protocol

from simkvm.kernel.costs import FreeCosts
from simkvm.kernel.stage2 import TableId


class Frees(Protocol):
    """What a policy needs of its guest (:class:`simkvm.kernel.kvm.Kvm`)."""

    entries: int

    @property
    def free_costs(self) -> FreeCosts:
        """Costs of freeing a table page."""

    def table_reported_free(self, t_ns: int) -> None:
        """The statistics drop a table."""

    def table_freed(self, table: TableId, t_ns: int, deferred: bool) -> None:
        """The page is free."""

    def call_rcu(self, t_ns: int, cpu: int, table: TableId) -> None:
        """Have :meth:`callback` called after a grace period."""

    def call_rcu_for(
        self, t_ns: int, cpu: int, tables: Sequence[TableId], callback: Callable[[int], int]
    ) -> None:
        """Have ``callback(t)``, which frees ``tables`` and returns its cost, called after one."""

    def leaked(self, table: TableId, t_ns: int) -> None:
        """``table`` waited, and now nobody knows it any more."""


class Inline:
    """Free at once."""

    name: ClassVar[str] = "inline"
    deferred: ClassVar[bool] = False

    def under_lock_ns(self, costs: FreeCosts) -> int:
        """Work under ``mmu_lock`` for each table."""
        return costs.free_ns

    def unlinked(self, guest: Frees, table: TableId, t_ns: int, cpu: int) -> None:
        """``table`` was unlinked at ``t_ns`` by ``cpu``."""
        guest.table_reported_free(t_ns)
        guest.table_freed(table, t_ns, deferred=False)

    def callback(self, guest: Frees, table: TableId, t_ns: int) -> int:
        """The RCU callback of ``table``, run at ``t_ns``; returns its cost in nanoseconds."""
        raise AssertionError("inline frees have no callback")


class PutPageRcu:
    """Free after a grace period; the statistics change at once."""

    name: ClassVar[str] = "put_page_rcu"
    deferred: ClassVar[bool] = True

    def under_lock_ns(self, costs: FreeCosts) -> int:
        """Work under ``mmu_lock`` for each table: queueing the callback."""
        return costs.call_rcu_ns

    def unlinked(self, guest: Frees, table: TableId, t_ns: int, cpu: int) -> None:
        """``table`` was unlinked at ``t_ns`` by ``cpu``."""
        guest.table_reported_free(t_ns)
        guest.call_rcu(t_ns, cpu, table)

    def callback(self, guest: Frees, table: TableId, t_ns: int) -> int:
        """Drop the one reference that is left."""
        guest.table_freed(table, t_ns, deferred=True)
        return guest.free_costs.callback_ns


class FreeRemovedTable:
    """Free after a grace period, by a callback that walks the empty table once more."""

    name: ClassVar[str] = "free_removed_table"
    deferred: ClassVar[bool] = True

    def under_lock_ns(self, costs: FreeCosts) -> int:
        """Work under ``mmu_lock`` for each table: queueing the callback."""
        return costs.call_rcu_ns

    def unlinked(self, guest: Frees, table: TableId, t_ns: int, cpu: int) -> None:
        """``table`` was unlinked at ``t_ns`` by ``cpu``; the statistics wait for the callback."""
        guest.call_rcu(t_ns, cpu, table)

    def callback(self, guest: Frees, table: TableId, t_ns: int) -> int:
        """Walk all entries, then drop the last reference."""
        guest.table_reported_free(t_ns)
        guest.table_freed(table, t_ns, deferred=True)
        return guest.free_costs.callback_ns + self._walk_ns(guest)

    def _walk_ns(self, guest: Frees) -> int:
        return guest.entries * guest.free_costs.visit_ns


class FreeRemovedTableCountTest(FreeRemovedTable):
    """As :class:`FreeRemovedTable`, without the walk if the page's count says empty."""

    name: ClassVar[str] = "free_removed_table_count_test"

    def _walk_ns(self, guest: Frees) -> int:
        return guest.free_costs.count_test_ns


TableFree = Inline | PutPageRcu | FreeRemovedTable
POLICIES: dict[str, type[TableFree]] = {
    policy.name: policy
    for policy in (Inline, PutPageRcu, FreeRemovedTable, FreeRemovedTableCountTest)
}


class CollapseInline:
    """Free a replaced subtree at once."""

    name: ClassVar[str] = "inline"

    def under_lock_ns(self, costs: FreeCosts, tables: int, entries: int) -> int:
        """Work under ``mmu_lock`` for ``tables`` with room for ``entries``."""
        return entries * costs.visit_ns + tables * costs.free_ns

    def unlinked(self, guest: Frees, tables: Sequence[TableId], t_ns: int, cpu: int) -> None:
        """The subtree ``tables``, its root last, was unlinked at ``t_ns`` by ``cpu``."""
        for table in tables:
            guest.table_reported_free(t_ns)
            guest.table_freed(table, t_ns, deferred=False)


class Subtree:
    """One callback walks and frees the subtree, its root last."""

    name: ClassVar[str] = "subtree"

    def under_lock_ns(self, costs: FreeCosts, tables: int, entries: int) -> int:
        """Work under ``mmu_lock``: queueing one callback."""
        return costs.call_rcu_ns

    def unlinked(self, guest: Frees, tables: Sequence[TableId], t_ns: int, cpu: int) -> None:
        """The subtree ``tables``, its root last, was unlinked at ``t_ns`` by ``cpu``."""
        guest.call_rcu_for(t_ns, cpu, tables, partial(self._callback, guest, tables))

    def _callback(self, guest: Frees, tables: Sequence[TableId], t_ns: int) -> int:
        costs = guest.free_costs
        for table in tables[:-1]:
            guest.table_reported_free(t_ns)
            guest.table_freed(table, t_ns, deferred=True)
        walked_ns = len(tables) * guest.entries * costs.visit_ns
        inner_ns = (len(tables) - 1) * costs.callback_ns
        return walked_ns + inner_ns + self._drop_root(guest, tables[-1], t_ns)

    def _drop_root(self, guest: Frees, root: TableId, t_ns: int) -> int:
        guest.table_reported_free(t_ns)
        guest.table_freed(root, t_ns, deferred=True)
        return guest.free_costs.callback_ns


class SubtreeLeak(Subtree):
    """As :class:`Subtree`, but the root keeps the reference from its allocation for ever."""

    name: ClassVar[str] = "subtree_leak"

    def _drop_root(self, guest: Frees, root: TableId, t_ns: int) -> int:
        guest.leaked(root, t_ns)
        return 0


class PerTable:
    """Walk the subtree at once; a callback that only frees for each of its tables."""

    name: ClassVar[str] = "per_table"

    def under_lock_ns(self, costs: FreeCosts, tables: int, entries: int) -> int:
        """Work under ``mmu_lock``: each entry is frozen, each table queued."""
        return entries * costs.visit_ns + tables * costs.call_rcu_ns

    def unlinked(self, guest: Frees, tables: Sequence[TableId], t_ns: int, cpu: int) -> None:
        """The subtree ``tables``, its root last, was unlinked at ``t_ns`` by ``cpu``."""
        for table in reversed(tables):
            guest.table_reported_free(t_ns)
            guest.call_rcu_for(t_ns, cpu, [table], partial(_free, guest, table))


def _free(guest: Frees, table: TableId, t_ns: int) -> int:
    guest.table_freed(table, t_ns, deferred=True)
    return guest.free_costs.callback_ns


CollapseFree = CollapseInline | Subtree | PerTable
COLLAPSE: dict[str, type[CollapseFree]] = {
    policy.name: policy for policy in (CollapseInline, Subtree, SubtreeLeak, PerTable)
}
