"""Selftests at reduced size, for tests: built from a few words."""

from __future__ import annotations

from typing import Any

from simkvm.kernel.world import World
from simkvm.observe.record import Record
from simkvm.scenario.kernel import load_kernel
from simkvm.scenario.load import require_possible
from simkvm.scenario.machine import load_machine
from simkvm.scenario.schema import Scenario
from simkvm.units import MIB

MS = 1_000_000

SMALL: dict[str, dict[str, Any]] = {
    # Twice what the TLB of an Altra holds, so that no translation outlives a round.
    "access_tracking_perf_test": {"vcpus": 2, "vcpu_memory": 10 * MIB},
    "demand_paging_test": {"vcpus": 2, "vcpu_memory": 2 * MIB, "uffd_mode": "MISSING"},
    "dirty_log_perf_test": {"vcpus": 2, "vcpu_memory": 2 * MIB},
    "kvm_page_table_test": {"vcpus": 2, "memory": 4 * MIB},
    "max_guest_memory_test": {"vcpus": 2, "memory": 8 * MIB, "slot_size": 2 * MIB},
    "memslot_perf_test": {"slots": 34, "memory": 16 * MIB, "length": MS},
    "mmu_stress_test": {"vcpus": 2, "memory": 8 * MIB, "slot_size": 2 * MIB},
}
"""Options that make each test small."""


def scenario(test: str, top: dict[str, Any] | None = None, **options: Any) -> Scenario:
    """A scenario of ``test`` with its small options and these; ``top``: other keys."""
    keys = {"machine": "ampere-altra-80c", "kernel": "linux-6.12", **(top or {})}
    selftest = {"test": test, **SMALL[test], **options}
    made = Scenario.model_validate({"name": test, **keys, "selftest": selftest})
    require_possible(made)
    return made


def world(test: str, top: dict[str, Any] | None = None, **options: Any) -> World:
    """Its world, not yet run."""
    return world_of(scenario(test, top, **options))


def world_of(spec: Scenario) -> World:
    """The world of a scenario, not yet run."""
    return World(spec, load_machine(spec.machine), load_kernel(spec.kernel))


def run(test: str, top: dict[str, Any] | None = None, **options: Any) -> tuple[World, Record]:
    """Its world after the run, and the record."""
    made = world(test, top, **options)
    return made, made.run()


def run_scenario(spec: Scenario) -> tuple[World, Record]:
    """As :func:`run`, for a scenario."""
    made = world_of(spec)
    return made, made.run()


def lines(record: Record) -> list[str]:
    """What the test printed, line by line."""
    return "\n".join(
        line
        for name, line in zip(record.phases["name"], record.phases["line"], strict=True)
        if line or name == "message"
    ).split("\n")


def phases(record: Record) -> list[dict[str, Any]]:
    """What it measured, without its messages."""
    rows = zip(*record.phases.values(), strict=True)
    made = [dict(zip(record.phases, row, strict=True)) for row in rows]
    return [row for row in made if row["name"] != "message"]


def acquisitions(record: Record, site: str, mode: str, guest: str = "vm") -> int:
    """How often ``mmu_lock`` was taken."""
    table = record.locks
    rows = zip(table["guest"], table["site"], table["mode"], table["acquisitions"], strict=True)
    return sum(n for g, s, m, n in rows if (g, s, m) == (guest, site, mode))
