"""Stand-ins for the simulation and for a task, importable by name from spawned workers.

What they are to do comes in a task's or a scenario's own name; what they did is left as files in a
folder, since a killed worker can return nothing.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import Executor, Future, ProcessPoolExecutor
from contextlib import contextmanager, suppress
from multiprocessing import get_context
from pathlib import Path
from typing import TYPE_CHECKING, Any

from simkvm.study.columns import COLUMNS

if TYPE_CHECKING:
    from simkvm.observe.record import Record

MARKS = "SIMKVM_TEST_MARKS"
"""Names the folder, for workers that inherit the environment."""


def mark(folder: Path, name: str) -> int:
    """Leave another file for `name`; how many there are now."""
    for count in range(1, 1000):
        try:
            (folder / f"{name}.{count}").touch(exist_ok=False)
        except FileExistsError:
            continue
        return count
    raise AssertionError("a thousand runs of one task")


def runs(folder: Path) -> dict[str, int]:
    """How often each name was run."""
    found: dict[str, int] = {}
    for path in sorted(folder.iterdir()):
        name = path.name.rpartition(".")[0]
        found[name] = found.get(name, 0) + 1
    return found


def act(folder: Path, name: str) -> str:
    """Do what the first word of `name` says."""
    deed, count = name.partition("-")[0], mark(folder, name)
    if deed == "poison" or (deed == "fragile" and count == 1):
        os.kill(os.getpid(), signal.SIGKILL)
    if deed == "broken":
        raise UnpicklableError(name, because="it says so")
    if deed == "patient":
        wait_for(folder / "go")
    if deed == "release":
        (folder / "go").touch()
    if deed == "interrupt":
        raise KeyboardInterrupt
    if deed == "leave":
        raise SystemExit(3)
    return name


class DiesOnce(ProcessPoolExecutor):
    """A pool in which the first task to finish takes its worker down before it can answer."""

    def submit(self, fn: Any, /, *args: Any, **kwargs: Any) -> Future[Any]:
        return super().submit(do_and_die_once, fn, *args, **kwargs)


def pool_that_dies_once(workers: int) -> Executor:
    """One process: else a neighbour's death would have a point in flight run twice."""
    return DiesOnce(min(1, workers), mp_context=get_context("spawn"))


class Wordless(ProcessPoolExecutor):
    """A pool in which Ctrl-C comes after the first task has finished and before it is told."""

    def submit(self, fn: Any, /, *args: Any, **kwargs: Any) -> Future[Any]:
        future = super().submit(fn, *args, **kwargs)
        if isinstance(future.result(), str):
            raise KeyboardInterrupt
        return future


def pool_that_is_interrupted(workers: int) -> Executor:
    """Processes started afresh, as the product's own."""
    return Wordless(workers, mp_context=get_context("spawn"))


def do_and_die_once(fn: Any, *args: Any, **kwargs: Any) -> Any:
    """Do it; if it stored a point and nobody has died of that yet, die."""
    folder = Path(os.environ[MARKS])
    result = fn(*args, **kwargs)
    if isinstance(result, str) and not (folder / "died after storing.1").exists():
        mark(folder, "died after storing")
        os.kill(os.getpid(), signal.SIGKILL)
    return result


def act_here(task: tuple[str, str]) -> str:
    """`act` with one argument, as the driver calls it."""
    return act(Path(task[0]), task[1])


class UnpicklableError(Exception):
    """Cannot be built again from its arguments, so a pool that sends it home breaks."""

    def __init__(self, name: str, *, because: str) -> None:
        super().__init__(f"{name}: {because}")


def wait_for(path: Path) -> None:
    """Until somebody makes the file; the test's own time limit is the only one."""
    while not path.exists():
        time.sleep(0.01)


def deaf(task: object) -> tuple[bool, bool]:
    """Whether this worker ignores Ctrl-C, and whether it has held it back from its first moment."""
    ignored = signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    return ignored, signal.SIGINT in signal.pthread_sigmask(signal.SIG_BLOCK, ())


@contextmanager
def session(script: Path, program: str, *arguments: object) -> Iterator[subprocess.Popen[str]]:
    """A program in a session of its own, so that it can be sent a terminal's Ctrl-C.

    Nobody of the session outlives the test, whatever the test finds.
    """
    script.write_text(program)
    path = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
    with subprocess.Popen(
        [sys.executable, str(script), *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        env={**os.environ, "PYTHONPATH": path},
    ) as process:
        try:
            yield process
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)


def simulate(scenario: Any, machine: Any, kernel: Any) -> Record:
    """A world that does what the scenario's description says; marks go where MARKS says."""
    name = f"{scenario.description}-{scenario.seed}-{scenario.replication}"
    act(Path(os.environ[MARKS]), name)
    return record(scenario.seed * 1000 + scenario.replication * 100 + len(kernel.name))


def record(number: int) -> Record:
    """A record whose every table and figure depends on `number` alone."""
    from simkvm.observe.record import Record

    tables: dict[str, dict[str, list[Any]]] = {
        name: {column: [_cell(column, number, row) for row in range(3)] for column in columns}
        for name, columns in COLUMNS.items()
    }
    tables["passes"] = {column: [] for column in COLUMNS["passes"]}
    return Record(
        summary={"sim_ns": number * 10**9, "touches_per_s": number / 7, "safety": "clean"},
        violations=[],
        fingerprint=f"{number:064x}",
        **tables,
    )


def _cell(column: str, number: int, row: int) -> Any:
    if column in {"guest", "lock", "site", "mode", "quantity", "name", "line"}:
        return f"{column}{row}"
    return (number + row) / 3 if "_mean" in column else number + row
