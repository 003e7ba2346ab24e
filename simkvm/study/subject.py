"""What an analysis takes its metric of: points of a study or pairs of them, with settings of the
parameters of their machine.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from simkvm.scenario.errors import InputError, nearest
from simkvm.scenario.expand import Scalar
from simkvm.scenario.fields import FrozenDict
from simkvm.scenario.load import Point, Study
from simkvm.scenario.machine import load_machine

if TYPE_CHECKING:
    from simkvm.scenario.schema import Scenario

SIDES = ("low", "high")
Setting = tuple[tuple[str, str], ...]
"""Parameters that are not at their value: each name with "low" or "high"."""


@dataclass(frozen=True)
class Subject:
    """What a metric is taken of: a point of the study, or that point over another one."""

    axes: dict[str, Scalar]
    scenario: Scenario
    over: Scenario | None = None

    @property
    def scenarios(self) -> tuple[Scenario, ...]:
        """The one or two scenarios that have to be run."""
        return (self.scenario,) if self.over is None else (self.scenario, self.over)


def at(scenario: Scenario, setting: Setting) -> Scenario:
    """The scenario with parameters at their low or high; itself if that changes nothing, as where
    its machine lacks them.
    """
    machine = load_machine(scenario.machine)
    changes = {}
    for name, side in setting:
        parameter = machine.parameters.get(name)
        if parameter is not None and getattr(parameter, side) != parameter.value:
            changes[name] = getattr(parameter, side)
    if not changes:
        return scenario
    return scenario.model_copy(update={"machine": _changed(scenario.machine, changes)})


def _changed(machine: Any, changes: Mapping[str, float]) -> Any:
    """The reference to a machine with more parameters set."""
    base, earlier = (machine, {}) if isinstance(machine, str) else (machine["base"], machine["set"])
    return FrozenDict({"base": base, "set": FrozenDict({**earlier, **changes})})


def subjects_of(study: Study, over: str | None) -> Iterator[Subject]:
    """Every point of a study; or, with "KEY=VALUE", every other one over that with this value.

    Raises InputError for a key that is no axis of it, or a value that it never has.
    """
    if over is None:
        for point in study.points:
            yield Subject(dict(point.axes), point.scenario)
        return
    key, value = _axis_and_value(study, over)
    below = {_others(point, key): point for point in study.points if str(point.axes[key]) == value}
    for point in study.points:
        written = str(point.axes[key])
        if written != value:
            axes = {**point.axes, key: f"{written} / {value}"}
            yield Subject(axes, point.scenario, below[_others(point, key)].scenario)


def _others(point: Point, key: str) -> tuple[Scalar, ...]:
    return tuple(value for name, value in point.axes.items() if name != key)


def _axis_and_value(study: Study, over: str) -> tuple[str, str]:
    name, equals, value = over.partition("=")
    if not equals:
        raise InputError(f"expected KEY=VALUE, not '{over}'", key="over")
    short = {axis.rsplit(".", 1)[-1]: axis for axis in reversed(study.axes)}
    key = name if name in study.axes else short.get(name)
    if key is None:
        hint = nearest(name, [*study.axes, *short])
        raise InputError(f"the study has no axis '{name}'", key="over", hint=hint)
    if key == "machine":
        raise InputError("each machine has ranges of its own; compare along another", key="over")
    values = list(dict.fromkeys(str(point.axes[key]) for point in study.points))
    if value not in values:
        hint = nearest(value, values)
        raise InputError(f"{key} is never '{value}' in this study", key="over", hint=hint)
    if len(values) == 1:
        raise InputError(f"{key} is always '{value}': there is nothing to compare", key="over")
    return key, value


def check_parameters(subjects: Sequence[Subject], names: Sequence[str]) -> None:
    """Raise InputError for a parameter that no machine of the subjects has."""
    known = {
        name: None
        for subject in subjects
        for scenario in subject.scenarios
        for name in load_machine(scenario.machine).parameters
    }
    for name in names:
        if name not in known:
            hint = nearest(name, known)
            raise InputError(f"no machine here has '{name}'", key="parameter", hint=hint)
