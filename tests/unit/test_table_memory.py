"""Memory in stage-2 tables over time: real, waiting, reported."""

from __future__ import annotations

import numpy as np
import pytest

from simkvm.observe.table_memory import TableMemory, time_average

PAGE = 4096


def timeline(made: TableMemory, end_ns: int = 10_000) -> dict[str, list[int]]:
    return {name: column.tolist() for name, column in made.timeline(end_ns).items()}


def memory() -> TableMemory:
    made = TableMemory()
    made.root(2 * PAGE)
    return made


def test_the_root_is_there_from_the_start() -> None:
    assert timeline(memory()) == {
        "t_ns": [0],
        "deferred_bytes": [0],
        "reported_table_bytes": [2 * PAGE],
        "table_bytes": [2 * PAGE],
    }


def test_a_table_that_is_freed_at_once() -> None:
    made = memory()
    made.linked(100, PAGE)
    made.unreported(500, PAGE)
    made.freed(500, PAGE, deferred=False)
    line = timeline(made)
    assert line["t_ns"] == [0, 100, 500]
    assert line["table_bytes"] == line["reported_table_bytes"] == [2 * PAGE, 3 * PAGE, 2 * PAGE]
    assert line["deferred_bytes"] == [0, 0, 0]


def test_a_table_that_waits_is_real_and_perhaps_not_reported() -> None:
    made = memory()
    made.linked(100, PAGE)
    made.unreported(500, PAGE)
    made.deferred(500, PAGE)
    made.freed(900, PAGE, deferred=True)
    assert timeline(made) == {
        "t_ns": [0, 100, 500, 900],
        "deferred_bytes": [0, 0, PAGE, 0],
        "reported_table_bytes": [2 * PAGE, 3 * PAGE, 2 * PAGE, 2 * PAGE],
        "table_bytes": [2 * PAGE, 3 * PAGE, 3 * PAGE, 2 * PAGE],
    }


def test_what_was_told_ahead_is_put_in_order() -> None:
    """A walk tells of its frees when it begins; a fault that comes before them tells later."""
    made = memory()
    made.freed(900, PAGE, deferred=False)
    made.linked(100, PAGE)
    made.linked(500, 2 * PAGE)
    line = timeline(made)
    assert line["t_ns"] == [0, 100, 500, 900]
    assert line["table_bytes"] == [2 * PAGE, 3 * PAGE, 5 * PAGE, 4 * PAGE]


def test_changes_of_one_moment_are_one_step() -> None:
    made = memory()
    for _ in range(17):
        made.linked(100, PAGE)
    assert timeline(made)["t_ns"] == [0, 100]
    assert timeline(made)["table_bytes"] == [2 * PAGE, 19 * PAGE]


@pytest.mark.parametrize(("end", "times"), [(99, [0]), (100, [0, 100]), (500, [0, 100, 500])])
def test_the_line_ends_with_the_run(end: int, times: list[int]) -> None:
    made = memory()
    made.linked(100, PAGE)
    made.linked(500, PAGE)
    assert timeline(made, end)["t_ns"] == times


def test_the_end_of_the_root() -> None:
    made = memory()
    made.root_freed(700, 2 * PAGE)
    assert timeline(made)["table_bytes"] == timeline(made)["reported_table_bytes"] == [2 * PAGE, 0]


def test_time_average() -> None:
    times, values = np.array([0, 100, 300]), np.array([10, 20, 0])
    assert time_average(times, values, 300) == (100 * 10 + 200 * 20) / 300
    assert time_average(times, values, 1000) == (100 * 10 + 200 * 20) / 1000
    assert time_average(times, values, 0) == 0.0
    assert time_average(times[:0], values[:0], 100) == 0.0
