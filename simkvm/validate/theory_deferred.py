"""Table memory that waits for RCU in a whole simulated host, by Little's law.

A VMM drops 2 MiB ranges of a guest at random moments, about ten in each grace period, so that grace
periods follow one another without a pause. Tables that wait are then their rate times their wait,
and the wait follows from ticks alone (:mod:`simkvm.validate.theory_rcu`), to which wake-ups and
softirqs add some microseconds of milliseconds.
"""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING, Any, NamedTuple

from simkvm.units import KIB, MIB, NS_PER_S
from simkvm.validate.closed_form import SEED, ClosedForm, replicated
from simkvm.validate.theory_rcu import PERIODS, mean_wait
from simkvm.validate.theory_worlds import MS, run

if TYPE_CHECKING:
    from simkvm.observe.record import Record

PAGE = 4096
CPUS = 6
#: Drops a second and milliseconds to run, by HZ: about as many grace periods for each.
RATES = {100: (500.0, 1600), 250: (1200.0, 800), 300: (1000.0, 1000), 1000: (2500.0, 400)}


def closed_forms() -> list[ClosedForm]:
    """One row for each HZ."""
    return [_held(hz) for hz in RATES]


def dropping(hz: int, duration_ms: int, rate: float, policy: str) -> dict[str, Any]:
    """A guest that keeps touching 32 MiB, of which a VMM drops 2 MiB at random moments."""
    return {
        "machine": "graviton3-64c",
        "kernel": {"base": "linux-7.1-lockless", "set": {"table_free": policy}},
        "host": {"hz": hz, "cpus": CPUS},
        "guest": {
            "vcpus": 2,
            "memory": 32 * MIB,
            "access": {"pattern": "uniform", "write_ratio": 1.0, "think": 60_000},
        },
        # It never runs. Its CPU is the first idle one, so the grace-period kthread stays there:
        # on the VMM's own CPU it would number the callbacks at other moments.
        "ageing": {"start": duration_ms * MS - 1},
        "contenders": {
            "vmm": {
                "kind": "madvise_dontneed",
                "guest": "vm0",
                "range": 2 * MIB,
                "rate": rate,
                "arrivals": "poisson",
            }
        },
        "duration": duration_ms * MS,
    }


class Waits(NamedTuple):
    """Tables that came to wait while grace periods followed one another: how many, how long each.

    ``span_ns``: in what time they came.
    """

    span_ns: int
    waits_ns: list[int]

    @property
    def per_ns(self) -> float:
        """Their rate."""
        return len(self.waits_ns) / self.span_ns


def waits(record: Record, hz: int, duration_ns: int) -> Waits:
    """From the steps of the timeline: one CPU queues, so the first table in is the first out."""
    import numpy as np

    times = np.array(record.timeline["t_ns"])
    tables = np.diff(np.array(record.timeline["deferred_bytes"]), prepend=0) // PAGE
    queued = np.repeat(times, np.maximum(tables, 0))
    freed = np.repeat(times, np.maximum(-tables, 0))
    period_ns = PERIODS[hz] * NS_PER_S // hz
    first, last = 4 * period_ns, duration_ns - 4 * period_ns
    kept = np.flatnonzero((queued >= first) & (queued < last))
    return Waits(last - first, (freed[kept] - queued[kept]).tolist())


def _held(hz: int) -> ClosedForm:
    """The mean that waits is rate * wait: the rate as it was, since some ranges have no table."""
    rate, duration_ms = RATES[hz]
    wait_ns = mean_wait(PERIODS[hz]) * NS_PER_S / hz

    @cache
    def seen() -> Waits:
        keys = dropping(hz, duration_ms, rate, "put_page_rcu")
        return waits(run(seed=SEED, **keys), hz, duration_ms * MS)

    def held_kib(wait_ns: float) -> float:
        return seen().per_ns * wait_ns * PAGE / KIB

    return ClosedForm(
        f"deferred/{hz}/held",
        f"HZ={hz}, ranges dropped at random: mean table memory that waits for RCU",
        "KiB",
        lambda: held_kib(wait_ns),
        lambda: replicated([held_kib(wait) for wait in seen().waits_ns]),
        "Little's law; Little, Operations Research 9 (1961), 383-387; the wait from ticks, "
        "simkvm.validate.theory_rcu",
    )
