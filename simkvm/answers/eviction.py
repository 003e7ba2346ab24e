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
from simkvm.units import format_rate

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


def _fault_wait_ns(result: Result) -> float:
    locks = result.locks
    return float(locks[locks["site"] == "fault"]["wait_mean_ns"].mean())


FIGURES: Final[Mapping[str, Callable[[Result], float]]] = {
    "requests": summary("requests_per_s"),
    "p99": summary("latency_p99_ns"),
    "p999": summary("latency_p999_ns"),
    "stolen": lambda result: float(
        result.summary["pgsteal_kswapd"] + result.summary["pgsteal_direct"]
    ),
    "busy": summary("kswapd_busy_ratio"),
    "asked": summary("kswapd_share_notifier_ratio"),
    "fault_wait": _fault_wait_ns,
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
    text = f"{title}\n\n`workloads/{FILE}`\n\n{table(headers, rows)}{figure}"
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
