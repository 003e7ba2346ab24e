"""The files of `workloads/pressure/`: what `simkvm run` makes is what rows are judged by."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from simkvm.scenario.load import load, resolved
from simkvm.scenario.machine import load_machine
from simkvm.scenario.schema import Scenario
from simkvm.units import GIB, MIB, format_size
from simkvm.validate.hosts import host_of
from simkvm.validate.published import LIMIT_BYTES, benchmark_of, figures
from simkvm.validate.reclaim import MemcachedUnderPressure, host_memory

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


def test_memcached_shows_the_runs_of_its_row_and_the_same_with_less_memory() -> None:
    row = [alike(one) for one in judged("V2-6")]
    files = [alike(one) for one in shown("memcached-arm64")]
    assert [one for one in files if one in row] == row
    others = [one for one in files if one not in row]
    (keys,) = {one["guests"]["vm"]["access"]["keys"] for one in row}
    touched = -(-keys // (MIB // MemcachedUnderPressure.chunk)) * MIB + MIB
    less = format_size(host_memory(touched, GIB, 64, 1.12))
    for one in row:
        one["host"]["memory"]["size"] = less
    assert others == row
    assert len(row) == 2
