"""How much memory RCU-deferred tables hold, what bounds it, and the rule of thumb for it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from simkvm.answers.headline import DEFERRED_BYTES
from simkvm.answers.page import bases, ending, fill, put, table
from simkvm.answers.runs import Points, Runs, Values, interval, place, summary
from simkvm.show.text import NOTHING
from simkvm.study.result import Result
from simkvm.study.statistics import Interval
from simkvm.units import NS_PER_S, format_count, format_duration, format_size, parse_duration

HZ, RATE = "host.hz", "contenders.vmm.rate"
QHIMARK, PREEMPTION = "host.rcu.qhimark", "host.preemption"
NOHZ, NOCBS, LAZY = "host.nohz_full", "host.rcu.nocbs", "host.rcu.lazy"

GRANULES = (
    ("4 KiB", "2 MiB", "256 MiB"),
    ("16 KiB", "32 MiB", "4 GiB"),
    ("64 KiB", "512 MiB", "64 GiB"),
)
"""Page, what a table maps, and memory for 128 of them."""

GROWTH = 1.3
"""What waits grows if its peak in the second half of a run is this much above that of the first."""


class DeferredTables:
    """Memory in tables that wait for a grace period."""

    path = "answers/deferred-table-memory.md"

    def write(self, runs: Runs, folder: Path) -> str:
        """The page; its figures go beside it."""
        from simkvm.show.figures import draw

        rates = runs.sweep(
            "answers/deferred-rate.yaml",
            small=(
                *("duration=140 ms", "host.hz=[250, 1000]", f"{RATE}=[200 / s, 1000 / s]"),
                *("guests.vm0.memory=16 MiB", "guests.vm0.access.think=50 us"),
            ),
        )
        options = runs.sweep(
            "answers/deferred-options.yaml",
            small=("duration=200 ms", "host.hz=[1000]"),
            replicated=False,
        )
        granules = [_granule(runs, *sizes) for sizes in GRANULES]
        floods = runs.sweep(
            "answers/deferred-flood.yaml",
            small=(
                "duration=25 ms",
                "host.hz=[1000]",
                "guests.vm.memory=256 MiB",
                "contenders.vmm.range=256 MiB",
                f"{QHIMARK}=[10000]",
            ),
            replicated=False,
        )
        drawn = draw("deferred_vs_rate", rates.results)
        put(drawn, folder / "answers" / "deferred-table-memory.png")
        return fill(
            "deferred-table-memory",
            answer=_answer(rates, options, granules, floods),
            replications=runs.replications,
            by_rate=_by_rate(rates),
            start=format_duration(start_ns(rates.results[0])),
            **_rule(rates),
            by_option=_by_option(options),
            by_granule=_by_granule(granules),
            growth=GROWTH,
            by_flood=_by_flood(floods),
            **_bound(floods),
            hangs_on=f"{DEFERRED_BYTES.hangs_on(runs)}\n\n{bases()}",
            ending=ending(runs, "simkvm answers deferred-table-memory"),
        )


# -- figures of a point -----------------------------------------------------------------------


def start_ns(result: Result) -> int:
    """When the VMM begins."""
    return parse_duration(result.scenario["contenders"]["vmm"]["start"])


def queued(result: Result) -> float:
    """Tables handed to RCU: those whose callback ran, and those that wait at the end."""
    return float(result.summary["callbacks"]) + float(result.timeline["deferred_tables"].iloc[-1])


def queued_per_s(result: Result) -> float:
    """The same, a second from the VMM's start on."""
    return queued(result) * NS_PER_S / (int(result.summary["sim_ns"]) - start_ns(result))


def waiting(result: Result, first: float = 0.0, last: float = 1.0) -> float:
    """Mean number of tables that wait, over a part of the time from the VMM's start to the end."""
    begin, end = start_ns(result), int(result.summary["sim_ns"])
    low, high = begin + first * (end - begin), begin + last * (end - begin)
    steps = result.timeline
    times = steps["t_ns"].to_numpy(dtype=np.float64)
    spans = np.clip(np.append(times[1:], end), low, high) - np.clip(times, low, high)
    return float((steps["deferred_tables"].to_numpy() * spans).sum() / (high - low))


def factor(result: Result) -> float:
    """The k of the rule: tables that wait, over those that are queued in one grace period."""
    period_s = float(result.summary["grace_period_p50_ns"]) / NS_PER_S
    return waiting(result) / (queued_per_s(result) * period_s)


def waiting_bytes(result: Result) -> float:
    """Mean memory that waits, from the VMM's start on."""
    begin, end = start_ns(result), int(result.summary["sim_ns"])
    return float(result.summary["deferred_bytes_mean"]) * end / (end - begin)


def peak(result: Result, first: float, last: float) -> float:
    """Most tables that wait at once, in a part of the time from the VMM's start to the end."""
    begin, end = start_ns(result), int(result.summary["sim_ns"])
    steps = result.timeline
    inside = steps["t_ns"].between(begin + first * (end - begin), begin + last * (end - begin))
    return float(steps["deferred_tables"][inside].max()) if inside.any() else 0.0


def growth(result: Result) -> float:
    """The peak in the second half of a run over that in the first."""
    before = peak(result, 0, 0.5)
    return peak(result, 0.5, 1) / before if before else 1.0


# -- the page ---------------------------------------------------------------------------------


def _answer(rates: Points, options: Points, granules: Sequence[Points], floods: Points) -> str:
    held = rates.values(waiting_bytes)
    most = max(held, key=lambda at: interval(held[at]).mean)
    top = max(float(result.summary["deferred_bytes_peak"]) for result in rates.results)
    factors = [interval(values).mean for values in rates.values(factor).values()]
    lazy = _of(options, {LAZY: "True", NOCBS: "all"}, waiting_bytes)
    eager = _of(options, {LAZY: "False"}, waiting_bytes)
    growing = [result for result in floods.results if growth(result) > GROWTH]
    flood = {
        mode: max(
            _of(floods, {PREEMPTION: mode}, lambda r: float(r.summary["deferred_bytes_peak"]))
        )
        for mode in ("full", "none")
    }
    fate = (
        f"{len(growing)} of {len(floods.results)} runs still grow at their end"
        if growing
        else "in none of the runs does the peak still grow in the second half"
    )
    return "\n".join(
        [
            f"* Tables that one VMM thread empties hold {_size(interval(held[most]))} on average "
            f"at {_at(most)}, and {format_size(top)} at most in any run of the first table.",
            "* It is the tables emptied in a grace period, times a k between "
            f"{min(factors):.2f} and {max(factors):.2f}, times the size of a table.",
            f"* Lazy callbacks on offloaded CPUs hold {format_size(max(lazy))} on average, where "
            f"the largest average of others is {format_size(max(eager))}: up to ten seconds' "
            "worth, whatever HZ.",
            f"* {_granule_line(granules)}",
            f"* In a flood up to {format_size(flood['full'])} wait, and up to "
            f"{format_size(flood['none'])} in a kernel without preemption; {fate}.",
        ]
    )


def _at(at: Sequence[tuple[str, str]]) -> str:
    return ", ".join(f"{key.rsplit('.', 1)[-1]} = {value}" for key, value in at)


def _of(points: Points, where: dict[str, str], figure: Any) -> list[float]:
    return [
        figure(result)
        for result in points.results
        if all(str(result.axes[key]) == value for key, value in where.items())
    ]


def _size(value: Interval) -> str:
    half = f" ± {format_size(value.half_width)}" if value.count > 1 else ""
    return format_size(value.mean) + half


def _number(value: Interval, form: str = ".2f") -> str:
    half = f" ± {value.half_width:{form}}" if value.count > 1 else ""
    return f"{value.mean:{form}}{half}"


def _by_rate(rates: Points) -> str:
    columns: dict[str, dict[Any, dict[int, float]]] = {
        "period": rates.values(summary("grace_period_p50_ns")),
        "queued": rates.values(queued_per_s),
        "held": rates.values(waiting_bytes),
        "peak": rates.values(summary("deferred_bytes_peak")),
        "k": rates.values(factor),
    }
    rows = []
    for at in columns["held"]:
        axes = dict(at)
        cell: dict[str, Values] = {name: values[at] for name, values in columns.items()}
        rows.append(
            [
                axes[RATE],
                axes[HZ],
                format_duration(interval(cell["period"]).mean),
                format_count(interval(cell["queued"]).mean),
                _size(interval(cell["held"])),
                format_size(max(cell["peak"].values())),
                _number(interval(cell["k"])),
            ]
        )
    headers = ("calls", "HZ", "grace period", "tables / s", "mean", "peak", "k")
    return table(headers, rows)


def _rule(rates: Points) -> dict[str, str]:
    factors = [interval(values).mean for values in rates.values(factor).values()]
    middle = (min(factors) * max(factors)) ** 0.5
    return {
        "k_low": f"{min(factors):.2f}",
        "k_high": f"{max(factors):.2f}",
        "k_middle": f"{middle:.2f}",
        "k_error": f"{100 * (max(factors) / middle - 1):.0f}",
        "periods": ", ".join(_periods(rates)),
    }


def _periods(rates: Points) -> list[str]:
    """What grace periods take at the lowest rate, by HZ."""
    found = rates.values(summary("grace_period_p50_ns"))
    lowest = rates.axis(RATE)[0]
    return [
        f"{format_duration(interval(found[place({HZ: hz, RATE: lowest})]).mean)} at HZ {hz}"
        for hz in rates.axis(HZ)
    ]


def _by_option(options: Points) -> str:
    rows = [
        [
            str(result.axes[NOHZ]),
            str(result.axes[NOCBS]),
            "yes" if result.axes[LAZY] else "no",
            str(result.axes[HZ]),
            _period(result),
            format_size(waiting_bytes(result)),
            format_size(float(result.summary["deferred_bytes_peak"])),
        ]
        for result in options.results
    ]
    headers = ("nohz_full", "offloaded", "lazy", "HZ", "grace period", "mean", "peak")
    return table(headers, rows)


def _period(result: Result, figure: str = "p50") -> str:
    """Of the grace periods that ended."""
    if not result.summary["grace_periods"]:
        return NOTHING
    return format_duration(float(result.summary[f"grace_period_{figure}_ns"]))


def _granule(runs: Runs, page: str, covered: str, memory: str) -> Points:
    return runs.sweep(
        "answers/deferred-granule.yaml",
        [
            f"guests.vm0.page_size={page}",
            f"guests.vm0.memory={memory}",
            f"contenders.vmm.range={covered}",
        ],
        small=("duration=100 ms", "guests.vm0.access.think=50 us"),
    )


def _granule_line(granules: Sequence[Points]) -> str:
    held = [interval(dict(enumerate(map(waiting_bytes, g.results)))).mean for g in granules]
    said = ", ".join(
        f"{format_size(size)} with {page}"
        for size, (page, _, _) in zip(held, GRANULES, strict=True)
    )
    return f"At one rate of calls the size of a table decides: {said} pages."


def _by_granule(granules: Sequence[Points]) -> str:
    rows = []
    for points, (page, covered, _) in zip(granules, GRANULES, strict=True):
        each = range(len(points.results))
        held = {number: waiting_bytes(points.results[number]) for number in each}
        rate = {number: queued_per_s(points.results[number]) for number in each}
        share = {number: factor(points.results[number]) for number in each}
        rows.append(
            [
                page,
                covered,
                format_count(interval(rate).mean),
                _size(interval(held)),
                _number(interval(share)),
            ]
        )
    headers = ("page and table", "a table maps", "tables / s", "mean", "k")
    return table(headers, rows)


def _by_flood(floods: Points) -> str:
    rows = [
        [
            str(result.axes[HZ]),
            str(result.axes[PREEMPTION]),
            format_count(float(result.axes[QHIMARK])),
            format_count(queued_per_s(result)),
            format_count(queued_per_s(result) / int(result.axes[HZ])),
            _period(result, "p99"),
            format_count(waiting(result)),
            format_count(peak(result, 0, 0.5)),
            format_count(peak(result, 0.5, 1)),
            format_size(float(result.summary["deferred_bytes_peak"])),
            "yes" if growth(result) > GROWTH else "no",
        ]
        for result in floods.results
    ]
    headers = (
        *("HZ", "preemption", "qhimark", "tables / s", "a tick"),
        "grace periods, p99",
        *("waiting, mean", "most, 1st half", "2nd half", "peak", "grows"),
    )
    return table(headers, rows)


def _bound(floods: Points) -> dict[str, str]:
    """Whether the thread can fall behind for good with what it queues itself."""
    freeing = max(float(result.summary["callback_ns_per_table"]) for result in floods.results)
    emptying = min(NS_PER_S / queued_per_s(result) for result in floods.results)
    bound = (
        "As long as the second is well below the first, a CPU that comes to its callbacks at all "
        "cannot fall behind for good by its own work: what waits is bounded by the tables that "
        "guests fill in a grace period or two. How long those take is what then matters."
        if freeing < emptying / 2
        else "The second is not well below the first, so callbacks take a large share of the CPU."
    )
    return {
        "empty_ns": format_duration(emptying),
        "callback_ns": format_duration(freeing),
        "bound": bound,
    }
