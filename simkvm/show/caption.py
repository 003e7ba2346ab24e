"""The line under a figure: machine, seed, what was varied, and what was held where."""

from __future__ import annotations

from collections.abc import Sequence

from simkvm.show.points import (
    AxisOfStudy,
    OneOrMany,
    ResultLike,
    axes_of,
    listed,
    number,
    reference_label,
    same_value,
    value_of,
)


def caption(results: OneOrMany, shown: Sequence[ResultLike]) -> str:
    """Describe a figure of the points `shown` out of the study `results`."""
    axes = axes_of(listed(results))
    parts = [
        _named("machine", {reference_label(point.scenario.get("machine", "?")) for point in shown}),
        _replications(shown),
    ]
    if not any(key == "kernel" for key in axes):
        kernels = {reference_label(point.scenario.get("kernel", "?")) for point in shown}
        parts.insert(1, _named("kernel", kernels))
    varied = [_span(axis, shown) for axis in axes.values() if _values(axis, shown)[1:]]
    held = [_span(axis, shown) for axis in axes.values() if not _values(axis, shown)[1:]]
    if varied:
        parts.append("varied: " + ", ".join(varied))
    if held:
        parts.append("at " + ", ".join(held))
    return " · ".join([str(listed(results)[0].scenario.get("name", "")), *parts])


def _named(word: str, names: set[str]) -> str:
    plural = word if len(names) == 1 else f"{word}s"
    return f"{plural} {', '.join(sorted(names))}"


def _replications(shown: Sequence[ResultLike]) -> str:
    seeds = {str(point.scenario.get("seed", "?")) for point in shown}
    times = len({point.scenario.get("replication", 0) for point in shown})
    return _named("seed", seeds) + (f", {times} replications" if times > 1 else "")


def _values(axis: AxisOfStudy, shown: Sequence[ResultLike]) -> list[object]:
    present = [value_of(point, axis.key) for point in shown]
    return [value for value in axis.values if any(same_value(value, seen) for seen in present)]


def _span(axis: AxisOfStudy, shown: Sequence[ResultLike]) -> str:
    # Blanks within a value do not break, so that "200 / s" stays on one line.
    values = [str(value).replace(" ", "\u00a0") for value in _values(axis, shown)]
    if axis.numbers is not None and len(values) > 3:
        return f"{axis.name} {values[0]} … {values[-1]}"
    if len(values) > 1:
        return f"{axis.name} {', '.join(values)}"
    return f"{axis.name} = {values[0]}{_rank(axis, shown)}"


def _rank(axis: AxisOfStudy, shown: Sequence[ResultLike]) -> str:
    """Which of several values the one shown is."""
    if axis.numbers is None or len(axis.numbers) < 2:
        return ""
    value = number(_values(axis, shown)[0])
    for which, end in (("the largest", max), ("the smallest", min)):
        if value == end(axis.numbers):
            return f" ({which} of {len(axis.numbers)})"
    return ""
