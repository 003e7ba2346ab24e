"""What ageing on command costs guests and the ageing thread: write lock, read lock, no lock."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from simkvm.answers import eviction
from simkvm.answers.headline import OF_LOCKS
from simkvm.answers.page import bases, duration, ending, fill, percent, put, table, times
from simkvm.answers.runs import Place, Points, Runs, Values, interval, place, ratio, summary
from simkvm.scenario.machine import load_machine
from simkvm.study.result import Result
from simkvm.study.statistics import Interval
from simkvm.units import format_duration

KERNELS = {
    "linux-7.1": "write lock",
    "linux-7.1-read-locked": "read lock",
    "linux-7.1-lockless": "no lock",
}
WRITE, READ, NONE = KERNELS
VCPUS = "guests.vm0.vcpus"
MACHINES = ("ampere-altra-80c", "graviton3-64c")

ALTRA = ("machine=[ampere-altra-80c]", "guests.vm0.vcpus=[1, 2]")
SMALL = (*ALTRA, "guests.vm0.memory_per_vcpu=2 MiB")
SMALL_BLOCKS = (*ALTRA, "guests.vm0.memory_per_vcpu=32 MiB")
FEW_TOUCHES = ("guests.vm0.access.touches=256",)
BRIEF = ("duration=1 ms",)

UNNOTICED = 1.01
"""Guests that ageing slows down by less than this do not notice it."""
ALIKE = 1.1
"""Passes that differ by less than this take as long."""


@dataclass(frozen=True)
class Situation:
    """What guests do meanwhile; `slowdown` is of a figure with ageing over the one without."""

    file: str
    about: str
    small: tuple[str, ...]
    guest: Callable[[Result], float]


SITUATIONS = (
    Situation(
        "answers/ageing-faults-4k.yaml",
        "guests fault on 4 KiB pages",
        SMALL + FEW_TOUCHES,
        summary("vcpu_wall_ns"),
    ),
    Situation(
        "answers/ageing-faults-2m.yaml",
        "guests fault on 2 MiB blocks (THP)",
        SMALL_BLOCKS + FEW_TOUCHES,
        summary("vcpu_wall_ns"),
    ),
    Situation(
        "answers/ageing-touches-4k.yaml",
        "guests only touch memory that is mapped by 4 KiB pages",
        SMALL + BRIEF,
        lambda result: 1e9 / float(result.summary["touches_per_s"]),
    ),
    Situation(
        "answers/ageing-touches-2m.yaml",
        "guests only touch memory that is mapped by 2 MiB blocks",
        SMALL_BLOCKS + BRIEF,
        lambda result: 1e9 / float(result.summary["touches_per_s"]),
    ),
)


@dataclass(frozen=True)
class Cell:
    """One machine and number of vCPUs in one situation, by kernel."""

    situation: Situation
    machine: str
    vcpus: int
    page_ns: Mapping[str, Values]
    guest: Mapping[str, Values]
    alone: Values
    """The guest's figure without ageing."""

    def slowdown(self, kernel: str) -> Interval:
        """Of the guest, by ageing."""
        return ratio(self.guest[kernel], self.alone)

    def over_none(self, kernel: str) -> Interval:
        """The ageing thread's time for a page, over that without a lock."""
        return ratio(self.page_ns[kernel], self.page_ns[NONE])

    def lock_cost(self, kernel: str) -> Interval:
        """Of the guest, by the lock: its figure over that with ageing without one."""
        return ratio(self.guest[kernel], self.guest[NONE])

    def costs_nothing(self, kernel: str) -> bool:
        """Whether this lock makes a difference of less than a hundredth to the guest."""
        cost = self.lock_cost(kernel)
        return abs(cost.mean - 1) + _width(cost) < UNNOTICED - 1

    @property
    def unnoticed(self) -> bool:
        """Whether the guest is slowed down by less than a hundredth under every lock."""
        slowed = [self.slowdown(kernel) for kernel in KERNELS]
        return all(share.mean + _width(share) < UNNOTICED for share in slowed)

    @property
    def alike(self) -> bool:
        """Whether a pass takes as long under every lock."""
        return all(abs(self.over_none(kernel).mean - 1) < ALIKE - 1 for kernel in (WRITE, READ))


def _width(share: Interval) -> float:
    return share.half_width if share.count > 1 else 0.0


def cells(situation: Situation, aged: Points, alone: Points) -> Iterator[Cell]:
    """Every machine and number of vCPUs of a situation."""
    page_ns = aged.values(summary("ageing_ns_per_page"))
    guest = aged.values(situation.guest)
    lonely = alone.values(situation.guest)

    def at(machine: str, vcpus: int, kernel: str) -> Place:
        return place({"machine": machine, VCPUS: vcpus, "kernel": kernel})

    for machine in aged.axis("machine"):
        for vcpus in aged.axis(VCPUS):
            yield Cell(
                situation,
                machine,
                vcpus,
                {kernel: page_ns[at(machine, vcpus, kernel)] for kernel in KERNELS},
                {kernel: guest[at(machine, vcpus, kernel)] for kernel in KERNELS},
                lonely[place({"machine": machine, VCPUS: vcpus})],
            )


class AgeingLocks:
    """Write lock, read lock or no lock."""

    path = "answers/write-read-or-no-lock.md"

    def write(self, runs: Runs, folder: Path) -> str:
        """The page; its figures go beside it."""
        from simkvm.show.figures import draw

        everything: list[Cell] = []
        sections = []
        for situation in SITUATIONS:
            aged = runs.sweep(situation.file, small=situation.small)
            name = Path(situation.file).stem
            alone = runs.sweep(
                situation.file,
                ["kernel=linux-7.1", "ageing=null"],
                small=situation.small,
                name=f"{name}-without",
            )
            found = list(cells(situation, aged, alone))
            everything += found
            here = [result for result in aged.results if result.axes["machine"] == MACHINES[0]]
            drawn = f"write-read-or-no-lock-{name.removeprefix('ageing-')}.png"
            if name.startswith("ageing-faults"):
                put(draw("ageing_scaling", here), folder / "answers" / drawn)
                sections.append(_section(situation, found, drawn))
            else:
                sections.append(_section(situation, found, None))
        with_eviction, section = eviction.section(runs, KERNELS, folder)
        sections.append(section)
        return fill(
            "write-read-or-no-lock",
            answer=f"{_answer(everything)}\n{with_eviction}",
            unmatched=_unmatched(everything),
            replications=runs.replications,
            clean=format_duration(load_machine(MACHINES[0])["dcache_clean_2m_ns"]),
            sections="\n\n".join(sections),
            hangs_on="\n\n".join([*(one.hangs_on(runs) for one in OF_LOCKS), bases()]),
            ending=ending(runs, "simkvm answers write-read-or-no-lock"),
        )


def _answer(found: list[Cell]) -> str:
    said = []
    for machine in dict.fromkeys(cell.machine for cell in found):
        for situation in SITUATIONS[:2]:
            here = [c for c in found if (c.machine, c.situation) == (machine, situation)]
            said.append(_ageing(max(here, key=lambda cell: cell.vcpus)))
            said.append(_guest(max(here, key=lambda cell: cell.lock_cost(WRITE).mean)))
    return "\n".join(said)


def _vcpus(count: int) -> str:
    return f"{count} vCPU{'' if count == 1 else 's'}"


def _ageing(cell: Cell) -> str:
    spent = [duration(interval(cell.page_ns[kernel])) for kernel in KERNELS]
    write, read = (times(cell.over_none(kernel)) for kernel in (WRITE, READ))
    return (
        f"* {cell.machine}, {cell.situation.about}, {_vcpus(cell.vcpus)}: the ageing thread needs "
        f"{spent[0]} for each under the write lock, {spent[1]} under the read lock and {spent[2]} "
        f"without a lock ({write} and {read} times as much)."
    )


def _guest(cell: Cell) -> str:
    write, read = (percent(cell.lock_cost(kernel)) for kernel in (WRITE, READ))
    return (
        f"* There the guest pays most for the lock with {_vcpus(cell.vcpus)}: it takes {write} "
        f"longer under the write lock than without a lock, and {read} under the read lock. Against "
        f"no ageing at all it is {percent(cell.slowdown(WRITE))}, {percent(cell.slowdown(READ))} "
        f"and, without a lock, {percent(cell.slowdown(NONE))}."
    )


def _unmatched(found: list[Cell]) -> str:
    lines = []
    tests: dict[str, Callable[[Cell], bool]] = {
        "The guest takes less than 1 % longer than without ageing, whatever the lock": (
            lambda cell: cell.unnoticed
        ),
        "The write lock makes less than 1 % of difference to the guest, against none": (
            lambda cell: cell.costs_nothing(WRITE)
        ),
        "The read lock makes less than 1 % of difference to the guest, against none": (
            lambda cell: cell.costs_nothing(READ)
        ),
        "A pass takes as long, within 10 %, whatever the lock": lambda cell: cell.alike,
    }
    for title, test in tests.items():
        where = [_where(situation, found, test) for situation in SITUATIONS]
        there = "; ".join(place for place in where if place)
        lines.append(f"* {title}: {there or 'nowhere'}.")
    return "\n".join(lines)


def _where(situation: Situation, found: list[Cell], test: Callable[[Cell], bool]) -> str:
    here = [cell for cell in found if cell.situation == situation]
    met = [cell for cell in here if test(cell)]
    if not met:
        return ""
    if len(met) == len(here):
        return f"where {situation.about} (all points below)"
    by_machine: dict[str, list[str]] = {}
    for cell in met:
        by_machine.setdefault(cell.machine, []).append(str(cell.vcpus))
    points = "; ".join(f"{name}: {', '.join(vcpus)} vCPUs" for name, vcpus in by_machine.items())
    return f"where {situation.about} ({points})"


def _section(situation: Situation, found: list[Cell], drawn: str | None) -> str:
    headers = ("machine", "vCPUs", *(f"page, {said}" for said in KERNELS.values()))
    headers += tuple(f"guest, {said}" for said in KERNELS.values())
    rows = [
        (
            cell.machine,
            str(cell.vcpus),
            *(duration(interval(cell.page_ns[kernel])) for kernel in KERNELS),
            *(percent(cell.slowdown(kernel)) for kernel in KERNELS),
        )
        for cell in found
    ]
    title = situation.about[0].upper() + situation.about[1:]
    figure = f"\n\n![{title}]({drawn})" if drawn else ""
    return f"### {title}\n\n`workloads/{situation.file}`\n\n{table(headers, rows)}{figure}"
