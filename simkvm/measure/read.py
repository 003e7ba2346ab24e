"""Which of the formats a file has, and its observations."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from typing import Final

from simkvm.measure import bpftrace, ftrace, lock_stat, perf_lock
from simkvm.measure.mapping import PHASES
from simkvm.measure.observation import COLUMNS, Observation, from_mapping
from simkvm.measure.text import Lines, opened
from simkvm.scenario.errors import InputError, nearest

Format = tuple[Callable[[str], bool], Callable[[Lines], Iterator[Observation]]]

FORMATS: Final[tuple[Format, ...]] = (
    (lock_stat.recognises, lock_stat.parse),
    (perf_lock.recognises, perf_lock.parse),
    (bpftrace.recognises, bpftrace.parse),
    (ftrace.recognises, ftrace.parse),
)
LOOK_AT: Final = 200
"""So many lines at the head of a file may belong to no format, such as a shell's or perf's own."""


def read(path: str, phase: str = "") -> list[Observation]:
    """The observations of one file, each with the file's name and, if given, the phase.

    ``path`` is the text of ftrace, trace-cmd, perf lock contention, lock_stat or bpftrace, plain or
    gzipped, or a CSV or JSON file of observations; ``-`` is standard input. Memory does not grow
    with the file. Raises InputError, with the line's number, if it is none of them, has a malformed
    line or nothing in it, and for an unknown phase.
    """
    if phase and phase not in PHASES:
        choice = ", ".join(PHASES)
        hint = nearest(phase, PHASES)
        raise InputError(
            f"unknown phase {phase!r}" + ("" if hint else f", expected one of {choice}"), hint=hint
        )
    with opened(path) as lines:
        rows = [_placed(row, lines.name, phase) for row in _rows(lines)]
    if not rows:
        raise InputError("nothing was measured in it", file=lines.name)
    return rows


def read_all(files: Iterable[str]) -> list[Observation]:
    """The observations of several files, each FILE or PHASE=FILE."""
    rows = []
    for text in files:
        phase, equals, path = text.partition("=")
        rows += read(path, phase) if equals and phase.isidentifier() else read(text)
    return rows


def _placed(row: Observation, file: str, phase: str) -> Observation:
    if row.phase and row.phase not in PHASES:
        hint = nearest(row.phase, PHASES)
        raise InputError(f"a marker names the unknown phase {row.phase!r}", file=file, hint=hint)
    return replace(row, file=row.file or file, phase=phase or row.phase)


def _rows(lines: Lines) -> Iterator[Observation]:
    head = lines.peek(LOOK_AT)
    first = next((line for line in head if line.strip()), "")
    if first.split(",")[:3] == list(COLUMNS[:3]):
        return _of_csv(lines)
    if first.lstrip().startswith(("[", "{")) and '"' in "".join(head) and "{" in "".join(head):
        return _of_json(lines)
    for line in head:
        for recognises, parse in FORMATS:
            if recognises(line):
                return parse(lines)
    message = (
        "is empty"
        if not first
        else f"neither ftrace, trace-cmd report, perf lock contention, lock_stat nor bpftrace: "
        f"{first.strip()[:60]!r}"
    )
    raise lines.error(message, None if not first else head.index(first) + 1)


def _of_csv(lines: Lines) -> Iterator[Observation]:
    reader = csv.DictReader(lines, strict=True)
    try:
        for row in reader:
            if None in row or None in row.values():
                raise lines.error(f"does not have {len(COLUMNS)} columns")
            yield from_mapping(row, lines.name, lines.number)
    except csv.Error as error:
        raise lines.error(f"not CSV: {error}") from error


def _of_json(lines: Lines) -> Iterator[Observation]:
    try:
        rows = json.loads("\n".join(lines))
    except ValueError as error:
        place = getattr(error, "lineno", None)
        raise lines.error(f"not JSON: {error}", place) from error
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise lines.error("not a list of observations", 1)
    for row in rows:
        yield from_mapping(row, lines.name, None)
