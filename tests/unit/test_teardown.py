"""The end of a VM: what is freed when, and who may still be looking.

Source: virt/kvm/kvm_main.c (kvm_destroy_vm, kvm_mmu_notifier_release), mm/mmu_notifier.c,
mm/mmap.c (exit_mmap), arch/arm64/kvm/mmu.c (kvm_free_stage2_pgd), v6.12; the order after
unregistering from message 20230526234435.662652-1-yuzhao@google.com, patch 4 of 10.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from lab import Lab, account, fill_sparsely, world

from simkvm.kernel.sites import TEARDOWN
from simkvm.kernel.stage2 import TableId
from simkvm.kernel.teardown import Teardown
from simkvm.units import GIB, KIB, MIB

ORDERS = ["close_vm", "process_exit"]
ROOT_FREE = ["in_release", "after_unregister"]


def lab(memory: int = 16 * MIB, guest: dict[str, Any] | None = None, **policies: str) -> Lab:
    return Lab(memory, guest, kernel={"base": "linux-6.12", "set": policies})


def watch(made: Lab) -> list[tuple[str, int]]:
    """What the guest is told, and when: tables freed, root freed, host pages zapped."""
    story: list[tuple[str, int]] = []
    kvm = made.kvm
    freed, root, zap = kvm.table_freed, kvm.oracle.root_freed, kvm.zap_host

    def table_freed(table: TableId, t_ns: int, deferred: bool) -> None:
        story.append((f"L{table.level}", t_ns))
        freed(table, t_ns, deferred)

    def root_freed(t_ns: int) -> None:
        story.append(("root", t_ns))
        root(t_ns)

    def zap_host(t_ns: int, first: int, last: int) -> int:
        story.append(("zap", t_ns))
        return zap(t_ns, first, last)

    kvm.table_freed = table_freed  # type: ignore[method-assign]
    kvm.oracle.root_freed = root_freed  # type: ignore[method-assign]
    kvm.zap_host = zap_host  # type: ignore[method-assign]
    return story


# -- the walk ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("page", "bits", "mapping", "tables", "roots"),
    [
        (4 * KIB, 40, 4 * KIB, 16 + 1, 2),
        (4 * KIB, 48, 4 * KIB, 16 + 1 + 1, 1),
        (4 * KIB, 40, 2 * MIB, 1, 2),
        (16 * KIB, 40, 16 * KIB, 1, 16),
        (64 * KIB, 40, 64 * KIB, 1, 1),
    ],
)
def test_every_entry_of_every_table_is_visited(
    page: int, bits: int, mapping: int, tables: int, roots: int
) -> None:
    made = lab(32 * MIB, {"page_size": page, "ipa_bits": bits, "mapping": mapping})
    made.fill()
    teardown = made.destroy()
    assert made.kvm.tables_freed == tables
    assert teardown.visits == (tables + roots) * page // 8
    assert made.kvm.stage2.linked_tables == 0


def test_children_before_their_parent_the_root_last() -> None:
    made = lab(2 * GIB + 4 * MIB, {"ipa_bits": 48})
    made.fill([0, 511, 512, 262143, 262144, 524288])
    story = watch(made)
    made.destroy()
    kinds = [kind for kind, _ in story]
    assert kinds == ["L3", "L3", "L3", "L2", "L3", "L2", "L3", "L2", "L1", "root"]
    assert [at for _, at in story] == sorted(at for _, at in story)


def test_what_the_walk_costs() -> None:
    """A look at each entry, a put for each counted one, a descent and a free for each table."""
    made = lab(4 * MIB)
    made.fill(range(700))
    story = watch(made)
    made.destroy()
    costs = made.kvm.costs
    (row,) = account(made.kvm.mmu_lock.rows)
    began = row["entry"] + row["hold"]
    empty = 512 * costs.unmap.visit_ns + costs.unmap.descend_ns + costs.free.free_ns
    put = costs.line.same_ns
    ends = [empty + 512 * put, 2 * empty + 700 * put, 3 * empty + 702 * put]
    root = 2 * (512 * costs.unmap.visit_ns + costs.free.free_ns)
    assert [at - began for _, at in story] == [*ends, ends[-1] + root]


@pytest.mark.parametrize(("policy", "share"), [("single", 1), ("chunked", 4)])
def test_how_long_a_cpu_is_kept(policy: str, share: int) -> None:
    """Since the v6.19 cycle there is a point to reschedule after each largest block."""
    made = lab(4 * GIB, teardown_walk=policy)
    fill_sparsely(made, 2 * MIB)
    story = watch(made)
    teardown = made.destroy()
    (row,) = account(made.kvm.mmu_lock.rows)
    whole = story[-2][1] - row["entry"] - row["hold"]
    resched = made.kvm.costs.ageing.resched_ns
    expected = whole if share == 1 else (whole - 4 * resched) / share
    assert teardown.longest_ns == pytest.approx(expected, rel=0.001)


def test_the_lock_is_held_only_to_detach() -> None:
    """mmu->pgt becomes NULL under the lock, the walk runs without it and without invalidation."""
    made = lab()
    made.fill()
    made.destroy()
    (row,) = account(made.kvm.mmu_lock.rows)
    assert (row["site"], row["mode"]) == (TEARDOWN, 1)
    assert row["hold"] == made.kvm.costs.unmap.bookkeeping_ns
    assert made.broadcasts() == 0
    assert not made.kvm.stage2.attached


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("root_free", ROOT_FREE)
def test_nothing_is_left(order: str, root_free: str) -> None:
    made = lab(root_free=root_free, table_free="put_page_rcu")
    made.fill()
    made.drop(2 * MIB, 4 * MIB)
    teardown = made.destroy(order)
    made.env.run()
    end = int(made.env.now) + 1_000_000  # a batch of callbacks runs ahead of the clock
    timeline = made.world.memory.timeline(end)
    assert timeline["table_bytes"][-1] == timeline["reported_table_bytes"][-1] == 0
    assert timeline["deferred_bytes"][-1] == 0
    assert made.kvm.tables_freed == made.kvm.tables_allocated == 9
    made.kvm.oracle.finished(end)
    assert not made.kvm.oracle.violations
    assert not made.kvm.waiting
    assert teardown.done


# -- the order --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("order", "root_free", "story"),
    [
        ("close_vm", "in_release", "tree srcu"),
        ("close_vm", "after_unregister", "srcu tree"),
        ("process_exit", "in_release", "tree srcu zap"),
        ("process_exit", "after_unregister", "srcu zap tree"),
    ],
)
def test_what_comes_first(order: str, root_free: str, story: str) -> None:
    """A kill calls ->release before any mapping goes; a last close keeps the host's pages."""
    made = lab(root_free=root_free)
    made.fill()
    told = watch(made)
    srcu = made.kvm.notifier.srcu
    synchronize = srcu.synchronize

    def synchronized(t_ns: int) -> Any:
        told.append(("srcu", t_ns))
        assert not made.kvm.notifier.subscribed, "unlinked before the wait"
        return synchronize(t_ns)

    srcu.synchronize = synchronized  # type: ignore[method-assign]
    made.destroy(order)
    assert [kind.replace("root", "tree") for kind, _ in told if kind[0] != "L"] == story.split()
    assert bool(made.kvm.host.state.any()) == (order == "close_vm")


def section(made: Lab, until_ns: int) -> None:
    """Somebody inside the notifier's SRCU up to then."""
    token = made.kvm.notifier.srcu.enter(0)

    def steps() -> Iterator[Any]:
        yield made.env.timeout(until_ns)
        made.kvm.notifier.srcu.leave(token, until_ns)

    made.env.process(steps())


@pytest.mark.parametrize("root_free", ROOT_FREE)
def test_only_one_order_waits_for_those_inside(root_free: str) -> None:
    """->release frees while other notifier calls may run; after unregistering there are none."""
    made = lab(root_free=root_free)
    made.fill()
    story = watch(made)
    section(made, 500_000)
    made.destroy()
    root = dict(story)["root"]
    if root_free == "in_release":
        assert root < 100_000
    else:
        assert root > 500_000 + made.kvm.costs.wakeup_ns
    assert made.t_ns >= 500_000 + made.kvm.costs.wakeup_ns, "the wait comes in any case"


def test_an_exit_waits_for_who_holds_the_address_space() -> None:
    """exit_mmap() comes with the last reference (mmput); closing the file needs none."""
    detached = {}
    for order in ORDERS:
        made = lab()
        made.fill()
        made.kvm.pin()

        def let_go(made: Lab = made) -> Iterator[Any]:
            yield made.env.timeout(700_000)
            made.kvm.unpin(700_000)

        made.env.process(let_go())
        made.destroy(order)
        detached[order] = account(made.kvm.mmu_lock.rows)[0]["entry"]
    assert detached["close_vm"] < 10_000
    assert 700_000 < detached["process_exit"] < 710_000


def test_a_pin_is_held_by_each_walker() -> None:
    made = lab()
    assert made.kvm.unpinned() is None
    made.kvm.pin()
    made.kvm.pin()
    waiting = made.kvm.unpinned()
    assert waiting is not None
    assert made.kvm.unpinned() is waiting, "one event for all who wait"
    made.kvm.unpin(10)
    assert not waiting.triggered
    made.kvm.unpin(20)
    assert waiting.triggered
    assert made.kvm.unpinned() is None


# -- beside others ----------------------------------------------------------------------------

ALWAYS = {"pattern": "populate", "repeat": 100_000, "think": 300}


def ending(order: str, at: int, **policies: str) -> list[str]:
    """Kinds of violations when a VM ends ``at`` while it is aged over and over."""
    built = world(
        kernel={"base": "linux-6.12", "set": policies},
        guest={
            "memory": 256 * KIB,
            "access": ALWAYS,
            "teardown": {"order": order, "at": at},
        },
        ageing={"start": 200_000},
    )
    built.run()
    assert all(teardown.done for teardown in built.teardowns)
    return [violation.kind for kvm in built.kvms for violation in kvm.oracle.violations]


TIMES = range(220_000, 250_000, 2900)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("root_free", ROOT_FREE)
@pytest.mark.parametrize("lock", ["write", "read"])
def test_locked_ageing_survives_any_order(order: str, root_free: str, lock: str) -> None:
    """Every call looks at mmu->pgt again under the lock."""
    for at in TIMES:
        assert not ending(order, at, root_free=root_free, ageing_lock=lock)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("call", ["per_pte", "bitmap"])
def test_lockless_ageing_survives_the_later_order(order: str, call: str) -> None:
    for at in TIMES:
        found = ending(
            order, at, root_free="after_unregister", ageing_lock="none", ageing_call=call
        )
        assert not found


def test_lockless_ageing_meets_a_root_freed_in_release() -> None:
    """The negative control: a tree freed without lock, invalidation or grace period."""
    found: set[str] = set()
    for at in TIMES:
        found |= set(ending("close_vm", at, root_free="in_release", ageing_lock="none"))
    assert found
    assert found <= {"use_after_free", "root_freed_under_walker"}


def test_the_host_goes_on_after_its_guest() -> None:
    """Ranges and passes that come later find nothing to do, and the run ends."""
    guest = {"memory": 256 * KIB, "access": ALWAYS}
    once = {"access": {"pattern": "populate"}}
    built = world(
        guests={
            "a": guest | once | {"teardown": {"order": "process_exit", "at": 3_000_000}},
            "b": guest,
        },
        ageing={"interval": 100_000},
        contenders={"c": {"kind": "madvise_dontneed", "guest": "a", "range": 4096, "rate": 1e5}},
        duration=6_000_000,
    )
    record = built.run()
    a, b = built.kvms
    assert not record.violations
    assert b.vcpus[0].finished_ns < 0, "it runs on"
    assert 200 < record.summary["unmap_calls"] <= 300, "a call each 10 us, until its guest died"
    assert not a.stage2.attached
    assert max(report.start_ns for report in built.ageing.passes if report.guest == "a") < 3_100_000
    assert max(report.start_ns for report in built.ageing.passes if report.guest == "b") > 5_000_000


def test_teardown_starts_when_it_is_told_to() -> None:
    made = lab()
    made.fill()
    teardown = Teardown(made.kvm, made.task, "close_vm", 123_456)
    end = made.run(teardown.run())
    (row,) = account(made.kvm.mmu_lock.rows)
    assert row["arrival"] == 123_456
    assert end == made.env.now > row["entry"] + row["hold"] + teardown.walk_ns
