"""The Python interface: load, run, sweep, open. The command line is a thin layer over it.

Everything heavy is imported where it is used, so that importing simkvm costs nothing.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from simkvm.scenario.errors import InputError

if TYPE_CHECKING:
    from simkvm.scenario.kernel import KernelVariant
    from simkvm.scenario.load import Point, Study
    from simkvm.scenario.machine import Machine
    from simkvm.scenario.schema import Scenario
    from simkvm.study.progress import Progress
    from simkvm.study.result import Result, Results
    from simkvm.study.sensitivity import Sensitivity
    from simkvm.study.verify import Difference

PathLike = str | os.PathLike[str]


def load(path: PathLike, set: Sequence[str] = (), seed: int | None = None) -> Study:  # noqa: A002
    """Read a scenario or sweep file: one point, or one for each combination of its lists.

    `set` holds overrides "KEY=VALUE" with dotted keys of the schema, values as in YAML; `seed`
    replaces the file's. Raises InputError with file, line and key.
    """
    from simkvm.scenario.load import load as read

    return read(os.fspath(path), set, seed)


def run(
    what: PathLike | Study | Scenario,
    set: Sequence[str] = (),  # noqa: A002
    seed: int | None = None,
    out: PathLike | None = None,
) -> Result:
    """Simulate one point: a file, a loaded study of one point, or a scenario.

    With `out`, the result is kept in the store in that folder, and taken from there if it is in it
    already. `set` and `seed` are for files. Raises InputError for wrong input and for a sweep.
    """
    from simkvm.study.point import measure
    from simkvm.study.result import Result

    name, point = _one_point(what, set, seed)
    if out is not None:
        return _kept(name, point, out)
    record, certificate = measure(point.scenario, point.axes)
    return Result.from_record(record, certificate, point.axes)


def sweep(
    what: PathLike | Study,
    out: PathLike | None = None,
    jobs: int | None = None,
    replications: int = 1,
    *,
    set: Sequence[str] = (),  # noqa: A002
    seed: int | None = None,
    shard: tuple[int, int] | None = None,
    progress: Progress | None = None,
) -> Results:
    """Simulate every point of a study that the store `out` lacks (default: results/NAME).

    `jobs` processes (default: one a CPU) run points; `replications` repeats each with streams of
    its own; `progress` is told how far it is (`simkvm.study.progress.Silent()` says nothing of it);
    `shard` = (i, n) runs every n-th point from the i-th, i from 0. A script that uses more
    than one job calls this under `if __name__ == "__main__":`. Ctrl-C keeps what was finished, and
    the same call goes on from there.
    """
    from simkvm.study.sweep import sweep as run_all

    study = _study(what, set, seed)
    folder = default_folder(study) if out is None else out
    return run_all(study, folder, jobs, replications, progress=progress, shard=shard)


def sensitivity(
    what: PathLike | Study,
    metric: str,
    out: PathLike | None = None,
    jobs: int | None = None,
    *,
    over: str | None = None,
    parameters: Sequence[str] = (),
    replications: int = 1,
    set: Sequence[str] = (),  # noqa: A002
    seed: int | None = None,
    progress: Progress | None = None,
) -> Sensitivity:
    """Which of its machine's constants a result hangs on: each at its low and high, one at a time.

    `metric` is a column of the summary, or SITE.COLUMN of mmu_lock's account ("fault.wait_p99_ns").
    With `over` = "KEY=VALUE" each point's metric is divided by that of the point with that value on
    that axis of the sweep. The store `out` (default: results/NAME-sensitivity) keeps the runs.
    Raises InputError for what does not exist, before anything is run.
    """
    from simkvm.study.sensitivity import sensitivity as analyse

    study = _study(what, set, seed)
    home = default_folder(study)
    folder = home.with_name(f"{home.name}-sensitivity") if out is None else out
    return analyse(
        study,
        metric,
        folder,
        jobs,
        over=over,
        parameters=parameters,
        replications=replications,
        progress=progress,
    )


def default_folder(study: Study) -> Path:
    """Where a study is kept unless said otherwise: results/NAME."""
    return Path("results") / (study.name.replace(os.sep, "-").lstrip(".") or "study")


def open_results(folder: PathLike) -> Results:
    """The results in a store. Raises InputError if `folder` is none."""
    from simkvm.study.result import Results

    if not Path(folder).is_dir():
        raise InputError("no such folder", file=str(folder))
    if _is_point(folder):
        raise InputError("holds one point, not a study; use open_result", file=str(folder))
    return Results(folder)


def open_result(folder: PathLike) -> Result:
    """The result in a point's folder. Raises InputError if `folder` is none, or damaged."""
    from simkvm.study.result import Result

    return Result.from_folder(folder)


def open_any(folder: PathLike) -> Result | Results:
    """What is in `folder`: a store of a study, or one point of it. Raises InputError if nothing."""
    return open_result(folder) if _is_point(folder) else open_results(folder)


def verify(
    folder: PathLike, traces: Sequence[PathLike] = (".",)
) -> Iterator[tuple[str, list[Difference]]]:
    """Run a point, or every finished point of a store, again: its key, and what came out otherwise.

    Traces are looked for in and below the folders `traces`. Raises InputError if `folder` holds no
    results, or if a trace is not found.
    """
    from simkvm.study.result import Result
    from simkvm.study.verify import verify as verify_point

    opened = open_any(folder)
    if isinstance(opened, Result):
        yield str(opened.certificate["key"]), verify_point(folder, traces)
        return
    for result in opened:
        key = str(result.certificate["key"])
        yield key, verify_point(opened.store.folder(key), traces)


def machines() -> dict[str, Machine]:
    """The shipped machines by name."""
    from simkvm.scenario.machine import load_machine, machine_names

    return {name: load_machine(name) for name in machine_names()}


def kernels() -> dict[str, KernelVariant]:
    """The shipped kernel variants by name."""
    from simkvm.scenario.kernel import kernel_names, load_kernel

    return {name: load_kernel(name) for name in kernel_names()}


@dataclass(frozen=True)
class Workload:
    """A scenario file: how many points it has, over which axes, or what is wrong with it."""

    path: str
    points: int
    axes: tuple[str, ...]
    description: str


def workloads(folder: PathLike = "workloads") -> list[Workload]:
    """The scenario files in `folder` and below, by path. Raises InputError if there is none."""
    root = Path(folder)
    if not root.is_dir():
        raise InputError("no such folder; scenario files ship beside the package", file=str(folder))
    paths = sorted(root.rglob("*.yaml"))
    if not paths:
        raise InputError("holds no scenario file", file=str(folder))
    return [_workload(path) for path in paths]


def _workload(path: Path) -> Workload:
    try:
        study = load(path)
    except InputError as error:
        return Workload(str(path), 0, (), str(error))
    scenario = study.points[0].scenario
    return Workload(
        str(path), len(study.points), study.axes, " ".join(scenario.description.split())
    )


def _study(what: PathLike | Study, sets: Sequence[str], seed: int | None) -> Study:
    if isinstance(what, str | os.PathLike):
        return load(what, sets, seed)
    if sets or seed is not None:
        raise InputError("set and seed are for files; load the study with them instead")
    return what


def _one_point(
    what: PathLike | Study | Scenario, sets: Sequence[str], seed: int | None
) -> tuple[str, Point]:
    from simkvm.scenario.load import Point, require_possible
    from simkvm.scenario.schema import Scenario

    if isinstance(what, Scenario):
        require_possible(what)
        return what.name, Point(what)
    study = _study(what, sets, seed)
    if len(study.points) != 1:
        axes = ", ".join(study.axes)
        message = f"is a sweep of {len(study.points)} points over {axes}; use: simkvm sweep"
        raise InputError(message, file=study.path)
    return study.name, study.points[0]


def _kept(name: str, point: Point, out: PathLike) -> Result:
    from simkvm.study.point import key_of, measure
    from simkvm.study.result import Result
    from simkvm.study.store import Entry, Store

    store, key = Store(out), key_of(point.scenario)
    store.extend_manifest(name, tuple(point.axes), [Entry(key, point.axes)])
    if key not in store:
        record, certificate = measure(point.scenario, point.axes)
        store.write(key, record, certificate)
    return Result.from_folder(store.folder(key), point.axes)


def _is_point(folder: PathLike) -> bool:
    return (Path(folder) / "point.json").is_file()
