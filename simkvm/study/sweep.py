"""A study, point by point: what is in the store stays, what is missing is run, in any number of
processes, and the rows come out in the order of the file.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from simkvm.scenario.errors import InputError
from simkvm.study.executor import Backend, Drive, Failure, Interrupted, inline, process_pool
from simkvm.study.point import SIMULATE, key_of, measure
from simkvm.study.progress import Progress, automatic
from simkvm.study.result import Results
from simkvm.study.store import Entry, Store

if TYPE_CHECKING:
    from simkvm.scenario.load import Study
    from simkvm.scenario.schema import Scenario

REPLICATION = "replication"


@dataclass(frozen=True)
class Planned:
    """A point that a sweep is to have: its scenario and its row."""

    scenario: Scenario
    entry: Entry


def sweep(
    study: Study,
    out: str | os.PathLike[str],
    jobs: int | None = None,
    replications: int = 1,
    *,
    progress: Progress | None = None,
    shard: tuple[int, int] | None = None,
    backend: Backend | None = None,
    simulate: str = SIMULATE,
) -> Results:
    """Run what the store in the folder `out` lacks of a study, and open the store.

    `jobs` worker processes are used: one for each CPU by default, and 1 means this process itself.
    With `replications` above 1 every point is run that often, from its own replication number on,
    and `replication` becomes the last axis. `shard` = (i, n) runs only the points i, i + n, i + 2n
    ... of the study, but asks for all, so that shards on several machines share a folder.
    `progress` is told how far it is; by default a bar, or lines in a log, on stderr. `backend`
    makes the workers, by default processes here; `simulate` names the simulation.

    A point that cannot be run is recorded as failed and does not stop the others; running the same
    study again tries it again. Raises InputError for what cannot be a sweep or where it cannot be
    written, Interrupted on Ctrl-C, and BackendLost if the workers are gone; whatever was finished
    is kept.
    """
    workers = _checked(jobs, shard)
    planned = list(plan(study, replications))
    store = Store(out)
    store.sweep_stale()
    store.extend_manifest(
        study.name, _axes(study, replications), [point.entry for point in planned]
    )
    index, shards = shard or (0, 1)
    mine = {point.entry.key: point for point in planned[index::shards]}
    work = partial(_finish, str(store.root), simulate)
    run = _Run(store, progress or automatic(), total=len(mine))
    run.go(mine, work, workers, backend or (inline if workers == 1 else process_pool))
    return Results(out)


def plan(study: Study, replications: int = 1) -> Iterator[Planned]:
    """The points of a study in the order of its file, each with its replications together.

    Raises InputError if there is nothing to replicate that way.
    """
    if replications < 1:
        raise InputError(f"expected at least 1, not {replications}", key="replications")
    if replications > 1 and REPLICATION in study.axes:
        message = "the file already sweeps the replication; leave replications at 1"
        raise InputError(message, file=study.path, key=REPLICATION)
    for point in study.points:
        if replications == 1:
            yield _planned(point.scenario, point.axes)
            continue
        for number in range(replications):
            again = point.scenario.replication + number
            scenario = point.scenario.model_copy(update={REPLICATION: again})
            yield _planned(scenario, {**point.axes, REPLICATION: again})


@dataclass
class _Run:
    """The part of a sweep in which time passes: what it counts, tells and records."""

    store: Store
    progress: Progress
    total: int
    done: int = 0

    def go(
        self,
        mine: Mapping[str, Planned],
        work: Callable[[Planned], str],
        workers: int,
        backend: Backend,
    ) -> None:
        missing = [point for key, point in mine.items() if self.store.document(key) is None]
        self.done = self.total - len(missing)
        self.progress.start(self.total, self.done)
        try:
            if missing:
                workers = min(workers, len(missing))
                tick = self.progress.tick
                Drive(work, self._settled, workers=workers, backend=backend, tick=tick).run(missing)
        except KeyboardInterrupt:
            # from the store: a worker may have finished a point and not come to say so
            done = sum(key in self.store for key in mine)
            raise Interrupted(done, self.total) from None
        finally:
            self.progress.stop()
            self.store.sweep_stale()  # of workers that were killed

    def _settled(self, point: Planned, outcome: str | Failure) -> None:
        failed = isinstance(outcome, Failure)
        if isinstance(outcome, Failure):
            key = point.entry.key
            self.store.fail(key, outcome.reason, outcome.attempts, outcome.where)
        self.done += not failed
        self.progress.point(failed)


def _finish(root: str, simulate: str, point: Planned) -> str:
    """Run a point into the store, in a worker; its key. Not again if somebody has meanwhile, or if
    this is a second try and the first worker died only after it had finished.
    """
    store, key = Store(root), point.entry.key
    if key not in store:
        record, certificate = measure(point.scenario, point.entry.axes, simulate)
        store.write(key, record, certificate)
    return key


def _planned(scenario: Scenario, axes: dict[str, Any]) -> Planned:
    return Planned(scenario, Entry(key_of(scenario), axes))


def _axes(study: Study, replications: int) -> tuple[str, ...]:
    return (*study.axes, REPLICATION) if replications > 1 else study.axes


def _checked(jobs: int | None, shard: tuple[int, int] | None) -> int:
    if jobs is not None and jobs < 1:
        raise InputError(f"expected at least 1, not {jobs}", key="jobs")
    if shard is not None and not 0 <= shard[0] < shard[1]:
        message = f"expected I/N with I from 0 to N - 1, not {shard[0]}/{shard[1]}"
        raise InputError(message, key="shard")
    return jobs or len(os.sched_getaffinity(0))
