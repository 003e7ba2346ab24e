"""The runs behind a page: sweeps and analyses of shipped files, whose commands are noted.

A page reads the points that its own studies ask for, by their keys, so a store may hold older ones.
"""

from __future__ import annotations

import shlex
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from simkvm.scenario.load import load
from simkvm.study.progress import Progress
from simkvm.study.result import Result
from simkvm.study.sensitivity import Sensitivity, sensitivity
from simkvm.study.statistics import Interval, confidence_interval
from simkvm.study.store import Store
from simkvm.study.sweep import REPLICATION, plan, sweep

Place = tuple[tuple[str, str], ...]
"""Where a point lies: (key, value as written) of every axis but the replication, by key."""

Values = Mapping[int, float]
"""A figure of one point in each replication, by its number."""


class Unfinished(Exception):  # noqa: N818 (a state of a study)
    """A point that a page needs has no result."""


@dataclass
class Runs:
    """Runs studies from the folder `workloads` into stores below `store`.

    `reduced` shrinks every study to a size at which its page can be tested, not believed.
    `commands` are what was run, as one would type it.
    """

    workloads: Path = Path("workloads")
    store: Path = Path("results/answers")
    jobs: int | None = None
    replications: int = 5
    reduced: bool = False
    progress: Progress | None = None
    commands: list[str] = field(default_factory=list)

    def sweep(
        self,
        file: str,
        sets: Sequence[str] = (),
        *,
        small: Sequence[str] = (),
        name: str | None = None,
        replicated: bool = True,
    ) -> Points:
        """The points of a file with these settings; `small` are those that reduce it.

        `name` is that of the store, by default the file's. Raises Unfinished for a failed point.
        """
        path, out = self._paths(file, name)
        sets = [*sets, *(small if self.reduced else ())]
        times = self.replications if replicated else 1
        study = load(path, sets)
        sweep(study, out, self.jobs, times, progress=self.progress)
        options = ["--replications", str(times)] if times > 1 else []
        self._note("sweep", path, out, sets, options)
        store = Store(out)
        return Points([_finished(store, p.entry.key, p.entry.axes) for p in plan(study, times)])

    def sensitivity(
        self,
        file: str,
        metric: str,
        sets: Sequence[str] = (),
        *,
        over: str | None = None,
        small: Sequence[str] = (),
        parameters: Sequence[str] = (),
        replications: int = 1,
    ) -> Sensitivity:
        """What a metric of a file's points hangs on; reduced, only `parameters` are tried."""
        path, out = self._paths(file, f"{Path(file).stem}-sensitivity")
        sets = [*sets, *(small if self.reduced else ())]
        tried = parameters if self.reduced else ()
        found = sensitivity(
            load(path, sets),
            metric,
            out,
            self.jobs,
            over=over,
            parameters=tried,
            replications=replications,
            progress=self.progress,
        )
        options = ["--metric", metric, *(["--over", over] if over else [])]
        options += ["--replications", str(replications)] if replications > 1 else []
        self._note("sensitivity", path, out, sets, options)
        if found.failed:
            raise Unfinished(f"{out}: {found.failed[0]['reason']}")
        return found

    def _paths(self, file: str, name: str | None) -> tuple[Path, Path]:
        return self.workloads / file, self.store / (name or Path(file).stem)

    def _note(
        self, command: str, path: Path, out: Path, sets: Iterable[str], options: Iterable[str]
    ) -> None:
        words = [word for setting in sets for word in ("--set", setting)]
        self.commands.append(
            shlex.join(["simkvm", command, str(path), *words, *options, "--out", str(out)])
        )


def _finished(store: Store, key: str, axes: Mapping[str, Any]) -> Result:
    if key not in store:
        reason = (store.failure(key) or {}).get("reason", "has not been run")
        raise Unfinished(f"{store.root}: point {key}: {reason}")
    return Result.from_folder(store.folder(key), axes)


@dataclass(frozen=True)
class Points:
    """The finished points of a study, replications included, in its order."""

    results: Sequence[Result]

    def axis(self, key: str) -> list[Any]:
        """The values of one axis, in the order of the file; none if it was not swept."""
        return list(dict.fromkeys(r.axes[key] for r in self.results if key in r.axes))

    def values(self, figure: Callable[[Result], float]) -> dict[Place, dict[int, float]]:
        """A figure of every point, by its place and replication."""
        found: dict[Place, dict[int, float]] = {}
        for result in self.results:
            number = int(result.axes.get(REPLICATION, 0))
            found.setdefault(place(result.axes), {})[number] = figure(result)
        return found


def place(axes: Mapping[str, Any]) -> Place:
    """Where a point with these axes lies."""
    return tuple(sorted((key, str(value)) for key, value in axes.items() if key != REPLICATION))


def summary(name: str) -> Callable[[Result], float]:
    """The figure that is one column of the summary."""
    return lambda result: float(result.summary[name])


def interval(values: Values) -> Interval:
    """Mean over replications with its 95 % interval."""
    return confidence_interval([values[number] for number in sorted(values)])


def ratio(above: Values, below: Values) -> Interval:
    """Of two variants, with the same seed in each pair: both met the same draws."""
    return confidence_interval([above[number] / below[number] for number in sorted(above)])
