"""Whom the OOM killer takes, and what is left of the victim (mm/oom_kill.c, v6.12)."""

from __future__ import annotations

from collections.abc import Generator
from pathlib import Path
from typing import Any

import pytest
import selftest_runs
import worlds
from click.testing import CliRunner
from simpy import Event
from worlds import MS

from simkvm.cli import main
from simkvm.kernel.oom_kill import OomKiller
from simkvm.kernel.swap_fault import SwapFaultPath
from simkvm.kernel.swappable import SLOT, SwappableMemory
from simkvm.kernel.world import World
from simkvm.units import MIB

POPULATE = {"pattern": "populate"}


def host(kvm: Any) -> SwappableMemory:
    assert isinstance(kvm.host, SwappableMemory)
    return kvm.host


def world(swap: Any = None, size: int = 32 * MIB, **guests: Any) -> World:
    return worlds.world(host={"memory": {"size": size}, "swap": swap}, guests=guests)


def killer(made: World) -> OomKiller:
    """The killer of a world."""
    assert made.pgdat is not None
    found = made.pgdat.pages.out_of_memory.__self__  # type: ignore[attr-defined]
    assert isinstance(found, OomKiller)
    return found


def small(memory: int = 2 * MIB, **keys: Any) -> dict[str, Any]:
    return {"memory": memory, "vcpus": 1, "access": POPULATE, **keys}


def test_the_victim_is_who_has_most() -> None:
    made = world(a=small(), b=small(4 * MIB), c=small(4 * MIB))
    for kvm, pages in zip(made.kvms, (400, 500, 450), strict=True):
        host(kvm).populate(0, pages, huge=False)
        host(kvm).pages.take(pages)
    killer(made).kill(10)
    assert killer(made).kills == [(10, "b")]
    assert [kvm.alive for kvm in made.kvms] == [True, False, True]
    killer(made).kill(20)
    assert killer(made).kills[1] == (20, "c")


def test_a_report_names_the_victim(tmp_path: Path) -> None:
    file = tmp_path / "short.yaml"
    file.write_text(
        "{name: short, machine: ampere-altra-80c, kernel: linux-6.12, host: {memory: {size: 2 MiB}}"
        ", guests: {a: {memory: 512 KiB, access: {pattern: populate}}, b: {memory: 2 MiB, "
        "access: {pattern: populate}}}}"
    )
    said = CliRunner().invoke(main, ["run", str(file)])
    assert said.exit_code == 0, said.output
    lines = said.output.splitlines()
    at = lines.index("Killed, out of memory")
    assert [line.split()[0] for line in lines[at + 1 : at + 4 : 2]] == ["guest", "b"]
    assert "As the selftest prints it" not in said.output


def test_swap_entries_and_page_tables_count() -> None:
    """``oom_badness``: RSS, swap entries and page tables."""
    made = world({"kind": "optane"}, a=small(), b=small())
    first, second = map(host, made.kvms)
    assert first.device is not None
    for each, pages in ((first, 100), (second, 99)):
        each.populate(0, pages, huge=False)
        each.pages.take(pages)
    second.device.allocate(2)  # type: ignore[union-attr]
    second.swap[200:202] = SLOT
    killer(made).kill(0)
    assert killer(made).kills[0][1] == "b"

    made = world(a=small(), b=small())
    first, second = map(host, made.kvms)
    second.table_linked(0)
    second.pages.take(1)
    killer(made).kill(0)
    assert killer(made).kills[0][1] == "b"


def test_tables_of_stage_2_do_not_count() -> None:
    """They are nobody's RSS, and not in ``mm_pgtables_bytes``."""
    made = world(a=small(), b=small())
    made.kvms[1].tables_allocated += 100
    killer(made).kill(0)
    assert killer(made).kills[0][1] == "a"


def test_the_length_of_a_file_does_not_count() -> None:
    """A guest whose memory is a file's has what is in memory, as any other (MM_FILEPAGES)."""
    made = world({"kind": "optane"}, a=small(), b=small(4 * MIB, backing="file"))
    first = host(made.kvms[0])
    first.populate(0, 100, huge=False)
    first.pages.take(100)
    killer(made).kill(0)
    assert killer(made).kills[0][1] == "a"


def test_the_first_of_equals_is_killed_and_nobody_twice() -> None:
    made = world(a=small(), b=small())
    for at_ns in (1, 2, 3):
        killer(made).kill(at_ns)
    assert killer(made).kills == [(1, "a"), (2, "b")]


def test_memory_and_slots_are_free_at_once() -> None:
    made = world({"kind": "optane"}, a=small())
    victim = host(made.kvms[0])
    victim.populate(0, 100, huge=False)
    victim.pages.take(100)
    assert victim.device is not None
    victim.device.allocate(5)
    victim.swap[200:205] = SLOT
    free = victim.pages.free
    killer(made).kill(0)
    assert victim.pages.free == free + 100
    assert victim.device.used == 0


def test_nothing_of_a_victim_is_left() -> None:
    """Its memory at once, tables and memory caches when its process has ended."""
    made = world(a=small(4 * MIB), b=small(MIB))
    made.env.timeout(100_000).callbacks.append(lambda _: killer(made).kill(100_000))  # type: ignore[union-attr]
    made.env.timeout(50 * MS)
    made.run()
    victim, other = made.kvms
    made.env.run(60 * MS)
    assert not victim.alive
    assert victim.tree_freed
    assert victim.tables_allocated == victim.tables_freed > 0
    pages = host(other).pages
    held = host(other).page_count + host(other).table_pages + other.tables_allocated
    fault = other.vcpus[0].fault
    assert isinstance(fault, SwapFaultPath)
    held += other.stage2.geometry.root_pages + fault.cached
    assert pages.total - pages.free == held


def test_the_others_go_on() -> None:
    """Without swap two guests that do not fit together: one ends, the other one finishes."""
    made = world(size=8 * MIB, a=small(2 * MIB), b=small(8 * MIB))
    record = made.run()
    assert record.summary["oom_kills"] == 1
    assert [kvm.alive for kvm in made.kvms] == [True, False]
    assert made.kvms[0].vcpus[0].touches == 512
    assert made.kvms[1].vcpus[0].touches < 2048


def test_a_guest_that_can_never_fit_is_killed_at_the_first_look() -> None:
    """No swap: there is nothing to reclaim, so nothing is tried twice."""
    record = world(size=8 * MIB, a=small(16 * MIB)).run()
    assert record.summary["oom_kills"] == 1
    assert record.summary["allocstall"] == 1


@pytest.mark.parametrize(
    "access",
    [
        {"pattern": "chase", "loads": 100_000},
        {"pattern": "sort", "data": MIB, "rounds": 1000},
        {"pattern": "memcached", "clients": 4, "keys": 200, "requests": 10**6},
        {"pattern": "interactive", "tabs": 2, "tab_size": MIB, "visits": 10**6},
        {"pattern": "uniform", "touches": 10**6},
    ],
)
@pytest.mark.parametrize("engine", ["explicit", "lazy"])
def test_the_run_ends_with_its_last_victim(access: dict[str, Any], engine: str) -> None:
    if engine == "lazy" and access["pattern"] != "uniform":
        return
    made = world(
        {"kind": "optane"}, a={"memory": 4 * MIB, "vcpus": 2, "access": access, "engine": engine}
    )
    made.env.timeout(MS).callbacks.append(lambda _: killer(made).kill(MS))  # type: ignore[union-attr]
    record = made.run()
    assert record.summary["oom_kills"] == 1
    assert all(0 <= vcpu.finished_ns < 1000 * MS for vcpu in made.kvms[0].vcpus)


ROOMY = {"host": {"memory": {"size": 64 * MIB}}}


def run_at_most(made: World, most_ns: int) -> Any:
    """Run to the end, which has to come before ``most_ns``."""

    def late() -> Generator[Event, Any, None]:
        yield made.env.timeout(most_ns)
        raise AssertionError("the run goes on and on")

    made.env.process(late())
    return made.run()


AGES: dict[str, Any] = {"test": "access_tracking_perf_test", "lru_gen": True}
ASYNC: dict[str, Any] = {**AGES, "age_while_populating": True}
FILLS: dict[str, Any] = {"test": "max_guest_memory_test"}


@pytest.mark.parametrize(
    ("options", "at_us"),
    [
        *((AGES, at_us) for at_us in (0, 1, 3000, 8500, 9420, 11000)),  # it ages from 8 to 9.4 ms
        *((ASYNC, at_us) for at_us in (3000, 8700)),
        *((FILLS, at_us) for at_us in (10, 1000, 1800, 2000, 3000)),  # from 2 ms on: memslots go
    ],
)
def test_the_run_ends_with_its_selftest(options: dict[str, Any], at_us: int) -> None:
    """Whatever its threads do: spin, wait for one another, take faults, age, delete memslots."""
    made = selftest_runs.world(**options, top=ROOMY)
    at_ns = at_us * 1000
    made.env.timeout(at_ns).callbacks.append(lambda _: killer(made).kill(at_ns))  # type: ignore[union-attr]
    record = run_at_most(made, 1000 * MS)
    assert record.summary["oom_kills"] == 1
    whole = selftest_runs.lines(selftest_runs.run(**options, top=ROOMY)[1])
    said = selftest_runs.lines(record)
    said = said[: said.index("vm")]
    assert said == whole[: len(said)]
    assert "message" not in record.phases["name"][record.phases["name"].index("oom_kill") :]


@pytest.mark.parametrize("options", [AGES, ASYNC])
def test_a_selftest_that_does_not_fit_is_killed(options: dict[str, Any]) -> None:
    made = selftest_runs.world(**options, top={"host": {"memory": {"size": 16 * MIB}}})
    assert run_at_most(made, 1000 * MS).summary["oom_kills"] == 1


def test_what_a_killed_selftest_has_measured_stays() -> None:
    """Here the first pass and the reset after it, which it would print at its end."""
    made = selftest_runs.world(**FILLS, top=ROOMY)
    at_ns = 1_800_000
    made.env.timeout(at_ns).callbacks.append(lambda _: killer(made).kill(at_ns))  # type: ignore[union-attr]
    record = run_at_most(made, 1000 * MS)
    assert [name for name in record.phases["name"] if name in ("run1", "reset", "run2")] == [
        "run1",
        "reset",
    ]
