"""The files of `workloads/pressure/`: what `simkvm run` makes is what rows are judged by."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from simkvm.scenario.load import load, resolved
from simkvm.scenario.machine import load_machine
from simkvm.scenario.schema import Scenario
from simkvm.units import MIB
from simkvm.validate.hosts import host_of
from simkvm.validate.published import LIMIT_BYTES, benchmark_of, figures
from simkvm.validate.reclaim import host_memory

FOLDER = Path(__file__).parents[2] / "workloads" / "pressure"
ROWS = {"spark-arm64": "V2-3", "max-guest-memory": "V2-1"}


def shown(name: str) -> list[Scenario]:
    """What `simkvm run` makes of a file."""
    return [point.scenario for point in load(FOLDER / f"{name}.yaml").first]


def judged(row: str) -> list[Scenario]:
    """What `simkvm validate published` makes of a row, an arm each."""
    arms = {figure.arm: figure for figure in figures() if figure.id == row}
    runs = []
    for figure in arms.values():
        benchmark = benchmark_of(figure)
        assert benchmark is not None
        runs.append(benchmark.run(figure, host_of(row), LIMIT_BYTES).scenario)
    return runs


def alike(scenario: Scenario) -> dict[str, Any]:
    """All but what it is called, and the machine as its numbers."""
    content = resolved(scenario)
    machine = load_machine(scenario.machine)
    del content["name"], content["description"]
    numbers = {name: each.value for name, each in machine.parameters.items()}
    return {**content, "machine": (machine.cores, machine.nodes, numbers)}


@pytest.mark.parametrize("name", ROWS)
def test_a_file_shows_the_runs_of_its_row(name: str) -> None:
    files, rows = ([alike(one) for one in each] for each in (shown(name), judged(ROWS[name])))
    assert files == rows
    assert len(files) == 2


def test_memcached_overcommits_as_its_row_does() -> None:
    """Its memory is cut to another size, by the same rule."""
    row = judged("V2-6")[0]
    for scenario in shown("memcached-arm64"):
        (guest,), (other,) = scenario.guests.values(), row.guests.values()
        mine, theirs = guest.access.model_dump(), other.access.model_dump()
        assert mine.pop("keys") == pytest.approx(theirs.pop("keys"), rel=0.03)
        assert mine == theirs
        assert scenario.host.memory is not None
        memory = guest.memory_pages * 4096
        sizes = [host_memory(memory - 2 * MIB, memory, 64, times) for times in (1.08, 1.12)]
        assert min(abs(scenario.host.memory.size - size) for size in sizes) <= 4 * MIB
