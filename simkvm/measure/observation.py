"""Observations: how long something took, or how often it happened, as a measured distribution.

A tally is of constant size: it counts distinct values, and once there are too many of them it
keeps fewer leading bits of each. Until then every quantile is exact; afterwards it is off by at
most 1/256 of its value.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, Final, TextIO

from simkvm.scenario.errors import InputError, nearest

WHAT: Final = {
    "function": "duration of a kernel function with nothing traced inside it",
    "function_outer": "duration of a kernel function that contains the cost of tracing others",
    "wait": "time from asking for a contended lock to having it",
    "hold": "time between taking a lock and releasing it",
    "exit": "time from a guest's exit to its next entry, by reason",
    "grace_period": "time from the start to the end of an RCU grace period",
    "callback": "time of one RCU callback, the mean of its batch",
    "value": "a value of unstated kind (a bpftrace map whose name says nothing)",
    "count": "how often something happened",
}
"""What can be observed; everything but counts is in nanoseconds."""

MOST_DISTINCT: Final = 1 << 15
FEWEST_BITS: Final = 8

NUMBERS: Final = ("min_ns", "p10_ns", "p50_ns", "p90_ns", "p99_ns", "max_ns", "mean_ns", "sum_ns")


@dataclass(frozen=True)
class Observation:
    """One row. What a tool does not tell is None: lock_stat has no quantiles, a count no times.

    ``phase`` is what the host did meanwhile, if the user said so (`mapping.PHASES`); ``tool`` and
    ``file`` say where the row comes from.
    """

    what: str
    key: str
    n: int
    min_ns: float | None = None
    p10_ns: float | None = None
    p50_ns: float | None = None
    p90_ns: float | None = None
    p99_ns: float | None = None
    max_ns: float | None = None
    mean_ns: float | None = None
    sum_ns: float | None = None
    phase: str = ""
    tool: str = ""
    file: str = ""
    note: str = ""


COLUMNS: Final = tuple(field.name for field in fields(Observation))


class Tally:
    """A distribution of whole nanoseconds, one value after the other."""

    __slots__ = ("bits", "counts", "largest", "n", "smallest", "total")

    def __init__(self) -> None:
        self.counts: dict[int, int] = {}
        self.bits = 64
        self.n = 0
        self.total = 0
        self.smallest = 0
        self.largest = 0

    def add(self, value: int, times: int = 1) -> None:
        """Count ``value``, which is not negative, ``times`` times."""
        self.smallest = min(self.smallest, value) if self.n else value
        self.largest = max(self.largest, value)
        self.n += times
        self.total += value * times
        kept = value if self.bits == 64 else _leading(value, self.bits)
        self.counts[kept] = self.counts.get(kept, 0) + times
        if len(self.counts) > MOST_DISTINCT and self.bits > FEWEST_BITS:
            self._coarsen()

    def _coarsen(self) -> None:
        self.bits = 16 if self.bits == 64 else self.bits - 2
        coarser: dict[int, int] = {}
        for value, times in self.counts.items():
            kept = _leading(value, self.bits)
            coarser[kept] = coarser.get(kept, 0) + times
        self.counts = coarser

    def quantile(self, q: float) -> int:
        """The smallest value at or below which a share ``q`` lies."""
        rank, seen = q * self.n, 0
        for value in sorted(self.counts):
            seen += self.counts[value]
            if seen >= rank:
                return min(max(value, self.smallest), self.largest)
        return self.largest

    def observation(self, what: str, key: str, phase: str = "", note: str = "") -> Observation:
        """The row of this distribution, which is not empty."""
        return Observation(
            what=what,
            key=key,
            n=self.n,
            min_ns=self.smallest,
            p10_ns=self.quantile(0.1),
            p50_ns=self.quantile(0.5),
            p90_ns=self.quantile(0.9),
            p99_ns=self.quantile(0.99),
            max_ns=self.largest,
            mean_ns=self.total / self.n,
            sum_ns=self.total,
            phase=phase,
            note=note,
        )


def _leading(value: int, bits: int) -> int:
    """``value`` with only its ``bits`` leading bits, the middle of what they stand for."""
    shift = value.bit_length() - bits
    return ((value >> shift) << shift) + (1 << shift >> 1) if shift > 0 else value


class Tallies:
    """Tallies by what, key and phase; of keys beyond ``most`` a group, the rest goes together.

    Lock addresses and the like are unbounded, and a trace must not fill the memory with them.
    """

    OTHERS: Final = "(others)"

    def __init__(self, most: int = 1000) -> None:
        self.most = most
        self.times: dict[tuple[str, str, str], Tally] = {}
        self.counts: dict[tuple[str, str], int] = {}
        self._keys: dict[tuple[str, str], int] = {}

    def add(self, what: str, key: str, phase: str, value_ns: int) -> None:
        """One more duration."""
        place = (what, key, phase)
        if place not in self.times:
            place = self._admitted(what, key, phase)
        self.times.setdefault(place, Tally()).add(value_ns)

    def count(self, key: str, phase: str) -> None:
        """One more occurrence."""
        self.counts[key, phase] = self.counts.get((key, phase), 0) + 1

    def _admitted(self, what: str, key: str, phase: str) -> tuple[str, str, str]:
        known = self._keys.get((what, phase), 0)
        if known >= self.most:
            return what, self.OTHERS, phase
        self._keys[what, phase] = known + 1
        return what, key, phase

    def observations(self) -> Iterator[Observation]:
        """Every row: times by what and key, then counts by key."""
        order = {what: place for place, what in enumerate(WHAT)}
        for what, key, phase in sorted(self.times, key=lambda row: (order[row[0]], *row[1:])):
            yield self.times[what, key, phase].observation(what, key, phase)
        for (key, phase), n in sorted(self.counts.items()):
            yield Observation("count", key, n, phase=phase)


def document(rows: Iterable[Observation]) -> list[dict[str, Any]]:
    """The rows as plain mappings, for JSON."""
    return [asdict(row) for row in rows]


def write(rows: Sequence[Observation], path: str) -> None:
    """Write the rows to ``path``, ``.csv`` or ``.json``. Raises InputError for any other name."""
    suffix = Path(path).suffix
    if suffix not in {".csv", ".json"}:
        raise InputError("observations are written as .csv or .json", file=path)
    if not Path(path).parent.is_dir():
        raise InputError("no such folder", file=str(Path(path).parent))
    if suffix == ".json":
        text = json.dumps(document(rows), indent=2, allow_nan=False) + "\n"
        Path(path).write_text(text, encoding="utf-8")
        return
    with Path(path).open("w", encoding="utf-8", newline="") as file:
        _write_csv(rows, file)


def _write_csv(rows: Iterable[Observation], file: TextIO) -> None:
    writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
    writer.writeheader()
    for row in document(rows):
        writer.writerow({name: "" if value is None else value for name, value in row.items()})


def from_mapping(row: Mapping[str, Any], file: str, line: int | None) -> Observation:
    """A row of a CSV or JSON file that `write` wrote. Raises InputError for what it cannot be."""
    for name in row:
        if name not in COLUMNS:
            raise InputError(
                f"{name!r} is no column of observations",
                file=file,
                line=line,
                hint=nearest(str(name), COLUMNS),
            )
    for name in ("what", "key", "n"):
        if row.get(name) in {None, ""}:
            raise InputError(f"has no {name}", file=file, line=line)
    if row["what"] not in WHAT:
        hint = nearest(str(row["what"]), WHAT)
        raise InputError(f"{row['what']!r} is not observed", file=file, line=line, hint=hint)
    values: dict[str, Any] = {name: str(row.get(name) or "") for name in COLUMNS}
    values |= {name: _number(row.get(name), name, file, line) for name in NUMBERS}
    n = _number(row["n"], "n", file, line)
    if n is None or n != int(n):
        raise InputError(f"n is {row['n']!r}, not a whole number", file=file, line=line)
    return replace(Observation(**(values | {"n": int(n)})), file=values["file"] or file)


def _number(text: object, name: str, file: str, line: int | None) -> float | None:
    if text is None or text == "":
        return None
    try:
        value = float(str(text))
    except ValueError:
        value = -1.0
    if not 0 <= value < 2**63:
        raise InputError(f"{name} is {text!r}, not a number from 0 up", file=file, line=line)
    return value
