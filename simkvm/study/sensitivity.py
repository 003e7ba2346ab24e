"""Which constants a result hangs on: each parameter of the machine at its low and at its high, one
at a time, everything else as it was.

The ranges stand beside the values (`simkvm machines NAME`). A run is the same for the same numbers,
so a parameter that a run never asked for is not tried; which it asked for stands in its birth
certificate. Runs are points of an ordinary store, so an interrupted analysis goes on where it was.

What parameters do together is looked at in two corners only: all those that move the metric at the
ends that lower it, and all at the ends that raise it. As far as they act each by itself, a corner
lies where the single changes add up to.
"""

from __future__ import annotations

import itertools
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from simkvm.scenario.errors import InputError
from simkvm.scenario.load import Point, Study
from simkvm.scenario.machine import Parameter, load_machine
from simkvm.study.effect import Effect, Tornado, corners_of
from simkvm.study.metric import Metric
from simkvm.study.point import SIMULATE, key_of
from simkvm.study.result import Result, Results
from simkvm.study.statistics import confidence_interval
from simkvm.study.store import Store
from simkvm.study.subject import SIDES, Setting, Subject, at, check_parameters, subjects_of
from simkvm.study.sweep import REPLICATION, sweep

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

    from simkvm.scenario.schema import Scenario
    from simkvm.study.progress import Progress

PARAMETER, SETTING = "parameter", "setting"
AS_IT_IS: Setting = ()
TOGETHER = "together"


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
        """One row a point and parameter, of each point the largest beyond chance first.

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
    subjects = list(subjects_of(study, over))
    check_parameters(subjects, parameters)
    runs = _Runs(study, subjects, replications, set(parameters))
    options: dict[str, Any] = {"progress": progress, "simulate": simulate}
    sweep(runs.as_it_is(), out, jobs, replications, **options)
    store = Store(out)
    tried = runs.tried(store)
    varied = runs.varied(tried)
    if varied.points:
        sweep(varied, out, jobs, replications, **options)
    found = _Found(store, wanted, replications)
    singly = [
        found.tornado(subject, runs.parameters(subject), names)
        for subject, names in zip(subjects, tried, strict=True)
    ]
    corners = runs.corners(singly)
    if corners.points:
        sweep(corners, out, jobs, replications, **options)
    tornados = tuple(
        found.with_corners(subject, tornado)
        for subject, tornado in zip(subjects, singly, strict=True)
    )
    results = Results(out)
    _require_a_value(wanted, tornados, results)
    return Sensitivity(study.name, metric, over, replications, tornados, results)


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
            Point(point.scenario, {**point.axes, PARAMETER: "", SETTING: "value"})
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
                    changed = at(scenario, ((name, side),))
                    place = {**places[id(scenario)], PARAMETER: name, SETTING: side}
                    if changed is not scenario:
                        points.setdefault(key_of(changed), Point(changed, place))
        return self._study(list(points.values()))

    def corners(self, tornados: Sequence[Tornado]) -> Study:
        """The subjects' points with all parameters that move the metric, together."""
        places = {id(point.scenario): point.axes for point in self.study.points}
        points: dict[str, Point] = {}
        for subject, tornado in zip(self.subjects, tornados, strict=True):
            for name, corner in corners_of(tornado).items():
                for scenario in subject.scenarios:
                    changed = at(scenario, corner)
                    place = {**places[id(scenario)], PARAMETER: TOGETHER, SETTING: name}
                    points.setdefault(key_of(changed), Point(changed, place))
        return self._study(list(points.values()))

    def _study(self, points: Sequence[Point]) -> Study:
        axes = (*self.study.axes, PARAMETER, SETTING)
        return Study(self.study.path, self.study.name, tuple(points), axes)


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
        effects.sort(key=lambda effect: -effect.sure)
        return Tornado(subject.axes, value, _half_width(base), tuple(effects))

    def with_corners(self, subject: Subject, tornado: Tornado) -> Tornado:
        """The same with what parameters do together."""
        corners = corners_of(tornado)
        found = {name: _mean(self.values(subject, corner)) for name, corner in corners.items()}
        return replace(
            tornado,
            lowest=found.get("lowest", math.nan),
            highest=found.get("highest", math.nan),
        )

    def effect(self, subject: Subject, parameter: Parameter, base: Sequence[float]) -> Effect:
        """The effect of one parameter."""
        sides = [((parameter.name, side),) for side in SIDES]
        low, high = (self.values(subject, setting) for setting in sides)
        changed = any(
            self._runs(scenario, setting) != self._runs(scenario, AS_IT_IS)
            for scenario in subject.scenarios
            for setting in sides
        )
        moves = [after - before for before, after in zip(low, high, strict=True)]
        return Effect(parameter, _mean(low), _mean(base), _mean(high), changed, _half_width(moves))

    def _runs(self, scenario: Scenario, setting: Setting) -> list[tuple[float, str] | None]:
        """Metric, and all that is known of what happened, of each replication; None if failed."""
        changed = at(scenario, setting)
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
