"""Memory in stage-2 tables over time: what is really held, what waits, what statistics say.

Three quantities, because the free policies differ in them: pages that tables occupy (linked or
waiting), pages that wait for a grace period, and what ``nr_sec_page_table_pages`` reports.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

Int64s = NDArray[np.int64]


@dataclass
class TableMemory:
    """Changes as they are told; their times may lie ahead, so they are put in order at the end."""

    _real: list[int] = field(default_factory=list)  # t, change, t, change...
    _waiting: list[int] = field(default_factory=list)
    _reported: list[int] = field(default_factory=list)

    def root(self, size: int) -> None:
        """Root tables of ``size`` bytes exist from the start."""
        self._real += (0, size)
        self._reported += (0, size)

    def root_freed(self, t_ns: int, size: int) -> None:
        """The root tables are gone."""
        self._real += (t_ns, -size)
        self._reported += (t_ns, -size)

    def linked(self, t_ns: int, size: int) -> None:
        """Tables of ``size`` bytes were linked."""
        self._real += (t_ns, size)
        self._reported += (t_ns, size)

    def unreported(self, t_ns: int, size: int) -> None:
        """Statistics drop ``size`` bytes."""
        self._reported += (t_ns, -size)

    def deferred(self, t_ns: int, size: int) -> None:
        """``size`` bytes begin to wait for a grace period."""
        self._waiting += (t_ns, size)

    def freed(self, t_ns: int, size: int, deferred: bool) -> None:
        """``size`` bytes are free again."""
        self._real += (t_ns, -size)
        if deferred:
            self._waiting += (t_ns, -size)

    def leaked(self, t_ns: int, size: int) -> None:
        """``size`` bytes wait no more and are not free either: nobody knows of them."""
        self._waiting += (t_ns, -size)

    def timeline(self, end_ns: int) -> dict[str, Int64s]:
        """Step functions up to ``end_ns``: each value holds from its ``t_ns`` on.

        Columns ``t_ns``, ``deferred_bytes``, ``reported_table_bytes``, ``table_bytes``.
        """
        told = (self._waiting, self._reported, self._real)
        series = [np.array(changes, np.int64).reshape(-1, 2) for changes in told]
        times = np.unique(np.concatenate([[0], *(s[:, 0] for s in series)]))
        times = times[times <= end_ns]
        columns: dict[str, Int64s] = {"t_ns": times}
        for title, changes in zip(
            ("deferred_bytes", "reported_table_bytes", "table_bytes"), series, strict=True
        ):
            ordered = changes[np.argsort(changes[:, 0], kind="stable")]
            running = np.concatenate([[0], np.cumsum(ordered[:, 1])])
            columns[title] = running[np.searchsorted(ordered[:, 0], times, side="right")]
        return columns


def time_average(times: Int64s, values: Int64s, end_ns: int) -> float:
    """Mean over [0, ``end_ns``] of a step function given by its changes; 0 for an empty span."""
    if end_ns <= 0 or not len(times):
        return 0.0
    spans = np.diff(np.append(times, end_ns))
    return float((spans * values).sum() / end_ns)
