"""The queued rwlock: formulas against one another, and what has bounds instead of a closed form.

Closed forms themselves are rows of ``simkvm validate theory``.
"""

from __future__ import annotations

import numpy as np
import pytest

from simkvm.kernel.cacheline import LineCosts
from simkvm.validate import queueing
from simkvm.validate.theory_locks import READ, closed, constant


@pytest.mark.parametrize("threads", [1, 2, 5, 12])
def test_the_two_closed_forms_agree_where_both_apply(threads: int) -> None:
    think, service = 60_000.0, 10_000.0
    throughput = queueing.machine_repair(threads, think, service, queueing.exponential(service))
    assert throughput == pytest.approx(queueing.closed_network(threads, think, service)[0])


@pytest.mark.parametrize("load", [0.1, 0.5, 0.8])
def test_the_mean_of_erlangs_waits_is_pollaczek_and_khinchines(load: float) -> None:
    step = 0.002
    services = np.arange(0, 24, step) + step / 2  # the sum alternates: doubles end beyond
    longer = [queueing.waits_longer_m_d_1(load, x) for x in services]
    assert sum(longer) * step == pytest.approx(queueing.mean_wait(load, 1, 0), rel=1e-3)


# -- the line of the lock word ---------------------------------------------------------------------


def read_rate(threads: int, think_ns: int, hold_ns: int, costs: LineCosts) -> tuple[int, int]:
    """Readers alone: sections begun, in how many nanoseconds."""
    until_ns = 400_000
    rows = closed(
        [READ] * threads,
        constant(think_ns),
        {READ: constant(hold_ns)},
        until_ns,
        np.random.default_rng(0),
        costs,
    )
    entries = np.sort(rows.arrival + rows.wait)
    return len(entries) - 1, int(entries[-1] - entries[0])


def test_few_readers_are_not_bound_by_the_line() -> None:
    """Below saturation, a thread's cycle is what it does itself; nobody waits for long."""
    costs = LineCosts(7, 65, 65, cpus_per_node=64)
    sections, elapsed_ns = read_rate(2, 1500, 100, costs)
    least, most = 1500 + 100 + 7, 1500 + 100 + 4 * 65
    assert 2 * elapsed_ns / most - 2 <= sections <= 2 * elapsed_ns / least + 2
