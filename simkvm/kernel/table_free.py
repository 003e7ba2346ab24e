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

A new policy is a class with a ``name``, listed in :data:`POLICIES`.
"""

from __future__ import annotations

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
