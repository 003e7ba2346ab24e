"""What the walk of an empty table in free_removed_table() costs, and whether anybody notices."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from simkvm.answers.headline import CALLBACK
from simkvm.answers.page import bases, duration, ending, fill, put, table, times
from simkvm.answers.runs import Points, Runs, interval, place, ratio, summary
from simkvm.study.result import Result
from simkvm.study.statistics import Interval
from simkvm.units import format_duration, format_rate

FREES = {
    "linux-6.4-upton": "walk",
    "linux-6.4-upton-count-test": "count test",
    "linux-6.4-yuzhao-v2": "put_page",
}
WALK, TEST, PUT = FREES
PAGE_SIZE = "guests.vm0.page_size"
ENTRIES = {"4 KiB": 512, "16 KiB": 2048, "64 KiB": 8192}


def _rate(value: Interval) -> str:
    return format_rate(value.mean)


NOTICED: dict[str, tuple[str, Callable[[Interval], str]]] = {
    "touches": ("touches_per_s", _rate),
    "ageing, for a page": ("ageing_ns_per_page", duration),
    "waits for mmu_lock, 99 %": ("mmu_lock_wait_p99_ns", duration),
}
"""What users of the host could see: the column, and how it is written."""


class EmptyWalk:
    """The first question of May 2023."""

    path = "answers/empty-table-walk.md"

    def write(self, runs: Runs, folder: Path) -> str:
        """The page; its figure goes beside it."""
        from simkvm.show.figures import draw

        cost = runs.sweep(
            "questions/empty-table-walk.yaml",
            small=("guests.vm0.memory=512 MiB", "guests.vm0.page_size=[16 KiB, 64 KiB]"),
            replicated=False,
        )
        seen = runs.sweep(
            "answers/empty-walk-noticed.yaml", small=("duration=60 ms", "guests.vm0.memory=32 MiB")
        )
        put(draw("callback_cost", cost.results), folder / "answers" / "empty-table-walk.png")
        freed = seen.values(summary("callbacks"))[place({"kernel": WALK})]
        return fill(
            "empty-table-walk",
            answer=_answer(cost, seen),
            costs=_costs(cost),
            freed=f"{interval(freed).mean:.0f}",
            replications=runs.replications,
            noticed=_noticed(seen),
            hangs_on=f"{CALLBACK.hangs_on(runs)}\n\n{bases()}",
            ending=ending(runs, "simkvm answers empty-table-walk"),
        )


def _answer(cost: Points, seen: Points) -> str:
    tables = cost.values(summary("callback_ns_per_table"))
    per_gib = cost.values(summary("callback_ns_per_unmapped_gib"))
    said = []
    for size in cost.axis(PAGE_SIZE):
        one = {kernel: tables[_at(kernel, size)][0] for kernel in FREES}
        gib = {kernel: per_gib[_at(kernel, size)][0] for kernel in FREES}
        said.append(
            f"* {ENTRIES[size]} entries ({size} pages): the walk makes a callback take "
            f"{format_duration(one[WALK])} instead of {format_duration(one[PUT])} "
            f"({format_duration(one[TEST])} with the count test), and all callbacks for a GiB "
            f"taken back {format_duration(gib[WALK])} instead of {format_duration(gib[PUT])}."
        )
    share = seen.values(_softirq_share)
    walk, put = (interval(share[place({"kernel": kernel})]) for kernel in (WALK, PUT))
    said.append(
        "* The CPU of a VMM thread that takes 2 MiB ranges back as fast as it can spends "
        f"{100 * walk.mean:.2g} % of its time in callbacks with the walk, {100 * put.mean:.2g} % "
        "with put_page."
    )
    noticed = [name for name, (column, _) in NOTICED.items() if _differs(seen, column)]
    said.append(
        f"* Beyond that somebody notices: {', '.join(noticed)} (intervals below)."
        if noticed
        else "* Nobody else notices: no difference below is outside its interval."
    )
    return "\n".join(said)


def _at(kernel: str, size: str) -> tuple[tuple[str, str], ...]:
    return place({"kernel": kernel, PAGE_SIZE: size})


def _softirq_share(result: Result) -> float:
    """Time in callbacks as a share of one CPU, while the VMM calls."""
    summed = result.summary
    return float(summed["callback_ns_total"] / summed["sim_ns"])


def _differs(seen: Points, column: str) -> bool:
    values = seen.values(summary(column))
    share = ratio(values[place({"kernel": WALK})], values[place({"kernel": PUT})])
    return share.count > 1 and 1 not in share


def _costs(cost: Points) -> str:
    rows = []
    for size in cost.axis(PAGE_SIZE):
        row = [f"{ENTRIES[size]} ({size} pages)"]
        for column in ("callback_ns_per_table", "callback_ns_per_unmapped_gib"):
            values = cost.values(summary(column))
            row += [format_duration(values[_at(kernel, size)][0]) for kernel in FREES]
        rows.append(row)
    headers = ("entries", *(f"table, {free}" for free in FREES.values()))
    headers += tuple(f"GiB, {free}" for free in FREES.values())
    return table(headers, rows)


def _noticed(seen: Points) -> str:
    rows = []
    for name, (column, text) in NOTICED.items():
        values = seen.values(summary(column))
        by_kernel = {kernel: values[place({"kernel": kernel})] for kernel in FREES}
        said = [text(interval(by_kernel[kernel])) for kernel in FREES]
        rows.append([name, *said, times(ratio(by_kernel[WALK], by_kernel[PUT]))])
    return table(("", *FREES.values(), "walk / put_page"), rows)
