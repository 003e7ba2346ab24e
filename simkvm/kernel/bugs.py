"""Known mistakes that a scenario can put back into its kernel, to see them found.

A scenario's ``bugs`` names them. Each changes one rule for the run that asks for it: by policies,
before the world is built, or by replacing one object or method of that run's own objects
afterwards. Nothing outside the run is touched, and a run without bugs looks at none of this.

``kind`` is the violation that the oracle has to report; the oracle knows nothing of bugs.
``source`` says where the mistake was made or proposed, or which rule forbids it.

A new bug is one entry of :data:`BUGS`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Final

from simkvm.kernel.rcu_segcblist import SegmentedCallbackList
from simkvm.scenario.kernel import KernelVariant, Policy

if TYPE_CHECKING:
    from simkvm.kernel.kvm import Kvm
    from simkvm.kernel.stage2 import TableId
    from simkvm.kernel.world import World

Change = Callable[["World"], None]


def _nothing(_: World) -> None:
    """Policies say all of it."""


@dataclass(frozen=True)
class Bug:
    """One mistake: what it is, in a sentence, and what it has to be caught as."""

    name: str
    about: str
    kind: str
    source: str
    policies: Mapping[str, str] = field(default_factory=dict)
    change: Change = _nothing


def with_bugs(kernel: KernelVariant, names: Iterable[str]) -> KernelVariant:
    """``kernel`` with the policies that these bugs stand for."""
    policies = dict(kernel.policies)
    for name in names:
        for policy, value in BUGS[name].policies.items():
            policies[policy] = Policy(value, f"the bug {name}")
    return replace(kernel, policies=policies)


def put_back(world: World, names: Iterable[str]) -> None:
    """Make the mistakes ``names`` in ``world``, which was just built."""
    for name in names:
        BUGS[name].change(world)


# -- mistakes that no policy describes -------------------------------------------------------------


class _EarlyList(SegmentedCallbackList):
    """Gives every callback the number before its own."""

    __slots__ = ()

    def accelerate(self, number: int) -> bool:
        return super().accelerate(number - 1)


def _number_too_early(world: World) -> None:
    for data in world.rcu.per_cpu:
        data.callbacks = _EarlyList()


def _each_kvm(change: Callable[[Any], None]) -> Change:
    def changed(world: World) -> None:
        for kvm in world.kvms:
            change(kvm)

    return changed


def _free_without_waiting(kvm: Any) -> None:
    def call_rcu(t_ns: int, cpu: int, table: TableId) -> None:
        kvm.memory.deferred(t_ns, kvm.table_bytes)
        kvm.table_freed(table, t_ns, deferred=True)

    kvm.call_rcu = call_rcu


def _keep_the_last_reference(kvm: Any) -> None:
    def callback(guest: Kvm, table: TableId, t_ns: int) -> int:
        return guest.free_costs.callback_ns

    kvm.table_free.callback = callback


def _free_twice(kvm: Any) -> None:
    unlinked = kvm.table_free.unlinked

    def freed_too(guest: Kvm, table: TableId, t_ns: int, cpu: int) -> None:
        guest.table_freed(table, t_ns, deferred=False)
        unlinked(guest, table, t_ns, cpu)

    kvm.table_free.unlinked = freed_too


def _keep_the_last_leaf(kvm: Any) -> None:
    unmap_chunk = kvm.unmap_chunk

    def one_short(cpu: int, t_ns: int, first: int, last: int) -> int:
        end: int = unmap_chunk(cpu, t_ns, first, last - 1) if last - first > 1 else t_ns
        return end

    kvm.unmap_chunk = one_short


def _ignore_invalidations(kvm: Any) -> None:
    from simkvm.kernel.mmu_notifier import MmuNotifier

    class Unheard(MmuNotifier):
        """Its count and sequence never seem to move."""

        in_progress = property(lambda _: 0, lambda *_: None)
        moved_ns = property(lambda _: -1, lambda *_: None)

    kvm.notifier = Unheard(kvm, kvm.notifier.srcu)


def _count_too_low(kvm: Any) -> None:
    linked = kvm.tables_linked

    def miscounted(tables: list[TableId], t_ns: int) -> None:
        linked(tables, t_ns)
        for table in tables:
            if table.level == kvm.stage2.leaf_level:
                kvm.stage2.leaf.counts[table.index] -= 1

    kvm.tables_linked = miscounted


def _unlink_again(kvm: Any) -> None:
    unlinked = kvm.table_free.unlinked

    def reported_again(guest: Kvm, table: TableId, t_ns: int, cpu: int) -> None:
        guest.oracle.unlinked(table, t_ns)
        unlinked(guest, table, t_ns, cpu)

    kvm.table_free.unlinked = reported_again


def _miss_a_table(world: World) -> None:
    for teardown in world.teardowns:
        walk: Any = teardown.walk
        walk.tables = lambda tables=walk.tables: tables()[1:]


_ALL: Final = (
    Bug(
        "inline_free",
        "Unmap frees an empty table at once, although walkers without mmu_lock may be in it.",
        "use_after_free",
        "upstream's unmap, v6.12, under the walkers of "
        "<20230526234435.662652-1-yuzhao@google.com>, whose patch 4 defers the free",
        {"table_free": "inline"},
    ),
    Bug(
        "root_freed_in_release",
        "The notifier's release hook frees the tree before the notifier's readers have drained.",
        "root_freed_under_walker",
        "arch/arm64/kvm/mmu.c, kvm_arch_flush_shadow_all, v6.12, under walkers without mmu_lock; "
        "<20230526234435.662652-1-yuzhao@google.com>, patch 4",
        {"root_free": "in_release"},
    ),
    Bug(
        "chunked_destroy_2025",
        "Teardown in chunks drops a table with each chunk that walks a part of it.",
        "use_after_free",
        "<20250724235144.2428795-1-rananta@google.com>, reverted by "
        "<20250910180930.3679473-1-oliver.upton@linux.dev>",
        {"teardown_walk": "chunked_early"},
    ),
    Bug(
        "double_flush_2026",
        "Two ends of one VM both free its split cache, with only SRCU held.",
        "double_free",
        "kvm_arch_flush_shadow_all, arm64; <20260504224213.1049426-1-jthoughton@google.com>",
        {"flush_shadow": "srcu"},
    ),
    Bug(
        "collapse_leak_2023",
        "The callback of a collapsed subtree frees all but the subtree's own root.",
        "leak",
        "stage2_free_removed_table before commit f6a27d6dc51b; "
        "<20230530193213.1663411-1-oliver.upton@linux.dev>",
        {"collapse_free": "subtree_leak"},
    ),
    Bug(
        "callback_numbered_early",
        "Callbacks are numbered with the grace period that runs already.",
        "free_before_grace_period",
        "forbidden: a new callback waits for the next whole grace period (rcu_seq_snap, "
        "kernel/rcu/rcu.h, v6.12)",
        change=_number_too_early,
    ),
    Bug(
        "no_grace_period",
        "call_rcu() frees the table at once.",
        "free_before_grace_period",
        "forbidden: call_rcu() invokes after a grace period (kernel/rcu/tree.c, v6.12)",
        change=_each_kvm(_free_without_waiting),
    ),
    Bug(
        "last_reference_kept",
        "The callback of an unlinked table does not drop its last reference.",
        "leak",
        "what commit f6a27d6dc51b mended for collapsed subtrees, made for every table that unmap "
        "removes: <CAOUHufa74CufHziHSquO5bZwbFXz2MNssBzW+AH7=Xo5RCnQ0A@mail.gmail.com>, question 2",
        change=_each_kvm(_keep_the_last_reference),
    ),
    Bug(
        "table_missed_at_end",
        "Teardown's walk misses one table.",
        "leak",
        "forbidden: at the end of a VM no table is left (kvm_pgtable_stage2_destroy, v6.12)",
        change=_miss_a_table,
    ),
    Bug(
        "freed_twice",
        "A table is freed by the walk that unlinks it, and by its callback again.",
        "double_free",
        "forbidden: one put_page() for the allocation (put_page_rcu of "
        "<20230526234435.662652-1-yuzhao@google.com>, patch 4)",
        change=_each_kvm(_free_twice),
    ),
    Bug(
        "last_leaf_kept",
        "Unmapping a range ends one leaf early.",
        "leaf_after_invalidate",
        "forbidden: after the start of an invalidation no leaf maps its range "
        "(kvm_unmap_gfn_range, arch/arm64/kvm/mmu.c, v6.12)",
        change=_each_kvm(_keep_the_last_leaf),
    ),
    Bug(
        "invalidation_ignored",
        "Faults do not look whether an invalidation runs, or ran since they looked the page up.",
        "leaf_after_invalidate",
        "forbidden: mmu_invalidate_retry() under mmu_lock (user_mem_abort, v6.12)",
        change=_each_kvm(_ignore_invalidations),
    ),
    Bug(
        "count_too_low",
        "A table's page count is one too low, so it goes with one entry still in it.",
        "unlink_with_entries",
        "forbidden: the count is the counted entries + 1 (stage2_make_pte, "
        "arch/arm64/kvm/hyp/pgtable.c, v6.12)",
        change=_each_kvm(_count_too_low),
    ),
    Bug(
        "unlinked_twice",
        "The unmap walk unlinks a table that it has unlinked already.",
        "unlink_twice",
        "forbidden: one entry points to a table, and clearing it is what unlinks "
        "(stage2_unmap_walker, v6.12)",
        change=_each_kvm(_unlink_again),
    ),
)
BUGS: Final[Mapping[str, Bug]] = {bug.name: bug for bug in _ALL}
"""Every bug by name."""
