"""Write lock, read lock or no lock while eviction runs: a section of the page on ageing's lock."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from simkvm.answers.page import duration, percent, put, table, times
from simkvm.answers.runs import Place, Points, Runs, Values, interval, place, ratio, summary
from simkvm.study.result import Result
from simkvm.study.statistics import Interval
from simkvm.units import NS_PER_S, format_duration, format_rate, parse_size

FILE: Final = "answers/eviction-locks.yaml"
DRAWN: Final = "write-read-or-no-lock-eviction.png"
MEMORY: Final = "host.memory.size"
SMALL: Final = (
    f"{MEMORY}=[25 MiB, 22 MiB]",
    "host.memory.watermark_scale=10",
    "guests.vm.vcpus=2",
    "guests.vm.memory=28 MiB",
    "guests.vm.access.clients=4",
    "guests.vm.access.keys=11000",
    "guests.vm.access.warmup=10 ms",
    "duration=40 ms",
)


def _wait_ns(site: str) -> Callable[[Result], float]:
    """Mean wait at a call site, of all acquisitions."""
    return lambda result: _waited_ns(result, site) / max(_sum(result, site, "acquisitions"), 1)


def _queued_wait_ns(result: Result) -> float:
    """Mean wait of the faults that had to wait."""
    return _waited_ns(result, "fault") / max(_sum(result, "fault", "contended"), 1)


def _queued_share(result: Result) -> float:
    return _sum(result, "fault", "contended") / max(_sum(result, "fault", "acquisitions"), 1)


def _waited_ns(result: Result, site: str) -> float:
    rows = result.locks[result.locks["site"] == site]
    return float((rows["wait_mean_ns"] * rows["acquisitions"]).sum())


def _sum(result: Result, site: str, column: str) -> float:
    return float(result.locks.loc[result.locks["site"] == site, column].sum())


def _a_second(count: float, result: Result) -> float:
    return count * NS_PER_S / float(result.summary["sim_ns"])


FIGURES: Final[Mapping[str, Callable[[Result], float]]] = {
    "requests": summary("requests_per_s"),
    "p99": summary("latency_p99_ns"),
    "p999": summary("latency_p999_ns"),
    "busy": summary("kswapd_busy_ratio"),
    "asked": summary("kswapd_share_notifier_ratio"),
    "fault_wait": _wait_ns("fault"),
    "queued_share": _queued_share,
    "queued_wait": _queued_wait_ns,
    "start_wait": _wait_ns("range_start"),
    "starts": lambda result: _a_second(_sum(result, "range_start", "acquisitions"), result),
    "by_kswapd": lambda result: _a_second(float(result.summary["pgsteal_kswapd"]), result),
}


@dataclass(frozen=True)
class Pressed:
    """What one lock did at one size of the host, by figure and replication."""

    memory: str
    kernel: str
    values: Mapping[str, Values]

    def over(self, other: Pressed, name: str) -> Interval:
        """A figure over another lock's."""
        return ratio(self.values[name], other.values[name])


def section(runs: Runs, kernels: Mapping[str, str], folder: Path) -> tuple[str, str]:
    """The answer in a few lines, and the section with its table and figure."""
    from simkvm.show.figures import draw

    points = runs.sweep(FILE, small=SMALL)
    found = _found(points, kernels)
    if len(points.axis(MEMORY)) > 1:
        put(draw("under_pressure", list(points.results)), folder / "answers" / DRAWN)
    headers = (
        *("host", "lock", "requests/s", "p99", "p99.9", "fault waits for mmu_lock"),
        *("kswapd busy", "of it asking", "requests, over no lock"),
    )
    rows = [_row(one, _lockless(found, one), kernels) for one in found]
    title = "### A key-value server that does not fit: eviction runs"
    figure = f"\n\n![Requests and latency by lock, as memory shrinks]({DRAWN})"
    text = f"{title}\n\n`workloads/{FILE}`\n\n{table(headers, rows)}{_longer_wait(found)}{figure}"
    return _answer(found), text


def _found(points: Points, kernels: Mapping[str, str]) -> list[Pressed]:
    values = {name: points.values(figure) for name, figure in FIGURES.items()}
    found = []
    for memory in points.axis(MEMORY) or [""]:
        for kernel in kernels:
            at: Place = place({"kernel": kernel, **({MEMORY: memory} if memory else {})})
            here = {name: by_place[at] for name, by_place in values.items()}
            found.append(Pressed(str(memory), kernel, here))
    return found


def _lockless(found: list[Pressed], one: Pressed) -> Pressed:
    return [other for other in found if other.memory == one.memory][-1]


def _row(one: Pressed, lockless: Pressed, kernels: Mapping[str, str]) -> tuple[str, ...]:
    mean = {name: interval(values) for name, values in one.values.items()}
    return (
        one.memory,
        kernels[one.kernel],
        format_rate(mean["requests"].mean),
        duration(mean["p99"]),
        duration(mean["p999"]),
        duration(mean["fault_wait"]),
        f"{100 * mean['busy'].mean:.0f} %",
        f"{100 * mean['asked'].mean:.1f} %",
        percent(one.over(lockless, "requests")),
    )


def _longer_wait(found: list[Pressed]) -> str:
    """Why a fault waits longer where ageing takes no lock, if it does where memory is shortest."""
    least = min((one.memory for one in found), key=lambda memory: parse_size(memory or "0 B"))
    write, _, none = (one for one in found if one.memory == least)
    if write.over(none, "fault_wait").mean >= 1:
        return ""
    (ours, theirs) = (
        {name: interval(values).mean for name, values in one.values.items()}
        for one in (none, write)
    )

    def both(name: str, form: Callable[[float], str]) -> str:
        return f"{form(ours[name])} against {form(theirs[name])}"

    return (
        f"\n\nOn the host of {least} a fault waits longer for `mmu_lock` if ageing takes none. "
        f"Fewer faults find the lock taken ({both('queued_share', '{:.0%}'.format)} under the "
        f"write lock), but those wait {both('queued_wait', format_duration)}: not for calls of "
        "ageing, which are short, but for range starts of eviction, which hold the lock while they "
        f"flush. There are more of them ({both('starts', format_rate)}), and as they wait "
        f"{both('start_wait', format_duration)} themselves, they come in bunches: presumably those "
        "who evict are no longer kept apart by their own calls of ageing. The server answers more "
        f"all the same: kswapd takes {both('by_kswapd', format_rate)} pages, so that vCPUs have to "
        "reclaim less themselves."
    )


def _answer(found: list[Pressed]) -> str:
    lines = []
    for memory in dict.fromkeys(one.memory for one in found):
        here = [one for one in found if one.memory == memory]
        write, read, none = here
        lines.append(
            f"* With eviction running, on a host of {memory}: against no lock the server answers "
            f"{percent(write.over(none, 'requests'))} requests under the write lock and "
            f"{percent(read.over(none, 'requests'))} under the read lock; p99.9 is "
            f"{times(write.over(none, 'p999'))} and {times(read.over(none, 'p999'))} times as "
            f"long, and a fault waits {times(write.over(none, 'fault_wait'))} and "
            f"{times(read.over(none, 'fault_wait'))} times as long for `mmu_lock`."
        )
    return "\n".join(lines)
