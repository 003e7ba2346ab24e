"""Does the oracle find what is unsafe, name it, and leave what Linux considers safe alone?

Two shipped workloads must be found unsafe, every shipped kernel must run clean on the same demands,
and negative controls break the model one rule at a time: each has to be found by its own name.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from worlds import KIB, MIB, MS, journal, run

from simkvm.contenders.contender import Contender
from simkvm.kernel.kvm import Kvm
from simkvm.kernel.mmu_notifier import MmuNotifier
from simkvm.kernel.rcu_segcblist import SegmentedCallbackList
from simkvm.kernel.stage2 import Stage2, TableId
from simkvm.kernel.table_free import PutPageRcu
from simkvm.kernel.teardown import Teardown
from simkvm.observe.record import Record
from simkvm.scenario.kernel import kernel_names, load_kernel
from simkvm.scenario.load import load

UNSAFE = Path(__file__).parents[2] / "workloads" / "unsafe"
KERNELS = kernel_names()
MACHINES = {"arm64": "ampere-altra-80c", "x86": "x86-icelake-64c"}
ORDERS = ["close_vm", "process_exit"]

Patch = pytest.MonkeyPatch


def shipped(workload: str, *sets: str) -> Record:
    """The record of a workload in ``workloads/unsafe``, with some keys changed."""
    study = load(UNSAFE / f"{workload}.yaml", sets)
    (point,) = study.points
    return run(point.scenario)


def with_kernel(kernel: str) -> list[str]:
    """Settings that run a workload under a shipped kernel, on a machine of its architecture."""
    return [f"kernel={kernel}", f"machine={MACHINES[load_kernel(kernel).arch]}", "expect=safe"]


def kinds(record: Record) -> Counter[str]:
    return Counter(violation["kind"] for violation in record.violations)


# -- what must be found ----------------------------------------------------------------------------


@pytest.mark.parametrize("path", sorted(UNSAFE.glob("*.yaml")), ids=lambda path: path.stem)
def test_an_unsafe_workload_is_a_finding_when_run(path: Path) -> None:
    (point,) = load(path).points
    assert point.scenario.expect == "unsafe", "else it would not be run at all"
    assert point.scenario.name == path.stem
    assert len(point.scenario.description) > 100


def test_inline_frees_under_lock_free_walkers_are_found() -> None:
    record = shipped("inline-free-lockless")
    assert set(kinds(record)) == {"use_after_free"}
    assert record.summary["safety"] == "violated"
    first = record.violations[0]
    assert first["time_ns"] == min(violation["time_ns"] for violation in record.violations)
    told = [line.partition(": ")[2] for line in first["timeline"]]
    (table,) = {line.removesuffix(" unlinked") for line in told if line.endswith(" unlinked")}
    assert told[0] == f"{table} linked"
    assert told[-1] == "ageing leaves"
    assert f"use_after_free: ageing reads {table} after its page was freed" in told
    assert told.index("ageing enters, holding no lock") < told.index(
        f"use_after_free: ageing reads {table} after its page was freed"
    )


@pytest.mark.parametrize(
    ("base", "seed", "duration"),
    [("linux-6.4-yuzhao-v2", 2, "40 ms"), ("linux-7.1-lockless", 3, "80 ms")],
)
def test_it_takes_no_lucky_seed_to_find_them(base: str, seed: int, duration: str) -> None:
    record = shipped(
        "inline-free-lockless",
        f"kernel={{base: {base}, set: {{table_free: inline}}}}",
        f"seed={seed}",
        f"duration={duration}",
    )
    assert kinds(record)["use_after_free"] > 0


def test_the_root_freed_in_release_is_found() -> None:
    record = shipped("root-freed-in-release")
    assert kinds(record)["root_freed_under_walker"] > 0
    assert set(kinds(record)) <= {"root_freed_under_walker", "use_after_free"}
    story = next(v for v in record.violations if v["kind"] == "root_freed_under_walker")["timeline"]
    told = [line.partition(": ")[2] for line in story]
    assert {"the root freed", "ageing enters, holding no lock", "ageing leaves"} < set(told)


def test_it_takes_no_lucky_moment_to_find_it() -> None:
    """Ageing spends most of its time in the one table of that guest, and freeing takes less."""
    found = [
        bool(kinds(shipped("root-freed-in-release", f"guests.vm0.teardown.at={at} us")))
        for at in range(5000, 6000, 91)
    ]
    assert sum(found) > len(found) / 2


# -- what must not be found ------------------------------------------------------------------------


@pytest.mark.parametrize("kernel", KERNELS)
def test_shipped_kernels_unmap_safely(kernel: str) -> None:
    record = shipped("inline-free-lockless", *with_kernel(kernel), "duration=25 ms")
    assert record.violations == []
    assert record.summary["unmapped_pages"] > 0
    keeps = load_kernel(kernel)["unmap_tables"] == "keep"
    assert (record.summary["tables_freed"] == 0) == keeps
    assert record.summary["safety"] == "clean"


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("kernel", KERNELS)
def test_shipped_kernels_end_a_vm_safely(kernel: str, order: str) -> None:
    record = shipped(
        "root-freed-in-release",
        *with_kernel(kernel),
        f"guests.vm0.teardown.order={order}",
        "duration=60 ms",  # x86's tables go by RCU
    )
    assert record.violations == []
    assert record.timeline["table_bytes"][-1] == 0


BUSY: dict[str, Any] = {
    "kernel": "linux-7.1-lockless",
    "host": {"hz": 1000, "cpus": 8},
    "guest": {
        "vcpus": 2,
        "memory": 4 * MIB,
        "access": {"pattern": "uniform", "write_ratio": 0.8, "think": 4_000},
        "teardown": {"order": "close_vm", "at": 12 * MS},
    },
    "ageing": {},
    "contenders": {
        "vmm": {"kind": "madvise_dontneed", "guest": "vm0", "range": 2 * MIB, "rate": 1500.0}
    },
    "duration": 25 * MS,  # the last callbacks are long over: that is when leaks are looked for
}


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("kernel", KERNELS)
def test_shipped_kernels_end_a_busy_vm_safely(kernel: str, order: str) -> None:
    """Faults, unmaps and ageing in full swing; in the end every table has been freed once."""
    guest = {**BUSY["guest"], "teardown": {"order": order, "at": 12 * MS}}
    with journal() as notes:
        machine = MACHINES[load_kernel(kernel).arch]
        record = run(**{**BUSY, "kernel": kernel, "machine": machine, "guest": guest})
    assert record.violations == []
    least = 3 if load_kernel(kernel)["unmap_tables"] == "keep" else 5
    assert record.summary["tables_allocated"] == record.summary["tables_freed"] > least
    assert len(notes.roots_freed) == 1
    assert record.timeline["table_bytes"][-1] == 0
    assert record.timeline["reported_table_bytes"][-1] == 0
    assert record.timeline["deferred_bytes"][-1] == 0


# -- negative controls -----------------------------------------------------------------------------


def broken(patch: Patch, owner: type, method: str, how: Callable[..., Any]) -> None:
    """Replace ``method`` by ``how``, which gets the original as its first argument."""
    original = getattr(owner, method)
    patch.setattr(owner, method, lambda *args, **kwargs: how(original, *args, **kwargs))


def number_too_early(patch: Patch) -> None:
    """Callbacks are numbered with the grace period that runs already."""
    broken(
        patch, SegmentedCallbackList, "accelerate", lambda done, it, number: done(it, number - 1)
    )


def free_without_waiting(patch: Patch) -> None:
    """call_rcu() invokes at once."""
    broken(
        patch, Kvm, "call_rcu", lambda _, kvm, t_ns, cpu, table: kvm.table_freed(table, t_ns, True)
    )


def forget_the_last_reference(patch: Patch) -> None:
    """The callback does not drop it, as that of collapsed subtrees did not before June 2023."""
    broken(patch, PutPageRcu, "callback", lambda _, policy, guest, table, t_ns: 1)


def forget_a_table_at_the_end(patch: Patch) -> None:
    """Teardown's walk misses one."""
    broken(patch, Teardown, "_tables", lambda done, teardown: done(teardown)[1:])


def free_twice(patch: Patch) -> None:
    """put_page() in the walk and in the callback."""

    def unlinked(done: Any, policy: Any, guest: Any, table: TableId, t_ns: int, cpu: int) -> None:
        guest.table_freed(table, t_ns, deferred=False)
        done(policy, guest, table, t_ns, cpu)

    broken(patch, PutPageRcu, "unlinked", unlinked)


def keep_the_last_leaf(patch: Patch) -> None:
    """Unmapping ends one leaf early."""
    broken(
        patch,
        Kvm,
        "unmap_chunk",
        lambda done, kvm, cpu, t_ns, first, last: done(kvm, cpu, t_ns, first, last - 1),
    )


def ignore_invalidations(patch: Patch) -> None:
    """Faults do not look whether an invalidation runs or ran."""
    for name, seen in (("in_progress", 0), ("moved_ns", -1)):
        blind = property(lambda _, seen=seen: seen, lambda *_: None)  # type: ignore[misc]
        patch.setattr(MmuNotifier, name, blind, raising=False)


def unlink_with_entries(patch: Patch) -> None:
    """A count that is one too low: removing all entries but one takes the table with it."""

    def map_leaf(done: Any, stage2: Stage2, leaf: int, flags: int) -> Any:
        made = done(stage2, leaf, flags)
        if made:
            stage2.leaf.counts[stage2.leaf_table(leaf)] -= 1
        return made

    def take_back(done: Any, contender: Contender, t_ns: int, first_byte: int, size: int) -> Any:
        return done(contender, t_ns, first_byte, size - 4 * KIB)

    broken(patch, Stage2, "map_leaf", map_leaf)
    broken(patch, Contender, "take_back", take_back)


def unlink_again(patch: Patch) -> None:
    """The walk reports a table twice."""

    def unmap_chunk(done: Any, kvm: Kvm, cpu: int, t_ns: int, first: int, last: int) -> int:
        tables = kvm.stage2.path(first)
        end: int = done(kvm, cpu, t_ns, first, last)
        if tables and tables[-1] not in kvm.stage2.path(first):
            kvm.oracle.unlinked(tables[-1], end)
        return end

    broken(patch, Kvm, "unmap_chunk", unmap_chunk)


CONTROLS: dict[Callable[[Patch], None], str] = {
    number_too_early: "free_before_grace_period",
    free_without_waiting: "free_before_grace_period",
    forget_the_last_reference: "leak",
    forget_a_table_at_the_end: "leak",
    free_twice: "double_free",
    keep_the_last_leaf: "leaf_after_invalidate",
    ignore_invalidations: "leaf_after_invalidate",
    unlink_with_entries: "unlink_with_entries",
    unlink_again: "unlink_twice",
}


@pytest.fixture
def patch() -> Iterator[Patch]:
    with Patch.context() as patch:
        yield patch


@pytest.mark.parametrize("breaks", CONTROLS, ids=lambda how: how.__name__)
def test_a_broken_rule_is_found_by_its_name(breaks: Callable[[Patch], None], patch: Patch) -> None:
    breaks(patch)
    record = run(**BUSY)
    assert kinds(record)[CONTROLS[breaks]] > 0
    assert record.summary["safety"] == "violated"
    for violation in record.violations:
        assert violation["timeline"], "every violation has its story"
        assert violation["guest"] == "vm0"


def test_lock_free_walkers_are_what_makes_inline_frees_unsafe() -> None:
    """The same frees, with ageing under the lock for read or write, are safe."""
    for lock in ("read", "write"):
        changes = {"table_free": "inline", "ageing_lock": lock}
        kernel = {"base": "linux-7.1-lockless", "set": changes}
        assert run(**{**BUSY, "kernel": kernel}).violations == []


def test_tables_that_are_kept_make_inline_frees_safe() -> None:
    """Unmap as x86 does it, on arm64: no table goes before the VM does, after SRCU has drained."""
    changes = {"table_free": "inline", "unmap_tables": "keep"}
    with journal() as notes:
        record = run(**{**BUSY, "kernel": {"base": "linux-7.1-lockless", "set": changes}})
    assert record.violations == []
    assert record.summary["unmapped_pages"] > 0
    assert len(notes.freed) == record.summary["tables_allocated"] == 3
