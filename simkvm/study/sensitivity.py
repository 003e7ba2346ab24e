"""Which constants a result hangs on: each parameter of the machine at its low and at its high, one
at a time, everything else as it was.

The ranges stand beside the values (`simkvm machines NAME`). A run is the same for the same numbers,
so a parameter that a run never asked for is not tried; which it asked for stands in its birth
certificate. What two parameters do together is not seen: this looks along the axes, not between
them. Runs are points of an ordinary store, so an interrupted analysis goes on where it was.
"""

from __future__ import annotations

import itertools
import math
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from simkvm.scenario.errors import InputError, nearest
from simkvm.scenario.expand import Scalar
from simkvm.scenario.fields import FrozenDict
from simkvm.scenario.load import Point, Study
from simkvm.scenario.machine import Parameter, load_machine
from simkvm.study.metric import Metric
from simkvm.study.point import SIMULATE, key_of
from simkvm.study.result import Result, Results
from simkvm.study.statistics import confidence_interval
from simkvm.study.store import Store
from simkvm.study.sweep import REPLICATION, sweep

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

    from simkvm.scenario.schema import Scenario
    from simkvm.study.progress import Progress

PARAMETER, SETTING = "parameter", "setting"
SIDES = ("low", "high")
Setting = tuple[str, str]
"""A parameter's name and "low" or "high"; or nobody's, for everything at its value."""

AS_IT_IS: Setting = ("", "value")


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


@dataclass(frozen=True)
class Effect:
    """What one parameter does to the metric of one subject.

    `at_low` and `at_high` are nan where no run gave a value. `changed`: the parameter changed what
    happened in some run, whether or not the metric moved. `half_width` is of the 95 % confidence
    interval of the change from low to high, over replications; infinite with one replication.
    """

    parameter: Parameter
    at_low: float
    value: float
    at_high: float
    changed: bool
    half_width: float

    @property
    def swing(self) -> float:
        """How far apart the metric gets, over low, value and high."""
        found = [x for x in (self.at_low, self.value, self.at_high) if not math.isnan(x)]
        return max(found) - min(found) if found else 0.0

    @property
    def share(self) -> float:
        """The swing as a share of the metric as it is; nan where that is nothing."""
        return self.swing / abs(self.value) if self.value else math.nan


@dataclass(frozen=True)
class Tornado:
    """All effects on one subject, the largest swing first. `value` is the metric as it is, and
    `half_width` that of its 95 % interval over replications.
    """

    axes: dict[str, Scalar]
    value: float
    half_width: float
    effects: tuple[Effect, ...]

    @property
    def moving(self) -> tuple[Effect, ...]:
        """Parameters that move the metric."""
        return tuple(effect for effect in self.effects if effect.swing > 0)

    @property
    def still(self) -> tuple[str, ...]:
        """Parameters that changed the run but not the metric."""
        return tuple(e.parameter.name for e in self.effects if e.changed and not e.swing)

    @property
    def unused(self) -> tuple[str, ...]:
        """Parameters without any effect: never asked for, or the same fingerprint and figures."""
        return tuple(e.parameter.name for e in self.effects if not e.changed)

    def among(self, basis: str) -> tuple[Effect, ...]:
        """Those of the moving ones whose value has this basis ("E": an estimate)."""
        return tuple(effect for effect in self.moving if effect.parameter.basis == basis)


@dataclass(frozen=True)
class Sensitivity:
    """A finished analysis; `over` is the setting that others are divided by, if any."""

    name: str
    metric: str
    over: str | None
    replications: int
    tornados: tuple[Tornado, ...]
    results: Results = field(repr=False)

    @property
    def failed(self) -> list[dict[str, Any]]:
        """Runs that gave no result, as in `Results.failed`."""
        return self.results.failed

    @property
    def frame(self) -> pd.DataFrame:
        """One row a point and parameter, the largest swing of each point first.

        Columns: the axes, then `parameter`, `basis`, `unit`, `low`, `value`, `high` (of the
        parameter), `at_low`, `at_value`, `at_high` (of the metric), `swing`, `share`, `changed`,
        `half_width`.
        """
        import pandas as pd

        rows = [{**one.axes, **_columns(effect)} for one in self.tornados for effect in one.effects]
        return pd.DataFrame(rows)

    def plot_tornado(self, **options: Any) -> Figure:
        """A bar a parameter, from the metric at its low to that at its high."""
        from simkvm.show.figure_tornado import tornado

        return tornado(self, **options)


def _columns(effect: Effect) -> dict[str, Any]:
    names = ("name", "basis", "unit", "low", "value", "high")
    parameter = {name: getattr(effect.parameter, name) for name in names}
    parameter["parameter"] = parameter.pop("name")
    metric = ("at_low", "at_high", "swing", "share", "changed", "half_width")
    found = {name: getattr(effect, name) for name in metric}
    return {**parameter, "at_value": effect.value, **found}


def sensitivity(
    study: Study,
    metric: str,
    out: str | os.PathLike[str],
    jobs: int | None = None,
    *,
    over: str | None = None,
    parameters: Sequence[str] = (),
    replications: int = 1,
    progress: Progress | None = None,
    simulate: str = SIMULATE,
) -> Sensitivity:
    """Run what the store `out` lacks of an analysis, and sum it up.

    `over` = "KEY=VALUE" names an axis of the study and one of its values: each other point's metric
    is divided by that of the point there. `parameters` are the only ones to try, by default every
    one that a run asked for. Raises InputError, before anything is written, for a metric,
    parameter, key or value that does not exist; Interrupted and BackendLost as `sweep` does.
    """
    wanted = Metric.named(metric)
    subjects = list(_subjects(study, over))
    _check_parameters(subjects, parameters)
    runs = _Runs(study, subjects, replications, set(parameters))
    options: dict[str, Any] = {"progress": progress, "simulate": simulate}
    sweep(runs.as_it_is(), out, jobs, replications, **options)
    store = Store(out)
    tried = runs.tried(store)
    varied = runs.varied(tried)
    if varied.points:
        sweep(varied, out, jobs, replications, **options)
    results, found = Results(out), _Found(store, wanted, replications)
    tornados = tuple(
        found.tornado(subject, runs.parameters(subject), names)
        for subject, names in zip(subjects, tried, strict=True)
    )
    _require_a_value(wanted, tornados, results)
    return Sensitivity(study.name, metric, over, replications, tornados, results)


# -- what to compare --------------------------------------------------------------------------


def _subjects(study: Study, over: str | None) -> Iterator[Subject]:
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


def _check_parameters(subjects: Sequence[Subject], names: Sequence[str]) -> None:
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


# -- what to run ------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Runs:
    """The scenarios of an analysis, by subject and setting."""

    study: Study
    subjects: Sequence[Subject]
    replications: int
    only: set[str]

    def as_it_is(self) -> Study:
        """Every point that a subject needs, with the parameters as they are."""
        needed = {id(scenario) for subject in self.subjects for scenario in subject.scenarios}
        points = [
            Point(point.scenario, {**point.axes, PARAMETER: AS_IT_IS[0], SETTING: AS_IT_IS[1]})
            for point in self.study.points
            if id(point.scenario) in needed
        ]
        return self._study(points)

    def tried(self, store: Store) -> list[list[str]]:
        """The parameters to try with each subject: what any of its runs asked for.

        In a comparison a parameter that either side asks for is tried on both.
        """
        return [self._tried(subject, store) for subject in self.subjects]

    def _tried(self, subject: Subject, store: Store) -> list[str]:
        asked = {
            name
            for scenario in subject.scenarios
            for run in _replicated(scenario, self.replications)
            for name in _asked(store, run)
        }
        return [p.name for p in self.parameters(subject) if p.name in asked]

    def parameters(self, subject: Subject) -> list[Parameter]:
        """Those of the subject's machine that are looked at."""
        known = load_machine(subject.scenario.machine).parameters.values()
        return [p for p in known if not self.only or p.name in self.only]

    def varied(self, tried: Sequence[Sequence[str]]) -> Study:
        """The subjects' points with one of these parameters at its low or high."""
        places = {id(point.scenario): point.axes for point in self.study.points}
        points: dict[str, Point] = {}
        for subject, names in zip(self.subjects, tried, strict=True):
            for name, side in itertools.product(names, SIDES):
                for scenario in subject.scenarios:
                    changed = at(scenario, (name, side))
                    place = {**places[id(scenario)], PARAMETER: name, SETTING: side}
                    if changed is not scenario:
                        points.setdefault(key_of(changed), Point(changed, place))
        return self._study(list(points.values()))

    def _study(self, points: Sequence[Point]) -> Study:
        axes = (*self.study.axes, PARAMETER, SETTING)
        return Study(self.study.path, self.study.name, tuple(points), axes)


def at(scenario: Scenario, setting: Setting) -> Scenario:
    """The scenario with one parameter at its low or high; itself if that changes nothing, or if its
    machine lacks the parameter.
    """
    name, side = setting
    parameter = load_machine(scenario.machine).parameters.get(name)
    if parameter is None or getattr(parameter, side) == parameter.value:
        return scenario
    return scenario.model_copy(
        update={"machine": _changed(scenario.machine, name, getattr(parameter, side))}
    )


def _changed(machine: Any, name: str, value: float) -> Any:
    """The reference to a machine with one more parameter set."""
    base, earlier = (machine, {}) if isinstance(machine, str) else (machine["base"], machine["set"])
    return FrozenDict({"base": base, "set": FrozenDict({**earlier, name: value})})


def _asked(store: Store, scenario: Scenario) -> Sequence[str]:
    """What a run asked for; everything, if it failed or its point is older than such notes."""
    document = store.document(key_of(scenario)) or {"certificate": {}}
    everything = list(load_machine(scenario.machine).parameters)
    return list(document["certificate"].get("parameters_read", everything))


def _replicated(scenario: Scenario, replications: int) -> list[Scenario]:
    """As `simkvm.study.sweep.plan` numbers them."""
    return [
        scenario.model_copy(update={REPLICATION: scenario.replication + number})
        for number in range(replications)
    ]


# -- what came out ----------------------------------------------------------------------------


@dataclass
class _Found:
    """Metrics of stored runs, each read once."""

    store: Store
    metric: Metric
    replications: int
    _read: dict[str, tuple[float, str] | None] = field(default_factory=dict)

    def values(self, subject: Subject, setting: Setting) -> list[float]:
        """The metric (or ratio of two) in each replication; nan for a run without result."""
        columns = [
            [found[0] if found else math.nan for found in self._runs(scenario, setting)]
            for scenario in subject.scenarios
        ]
        if subject.over is None:
            return columns[0]
        return [above / below if below else math.nan for above, below in zip(*columns, strict=True)]

    def tornado(
        self, subject: Subject, parameters: Sequence[Parameter], tried: Sequence[str]
    ) -> Tornado:
        """The effects of parameters on a subject; of those that were not tried, none."""
        base = self.values(subject, AS_IT_IS)
        value = _mean(base)
        effects = [
            self.effect(subject, parameter, base)
            if parameter.name in tried
            else Effect(parameter, value, value, value, changed=False, half_width=0.0)
            for parameter in parameters
        ]
        effects.sort(key=lambda effect: -effect.swing)
        return Tornado(subject.axes, value, _half_width(base), tuple(effects))

    def effect(self, subject: Subject, parameter: Parameter, base: Sequence[float]) -> Effect:
        """The effect of one parameter."""
        low, high = (self.values(subject, (parameter.name, side)) for side in SIDES)
        changed = any(
            self._runs(scenario, (parameter.name, side)) != self._runs(scenario, AS_IT_IS)
            for scenario in subject.scenarios
            for side in SIDES
        )
        moves = [after - before for before, after in zip(low, high, strict=True)]
        return Effect(parameter, _mean(low), _mean(base), _mean(high), changed, _half_width(moves))

    def _runs(self, scenario: Scenario, setting: Setting) -> list[tuple[float, str] | None]:
        """Metric, and all that is known of what happened, of each replication; None if failed."""
        changed = scenario if setting == AS_IT_IS else at(scenario, setting)
        return [self._run(run) for run in _replicated(changed, self.replications)]

    def _run(self, scenario: Scenario) -> tuple[float, str] | None:
        key = key_of(scenario)
        if key not in self._read:
            self._read[key] = None
            if key in self.store:
                result = Result.from_folder(self.store.folder(key))
                happened = f"{result.fingerprint} {result.summary.to_dict()}"
                self._read[key] = (self.metric.of(result), happened)
        return self._read[key]


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values) if all(map(math.isfinite, values)) else math.nan


def _half_width(values: Sequence[float]) -> float:
    return confidence_interval(values).half_width if all(map(math.isfinite, values)) else math.nan


def _require_a_value(metric: Metric, tornados: Sequence[Tornado], results: Results) -> None:
    """Raise InputError if the metric has no value in any point that was run."""
    if all(math.isnan(tornado.value) for tornado in tornados) and not results.failed:
        raise InputError(f"'{metric.name}' has no value in these points", key="metric")
