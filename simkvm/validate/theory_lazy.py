"""The lazy access engine: against closed forms, and against touches that are followed one by one.

With a TLB of one entry n touches that each hit page i with probability p_i find sum(1 - (1 - p_i)
** n) pages young, and as many distinct pages have been faulted in where none was mapped: the
working set of :mod:`simkvm.validate.theory_young`, which also has the closed form for a larger TLB.
For the rest, where vCPUs share memory, fault while pages are taken away and are held up by each
other, there is no closed form: the two engines have to agree. What is not drawn agrees to the
nanosecond.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache, partial
from typing import Any

from simkvm.observe.record import Record
from simkvm.units import MIB
from simkvm.validate.closed_form import SEED, ClosedForm, Estimate, exactly, replicated
from simkvm.validate.theory_worlds import MS, run
from simkvm.validate.theory_young import (
    PAGES,
    PATTERNS,
    SOURCE,
    TOUCHES,
    found,
    found_uniform,
    measure,
    probabilities,
)

REPLICATIONS = 40
FILLS = 16
FILLED = 8192  #: touches while memory is filled, two a page
HOT_RATIO = 0.25
AGREE = "explicit touches, simkvm.guest.vcpu"


def closed_forms() -> list[ClosedForm]:
    """Closed forms, ratios to the explicit engine, and what is equal exactly."""
    expected = {
        "hot-cold": found(probabilities("hot-cold"), TOUCHES) / PAGES,
        "tlb-2048": found_uniform(2048, TOUCHES) / PAGES,
    }
    return [
        ClosedForm(
            "lazy/young/hot-cold",
            f"lazy, {PAGES} pages, hot-cold touches, one a page: share found young",
            "1",
            expected["hot-cold"],
            partial(measure, "hot-cold", 1, "lazy"),
            SOURCE,
        ),
        ClosedForm(
            "lazy/young/tlb-2048",
            f"lazy, {PAGES} pages, uniform touches, one a page, TLB of 2048: share found young",
            "1",
            expected["tlb-2048"],
            partial(measure, "uniform", 2048, "lazy"),
            "Markov chain of one TLB place, simkvm.validate.theory_young.missed",
        ),
        ClosedForm(
            "lazy/fill/zipf",
            f"lazy, {PAGES} pages, none mapped, {FILLED} zipf touches: faults",
            "1",
            found(probabilities("zipf"), FILLED),
            _filled,
            SOURCE,
        ),
        *(
            ClosedForm(
                f"lazy/explicit/{name}",
                f"zipf touches of 2 vCPUs, TLB of 16, ageing, pages taken away: {about}, "
                "lazy over explicit",
                "1",
                1.0,
                partial(_ratio, of),
                AGREE,
            )
            for name, about, of in (
                ("faults", "faults", _faults),
                ("young", "pages found young", _young),
                ("touches", "touches", _touches),
            )
        ),
        *(
            ClosedForm(
                f"lazy/{name}",
                about,
                unit,
                partial(_exact, name, key, "explicit"),
                partial(_same, name, key),
                AGREE,
                drawn=False,
            )
            for name, key, unit, about in (
                ("mapped", "sim_ns", "ns", "3 vCPUs, memory mapped, 50000 touches each: end"),
                ("one-page", "faults", "1", "one page, 100 writes: faults"),
                ("hot-only", "faults", "1", "cold pages never touched: faults"),
            )
        ),
    ]


# -- filling memory --------------------------------------------------------------------------------


def _filled() -> Estimate:
    touch = {**PATTERNS["zipf"], "touches": FILLED, "write_ratio": 1.0}
    guest = {"memory": PAGES * 4096, "engine": "lazy", "access": touch}
    runs = (run(guest, seed=SEED, replication=n) for n in range(FILLS))
    return replicated([float(record.summary["faults"]) for record in runs])


# -- against the explicit engine -------------------------------------------------------------------


@cache
def _runs(engine: str) -> tuple[Record, ...]:
    """Independent runs of a guest whose memory is taken away all the time."""
    guest = {
        "vcpus": 2,
        "memory": 2 * MIB,
        "engine": engine,
        "access": {"pattern": "zipf", "think": 400},
    }
    # Replications of one seed: no two of the runs draw the same.
    first = 0 if engine == "explicit" else REPLICATIONS
    return tuple(
        run(
            guest,
            seed=SEED,
            replication=first + n,
            duration=4 * MS,
            machine={"base": "ampere-altra-80c", "set": {"tlb_l2_entries": 16}},
            ageing={"interval": 200_000},
            contenders={
                "drop": {
                    "kind": "madvise_dontneed",
                    "guest": "vm0",
                    "range": 64 << 10,
                    "rate": 4000,
                }
            },
        )
        for n in range(REPLICATIONS)
    )


def _faults(record: Record) -> float:
    return float(record.summary["faults"])


def _young(record: Record) -> float:
    return float(record.summary["young_pages"])


def _touches(record: Record) -> float:
    return float(record.summary["touches"])


def _ratio(of: Callable[[Record], float]) -> Estimate:
    """Mean of ``of`` over lazy runs to that over explicit ones, with the interval of both."""
    lazy, explicit = (
        replicated([of(record) for record in _runs(engine)]) for engine in ("lazy", "explicit")
    )
    ratio = lazy.value / explicit.value
    half = ratio * math.hypot(*(_relative(estimate) for estimate in (lazy, explicit)))
    return Estimate(ratio, ratio - half, ratio + half)


def _relative(estimate: Estimate) -> float:
    return (estimate.high - estimate.low) / 2 / estimate.value


# -- what nothing is drawn of ----------------------------------------------------------------------

WORLDS: dict[str, dict[str, Any]] = {
    "mapped": {
        "vcpus": 3,
        "memory": 2 * MIB,
        "mapped": True,
        "access": {"pattern": "uniform", "touches": 50_000, "think": 70},
    },
    "one-page": {
        "memory": 4096,
        "access": {"pattern": "uniform", "touches": 100, "write_ratio": 1.0},
    },
    "hot-only": {
        "memory": 2 * MIB,
        "access": {
            "pattern": "hot_cold",
            "hot_ratio": HOT_RATIO,
            "hot_access_ratio": 1.0,
            "write_ratio": 1.0,
            "touches": 5_000,
        },
    },
}


def _same(name: str, key: str) -> Estimate:
    return exactly(_exact(name, key, "lazy"))


def _exact(name: str, key: str, engine: str) -> float:
    return float(run(WORLDS[name] | {"engine": engine}, seed=SEED).summary[key])
