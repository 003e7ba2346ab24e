"""Every published figure of the record, its benchmark run again in the model.

Rows about reclaim (V2) wait until the model reclaims.
"""

from __future__ import annotations

import csv
import tempfile
from collections.abc import Iterator, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING

from simkvm.scenario.load import Point, Study
from simkvm.units import SIZE_BYTES
from simkvm.validate.benchmarks import BENCHMARKS, Benchmark, Figure, Run
from simkvm.validate.hosts import data, host_of
from simkvm.validate.row import PublishedRow

if TYPE_CHECKING:
    from simkvm.study.progress import Progress
    from simkvm.study.result import Result, Results

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
    """Which benchmark shows a figure; None if none does yet."""
    for pattern, benchmark in BENCHMARKS.items():
        if fnmatchcase(figure.id, pattern):
            return benchmark
    return None


def rows(
    only: str = "*",
    out: Path | str | None = None,
    jobs: int | None = None,
    limit_bytes: int = LIMIT_BYTES,
    progress: Progress | None = None,
) -> list[PublishedRow]:
    """The rows whose id matches the glob ``only``, their runs kept in the store ``out``.

    ``jobs`` processes run them; ``limit_bytes`` says how much guest memory one may fault in, beyond
    which it is scaled down. With a store, a second call runs only what is missing.
    """
    from simkvm.study.sweep import sweep

    chosen = [
        (figure, benchmark)
        for figure in figures()
        if fnmatchcase(figure.id, only) and (benchmark := benchmark_of(figure)) is not None
    ]
    runs = [benchmark.run(figure, host_of(figure.id), limit_bytes) for figure, benchmark in chosen]
    with tempfile.TemporaryDirectory() as aside:
        results = sweep(_study(runs), out or aside, jobs, progress=progress)
        by_key = {str(result.certificate["key"]): result for result in results}
        return [
            _row(figure, benchmark, run, by_key.get(_key(run)), results)
            for (figure, benchmark), run in zip(chosen, runs, strict=True)
        ]


def _key(run: Run) -> str:
    from simkvm.study.point import key_of

    return key_of(run.scenario)


def _study(runs: Sequence[Run]) -> Study:
    """One study of all runs; figures of the same run share its point."""
    by_key = {_key(run): run for run in runs}
    points = tuple(Point(run.scenario, {"figure": run.scenario.name}) for run in by_key.values())
    return Study("published", "validate-published", points, ("figure",))


def _row(
    figure: Figure, benchmark: Benchmark, run: Run, result: Result | None, results: Results
) -> PublishedRow:
    host = host_of(figure.id)
    fit = host.fitted_to(figure.id, figure.metric, figure.arm)
    note = figure.note
    simulated = None
    if result is None:
        failures = [f["reason"] for f in results.failed if f["key"] == _key(run)]
        note = "; ".join(failures) or "has no result"
    else:
        simulated = benchmark.value(figure, result, run.scale)
    return PublishedRow(
        id=figure.id,
        about=f"{figure.metric}, {figure.arm}",
        unit=figure.unit,
        measured=figure.value,
        simulated=simulated,
        role="fit" if fit else "predicted",
        source=figure.message_id,
        bound="more than" if figure.note == "more than" else "about",
        scale=run.scale,
        note=note,
    )


def iterate() -> Iterator[PublishedRow]:
    """The rows, as the other two kinds give them."""
    yield from rows()
