"""Memory that waits for RCU, through a whole world: lengths, bounds, and what policies change.

What waits on average is a row of ``simkvm validate theory``; rules in
:mod:`simkvm.validate.theory_rcu`, the world in :mod:`simkvm.validate.theory_deferred`. Times of
unlinking come from the oracle's hook, waits from RCU's callbacks, the memory held from the
timeline: three sources. Arrivals are Poisson; intervals are 4.5 standard errors wide on each side,
worked out from the theory's own variance (risk below 1e-5).
"""

from __future__ import annotations

from functools import cache
from math import sqrt
from typing import NamedTuple

import numpy as np
import pytest
from worlds import MS, Journal, journal, world

from simkvm.observe.record import Record
from simkvm.scenario.machine import load_machine
from simkvm.units import NS_PER_S
from simkvm.validate.theory_deferred import CPUS, dropping
from simkvm.validate.theory_rcu import PERIODS, mean_wait, waits_in_ticks

Z = 4.5
#: Calls a second (several in each period) and milliseconds to run, by HZ.
RATES = {100: (500.0, 1200), 250: (1200.0, 700), 1000: (2500.0, 300)}
POLICIES = ["put_page_rcu", "free_removed_table", "free_removed_table_count_test"]


class Run(NamedTuple):
    """One world, run: what was recorded, and what was told while it ran."""

    record: Record
    notes: Journal
    duration_ns: int
    tick_ns: int
    ticks: int


@cache
def dropped(hz: int, policy: str = "put_page_rcu") -> Run:
    """A guest that keeps touching 32 MiB, of which a VMM drops 2 MiB at random moments."""
    rate, duration_ms = RATES[hz]
    with journal() as notes:
        record = world(**dropping(hz, duration_ms, rate, policy)).run()
    return Run(record, notes, duration_ms * MS, NS_PER_S // hz, PERIODS[hz])


def deviation(ticks: int) -> float:
    """Standard deviation of a wait in ticks."""
    return sqrt(float(np.var(waits_in_ticks(ticks))) + 1 / 12)


def slack_ns() -> int:
    """What the grace-period kthread and a softirq may be late behind their tick."""
    machine = load_machine("graviton3-64c")
    wake = machine["wakeup_ns"] + machine["context_switch_ns"]
    return round(4 * wake + 100 * CPUS)


@pytest.mark.parametrize("hz", list(RATES))
def test_grace_periods_last_whole_ticks(hz: int) -> None:
    """20, 8 and 4 ms at HZ 100, 250 and 1000, with a CPU idle somewhere."""
    run = dropped(hz)
    table = run.record.grace_periods
    lengths = np.array(table["end_ns"]) - np.array(table["start_ns"])
    assert len(lengths) > 40
    assert (np.abs(lengths - run.ticks * run.tick_ns) <= slack_ns()).all()
    between = np.array(table["start_ns"][1:]) - np.array(table["end_ns"][:-1])
    assert np.mean(between == 0) > 0.9, "one after the other"
    assert set(table["fqs_scans"]) == {1}


def settled(run: Run) -> list[int]:
    """Waits of callbacks that were queued while grace periods followed one another."""
    starts, ends = (np.array(run.record.grace_periods[key]) for key in ("start_ns", "end_ns"))
    follows = np.flatnonzero(starts[1:] == ends[:-1]) + 1
    spans = [(starts[i], ends[i]) for i in follows if i + 2 < len(starts) and i + 1 in follows]
    return [
        callback.invoked_ns[0] - callback.queued_ns
        for callback in run.notes.callbacks
        if any(start <= callback.queued_ns < end for start, end in spans)
    ]


@pytest.mark.parametrize("hz", list(RATES))
def test_a_callback_waits_as_long_as_the_ticks_say(hz: int) -> None:
    run = dropped(hz)
    waits = np.array(settled(run)) / run.tick_ns
    late = slack_ns() / run.tick_ns
    assert len(waits) > 200
    off = abs(waits.mean() - mean_wait(run.ticks))
    assert off <= Z * deviation(run.ticks) / sqrt(len(waits)) + late
    assert waits.min() >= min(waits_in_ticks(run.ticks)) - late
    assert waits.max() <= max(waits_in_ticks(run.ticks)) + 1 + late


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("hz", [1000])
def test_tables_in_waiting_are_rate_times_wait(hz: int, policy: str) -> None:
    run = dropped(hz, policy)
    _littles_law(run)


@pytest.mark.parametrize("hz", [100, 250])
def test_tables_in_waiting_are_rate_times_wait_at_any_hz(hz: int) -> None:
    _littles_law(dropped(hz))


def _littles_law(run: Run) -> None:
    """L = rate * W. In a run from empty, the two sides differ by the waits cut off at its end."""
    unlinked = [told.t_ns for told in run.notes.unlinked]
    waits = [c.invoked_ns[0] - c.queued_ns for c in run.notes.callbacks if c.invoked_ns]
    cut_off = [c for c in run.notes.callbacks if not c.invoked_ns]
    rate_per_ns, wait_ns = len(unlinked) / run.duration_ns, float(np.mean(waits))
    edge = len(cut_off) * max(waits) / run.duration_ns
    waiting = run.record.summary["deferred_tables_mean"]
    assert isinstance(waiting, float)
    assert len(waits) > 200
    assert abs(waiting - rate_per_ns * wait_ns) <= edge
    assert edge < 0.1 * waiting, "a run long enough to tell"


@pytest.mark.parametrize("hz", list(RATES))
def test_the_timeline_is_the_sum_of_its_waits(hz: int) -> None:
    """Little's law path by path: the area under the timeline is the sum of all waits, exactly."""
    run = dropped(hz)
    times = np.append(run.record.timeline["t_ns"], run.duration_ns)
    area = int((np.diff(times) * np.array(run.record.timeline["deferred_tables"])).sum())
    until = run.duration_ns
    waited = sum(
        min([*callback.invoked_ns, until]) - callback.queued_ns for callback in run.notes.callbacks
    )
    assert area == waited
    assert run.record.summary["deferred_tables_peak"] == max(run.record.timeline["deferred_tables"])


def test_a_second_walk_costs_the_softirq_not_the_wait() -> None:
    """The three policies differ in what a callback costs; ticks decide how long a table waits."""
    means = [float(np.mean(settled(dropped(1000, policy)))) for policy in POLICIES]
    samples = min(len(settled(dropped(1000, policy))) for policy in POLICIES)
    apart = 2 * Z * deviation(4) / sqrt(samples) * dropped(1000).tick_ns + slack_ns()
    assert max(means) - min(means) <= apart


def test_statistics_drop_a_table_at_unlink_or_at_its_free() -> None:
    """put_page_rcu takes it out of the counter at once; free_removed_table when it is freed."""
    early, late = dropped(1000, "put_page_rcu").record, dropped(1000, "free_removed_table").record
    early_gap = np.array(early.timeline["table_bytes"]) - early.timeline["reported_table_bytes"]
    late_gap = np.array(late.timeline["table_bytes"]) - late.timeline["reported_table_bytes"]
    assert np.array_equal(early_gap, early.timeline["deferred_bytes"])
    assert not late_gap.any()
