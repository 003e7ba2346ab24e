"""What became better or worse from the first of some points to each other one."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Final

from rich.console import RenderableType

from simkvm.show.points import ResultLike, axes_of, listed, summary_of, value_of
from simkvm.show.text import NOTHING, titled_table, wrapped

CHANGES: Final = {
    "requests_per_s": "requests/s",
    "bytes_per_s": "bytes/s",
    "loads_per_s": "loads/s",
    "latency_mean_ns": "latency\nmean",
    "latency_p50_ns": "p50",
    "latency_p99_ns": "p99",
    "latency_p999_ns": "p99.9",
    "vcpu_wall_ns": "vCPU\nwall",
    "psi_some_ratio": "stalled",
    "young_calls_locked_per_scanned_page": "age calls\nunder lock\na page",
}
"""Columns of the summary, and what the table calls them."""


def change_table(results: Iterable[ResultLike]) -> list[RenderableType]:
    """Each point as a multiple of the first; nothing for fewer than two."""
    points = listed(results)
    if len(points) < 2:
        return []
    axes = list(axes_of(points).values())
    first = summary_of(points[0])
    shown = {name: title for name, title in CHANGES.items() if _usable(first.get(name))}
    rows = [
        [
            *(wrapped(value_of(point, axis.key), 30) for axis in axes),
            *(_multiple(summary_of(point).get(name), first[name]) for name in shown),
        ]
        for point in points[1:]
    ]
    headers = [*(axis.name for axis in axes), *shown.values()]
    return [titled_table("Multiples of the first point", headers, rows, left=len(axes))]


def _usable(value: Any) -> bool:
    return isinstance(value, int | float) and value > 0


def _multiple(value: Any, first: float) -> str:
    if not isinstance(value, int | float) or value != value:  # noqa: PLR0124  # a gap
        return NOTHING
    return f"{value / first:.3g}"
