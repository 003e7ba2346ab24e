"""What a finished run knows: plain tables of columns, ready for a store or for pandas."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

#: Columns of equal length, in row order.
Table = dict[str, list[Any]]


#: Of a selftest's phases. ``line`` is what the test prints, without its last newline; a row of
#: the name ``message`` measures nothing. Under memory pressure ``lru_gen`` are lines of that file,
#: ``lru_gen_write`` writes to it, and ``oom_kill`` names a guest.
PHASE_COLUMNS = ("name", "iteration", "begin_ns", "end_ns", "line")


@dataclass(frozen=True)
class Record:
    """Results of one run; units are in the names of columns and keys.

    ``fingerprint`` is a digest over every lock acquisition, grace period, batch of callbacks,
    ageing pass, answered request and phase of a selftest, in order: two runs with the same one did
    the same.
    """

    summary: dict[str, int | float | str]
    locks: Table
    histograms: Table
    timeline: Table
    grace_periods: Table
    passes: Table
    series: Table
    violations: list[dict[str, Any]]
    fingerprint: str
    phases: Table = field(default_factory=lambda: {name: [] for name in PHASE_COLUMNS})


def table(columns: Sequence[str], rows: Sequence[Mapping[str, Any]]) -> Table:
    """A table with ``columns`` from ``rows``."""
    return {column: [row[column] for row in rows] for column in columns}
