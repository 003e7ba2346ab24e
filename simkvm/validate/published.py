"""Every published figure of the record, its benchmark run again in the model."""

from __future__ import annotations

import csv
import tempfile
import tomllib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from fnmatch import fnmatchcase
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from simkvm.scenario.errors import InputError, nearest
from simkvm.scenario.load import Point, Study
from simkvm.units import SIZE_BYTES
from simkvm.validate.benchmarks import BENCHMARKS, UNANSWERED, Benchmark, Figure, Run
from simkvm.validate.curves import shapes
from simkvm.validate.hosts import data, host_of
from simkvm.validate.reclaim import RECLAIM
from simkvm.validate.row import PublishedRow, ShapeRow

if TYPE_CHECKING:
    from simkvm.study.progress import Progress
    from simkvm.study.result import Results

LIMIT_BYTES = 32 * SIZE_BYTES["GiB"]
"""Guest memory that a benchmark may fault in: some two minutes of simulation."""


def figures() -> list[Figure]:
    """The record (``data/published.csv``), in its order."""
    rows = csv.DictReader(data("published.csv").splitlines())
    return [
        Figure(
            id=row["id"],
            message_id=row["message_id"],
            date=row["date"],
            workload=row["workload"],
            params=row["params"],
            metric=row["metric"],
            unit=row["unit"],
            arm=row["arm"],
            value=float(row["value"]),
            note=row["note"],
        )
        for row in rows
    ]


def benchmark_of(figure: Figure) -> Benchmark | None:
    """Which benchmark shows a figure; None if none does."""
    for pattern, benchmark in {**BENCHMARKS, **RECLAIM}.items():
        if fnmatchcase(figure.id, pattern):
            return benchmark
    return None


def rows(
    only: str = "*",
    out: Path | str | None = None,
    jobs: int | None = None,
    limit_bytes: int = LIMIT_BYTES,
    progress: Progress | None = None,
) -> list[PublishedRow | ShapeRow]:
    """The rows whose id matches the glob ``only``, and the shapes of the curves that they make.

    ``jobs`` processes run the benchmarks; each may fault in ``limit_bytes`` of guest memory, and is
    scaled down beyond. Runs are kept in the store ``out``, if there is one, and not made again.
    Raises InputError if no row matches.
    """
    from simkvm.study.sweep import sweep

    chosen = _chosen(only)
    runs = {
        figure: benchmark.run(figure, host_of(figure.id), limit_bytes)
        for figure in chosen
        if (benchmark := benchmark_of(figure)) is not None
    }
    with tempfile.TemporaryDirectory() as aside:
        results = sweep(_study(runs.values()), out or aside, jobs, progress=progress)
        found = list(_rows(chosen, runs, results))
    return [*found, *shapes(found)]


def explanation(row: PublishedRow) -> str:
    """Why a row is missed, as far as that was found out (``data/misses.toml``)."""
    for entry in _misses():
        patterns = (entry["id"], entry.get("metric", "*"), entry.get("arm", "*"))
        if all(map(fnmatchcase, (row.id, row.metric, row.arm), patterns)):
            return " ".join(entry["why"].split())
    return "not explained"


@cache
def _misses() -> list[dict[str, str]]:
    return list(tomllib.loads(data("misses.toml"))["miss"])


def _chosen(only: str) -> list[Figure]:
    ours = [f for f in figures() if benchmark_of(f) is not None or f.id in UNANSWERED]
    chosen = [figure for figure in ours if fnmatchcase(figure.id, only)]
    if not chosen:
        ids = list(dict.fromkeys(figure.id for figure in ours))
        raise InputError(f"no row matches '{only}'", key="--only", hint=nearest(only, ids))
    return chosen


def _key(run: Run) -> str:
    from simkvm.study.point import key_of

    return key_of(run.scenario)


def _study(runs: Iterable[Run]) -> Study:
    """One study of all runs; figures of the same run share its point."""
    by_key = {_key(run): run for run in runs}
    points = tuple(Point(run.scenario, {"figure": run.scenario.name}) for run in by_key.values())
    return Study("published", "validate-published", points, ("figure",))


def _rows(
    chosen: Sequence[Figure], runs: Mapping[Figure, Run], results: Results
) -> Iterator[PublishedRow]:
    done = {str(result.certificate["key"]): result for result in results}
    failed = {failure["key"]: str(failure["reason"]) for failure in results.failed}
    for figure in chosen:
        run, benchmark = runs.get(figure), benchmark_of(figure)
        if run is None or benchmark is None:
            yield _row(figure, None, 1.0, UNANSWERED[figure.id])
        elif (result := done.get(_key(run))) is None:
            yield _row(figure, None, run.scale, failed.get(_key(run), "was not run"))
        else:
            row = _row(figure, benchmark.value(figure, result, run.scale), run.scale, figure.note)
            yield row if row.verdict == "inside" else replace(row, note=explanation(row))


def _row(figure: Figure, simulated: float | None, scale: float, note: str) -> PublishedRow:
    fit = host_of(figure.id).fitted_to(figure.id, figure.metric, figure.arm)
    return PublishedRow(
        id=figure.id,
        workload=figure.workload,
        params=figure.params,
        metric=figure.metric,
        arm=figure.arm,
        unit=figure.unit,
        measured=figure.value,
        simulated=simulated,
        role="fit" if fit else "predicted",
        source=figure.message_id,
        bound="more than" if figure.note == "more than" else "about",
        scale=scale,
        note=note,
    )
