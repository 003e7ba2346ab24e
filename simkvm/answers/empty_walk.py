"""What the walk of an empty table in free_removed_table() costs, and whether anybody notices."""

from __future__ import annotations

from pathlib import Path

from simkvm.answers.headline import CALLBACK
from simkvm.answers.page import bases, duration, ending, table, times
from simkvm.answers.runs import Points, Runs, interval, place, ratio, summary
from simkvm.study.result import Result
from simkvm.units import format_duration

FREES = {
    "linux-6.4-upton": "walk",
    "linux-6.4-upton-count-test": "count test",
    "linux-6.4-yuzhao-v2": "put_page",
}
WALK, TEST, PUT = FREES
PAGE_SIZE = "guests.vm0.page_size"
ENTRIES = {"4 KiB": 512, "16 KiB": 2048, "64 KiB": 8192}
NS_PER_S = 1e9

NOTICED = {
    "touches a second": ("touches_per_s", False),
    "ageing, for a page": ("ageing_ns_per_page", True),
    "waits for mmu_lock, 99 %": ("mmu_lock_wait_p99_ns", True),
}
"""What users of the host could see: the column, and whether it is a time."""


class EmptyWalk:
    """The first question of May 2023."""

    path = "answers/empty-table-walk.md"

    def write(self, runs: Runs, folder: Path) -> str:
        """The page; its figure goes beside it."""
        from simkvm.show import figures

        cost = runs.sweep(
            "questions/empty-table-walk.yaml",
            small=("guests.vm0.memory=512 MiB", "guests.vm0.page_size=[16 KiB, 64 KiB]"),
            replicated=False,
        )
        seen = runs.sweep("answers/empty-walk-noticed.yaml", small=("duration=40 ms",))
        figures.write(
            figures.draw("callback_cost", cost.results), folder / "answers" / "empty-table-walk.png"
        )
        return (
            "# The walk of a table known to be empty\n\n"
            f"{QUESTION}\n\n## Answer\n\n{_answer(cost, seen)}\n\n## A table, and a GiB\n\n{_costs(cost)}\n\n"
            f"![Callback time](empty-table-walk.png)\n\n## Does anybody notice?\n\n{_noticed(seen)}\n\n"
            f"## What this hangs on\n\n{CALLBACK.hangs_on(runs)}\n\n{bases()}\n\n{NOT_IN_IT}\n\n"
            f"{ending(runs, 'simkvm answers empty-table-walk')}"
        )


QUESTION = """\
If unmap handed its empty tables to `free_removed_table()` (proposed on 27 May 2023), their RCU callback would
walk each of them although it is known to be empty (message ZHJHJPBF6euzOFdw@linux.dev and its answers). *walk*
does that; *count test* looks at the page's reference count first, as sketched on 31 May; *put_page* drops one
reference, as the series did. A table has as many entries as an eighth of its page's bytes."""

NOT_IN_IT = """\
The walk is a constant a visit (`stage2_leaf_visit_ns`) whatever the cache holds: after a grace period a table of
64 KiB is likely cold, so its first walk may cost more than the value, less than the high end. What the walk
evicts from the caches of whoever runs next is not modelled."""


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
            f"({format_duration(one[TEST])} with the count test), and all callbacks for a GiB taken back "
            f"{format_duration(gib[WALK])} instead of {format_duration(gib[PUT])}."
        )
    share = seen.values(_softirq_share)
    walk, put = (interval(share[place({"kernel": kernel})]) for kernel in (WALK, PUT))
    said.append(
        f"* A VMM thread that takes 2 MiB ranges back as fast as it can spends "
        f"{100 * walk.mean:.2g} % of a CPU in callbacks with the walk, {100 * put.mean:.2g} % with put_page."
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
    return (
        "Time in callbacks, softirq of the CPU that unmapped. A run has nothing random in it, so there is no "
        f"interval.\n\n{table(headers, rows)}"
    )


def _noticed(seen: Points) -> str:
    rows = []
    for name, (column, is_time) in NOTICED.items():
        values = seen.values(summary(column))
        by_kernel = {kernel: values[place({"kernel": kernel})] for kernel in FREES}
        said = [
            duration(interval(by_kernel[kernel]))
            if is_time
            else f"{interval(by_kernel[kernel]).mean:.4g}"
            for kernel in FREES
        ]
        rows.append([name, *said, times(ratio(by_kernel[WALK], by_kernel[PUT]))])
    headers = ("", *FREES.values(), "walk / put_page")
    calls = interval(seen.values(summary("callbacks"))[place({"kernel": WALK})])
    return (
        "`workloads/answers/empty-walk-noticed.yaml`: four vCPUs that fault on what a VMM thread takes back without a "
        f"pause ({calls.mean:.0f} tables freed in a run), and ageing every 10 ms. Ratios are by pairs of "
        f"equal seed, 95 %.\n\n{table(headers, rows)}"
    )
