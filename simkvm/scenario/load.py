"""From a YAML file to frozen scenarios: one, or one for each point of a sweep.

Every problem of a file is looked for, and the first one in file order is raised, with its line,
column and key. What a scenario *is* (its identity) does not depend on where its file lies, on
the order of its keys or on how its sizes and times are spelled.
"""

from __future__ import annotations

import hashlib
import json
import shlex
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from simkvm.scenario import check, complaint, first, profile
from simkvm.scenario.document import Document, Place, read_document
from simkvm.scenario.errors import InputError, Keys, Problem
from simkvm.scenario.expand import (
    Axis,
    Choice,
    Scalar,
    find_axes,
    point,
    product,
    source,
    spelled,
    star,
)
from simkvm.scenario.kernel import KernelVariant, load_kernel
from simkvm.scenario.machine import BETWEEN_NODES, Machine, load_machine
from simkvm.scenario.override import COMMAND_LINE, apply_setting
from simkvm.scenario.recordings import Recordings, replays
from simkvm.scenario.schema import Scenario

MODEL_VERSION = 3
"""Raised whenever the same scenario may give other results than before: part of every identity."""

LOADERS: Mapping[str, Any] = {"machine": load_machine, "kernel": load_kernel}


@dataclass(frozen=True)
class Point:
    """One simulation of a study, and its value on each axis as the file writes it."""

    scenario: Scenario
    axes: dict[str, Scalar] = field(default_factory=dict)


@dataclass(frozen=True)
class Study:
    """What one file asks for: a single scenario is one point without axes.

    `axes` are dotted keys in file order; in `points` the first axis is the slowest. `first` are
    those points that the file says to run first (:mod:`simkvm.scenario.first`).
    """

    path: str
    name: str
    points: tuple[Point, ...]
    axes: tuple[str, ...] = ()
    first: tuple[Point, ...] = ()

    def require_one_point(self, option: str) -> None:
        """Raise InputError if more than one point would be run, with settings that choose one."""
        points = self.first or self.points
        several = {axis: points[0].axes[axis] for axis in self.axes}
        several = {k: v for k, v in several.items() if any(p.axes[k] != v for p in points)}
        if not several:
            return
        sets = [f"--set {shlex.quote(f'{key}={spelled(v)}')}" for key, v in several.items()]
        raise InputError(
            f"{option} takes one run, and these are {len(points)}, over {', '.join(several)}: "
            f"choose, such as {' '.join(sets)}",
            file=self.path,
        )


def load(path: str | Path, sets: Sequence[str] = (), seed: int | None = None) -> Study:
    """Read a scenario or sweep file.

    `sets` are ``KEY=VALUE`` texts that change the file's values, in order; `seed` replaces the
    file's. Traces and machine profiles are looked up from the file's folder. Raises InputError for
    whatever is wrong; if that is only so because of settings, it names them.
    """
    try:
        return _load(path, sets, seed)
    except InputError as error:
        if error.file == COMMAND_LINE.file:
            raise
        guilty = [setting for setting in sets if _loads(path, sets, setting)]
        raise _because_of(error, guilty) from None


def _loads(path: str | Path, sets: Sequence[str], without: str) -> bool:
    try:
        _load(path, [setting for setting in sets if setting != without], None)
    except InputError:
        return False
    return True


def _because_of(error: InputError, settings: Sequence[str]) -> InputError:
    said = "".join(f", with {COMMAND_LINE.file} {setting}" for setting in settings)
    return InputError(
        error.message + said,
        file=error.file,
        line=error.line,
        column=error.column,
        key=error.key,
        hint=error.hint,
    )


def _load(path: str | Path, sets: Sequence[str], seed: int | None) -> Study:
    document = read_document(path)
    for setting in sets:
        apply_setting(document, setting)
    if seed is not None:
        document.root = {**document.root, "seed": seed}
        document.put(("seed",), Place("--seed"))
    chosen = first.take_choice(document)
    axes = find_axes(document)
    labels = {} if chosen is None else first.wanted(document, chosen, axes)
    points = _Loading(document, axes, Path(path).absolute().parent).points()
    return Study(
        path=str(path),
        name=points[0].scenario.name,
        points=points,
        axes=tuple(axis.name for axis in axes),
        first=tuple(
            point
            for point in points
            if chosen is not None and all(point.axes[axis] in some for axis, some in labels.items())
        ),
    )


def require_possible(scenario: Scenario) -> None:
    """Check a scenario that was built in Python as `load` checks one that was read.

    Raises InputError with a key, but without file and line.
    """
    machine, kernel = load_machine(scenario.machine), load_kernel(scenario.kernel)
    recordings = Recordings()
    for _, access in replays(resolved(scenario)):
        recordings.header(access["file"])
    for problem in check.problems(scenario, machine, kernel, recordings.headers):
        raise InputError(problem.message, key=problem.key, hint=problem.hint)


def resolved(scenario: Scenario) -> dict[str, Any]:
    """Every key of the scenario, defaults included, as JSON can hold it.

    Sizes, durations and rates are exact text with a unit; the result is itself a scenario, which
    `Scenario.model_validate` accepts and which can be saved as a YAML file.
    """
    return scenario.model_dump(mode="json")


def identity(scenario: Scenario) -> str:
    """What the scenario is, as 64 hexadecimal digits.

    Covers every resolved value, every number of the machine and every policy of the kernel, and
    `MODEL_VERSION`. A trace counts by its content and base name, not by its path.
    """
    content = resolved(scenario)
    content["machine"] = _numbers(load_machine(scenario.machine))
    content["kernel"] = _policies(load_kernel(scenario.kernel))
    recordings = Recordings()
    for _, access in replays(content):
        access["sha256"] = access["sha256"] or recordings.header(access["file"]).sha256
        access["file"] = Path(access["file"]).name
    document = {"model_version": MODEL_VERSION, "scenario": content}
    text = json.dumps(document, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


def _numbers(machine: Machine) -> dict[str, Any]:
    names = ("name", "arch", "cores", "nodes", "ghz", "hw_af", "tlbirange", "fwb")
    values = {name: parameter.value for name, parameter in machine.parameters.items()}
    return {name: getattr(machine, name) for name in names} | {"parameters": values}


def _policies(kernel: KernelVariant) -> dict[str, Any]:
    values = {name: policy.value for name, policy in kernel.policies.items()}
    return {"name": kernel.name, "arch": kernel.arch, "policies": values}


class _Loading:
    """One document on its way to points; remembers what it has read from other files."""

    def __init__(self, document: Document, axes: Sequence[Axis], folder: Path) -> None:
        self.document = document
        self.axes = axes
        self.folder = folder
        self.recordings = Recordings(folder)
        self.loaded: dict[str, Any] = {}

    def points(self) -> tuple[Point, ...]:
        """Every point. Raises the InputError that stands first in the file."""
        self._check_values()
        return tuple(self._point(choice) for choice in product(self.axes))

    def _check_values(self) -> None:
        """Look at every value once, so that the first wrong one in the file is found."""
        found: list[tuple[Place, Problem]] = []
        for choice in star(self.axes):
            raw = self._raw(choice)
            _, problems = self._scenario(raw)
            for problem in (*self._reference_problems(raw), *problems):
                found.append((self._place(problem, choice), problem))
        self._raise_first(found)

    def _point(self, choice: Choice) -> Point:
        scenario, problems = self._checked(choice)
        labels = {axis.name: axis.label(choice[axis.keys]) for axis in self.axes}
        if problems or scenario is None:
            self._raise_first(
                [(self._place(p, choice), self._at(p, choice, labels)) for p in problems]
            )
            raise AssertionError("a point without a scenario has a problem")
        return Point(scenario, labels)

    def _checked(self, choice: Choice) -> tuple[Scenario | None, list[Problem]]:
        raw = self._raw(choice)
        scenario, problems = self._scenario(raw)
        if scenario is not None:
            machine, kernel = (self._load(kind, raw[kind]) for kind in LOADERS)
            headers = self.recordings.headers
            problems = list(check.problems(scenario, machine, kernel, headers))
        return scenario, problems

    def _raw(self, choice: Choice) -> dict[str, Any]:
        return profile.placed(point(self.document.root, self.axes, choice), self.folder)

    def _at(self, problem: Problem, choice: Choice, labels: Mapping[str, Scalar]) -> Problem:
        """The problem, saying which values of which axes it takes."""
        where = [
            f"{axis.name}={spelled(labels[axis.name])}"
            for axis in self.axes
            if self._matters(axis, problem, choice)
        ]
        at = f"; at {', '.join(where)}" if where else ""
        return Problem(problem.keys, problem.message + at, problem.hint)

    def _matters(self, axis: Axis, problem: Problem, choice: Choice) -> bool:
        """Whether another value on this axis alone would make the problem go away."""
        others = ({**choice, axis.keys: index} for index in range(len(axis.values)))
        return any(
            problem.keys not in {other.keys for other in self._checked(changed)[1]}
            for changed in others
        )

    def _scenario(self, raw: dict[str, Any]) -> tuple[Scenario | None, list[Problem]]:
        raw, problems = self.recordings.placed(raw)
        try:
            return Scenario.model_validate(raw, context={"units": "required"}), problems
        except ValidationError as error:
            return None, problems + complaint.problems(error, raw)

    def _place(self, problem: Problem, choice: Choice) -> Place:
        return self.document.place(source(problem.keys, choice))

    def _raise_first(self, found: Iterable[tuple[Place, Problem]]) -> None:
        for place, problem in sorted(found, key=lambda pair: pair[0].order):
            raise place.error(problem)

    def _load(self, kind: str, reference: Any) -> Any:
        memo = f"{kind} {spelled(reference)}"
        if memo not in self.loaded:
            self.loaded[memo] = LOADERS[kind](reference)
        return self.loaded[memo]

    def _reference_problems(self, raw: dict[str, Any]) -> Iterator[Problem]:
        for kind in LOADERS:
            for keys, reference in _references(kind, raw.get(kind)):
                try:
                    self._load(kind, reference)
                except InputError as error:
                    yield Problem(keys, error.message, error.hint)
                    break


def _references(kind: str, written: Any) -> Iterator[tuple[Keys, Any]]:
    """What to try to load, so that a failure tells which key it was."""
    if isinstance(written, str):
        yield (kind,), written
    if isinstance(written, dict) and isinstance(written.get("base"), str):
        base, changes = written["base"], written.get("set")
        yield (kind, "base"), base
        for name, value in changes.items() if isinstance(changes, dict) else ():
            alone = {name: value}
            if name in BETWEEN_NODES and isinstance(changes, dict) and "nodes" in changes:
                alone["nodes"] = changes["nodes"]  # without which it means nothing
            yield (kind, "set", name), {"base": base, "set": alone}
