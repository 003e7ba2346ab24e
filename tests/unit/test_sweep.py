"""Does a sweep run what is missing, only that, and give the same rows however it is run?"""

from __future__ import annotations

import io
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import fake_world
import pandas as pd
import psutil  # type: ignore[import-untyped]
import pytest

from simkvm.guest.trace import assemble, write_trace
from simkvm.scenario.errors import InputError
from simkvm.scenario.load import MODEL_VERSION, Study, load
from simkvm.study import verify as verify_module
from simkvm.study.executor import MAX_KILLS, Interrupted
from simkvm.study.point import certificate, key_of, measure, run_point
from simkvm.study.progress import Bar, Lines, Notebook, Silent, automatic
from simkvm.study.result import Result, Results
from simkvm.study.store import Damaged
from simkvm.study.sweep import plan, sweep
from simkvm.study.verify import verify

SIMULATE = "fake_world:simulate"
MACHINE = "ampere-altra-80c"


@pytest.fixture
def marks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "marks"
    folder.mkdir()
    monkeypatch.setenv(fake_world.MARKS, str(folder))
    return folder


def write(tmp_path: Path, description: Any = "good", **keys: Any) -> Path:
    """A scenario file that sweeps every key that is given as a list."""
    document = {
        "name": "small",
        "description": description,
        "machine": MACHINE,
        "kernel": "linux-7.1",
        "duration": "1 ms",
        "guests": {"vm0": {"memory": "64 MiB", "access": {"pattern": "uniform"}}},
        **keys,
    }
    path = tmp_path / "small.yaml"
    path.write_text(json.dumps(document))
    return path


def study(tmp_path: Path, description: Any = "good", **keys: Any) -> Study:
    return load(write(tmp_path, description, **keys))


def run(wanted: Study, out: Path, jobs: int = 1, **options: Any) -> Results:
    return sweep(wanted, out, jobs=jobs, progress=Silent(), simulate=SIMULATE, **options)


KERNELS = ["linux-7.1", "linux-6.12", "linux-7.1-lockless"]


def test_serial_and_parallel_are_the_same(tmp_path: Path, marks: Path) -> None:
    wanted = study(tmp_path, kernel=KERNELS, seed=[3, 1])
    serial = run(wanted, tmp_path / "serial", jobs=1)
    parallel = run(wanted, tmp_path / "parallel", jobs=2)
    pd.testing.assert_frame_equal(serial.summary, parallel.summary)
    pd.testing.assert_frame_equal(serial.locks, parallel.locks)
    assert [r.fingerprint for r in serial] == [r.fingerprint for r in parallel]
    assert list(serial.summary["kernel"]) == [k for k in KERNELS for _ in range(2)]
    assert list(serial.summary["seed"]) == [3, 1] * 3
    assert len({result.fingerprint for result in serial}) == 6


def test_rows_do_not_follow_who_finishes_first(tmp_path: Path, marks: Path) -> None:
    """The first point waits for a file that the last one leaves."""
    wanted = study(tmp_path, ["patient", "good", "release"])
    results = run(wanted, tmp_path / "out", jobs=2)
    finished = [r.certificate["axes"]["description"] for r in results]
    assert finished == list(results.summary["description"]) == ["patient", "good", "release"]


def test_a_second_run_runs_nothing(tmp_path: Path, marks: Path) -> None:
    wanted = study(tmp_path, seed=[1, 2, 3])
    first = run(wanted, tmp_path / "out")
    again = run(wanted, tmp_path / "out", jobs=2)
    assert set(fake_world.runs(marks).values()) == {1}
    pd.testing.assert_frame_equal(first.summary, again.summary)


def test_only_what_is_missing_is_run(tmp_path: Path, marks: Path) -> None:
    wanted = study(tmp_path, seed=[1, 2, 3])
    results = run(wanted, tmp_path / "out")
    damaged = results.store.folder(key_of(wanted.points[1].scenario)) / "point.json"
    damaged.write_text("{")
    assert list(Results(tmp_path / "out").summary["status"]) == ["done", "missing", "done"]
    again = run(wanted, tmp_path / "out")
    assert fake_world.runs(marks) == {"good-1-0": 1, "good-2-0": 2, "good-3-0": 1}
    pd.testing.assert_frame_equal(results.summary, again.summary)


def test_a_folder_may_grow_by_another_study(tmp_path: Path, marks: Path) -> None:
    run(study(tmp_path, seed=[2, 1]), tmp_path / "out")
    results = run(study(tmp_path, seed=[1, 5, 2], kernel=KERNELS[:2]), tmp_path / "out")
    rows = results.summary[["seed", "kernel"]].itertuples(index=False)
    assert [tuple(row) for row in rows] == [
        (2, "linux-7.1"),
        (1, "linux-7.1"),
        (5, "linux-7.1"),
        (1, "linux-6.12"),
        (5, "linux-6.12"),
        (2, "linux-6.12"),
    ]
    assert fake_world.runs(marks) == {f"good-{seed}-0": 2 for seed in (1, 2, 5)}  # two kernels
    assert set(results.summary["status"]) == {"done"}


def test_replications_are_points_with_a_number(tmp_path: Path, marks: Path) -> None:
    wanted = study(tmp_path, seed=[7, 8])
    run(wanted, tmp_path / "out")
    results = run(wanted, tmp_path / "out", replications=3)
    assert list(results.manifest.axes) == ["seed", "replication"]
    rows = sorted(zip(results.summary["seed"], results.summary["replication"], strict=True))
    assert rows == [(seed, number) for seed in (7, 8) for number in range(3)]
    assert set(fake_world.runs(marks).values()) == {1}
    assert [r.scenario["replication"] for r in results] == list(results.summary["replication"])


def test_replications_start_where_the_file_says(tmp_path: Path) -> None:
    planned = list(plan(study(tmp_path, replication=4), 2))
    assert [point.scenario.replication for point in planned] == [4, 5]
    assert [point.entry.axes for point in planned] == [{"replication": 4}, {"replication": 5}]


def test_shards_share_a_folder(tmp_path: Path, marks: Path) -> None:
    wanted = study(tmp_path, seed=[1, 2, 3, 4, 5])
    partly = run(wanted, tmp_path / "out", shard=(1, 2))
    assert list(partly.summary["status"]) == ["missing", "done", "missing", "done", "missing"]
    whole = run(wanted, tmp_path / "out", shard=(0, 2))
    assert list(whole.summary["seed"]) == [1, 2, 3, 4, 5]
    assert set(whole.summary["status"]) == {"done"}
    assert set(fake_world.runs(marks).values()) == {1}


@pytest.mark.parametrize(
    ("options", "key"),
    [
        ({"replications": 0}, "replications"),
        ({"jobs": 0}, "jobs"),
        ({"shard": (2, 2)}, "shard"),
        ({"shard": (-1, 2)}, "shard"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_written(
    tmp_path: Path, options: dict[str, Any], key: str
) -> None:
    with pytest.raises(InputError) as refusal:
        run(study(tmp_path), tmp_path / "out", **options)
    assert refusal.value.key == key
    assert not (tmp_path / "out").exists()


def test_replications_of_a_sweep_over_replications_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="already sweeps the replication"):
        list(plan(study(tmp_path, replication=[0, 1]), 2))


@pytest.mark.parametrize("jobs", [1, 2])
def test_a_failed_point_is_a_row_and_is_tried_again(tmp_path: Path, marks: Path, jobs: int) -> None:
    wanted = study(tmp_path, ["good", "broken"])
    results = run(wanted, tmp_path / "out", jobs=jobs)
    assert list(results.summary["status"]) == ["done", "failed"]
    (failure,) = results.failed
    assert failure["reason"] == "UnpicklableError: broken-1-0: it says so"
    assert failure["attempts"] == 1
    assert failure["axes"] == {"description": "broken"}
    assert failure["where"][-1].startswith("fake_world.act:")
    run(wanted, tmp_path / "out", jobs=jobs)
    assert fake_world.runs(marks) == {"good-1-0": 1, "broken-1-0": 2}


def test_killed_workers_lose_no_point(tmp_path: Path, marks: Path) -> None:
    """Points that finished before a neighbour died are not run again."""
    wanted = study(tmp_path, ["good", "fragile"], seed=[1, 2, 3])
    results = run(wanted, tmp_path / "out", jobs=2)
    assert set(results.summary["status"]) == {"done"}
    assert all(fake_world.runs(marks)[f"fragile-{seed}-0"] == 2 for seed in (1, 2, 3))
    assert not list((tmp_path / "out" / "points").glob(".tmp-*"))


def test_a_worker_that_dies_after_its_point_is_stored_runs_it_once(
    tmp_path: Path, marks: Path
) -> None:
    """The death is between the rename and the answer; the second worker finds the point there."""
    wanted = study(tmp_path, "good", seed=[1, 2])
    results = run(wanted, tmp_path / "out", jobs=2, backend=fake_world.pool_that_dies_once)
    assert set(results.summary["status"]) == {"done"}
    assert (marks / "died after storing.1").exists()
    assert fake_world.runs(marks)["good-1-0"] == 1


def test_a_poison_point_fails_and_the_others_finish(tmp_path: Path, marks: Path) -> None:
    wanted = study(tmp_path, ["good", "poison", "good-too"])
    results = run(wanted, tmp_path / "out", jobs=2)
    assert list(results.summary["status"]) == ["done", "failed", "done"]
    assert results.failed[0]["attempts"] == MAX_KILLS
    assert fake_world.runs(marks)["poison-1-0"] == MAX_KILLS


PROGRAM = """
import sys
from pathlib import Path
from simkvm.scenario.load import load
from simkvm.study.executor import Interrupted
from simkvm.study.sweep import sweep

if __name__ == "__main__":
    try:
        sweep(load(sys.argv[1]), sys.argv[2], jobs=int(sys.argv[3]), simulate="fake_world:simulate")
    except Interrupted as interruption:
        print(interruption.done, interruption.total)
        sys.exit(130)
"""


@pytest.mark.parametrize("jobs", [1, 2])
def test_ctrl_c_keeps_what_was_finished(tmp_path: Path, marks: Path, jobs: int) -> None:
    path = write(tmp_path, ["good", "patient"], seed=[1, 2, 3, 4])
    arguments = (path, tmp_path / "out", jobs)
    with fake_world.session(tmp_path / "program.py", PROGRAM, *arguments) as program:
        for job in range(1, jobs + 1):
            fake_world.wait_for(marks / f"patient-{job}-0.1")
        started = psutil.Process(program.pid).children(recursive=True)
        os.killpg(program.pid, signal.SIGINT)
        out, err = program.communicate()
        assert psutil.wait_procs(started, timeout=60)[1] == []
    assert program.returncode == 130
    assert out == "4 8\n"
    assert "Traceback" not in err
    stopped = Results(tmp_path / "out")
    assert list(stopped.summary["status"]) == ["done"] * 4 + ["missing"] * 4
    before = {key: result.certificate for key, result in enumerate(stopped)}
    (marks / "go").touch()
    resumed = run(load(path), tmp_path / "out")
    assert set(resumed.summary["status"]) == {"done"}
    assert not list((tmp_path / "out" / "points").glob(".tmp-*"))
    assert [resumed[key].certificate for key in before] == list(before.values())
    counts = fake_world.runs(marks)
    assert {name: counts[name] for name in counts if name.startswith("good")} == {
        f"good-{seed}-0": 1 for seed in (1, 2, 3, 4)
    }


def test_ctrl_c_counts_what_is_kept_not_what_was_told(tmp_path: Path, marks: Path) -> None:
    """A worker that has stored its point may not have come to say so before the Ctrl-C."""
    wanted = study(tmp_path, ["good", "good-too"])
    with pytest.raises(Interrupted) as interruption:
        run(wanted, tmp_path / "out", jobs=2, backend=fake_world.pool_that_is_interrupted)
    assert (interruption.value.done, interruption.value.total) == (1, 2)
    assert list(Results(tmp_path / "out").summary["status"]) == ["done", "missing"]


class Told(Silent):
    """Remembers what a sweep told it."""

    def __init__(self) -> None:
        self.said: list[Any] = []

    def start(self, total: int, done: int) -> None:
        self.said.append((total, done))

    def point(self, failed: bool) -> None:
        self.said.append(failed)

    def stop(self) -> None:
        self.said.append("stop")


def test_progress_is_told_of_every_point(tmp_path: Path, marks: Path) -> None:
    told = Told()
    run(study(tmp_path, "good", seed=[1]), tmp_path / "out")
    wanted = study(tmp_path, ["good", "broken"], seed=[1, 2])
    sweep(wanted, tmp_path / "out", jobs=1, progress=told, simulate=SIMULATE)
    assert told.said == [(4, 1), False, True, True, "stop"]


def test_what_the_dead_left_is_gone_before_anything_is_run(tmp_path: Path, marks: Path) -> None:
    stale = tmp_path / "out" / "points" / f".tmp-{2**22 + 1}-ab"
    stale.mkdir(parents=True)

    class Looks(Silent):
        def start(self, total: int, done: int) -> None:
            assert not stale.exists()

    sweep(study(tmp_path), tmp_path / "out", jobs=1, progress=Looks(), simulate=SIMULATE)


def test_an_interruption_counts_what_is_in_the_store(tmp_path: Path, marks: Path) -> None:
    told = Told()
    wanted = study(tmp_path, ["good", "broken", "interrupt", "good-too"])
    with pytest.raises(Interrupted) as interruption:
        sweep(wanted, tmp_path / "out", jobs=1, progress=told, simulate=SIMULATE)
    assert (interruption.value.done, interruption.value.total) == (1, 4)
    assert told.said == [(4, 0), False, True, "stop"]


def test_a_log_gets_a_line_now_and_then() -> None:
    lines: list[str] = []
    now = [0.0]
    progress = Lines(lines.append, every_s=10, clock=lambda: now[0])
    progress.start(total=6, done=2)
    for at_s, failed in ((4, False), (9, True), (12, False)):
        now[0] = at_s
        progress.point(failed)
    now[0] = 13
    progress.tick()
    now[0] = 22
    progress.tick()
    progress.point(failed=False)
    progress.stop()
    assert lines == [
        "5/6 points, 1 failed, 4 s a point, 4 s left",
        "6/6 points, 1 failed, 5.5 s a point",
    ]


def test_without_news_a_log_gets_a_line_a_minute() -> None:
    lines: list[str] = []
    now = [0.0]
    progress = Lines(lines.append, clock=lambda: now[0])
    progress.start(total=4, done=0)
    for at_s in range(1, 140):
        now[0] = at_s
        progress.tick()
    assert lines == ["0/4 points"] * 3


def test_a_log_is_what_a_sweep_writes_without_a_terminal(
    tmp_path: Path, marks: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sweep(study(tmp_path, "good", seed=[1, 2]), tmp_path / "out", jobs=1, simulate=SIMULATE)
    output = capsys.readouterr()
    assert output.out == ""
    assert re.fullmatch(r"simkvm: 2/2 points, .* a point\n", output.err)


@pytest.mark.parametrize(
    ("terminal", "notebook", "sink"),
    [(False, False, Lines), (True, False, Bar), (False, True, Notebook), (True, True, Notebook)],
)
def test_the_sink_suits_where_stderr_goes(
    monkeypatch: pytest.MonkeyPatch, terminal: bool, notebook: bool, sink: type
) -> None:
    stream = io.StringIO()
    monkeypatch.setattr(stream, "isatty", lambda: terminal, raising=False)
    shell = SimpleNamespace(kernel=1) if notebook else SimpleNamespace()
    monkeypatch.setitem(sys.modules, "IPython", SimpleNamespace(get_ipython=lambda: shell))
    assert type(automatic(stream)) is sink


def test_a_notebook_gets_one_line_that_is_renewed(monkeypatch: pytest.MonkeyPatch) -> None:
    shown: list[str] = []
    handle = SimpleNamespace(update=lambda bundle, raw: shown.append(bundle["text/plain"]))

    def display(bundle: dict[str, str], raw: bool, display_id: bool) -> Any:
        shown.append("new: " + bundle["text/plain"])
        return handle

    monkeypatch.setitem(
        sys.modules, "IPython", SimpleNamespace(display=SimpleNamespace(display=display))
    )
    monkeypatch.setitem(sys.modules, "IPython.display", SimpleNamespace(display=display))
    progress = Notebook()
    progress.start(total=2, done=2)
    progress.stop()
    progress.stop()
    assert shown == ["new: 2/2 points", "2/2 points"]


def test_a_bar_counts_points_and_failures(capsys: pytest.CaptureFixture[str]) -> None:
    bar = Bar()
    bar.start(total=3, done=1)
    bar.point(failed=True)
    bar.point(failed=False)
    bar.tick()
    bar.stop()
    output = capsys.readouterr()
    assert output.out == ""
    assert re.search(r"3/3 points, 1 failed", output.err)


def texts(value: Any) -> Sequence[str]:
    """Every text in a JSON document."""
    if isinstance(value, dict):
        return [text for pair in value.items() for part in pair for text in texts(part)]
    if isinstance(value, list):
        return [text for item in value for text in texts(item)]
    return [value] if isinstance(value, str) else []


@pytest.fixture
def traced(tmp_path: Path) -> Study:
    """A study that replays a trace from a folder of its own."""
    (tmp_path / "traces").mkdir()
    pages = [0, 1, 2, 1]
    write_trace(tmp_path / "traces" / "t.parquet", assemble(pages, [True] * 4, [5] * 4))
    access = {"pattern": "trace", "file": "traces/t.parquet"}
    return study(
        tmp_path,
        duration=None,
        machine={"base": MACHINE, "set": {"lock_handoff_ns": 77}},
        guests={"vm0": {"memory": "64 MiB", "access": access}},
    )


def test_a_certificate_says_what_was_run_and_not_where(
    traced: Study, tmp_path: Path, marks: Path
) -> None:
    (result,) = run(traced, tmp_path / "out")
    said = result.certificate
    assert said["key"] == key_of(traced.points[0].scenario)
    assert said["model_version"] == MODEL_VERSION
    assert said["machine"]["parameters"]["lock_handoff_ns"] == 77
    assert said["kernel"]["policies"]["table_free"]
    assert (said["seed"], said["replication"]) == (1, 0)
    assert set(said["versions"]) >= {"python", "simpy", "numpy", "pandas", "pyarrow"}
    assert said["git_commit"] is None or re.fullmatch("[0-9a-f]{40}", said["git_commit"])
    assert result.scenario["guests"]["vm0"]["access"]["file"] == "t.parquet"
    assert not [text for text in texts(said) if "/" in text and text != "200 / s"]
    assert os.uname().nodename not in texts(said)


def test_a_point_verifies(traced: Study, tmp_path: Path, marks: Path) -> None:
    results = run(traced, tmp_path / "out")
    folder = results.store.folder(results[0].certificate["key"])
    assert verify(folder, [tmp_path], SIMULATE) == []


def test_verify_names_what_differs(tmp_path: Path, marks: Path) -> None:
    results = run(study(tmp_path), tmp_path / "out")
    folder = results.store.folder(results[0].certificate["key"])
    path = folder / "point.json"
    document = json.loads(path.read_text())
    document["summary"]["sim_ns"] += 1
    document["summary"]["gone"] = 3
    document["certificate"]["fingerprint"] = "0" * 64
    path.write_text(json.dumps(document))
    differences = {d.name: (d.stored, d.found) for d in verify(folder, simulate=SIMULATE)}
    found = results[0].summary
    assert differences == {
        "fingerprint": ("0" * 64, results[0].fingerprint),
        "sim_ns": (found["sim_ns"] + 1, found["sim_ns"]),
        "gone": (3, None),
    }


def test_verify_uses_the_numbers_of_the_certificate(
    traced: Study, tmp_path: Path, marks: Path
) -> None:
    """The package's files may have changed since, and the scenario may have set some itself."""
    _, said = measure(traced.points[0].scenario, simulate=SIMULATE)
    said["machine"]["parameters"]["atomic_uncontended_ns"] = 123.0
    said["machine"]["tlbirange"] = not said["machine"]["tlbirange"]
    said["kernel"]["policies"]["table_free"] = "free_removed_table"
    scenario = verify_module.certified(said, [tmp_path])
    again = certificate(scenario, "0", 0.0, {})
    assert again["machine"] == said["machine"]
    assert again["kernel"] == said["kernel"]


def test_verify_wants_the_same_trace(traced: Study, tmp_path: Path, marks: Path) -> None:
    results = run(traced, tmp_path / "out")
    folder = results.store.folder(results[0].certificate["key"])
    write_trace(tmp_path / "traces" / "t.parquet", assemble([3, 3], [True] * 2, [5] * 2))
    with pytest.raises(InputError, match=r"no trace t.parquet with digest"):
        verify(folder, [tmp_path], SIMULATE)


def test_verify_refuses_a_damaged_point(tmp_path: Path) -> None:
    with pytest.raises(Damaged):
        verify(tmp_path)


def test_a_run_without_a_store_is_the_same_result(tmp_path: Path, marks: Path) -> None:
    wanted = study(tmp_path)
    (stored,) = run(wanted, tmp_path / "out")
    fresh = Result.from_record(*measure(wanted.points[0].scenario, simulate=SIMULATE))
    assert fresh.summary.to_dict() == stored.summary.to_dict()
    assert fresh.fingerprint == stored.fingerprint
    pd.testing.assert_frame_equal(fresh.locks, stored.locks)
    assert run_point(wanted.points[0].scenario, SIMULATE).fingerprint == fresh.fingerprint


def test_importing_a_study_brings_no_heavy_library() -> None:
    program = (
        "import sys, simkvm.study.sweep, simkvm.study.verify, simkvm.study.statistics\n"
        "heavy = {'numpy', 'pandas', 'pyarrow', 'matplotlib', 'simpy', 'rich'}\n"
        "print(*(heavy & set(sys.modules)))"
    )
    found = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert found.stdout.strip() == ""
