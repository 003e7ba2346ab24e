"""The account of a run's locks in the form of ``/proc/lock_stat``, to be read beside a real one.

One class a guest, lock and call site, which the kernel does not tell apart; times in microseconds
with two digits (kernel/locking/lockdep_proc.c, v6.12). A wait is any time between asking and
having, over the contended acquisitions; an acquisition that found the lock free waits for its
atomic too, and that is in the total. Bounces are not counted here: they are 0.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from simkvm.measure.lock_stat import COLUMNS

if TYPE_CHECKING:
    from simkvm.study.result import Result

WIDTH = 40 + 1 + 12 * (14 + 1)
SUFFIXES = {"read": "R", "write": "W"}

Row = Mapping[str, Any]


def text(result: Result) -> str:
    """The text for the locks of a result."""
    locks, histograms = (
        [dict(zip(table.columns, row, strict=True)) for row in table.itertuples(index=False)]
        for table in (result.locks, result.histograms)
    )
    return text_of(locks, histograms)


def text_of(locks: Iterable[Row], histograms: Iterable[Row]) -> str:
    """The text for the rows of a result's tables ``locks`` and ``histograms``."""
    least: dict[tuple[str, ...], int] = {}
    for row in histograms:
        place = (*_place(row), str(row["quantity"]))
        low = int(row["low_ns"])
        least[place] = min(low, least.get(place, low))
    rule = "-" * WIDTH
    lines = ["lock_stat version 0.4", rule, _line("class name", COLUMNS), rule, ""]
    lines += [_line(_name(row) + ":", _numbers(row, least)) for row in locks]
    return "\n".join(lines) + "\n"


def _place(row: Row) -> tuple[str, ...]:
    return tuple(str(row[name]) for name in ("guest", "lock", "site", "mode"))


def _name(row: Row) -> str:
    guest, lock, site, mode = _place(row)
    return f"{guest}.{lock}/{site}-{SUFFIXES[mode]}"


def _numbers(row: Row, least: Mapping[tuple[str, ...], int]) -> list[str]:
    contended, acquisitions = int(row["contended"]), int(row["acquisitions"])
    return [
        "0",
        str(contended),
        *_times(row, "wait", contended, least),
        "0",
        str(acquisitions),
        *_times(row, "hold", acquisitions, least),
    ]


def _times(row: Row, quantity: str, n: int, least: Mapping[tuple[str, ...], int]) -> list[str]:
    if not n:
        return ["0.00"] * 4
    total = int(row[f"{quantity}_total_ns"])
    smallest = least.get((*_place(row), quantity), 0)
    return [_us(ns) for ns in (smallest, int(row[f"{quantity}_max_ns"]), total, total / n)]


def _us(ns: float) -> str:
    return f"{ns / 1000:.2f}"


def _line(name: str, numbers: Iterable[str]) -> str:
    return f"{name:>40} " + " ".join(f"{number:>14}" for number in numbers)
