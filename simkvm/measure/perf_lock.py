"""``perf lock contention``: waits by call site, task or lock, as text or with ``-x`` as CSV.

A header line names the columns: ``contended``, ``total wait``, ``max wait``, ``avg wait``, as
``-F`` chose them (``min wait`` too), then the kind of lock and the caller, the task, or the lock's
address and symbol (tools/perf/builtin-lock.c, v6.12). Text gives times with a unit, CSV in
nanoseconds after a line that begins with ``# output:``. There are no quantiles.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import Final

from simkvm.measure.function_graph import nanoseconds
from simkvm.measure.observation import Observation
from simkvm.measure.text import Lines

TOOL: Final = "perf lock contention"

UNITS: Final = {"ns": 1, "us": 1_000, "ms": 1_000_000, "s": 1_000_000_000, "m": 60_000_000_000}
STATISTICS: Final = {
    "contended": "n",
    "total wait": "sum_ns",
    "max wait": "max_ns",
    "min wait": "min_ns",
    "avg wait": "mean_ns",
}
CSV_HEAD: Final = "# output:"
HEAD: Final = re.compile(
    r"\s*(?=.*\bcontended\b)(?=.*\bwait\b)(?:contended|total wait|max wait|min wait|avg wait|\s)+.*"
)
COLUMN: Final = re.compile(r"contended|(?:total|max|min|avg) wait|\S+")
TIME: Final = re.compile(r"(\d+(?:\.\d+)?)\s*(ns|us|ms|s|m)\b")
COUNT: Final = re.compile(r"\d+(?![\d.]*\s*(?:ns|us|ms|s|m)\b)")
TAIL: Final = re.compile(r"\s*(?:=== output for debug ===|bad:|# Total:|# total:|# data|# debug).*")
STACK: Final = re.compile(r"\s+0x[0-9a-f]+\s+\S.*")


def recognises(line: str) -> bool:
    """Whether a line can only be the header of ``perf lock contention``."""
    return line.startswith(CSV_HEAD) or (HEAD.fullmatch(line) is not None and "wait" in line)


def parse(lines: Lines) -> Iterator[Observation]:
    """The observations. Raises InputError if there is no header, and for a malformed line."""
    columns: list[str] = []
    separator: str | None = None
    for line in lines:
        if TAIL.match(line):
            break
        if line.startswith(CSV_HEAD):
            columns, separator = _csv_columns(lines, line)
        elif HEAD.fullmatch(line):
            columns, separator = COLUMN.findall(line), None
        elif not columns or not line.strip() or line.startswith("#") or STACK.fullmatch(line):
            continue  # remarks of perf itself, and stacks of -v
        elif separator is None:
            yield _of_text(lines, line, columns)
        else:
            cells = [cell.strip() for cell in line.split(separator, len(columns) - 1)]
            yield _of_csv(lines, line, dict(zip(columns, cells, strict=False)), columns)
    if not columns:
        raise lines.error("no header of perf lock contention")


def _csv_columns(lines: Lines, line: str) -> tuple[list[str], str]:
    head = line.removeprefix(CSV_HEAD).strip()
    match = re.match(r"(?:contended|(?:total|max|min|avg) wait)(\W+?)\s*\w", head)
    if match is None:
        raise lines.error(f"not a header of perf lock contention: {head[:60]!r}")
    return [name.strip() for name in head.split(match[1])], match[1]


def _of_csv(lines: Lines, line: str, cells: dict[str, str], columns: list[str]) -> Observation:
    numbers: dict[str, float] = {}
    for name, field in STATISTICS.items():
        if name in columns:
            if not cells.get(name, "").isdecimal():
                raise lines.error(f"{name} is no whole number in {line[:60]!r}")
            numbers[field] = int(cells[name])
    return _observation(
        lines,
        numbers,
        [cells[name] for name in columns if name in cells and name not in STATISTICS],
        columns,
    )


def _of_text(lines: Lines, line: str, columns: Sequence[str]) -> Observation:
    numbers: dict[str, float] = {}
    rest = line
    for name in columns:
        if name not in STATISTICS:
            break
        pattern = COUNT if name == "contended" else TIME
        match = pattern.match(rest.lstrip())
        if match is None:
            raise lines.error(f"no {name} in {line.strip()[:60]!r}")
        numbers[STATISTICS[name]] = (
            int(match[0]) if name == "contended" else nanoseconds(match[1], UNITS[match[2]])
        )
        rest = rest.lstrip()[match.end() :]
    kinds = sum(name not in STATISTICS for name in columns)
    return _observation(lines, numbers, rest.split(None, max(0, kinds - 1)), columns)


def _observation(
    lines: Lines, numbers: dict[str, float], words: Sequence[str], columns: Sequence[str]
) -> Observation:
    key = " ".join(word.strip() for word in words).strip()
    if not key or "n" not in numbers:
        raise lines.error("needs at least the columns contended and caller, task or lock")
    times = {name: value for name, value in numbers.items() if name != "n"}
    return Observation("wait", key, int(numbers["n"]), tool=TOOL, **times)  # type: ignore[arg-type]
