"""Does the driver lose nothing to dead workers, and leave nothing behind when it is stopped?"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from concurrent.futures import BrokenExecutor, CancelledError, Executor, Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import fake_world
import psutil  # type: ignore[import-untyped]
import pytest
from fake_world import act_here, runs

from simkvm.study import executor
from simkvm.study.executor import (
    MAX_KILLS,
    BackendLost,
    Drive,
    Failure,
    Interrupted,
    inline,
    process_pool,
)

Outcomes = dict[str, Any]


def drive(
    folder: Path, names: list[str], workers: int = 2, backend: Any = process_pool
) -> Outcomes:
    """Run the named tasks; what became of each."""
    outcomes: Outcomes = {}

    def settled(task: tuple[str, str], outcome: Any) -> None:
        assert task[1] not in outcomes, "settled twice"
        outcomes[task[1]] = outcome

    driver = Drive(act_here, settled, workers=workers, backend=backend)
    driver.run((str(folder), name) for name in names)
    assert not workers_of(os.getpid())
    return outcomes


def workers_of(pid: int) -> list[psutil.Process]:
    """Living children of a process that a pool started."""
    return [
        child
        for child in psutil.Process(pid).children(recursive=True)
        if "spawn_main" in " ".join(child.cmdline())
    ]


@pytest.mark.parametrize("backend", [inline, process_pool, ThreadPoolExecutor])
def test_every_task_settles_once(tmp_path: Path, backend: Any) -> None:
    names = [f"good-{i}" for i in range(8)]
    assert drive(tmp_path, names, backend=backend) == {name: name for name in names}
    assert runs(tmp_path) == dict.fromkeys(names, 1)


@pytest.mark.parametrize("backend", [inline, process_pool])
def test_what_a_task_raises_is_its_own_failure(tmp_path: Path, backend: Any) -> None:
    """Once, and without breaking the pool, although the exception does not survive pickling."""
    outcomes = drive(tmp_path, ["good-1", "broken-2", "good-3"], backend=backend)
    assert outcomes["broken-2"] == Failure(
        "UnpicklableError: broken-2: it says so", 1, outcomes["broken-2"].where
    )
    assert [call.rpartition(":")[0] for call in outcomes["broken-2"].where] == [
        "fake_world.act_here",
        "fake_world.act",
    ]
    assert outcomes["good-1"] == "good-1"
    assert outcomes["good-3"] == "good-3"
    assert runs(tmp_path)["broken-2"] == 1


def test_a_worker_that_leaves_is_a_failure(tmp_path: Path) -> None:
    outcomes = drive(tmp_path, ["leave-1", "good-2"])
    assert outcomes["leave-1"].reason == "SystemExit: 3"
    assert outcomes["good-2"] == "good-2"


def test_killed_workers_cost_no_task(tmp_path: Path) -> None:
    names = [f"{'fragile' if i % 3 == 1 else 'good'}-{i}" for i in range(9)]
    assert drive(tmp_path, names) == {name: name for name in names}


def test_a_task_that_always_kills_is_given_up(tmp_path: Path) -> None:
    names = ["good-1", "poison-2", "good-3", "good-4", "good-5"]
    outcomes = drive(tmp_path, names)
    assert outcomes.pop("poison-2") == Failure("its worker process died every time", MAX_KILLS)
    assert outcomes == {name: name for name in names if name != "poison-2"}
    assert runs(tmp_path)["poison-2"] == MAX_KILLS


def test_two_poisons_do_not_take_a_neighbour_along(tmp_path: Path) -> None:
    """All three are in flight together; only alone can the innocent one be told apart."""
    outcomes = drive(tmp_path, ["poison-1", "good-2", "poison-3"])
    assert outcomes["good-2"] == "good-2"
    assert [outcomes[name].attempts for name in ("poison-1", "poison-3")] == [MAX_KILLS] * 2


def test_few_tasks_are_in_flight(tmp_path: Path) -> None:
    taken = 0
    settled = 0

    def tasks() -> Any:
        nonlocal taken
        for i in range(20):
            taken += 1
            assert taken - settled <= 3
            yield (str(tmp_path), f"good-{i}")

    def count(task: Any, outcome: Any) -> None:
        nonlocal settled
        settled += 1

    Drive(act_here, count, workers=2).run(tasks())
    assert settled == 20


def test_a_task_that_cannot_travel_fails_alone(tmp_path: Path) -> None:
    outcomes: list[Any] = []
    task: Any = (str(tmp_path), lambda: None)
    Drive(act_here, lambda _, outcome: outcomes.append(outcome), workers=2).run([task])
    assert isinstance(outcomes[0], Failure)


class Cancelling(Executor):
    """Answers once, then drops everything, as a cluster does whose scheduler has died."""

    def __init__(self, workers: int) -> None:
        self.submitted = 0

    def submit(self, fn: Any, /, *args: Any, **kwargs: Any) -> Future[Any]:
        self.submitted += 1
        future: Future[Any] = Future()
        if self.submitted == 1:
            future.set_result(fn(*args))
        else:
            future.set_exception(CancelledError())
        return future


def test_a_lost_backend_stops_the_drive(tmp_path: Path) -> None:
    pool = Cancelling(2)
    with pytest.raises(BackendLost, match="dropped its tasks"):
        drive(tmp_path, [f"good-{i}" for i in range(50)], backend=lambda _: pool)
    assert pool.submitted <= 1 + 3
    assert not runs(tmp_path)


class FoundDead(ThreadPoolExecutor):
    """Its workers die while nothing is in flight: only the third submission finds that out."""

    submitted = 0

    def submit(self, fn: Any, /, *args: Any, **kwargs: Any) -> Future[Any]:
        self.submitted += 1
        if self.submitted == 3:
            raise BrokenExecutor
        return super().submit(fn, *args, **kwargs)


def test_a_pool_found_dead_on_submission_loses_no_task(tmp_path: Path) -> None:
    names = [f"good-{i}" for i in range(5)]
    assert drive(tmp_path, names, backend=FoundDead) == {name: name for name in names}
    assert runs(tmp_path) == dict.fromkeys(names, 1)


class Mute(ThreadPoolExecutor):
    """Dies without a word to whoever waits, once."""

    _broken: Any = False
    born = 0

    def __init__(self, workers: int) -> None:
        super().__init__(workers)
        Mute.born += 1

    def submit(self, fn: Any, /, *args: Any, **kwargs: Any) -> Future[Any]:
        if Mute.born > 1 or fn is os.getpid:
            return super().submit(fn, *args, **kwargs)
        self._broken = "dead"
        return Future()


def test_a_dead_pool_that_says_nothing_loses_no_task(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Mute, "born", 0)
    monkeypatch.setattr(executor, "TICK_S", 0.01)
    monkeypatch.setattr(executor, "LAST_WORDS_S", 0.01)
    names = [f"good-{i}" for i in range(5)]
    assert drive(tmp_path, names, backend=Mute) == {name: name for name in names}
    assert Mute.born == 2


def test_all_workers_are_there_before_the_first_task() -> None:
    """None that is still on its way can take a task from a pool that has been given up."""
    with process_pool(3) as pool:
        pool.submit(os.getpid)
        assert len(workers_of(os.getpid())) == 3


def test_workers_that_cannot_start_are_said_so(tmp_path: Path) -> None:
    """A script without a main guard: each worker would start the sweep again."""
    script = tmp_path / "script.py"
    script.write_text(
        "from simkvm.study.executor import Drive\nDrive(print, print, workers=2).run(range(100))\n"
    )
    done = subprocess.run(
        [sys.executable, str(script)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    # On a busy machine Python's own resource tracker may have a last word.
    told = [line for line in done.stderr.splitlines() if "resource_tracker" not in line]
    assert "__main__" in "".join(told[-1:])
    assert done.stderr.count("executor.BackendLost: ") == 1


PROGRAM = """
import sys
from pathlib import Path
from fake_world import act_here
from simkvm.study.executor import Drive, Interrupted

if __name__ == "__main__":
    names = sys.argv[2:]
    try:
        Drive(act_here, lambda task, outcome: print(outcome, flush=True), workers=2).run(
            [(sys.argv[1], name) for name in names]
        )
    except Interrupted:
        sys.exit(130)
"""


@pytest.mark.parametrize("everybody", [True, False])
def test_ctrl_c_stops_at_once_and_leaves_nobody(tmp_path: Path, everybody: bool) -> None:
    """Both as a terminal sends it, to every process, and to the driver alone."""
    folder = tmp_path / "marks"
    folder.mkdir()
    names = ["good-1", "patient-2", "patient-3", "good-4"]
    with fake_world.session(tmp_path / "program.py", PROGRAM, folder, *names) as program:
        fake_world.wait_for(folder / "patient-2.1")
        fake_world.wait_for(folder / "patient-3.1")
        workers = workers_of(program.pid)
        assert workers
        (os.killpg if everybody else os.kill)(program.pid, signal.SIGINT)
        out, err = program.communicate()
        assert not [worker for worker in workers if worker.is_running()]
    assert program.returncode == 130
    assert out == "good-1\n"
    assert err == ""


def test_workers_go_when_the_driver_is_killed(tmp_path: Path) -> None:
    folder = tmp_path / "marks"
    folder.mkdir()
    names = ["patient-1", "patient-2"]
    with fake_world.session(tmp_path / "program.py", PROGRAM, folder, *names) as program:
        fake_world.wait_for(folder / "patient-1.1")
        workers = workers_of(program.pid)
        assert workers
        program.kill()
        assert psutil.wait_procs(workers, timeout=60)[1] == []


def test_workers_are_deaf_to_ctrl_c() -> None:
    """From their first moment, by what they inherit; and for good, by what they set."""
    outcomes: list[Any] = []
    Drive(fake_world.deaf, lambda _, outcome: outcomes.append(outcome), workers=2).run(range(4))
    assert outcomes == [(True, True)] * 4
    assert fake_world.deaf(None) == (False, False)


def test_interrupted_passes_an_except_exception() -> None:
    """Nothing that catches errors on its way may take it for one."""
    assert not issubclass(Interrupted, Exception)
