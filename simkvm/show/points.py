"""Which points of a study a figure or table compares, and what they are called.

A point is anything with a `Result`'s attributes. Axes are dotted scenario keys with the values as
the scenario file wrote them ("200 / s"), so this module also says which axes have an order and
which only name variants.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, cast

import pandas as pd

from simkvm.scenario.errors import InputError, nearest
from simkvm.units import measured_by

Where = Mapping[str, object]

SITES = (
    *("fault", "permission_fault", "access_fault", "pre_fault", "age", "range_start", "range_end"),
    *("write_protect", "dirty_log_get", "dirty_log_clear", "eager_split", "recover_huge"),
    *("memslot", "teardown"),
)
"""Call sites of mmu_lock in the order in which every figure and table shows them."""


class ResultLike(Protocol):
    """What figures and tables read of a finished point; columns as in `simkvm.observe.record`."""

    @property
    def summary(self) -> Any:
        """One row of figures about the whole run: a mapping, a Series or a one-row DataFrame."""
        ...

    @property
    def locks(self) -> pd.DataFrame:
        """One row a guest, call site and mode."""
        ...

    @property
    def histograms(self) -> pd.DataFrame:
        """One row a bucket that holds a value."""
        ...

    @property
    def timeline(self) -> pd.DataFrame:
        """Table memory as a step function of time."""
        ...

    @property
    def grace_periods(self) -> pd.DataFrame:
        """One row a grace period."""
        ...

    @property
    def passes(self) -> pd.DataFrame:
        """One row a completed ageing pass."""
        ...

    @property
    def violations(self) -> list[dict[str, Any]]:
        """What the safety oracle found."""
        ...

    @property
    def fingerprint(self) -> str:
        """Hash over the run's events, in hex."""
        ...

    @property
    def scenario(self) -> dict[str, Any]:
        """The resolved scenario."""
        ...

    @property
    def axes(self) -> dict[str, Any]:
        """The point's values on the axes of its study, as written."""
        ...


OneOrMany = ResultLike | Iterable[ResultLike]


REFERENCES = ("machine", "kernel")
SCARCE = "host.memory.size"
"""The axis on which most happens where it is smallest."""


@dataclass(frozen=True)
class AxisOfStudy:
    """One swept key: its values in file order, and as numbers if all of them have one."""

    key: str
    name: str
    values: tuple[Any, ...]
    numbers: tuple[float, ...] | None

    @property
    def last(self) -> str:
        """The largest value, as written."""
        by_number = dict(zip(self.numbers or (), self.values, strict=False))
        return str(by_number[max(by_number)])

    @property
    def default(self) -> float | None:
        """The number that figures show which do not run along this axis; None without an order."""
        if self.numbers is None:
            return None
        return min(self.numbers) if self.key == SCARCE else max(self.numbers)


def listed(results: OneOrMany) -> list[ResultLike]:
    """The finished points, whether one or many were given."""
    if hasattr(results, "fingerprint"):
        return [cast("ResultLike", results)]
    return list(results)


def summary_of(result: ResultLike) -> dict[str, Any]:
    """Summary of a point as a plain mapping, from a mapping, a Series or a one-row DataFrame."""
    summary = result.summary
    if isinstance(summary, pd.DataFrame):
        summary = summary.iloc[0]
    return {str(key): value for key, value in summary.items()}


def number(value: object) -> float | None:
    """What a value of an axis measures, in bytes, nanoseconds, events a second or plain; None for a
    name.
    """
    if isinstance(value, bool):
        return None
    if isinstance(value, int | float):
        return float(value)
    if not isinstance(value, str) or not value[:1].isdigit():
        return None
    parse = measured_by(value)
    return None if parse is None else float(parse(value))


def reference_label(reference: object) -> str:
    """The name of a machine or kernel as a scenario refers to it, overrides included."""
    if not isinstance(reference, Mapping):
        return str(reference)
    base = str(reference.get("base", reference.get("name", "")))
    overrides = reference.get("set") or {}
    return " ".join([base, *(f"{key}={_plain(value)}" for key, value in overrides.items())])


def _plain(value: object) -> object:
    """Parameters are all floats; a count is one for people, too, only without a point."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


def value_of(result: ResultLike, key: str) -> Any:
    """A point's value on an axis as written, machines and kernels by their label; None if none."""
    if key not in result.axes:
        return None
    return reference_label(result.scenario[key]) if key in REFERENCES else result.axes[key]


def in_site_order(sites: Iterable[str]) -> list[str]:
    """Each site once, in the order of `SITES`; others follow by name."""
    known = {site: place for place, site in enumerate(SITES)}
    return sorted(set(sites), key=lambda site: (known.get(site, len(known)), site))


def short_names(keys: Sequence[str]) -> dict[str, str]:
    """The last part of each dotted key, or as much of its tail as tells it from the others."""
    names = {key: key.rsplit(".", 1)[-1] for key in keys}
    depth = 1
    while clashing := {n for n, times in Counter(names.values()).items() if times > 1}:
        depth += 1
        names = {
            key: ".".join(key.split(".")[-depth:]) if name in clashing else name
            for key, name in names.items()
        }
    return names


def axes_of(results: Sequence[ResultLike]) -> dict[str, AxisOfStudy]:
    """The swept keys of these points in the order of the file; replications are no axis."""
    keys = list(dict.fromkeys(key for result in results for key in result.axes))
    keys = [key for key in keys if key not in {"replication", "seed"}]
    names = short_names(keys)
    return {key: _axis(key, names[key], results) for key in keys}


def _axis(key: str, name: str, results: Sequence[ResultLike]) -> AxisOfStudy:
    values: list[Any] = []
    for result in results:
        value = value_of(result, key)
        if value is not None and value not in values:
            values.append(value)
    measured = [number(value) for value in values]
    numbers = None if None in measured else tuple(cast("list[float]", measured))
    return AxisOfStudy(key, name, tuple(values), numbers)


def variant_label(result: ResultLike, axes: Mapping[str, AxisOfStudy]) -> str:
    """What tells this point's variant from the others: its values on the axes that have no order.

    Without such an axis it is the kernel.
    """
    parts = []
    for key, axis in axes.items():
        if axis.numbers is not None or len(axis.values) < 2:
            continue
        label = str(value_of(result, key))
        parts.append(label if key in REFERENCES else f"{axis.name}={label}")
    return ", ".join(parts) if parts else reference_label(result.scenario.get("kernel", ""))


def variants(
    results: OneOrMany, *, along: str | None = None, where: Where | None = None
) -> dict[str, list[ResultLike]]:
    """Points to compare, by variant: what `where` selects, else the largest value of every ordered
    axis (of the host's memory the smallest).

    `along` names the axis that a figure draws along: all of its values stay. Replications of a
    point stay together in the list of their variant. Raises InputError if `where` names no axis or
    selects nothing.
    """
    points = listed(results)
    if not points:
        raise InputError("these results have no finished point")
    axes = axes_of(points)
    chosen = resolve_where(axes, where or {})
    kept = [point for point in points if _wanted(point, axes, chosen, along)]
    if not kept:
        raise InputError(f"no point matches {dict(where or {})}", key="where")
    groups: dict[str, list[ResultLike]] = {}
    for point in kept:
        groups.setdefault(variant_label(point, axes), []).append(point)
    return groups


def resolve_where(axes: Mapping[str, AxisOfStudy], where: Where) -> dict[str, list[Any]]:
    """`where` with full keys and lists of values; axes may be given by their short names."""
    by_name = {axis.name: key for key, axis in axes.items()} | {key: key for key in axes}
    chosen = {}
    for name, value in where.items():
        if name not in by_name:
            raise InputError(
                f"this study has no axis '{name}'",
                key="where",
                hint=nearest(name, list(by_name)),
            )
        chosen[by_name[name]] = list(value) if isinstance(value, list | tuple) else [value]
    return chosen


def _wanted(
    point: ResultLike,
    axes: Mapping[str, AxisOfStudy],
    chosen: Mapping[str, list[Any]],
    along: str | None,
) -> bool:
    for key, axis in axes.items():
        value = value_of(point, key)
        if key in chosen:
            if not any(same_value(value, wanted) for wanted in chosen[key]):
                return False
        elif axis.numbers is not None and key != along and number(value) != axis.default:
            return False
    return True


def same_value(left: object, right: object) -> bool:
    """Whether two spellings mean the same value on an axis ("1 MiB" and "1024 KiB" do)."""
    if str(left) == str(right):
        return True
    return number(left) is not None and number(left) == number(right)


def unexpected(result: ResultLike) -> bool:
    """Whether the safety oracle found something although the scenario expects to be safe."""
    return bool(result.violations) and result.scenario.get("expect", "safe") == "safe"


def ordered_axis(results: OneOrMany, ending: str) -> AxisOfStudy | None:
    """The first axis with at least two ordered values whose key ends so, e.g. ".vcpus"."""
    for key, axis in axes_of(listed(results)).items():
        if key.endswith(ending) and axis.numbers is not None and len(axis.values) > 1:
            return axis
    return None


def along(results: OneOrMany, axis: AxisOfStudy, *, where: Where | None = None) -> list[ResultLike]:
    """The points that a figure along `axis` shows."""
    groups = variants(results, along=axis.key, where=where)
    return [point for group in groups.values() for point in group]


def along_axis(
    results: OneOrMany, axis: AxisOfStudy, *, where: Where | None = None
) -> pd.DataFrame:
    """Summary columns of the points along one axis, one row a point, in the order of the axis.

    Adds the columns `variant` and `x` (the axis as a number).
    """
    rows = [
        summary_of(point) | {"variant": label, "x": number(value_of(point, axis.key))}
        for label, points in variants(results, along=axis.key, where=where).items()
        for point in points
    ]
    return pd.DataFrame(rows).sort_values("x", kind="stable", ignore_index=True)
