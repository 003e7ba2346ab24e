"""Does the oracle find what is unsafe, name it, and leave what Linux considers safe alone?

Every shipped kernel must run clean, and each workload in ``workloads/unsafe`` breaks the model by
one known mistake: it has to be found by its own name, and the same world without it must be clean.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from worlds import MS, journal, run

from simkvm.kernel.bugs import BUGS
from simkvm.observe.record import Record
from simkvm.scenario.kernel import kernel_names, load_kernel
from simkvm.scenario.load import load
from simkvm.units import MIB

UNSAFE = Path(__file__).parents[2] / "workloads" / "unsafe"
KERNELS = kernel_names()
MACHINES = {"arm64": "ampere-altra-80c", "x86": "x86-icelake-64c"}
ORDERS = ["close_vm", "process_exit"]
WORLDS = sorted(UNSAFE.glob("*.yaml"))
FOLLOWS = {
    "root_freed_in_release": {"use_after_free"},
    "no_grace_period": {"use_after_free"},  # a page that is free at once may have a walker on it
    "freed_twice": {"use_after_free"},  # and the first of two frees comes at once
    "chunked_destroy_2025": {"double_free"},
}


def shipped(workload: str, *sets: str) -> Record:
    """The record of a workload in ``workloads/unsafe``, with some keys changed."""
    study = load(UNSAFE / f"{workload}.yaml", sets)
    (point,) = study.points
    return run(point.scenario)


def bugs_of(path: Path) -> tuple[str, ...]:
    (point,) = load(path).points
    return point.scenario.bugs


def with_kernel(kernel: str) -> list[str]:
    """Settings that run a workload under a shipped kernel, on a machine of its architecture."""
    machine = MACHINES[load_kernel(kernel).arch]
    return ["bugs=[]", f"kernel={kernel}", f"machine={machine}"]


def kinds(record: Record) -> Counter[str]:
    return Counter(violation["kind"] for violation in record.violations)


# -- what must be found ----------------------------------------------------------------------------


@pytest.mark.parametrize("path", WORLDS, ids=lambda path: path.stem)
def test_an_unsafe_workload_is_a_finding_when_run(path: Path) -> None:
    (point,) = load(path).points
    assert point.scenario.expect == "safe", "running it shows the story and exits with status 1"
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
        f"kernel={base}",
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
        for at in range(7000, 9000, 91)  # the guest has all of its memory from 5.3 ms on
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
    "duration": 25 * MS,  # the last callbacks are long over: no table waits any more
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


@pytest.mark.parametrize("path", WORLDS, ids=lambda path: path.stem)
def test_a_mistake_is_found_by_its_name(path: Path) -> None:
    """And by no other, but for what follows from it."""
    record = shipped(path.stem)
    (bug,) = (BUGS[name] for name in bugs_of(path))
    assert kinds(record)[bug.kind] > 0
    assert set(kinds(record)) <= {bug.kind, *FOLLOWS.get(bug.name, ())}
    assert record.summary["safety"] == "violated"
    for violation in record.violations:
        assert violation["timeline"], "every violation has its story"
        assert violation["guest"] == "vm0"


@pytest.mark.parametrize("path", WORLDS, ids=lambda path: path.stem)
def test_the_same_world_without_the_mistake_is_clean(path: Path) -> None:
    record = shipped(path.stem, "bugs=[]")
    assert record.violations == []
    assert record.summary["safety"] == "clean"


def test_every_mistake_has_a_world_in_which_it_is_found() -> None:
    shown = {name for path in WORLDS for name in bugs_of(path)}
    assert set(BUGS) == shown


def test_a_mistake_stays_in_its_run() -> None:
    """Nothing that another run in the process could feel: its events are those of before."""

    def fingerprint(*bugs: str) -> str:
        changes = (f"bugs=[{', '.join(bugs)}]", "duration=14 ms")
        return shipped("callback-numbered-early", *changes).fingerprint

    clean = fingerprint()
    of_each_kind = ("callback_numbered_early", "last_reference_kept", "invalidation_ignored")
    assert fingerprint(*of_each_kind, "last_leaf_kept", "inline_free") != clean
    assert fingerprint() == clean


def test_a_table_that_waits_for_its_callback_is_no_leak_but_another_one_is() -> None:
    """The run ends just after its VM, while callbacks are still to come."""
    soon = "duration=12100 us"
    record = shipped("table-missed-at-end", "bugs=[]", soon)
    assert record.timeline["deferred_bytes"][-1] > 0
    assert record.violations == []
    assert kinds(shipped("table-missed-at-end", soon)) == {"leak": 1}


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
