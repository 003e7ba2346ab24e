"""From observations to a machine profile: a shipped machine with the measured constants in it.

The value is the median, ``low`` the 10th and ``high`` the 90th percentile of what was measured,
less the tracer's own time; a parameter for which nothing fits, or too little, stays as shipped.
Nothing is fitted: each constant comes from the one observation that its rule names.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Final

from simkvm.measure.mapping import RULES, Rule
from simkvm.measure.observation import Observation
from simkvm.scenario.errors import InputError, nearest
from simkvm.scenario.machine import Machine, Parameter
from simkvm.units import parse_duration

LEAST: Final = 30
"""Fewer observations make no constant: a median of them moves with every one."""

MEASURED: Final = "M"


@dataclass(frozen=True)
class Change:
    """What became of one parameter. ``measured`` is None if it stayed as it was, with a reason."""

    parameter: str
    shipped: float
    measured: float | None
    low: float | None
    high: float | None
    n: int
    key: str
    phase: str
    reason: str


@dataclass(frozen=True)
class Calibration:
    """A profile, what was changed in it and why not, and the time of the tracer taken off."""

    machine: Machine
    base: str
    changes: tuple[Change, ...]
    overhead_ns: float

    def document(self) -> dict[str, Any]:
        """As plain values, for JSON."""
        return {
            "machine": self.machine.name,
            "base": self.base,
            "overhead_ns": self.overhead_ns,
            "changes": [asdict(change) for change in self.changes],
        }


@dataclass(frozen=True)
class Overhead:
    """The tracer's own part of a duration; ``function`` is what it was taken from, if from one."""

    ns: float = 0.0
    function: str = ""


NO_OVERHEAD: Final = Overhead()


def overhead_of(text: str | None, rows: Iterable[Observation]) -> Overhead:
    """What to take off durations, as ``text`` says.

    It is a duration, or a function among the observations that does next to nothing, whose median
    then stands for the tracer; None is nothing. Raises InputError if it is neither.
    """
    if text is None:
        return Overhead()
    functions: dict[str, Observation] = {}
    for row in rows:
        known = functions.get(row.key)
        if row.what == "function" and (known is None or known.n < row.n):
            functions[row.key] = row
    if text in functions and functions[text].p50_ns is not None:
        return Overhead(float(functions[text].p50_ns or 0), text)
    try:
        return Overhead(float(parse_duration(text)))
    except InputError:
        hint = nearest(text, functions)
        message = f"{text!r} is neither a duration nor a function that was traced on its own"
        raise InputError(message, key="--overhead", hint=hint) from None


def calibrate(
    rows: Sequence[Observation],
    base: Machine,
    *,
    name: str,
    overhead: Overhead = NO_OVERHEAD,
    kernel: str = "",
) -> Calibration:
    """A machine called ``name``: ``base`` with every constant that the observations give.

    ``overhead`` is taken off durations of functions only. Raises InputError if no observation gives
    any constant.
    """
    found = _Measured(rows, overhead)
    machine = replace(base, name=name, parameters=dict(base.parameters), overrides={})
    changes: dict[str, Change] = {}
    for rule in RULES:
        if rule.parameter not in base.parameters:
            continue
        before = changes.get(rule.parameter)
        if before is not None and before.measured is not None:
            continue  # an earlier rule for the same parameter had its observation
        change, parameter = _apply(rule, found, machine, kernel)
        if before is None or change.n > before.n:
            changes[rule.parameter] = change
        if parameter is not None:
            machine.parameters[rule.parameter] = parameter
    if all(change.measured is None for change in changes.values()):
        raise InputError(
            "no observation gives a machine constant: contrib/README.md says what is needed"
        )
    title = f"{base.title}, with constants measured on a real host"
    return Calibration(
        replace(machine, title=title), base.name, tuple(changes.values()), overhead.ns
    )


def _apply(
    rule: Rule, found: _Measured, machine: Machine, kernel: str
) -> tuple[Change, Parameter | None]:
    shipped = machine.parameters[rule.parameter]

    def unchanged(reason: str, row: Observation | None = None) -> tuple[Change, None]:
        n, key = (0, " or ".join(rule.keys)) if row is None else (row.n, row.key)
        return (
            Change(rule.parameter, shipped.value, None, None, None, n, key, rule.phase, reason),
            None,
        )

    row = found.row(rule.what, rule.keys, rule.phase)
    if row is None:
        return unchanged(found.why_missing(rule))
    if row.n < LEAST:
        return unchanged(f"only {row.n} observations, {LEAST} are needed", row)
    constants = _constants(rule, found, machine)
    if constants is None:
        return unchanged(f"needs {' in '.join(rule.also or ())} too", row)
    spread = [
        rule.formula(value, constants)
        for value in (row.p10_ns, row.p50_ns, row.p90_ns)
        if value is not None
    ]
    if len(spread) < 3:
        return unchanged(f"{row.tool} gives no median", row)
    low, value, high = spread
    if value <= 0:
        return unchanged("nothing is left of the median after what is to be taken off", row)
    low = max(0.0, low)
    parameter = Parameter(
        rule.parameter,
        round(value, 3),
        round(min(low, value), 3),
        round(max(high, value), 3),
        shipped.unit,
        MEASURED,
        _source(rule, row, kernel),
        _note(rule, found.overhead.ns),
    )
    change = Change(
        rule.parameter,
        shipped.value,
        parameter.value,
        parameter.low,
        parameter.high,
        row.n,
        row.key,
        rule.phase,
        rule.about,
    )
    return change, parameter


def _constants(rule: Rule, found: _Measured, machine: Machine) -> Mapping[str, float] | None:
    constants = {
        name: float(getattr(machine, name) if hasattr(machine, name) else machine[name])
        for name in rule.needs
    }
    if rule.also is not None:
        key, phase = rule.also
        other = found.row(rule.what, (key,), phase)
        if other is None or other.p50_ns is None or other.n < LEAST:
            return None
        constants[f"{key}@{phase}"] = other.p50_ns
    return constants


def _source(rule: Rule, row: Observation, kernel: str) -> str:
    where = ", ".join(Path(name).name for name in row.file.split(", "))
    on = f" on {kernel}" if kernel else ""
    during = f" during {row.phase}" if row.phase else ""
    return f"measured{on}: {where}, {row.tool}, {row.what} {row.key}{during}, n = {row.n}"


def _note(rule: Rule, overhead_ns: float) -> str:
    taken = (
        f"{overhead_ns:g} ns taken off for the tracer" if overhead_ns else "the tracer's cost is in"
    )
    return f"{rule.about}; " + (taken if rule.what == "function" else "low: p10, high: p90")


class _Measured:
    """The observations by what, key and phase, the tracer's own time taken off."""

    def __init__(self, rows: Sequence[Observation], overhead: Overhead) -> None:
        self.overhead = overhead
        self.rows: dict[tuple[str, str, str], Observation] = {}
        for row in rows:
            place = (row.what, row.key, row.phase)
            if place not in self.rows or self.rows[place].n < row.n:  # of several the largest
                self.rows[place] = row

    def row(self, what: str, keys: Iterable[str], phase: str) -> Observation | None:
        """The first of ``keys`` that was observed; its parts joined by ``+`` are added up."""
        for key in keys:
            if what == "function" and self.overhead.function in key.split("+"):
                continue
            parts = [self._one(what, part, phase) for part in key.split("+")]
            known = [part for part in parts if part is not None]
            if len(known) == len(parts):
                return known[0] if len(known) == 1 else _added(key, known)
        return None

    def why_missing(self, rule: Rule) -> str:
        """Why a rule found nothing: not measured, in another phase, or with others inside."""
        parts = {part for key in rule.keys for part in key.split("+")}
        if rule.what == "function" and self.overhead.function in parts:
            return f"{self.overhead.function} stands for the tracer, so nothing is left of it"
        seen = {(what, phase) for what, key, phase in self.rows if key in parts}
        if (rule.what, "") in seen and rule.phase:
            return f"not said to be measured during {rule.phase} (PHASE=FILE)"
        if any(what == "function_outer" for what, _ in seen) and rule.what == "function":
            return "traced together with what it calls: trace it alone"
        return f"not measured{f' during {rule.phase}' if rule.phase else ''}"

    def _one(self, what: str, key: str, phase: str) -> Observation | None:
        if phase:
            row = self.rows.get((what, key, phase))
        else:
            any_phase = (self.rows[place] for place in self.rows if place[:2] == (what, key))
            row = max(any_phase, key=lambda one: one.n, default=None)
        if row is None or what != "function" or not self.overhead.ns:
            return row
        taken = {
            name: max(0.0, value - self.overhead.ns)
            for name, value in asdict(row).items()
            if name in {"p10_ns", "p50_ns", "p90_ns"} and value is not None
        }
        return replace(row, **taken)


def _added(key: str, rows: Sequence[Observation]) -> Observation:
    """Durations one after the other: medians add up for want of the pairs."""

    def total(name: str) -> float | None:
        values = [getattr(row, name) for row in rows]
        return None if None in values else sum(values)

    first = rows[0]
    return replace(
        first,
        key=key,
        n=min(row.n for row in rows),
        p10_ns=total("p10_ns"),
        p50_ns=total("p50_ns"),
        p90_ns=total("p90_ns"),
        file=", ".join(dict.fromkeys(row.file for row in rows)),
    )
