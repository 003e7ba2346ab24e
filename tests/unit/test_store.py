"""Is a stored point whole or not there, whoever is killed when, and does it come back equal?"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import fake_world
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from simkvm.scenario.errors import InputError
from simkvm.study import store as store_module
from simkvm.study.columns import COLUMNS, write_table
from simkvm.study.result import Result, Results
from simkvm.study.store import Damaged, Entry, Manifest, Store

KEY = "ab" + "0" * 30
OTHER = "ab" + "1" * 30
DEAD_PID = 2**22 + 1  # above what Linux ever gives out


def certificate(number: int = 7, key: str = KEY) -> dict[str, Any]:
    return {
        "key": key,
        "fingerprint": fake_world.record(number).fingerprint,
        "scenario": {"name": "it"},
        "axes": {"guests.vm0.vcpus": 2},
    }


def put(store: Store, key: str = KEY, number: int = 7) -> bool:
    return store.write(key, fake_world.record(number), certificate(number, key))


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "study")


def temporaries(store: Store) -> list[str]:
    return sorted(path.name for path in (store.root / "points").glob(".tmp-*"))


def test_a_point_comes_back_equal(store: Store) -> None:
    record = fake_world.record(7)
    assert put(store)
    stored = Result.from_folder(store.folder(KEY))
    fresh = Result.from_record(record, certificate())
    for name in COLUMNS:
        pd.testing.assert_frame_equal(getattr(stored, name), getattr(fresh, name))
        assert {c: list(getattr(stored, name)[c]) for c in COLUMNS[name]} == getattr(record, name)
    assert stored.summary.to_dict() == record.summary == fresh.summary.to_dict()
    assert stored.fingerprint == record.fingerprint == fresh.fingerprint
    assert stored.certificate == certificate()
    assert stored.axes == {"guests.vm0.vcpus": 2}
    assert not temporaries(store)


@pytest.mark.parametrize("with_columns", [True, False])
def test_empty_tables_keep_columns_and_types(store: Store, with_columns: bool) -> None:
    empty: dict[str, Any] = {
        name: {column: [] for column in columns if with_columns}
        for name, columns in COLUMNS.items()
    }
    store.write(KEY, replace(fake_world.record(7), **empty), certificate())
    put(store, OTHER)
    for name in set(COLUMNS) - {"passes"}:
        table = pq.read_table(store.folder(KEY) / f"{name}.parquet")
        assert tuple(table.column_names) == COLUMNS[name]
        assert table.schema.equals(pq.read_schema(store.folder(OTHER) / f"{name}.parquet"))
        assert table.num_rows == 0


def test_files_are_packed_as_meant(store: Store) -> None:
    put(store)
    metadata = pq.ParquetFile(store.folder(KEY) / "locks.parquet").metadata
    columns = {metadata.schema.column(i).name: metadata.row_group(0).column(i) for i in range(17)}
    assert {column.compression for column in columns.values()} == {"ZSTD"}
    assert "DELTA_BINARY_PACKED" in columns["hold_total_ns"].encodings
    assert "RLE_DICTIONARY" in columns["site"].encodings
    assert "RLE_DICTIONARY" not in columns["wait_mean_ns"].encodings


def test_whole_numbers_keep_every_digit(store: Store) -> None:
    most = 2**62 + 1
    columns = {column: [most] for column in COLUMNS["timeline"]}
    store.write(KEY, replace(fake_world.record(7), timeline=columns), certificate())
    assert Result.from_folder(store.folder(KEY)).timeline["t_ns"][0] == most


def test_what_is_no_number_comes_back_as_a_gap(store: Store) -> None:
    summary: dict[str, int | float | str] = {"ageing_pass_mean_ns": float("nan"), "safety": "clean"}
    store.write(KEY, replace(fake_world.record(7), summary=summary), certificate())
    document = json.loads((store.folder(KEY) / "point.json").read_text())
    assert document["summary"]["ageing_pass_mean_ns"] is None
    assert pd.isna(Result.from_folder(store.folder(KEY)).summary["ageing_pass_mean_ns"])


def test_the_second_writer_finds_the_point_taken(store: Store) -> None:
    assert put(store)
    first = (store.folder(KEY) / "point.json").stat().st_ino
    assert not put(store)
    assert (store.folder(KEY) / "point.json").stat().st_ino == first
    assert not temporaries(store)


def test_a_second_writer_that_found_something_else_says_so(
    store: Store, capsys: pytest.CaptureFixture[str]
) -> None:
    put(store, number=7)
    put(store, number=7)
    assert capsys.readouterr().err == ""
    assert not put(store, number=8)
    assert "run twice and the two runs differ" in capsys.readouterr().err
    assert Result.from_folder(store.folder(KEY)).fingerprint == fake_world.record(7).fingerprint


WRITER = """
import os, signal, sys
from pathlib import Path
import fake_world
from simkvm.study.store import Store

root, key, number, dies = sys.argv[1:]
if dies == "before the rename":
    Path.rename = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
if dies == "between the files":
    os.fsync = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
print("ready", flush=True)
sys.stdin.readline()
certificate = {"key": key, "fingerprint": fake_world.record(int(number)).fingerprint}
print(Store(root).write(key, fake_world.record(int(number)), certificate))
"""


def writer(store: Store, dies: str = "never") -> subprocess.Popen[str]:
    """A process that writes the point once it is sent a line."""
    here = str(Path(fake_world.__file__).parent)
    return subprocess.Popen(
        [sys.executable, "-c", WRITER, str(store.root), KEY, "7", dies],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([here, os.environ.get("PYTHONPATH", "")])},
    )


@pytest.mark.parametrize("dies", ["between the files", "before the rename"])
def test_a_crash_leaves_no_point_and_is_swept(store: Store, dies: str) -> None:
    with writer(store, dies) as process:
        process.communicate("go\n")
    assert process.returncode == -signal.SIGKILL
    assert KEY not in store
    assert not store.folder(KEY).exists()
    assert temporaries(store) == [f".tmp-{process.pid}-{KEY}"]
    assert store.sweep_stale() == 1
    assert not temporaries(store)
    assert put(store)


def test_two_processes_write_one_point(store: Store) -> None:
    with writer(store) as first, writer(store) as second:
        assert first.stdout is not None
        assert second.stdout is not None
        first.stdout.readline()
        second.stdout.readline()
        for process in (first, second):
            assert process.stdin is not None
            process.stdin.write("go\n")
            process.stdin.flush()
        outs = [process.communicate()[0] for process in (first, second)]
    assert sorted(outs) == ["False\n", "True\n"]
    assert KEY in store
    assert not temporaries(store)


def test_only_the_dead_are_swept(store: Store) -> None:
    points = store.root / "points"
    for pid in (os.getpid(), os.getppid(), DEAD_PID):
        (points / f".tmp-{pid}-{KEY}").mkdir(parents=True)
    (points / ".tmp-of-somebody-else").mkdir()
    put(store, OTHER)
    assert store.sweep_stale() == 1
    assert not [name for name in temporaries(store) if str(DEAD_PID) in name]
    assert len(temporaries(store)) == 3
    assert OTHER in store


def test_a_writer_whose_folder_is_swept_writes_again(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another machine knows nothing of this one's processes, and may sweep in the middle."""
    swept: list[int] = []

    def interrupted(path: Path, table: pa.Table) -> None:
        write_table(path, table)
        if not swept:
            monkeypatch.setattr(store_module, "_alive", lambda pid: False)
            swept.append(store.sweep_stale())
            monkeypatch.undo()
            monkeypatch.setattr(store_module, "write_table", interrupted)

    monkeypatch.setattr(store_module, "write_table", interrupted)
    assert put(store)
    assert swept == [1]
    assert Result.from_folder(store.folder(KEY)).fingerprint
    assert not temporaries(store)


def test_a_full_disk_leaves_no_trace(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(store_module, "_write_json", full)
    with pytest.raises(OSError, match="No space"):
        put(store)
    assert KEY not in store
    assert not temporaries(store)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-9])


DAMAGE: dict[str, Callable[[Path], object]] = {
    "cut": lambda folder: cut(folder / "point.json"),
    "empty": lambda folder: (folder / "point.json").write_text(""),
    "not UTF-8": lambda folder: (folder / "point.json").write_bytes(b"\xff\xfe\x00"),
    "a list": lambda folder: (folder / "point.json").write_text("[]"),
    "another shape": lambda folder: (folder / "point.json").write_text('{"summary": {}}'),
    "null": lambda folder: (folder / "point.json").write_text("null"),
    "gone": lambda folder: (folder / "point.json").unlink(),
    "table cut": lambda folder: cut(folder / "locks.parquet"),
    "table gone": lambda folder: (folder / "series.parquet").unlink(),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_point_counts_as_missing_and_is_replaced(
    store: Store, damage: str, capsys: pytest.CaptureFixture[str]
) -> None:
    put(store)
    DAMAGE[damage](store.folder(KEY))
    assert KEY not in store
    assert store.document(KEY) is None
    assert f"warning: point {KEY} counts as missing" in capsys.readouterr().err
    with pytest.raises(Damaged):
        Result.from_folder(store.folder(KEY))
    assert put(store)
    assert KEY in store
    assert not temporaries(store)


def test_a_point_of_another_version_counts_as_missing(store: Store) -> None:
    put(store)
    path = store.folder(KEY) / "point.json"
    path.write_text(path.read_text().replace('"schema_version": 1', '"schema_version": 99'))
    assert KEY not in store


def test_a_point_that_was_never_there_is_no_damage(
    store: Store, capsys: pytest.CaptureFixture[str]
) -> None:
    assert store.document(KEY) is None
    assert capsys.readouterr().err == ""


def test_a_failure_stays_until_the_point_is_there(store: Store) -> None:
    store.fail(KEY, "ValueError: no", 1, ("simkvm.kernel.world.simulate:3",))
    store.fail(KEY, "its worker process died every time", 3)
    assert store.failure(KEY) == {
        "key": KEY,
        "reason": "its worker process died every time",
        "attempts": 3,
        "where": [],
    }
    put(store)
    assert store.failure(KEY) is None
    assert store.failure(OTHER) is None


def entries(*vcpus: int) -> list[Entry]:
    return [Entry(f"{v:032x}", {"vcpus": v}) for v in vcpus]


def test_the_manifest_keeps_its_order_and_adds_what_is_new(store: Store) -> None:
    store.extend_manifest("first", ["vcpus"], entries(4, 2))
    store.extend_manifest("second", ["vcpus"], entries(1, 2, 3))
    store.extend_manifest("first", ["vcpus"], entries(4, 2))
    manifest = store.manifest()
    assert manifest.studies == ("first", "second")
    assert [entry.axes["vcpus"] for entry in manifest.entries] == [4, 2, 1, 3]


def test_a_known_point_takes_on_new_axes() -> None:
    before = Manifest().merged("s", ["vcpus"], entries(1, 2))
    wider = [Entry(e.key, {**e.axes, "replication": 0}) for e in entries(1, 2)]
    after = before.merged("s", ["vcpus", "replication"], wider)
    assert after.axes == ("vcpus", "replication")
    assert after.entries == tuple(wider)
    assert after.merged("s", ["vcpus"], entries(1, 2)) == after


def test_one_point_may_be_two_rows() -> None:
    """Written in two ways, "1 GiB" and "1024 MiB" are one run at two places."""
    same = [Entry(KEY, {"memory": "1 GiB"}), Entry(KEY, {"memory": "1024 MiB"})]
    assert Manifest().merged("s", ["memory"], same).entries == tuple(same)


def test_shards_may_all_write_the_manifest_at_once(store: Store) -> None:
    """Each study's points survive the others, whoever comes last."""
    program = (
        "import sys; from simkvm.study.store import Entry, Store\n"
        "sys.stdin.readline()\n"
        "for i in range(20):\n"
        "    key = f'{int(sys.argv[2]) * 100 + i:032x}'\n"
        "    Store(sys.argv[1]).extend_manifest(sys.argv[2], [], [Entry(key, {})])\n"
    )
    shards = [
        subprocess.Popen(
            [sys.executable, "-c", program, str(store.root), str(i)], stdin=subprocess.PIPE
        )
        for i in range(3)
    ]
    for shard in shards:
        assert shard.stdin is not None
        shard.stdin.write(b"go\n")
        shard.stdin.flush()
    assert [shard.wait() for shard in shards] == [0, 0, 0]
    for shard in shards:
        assert shard.stdin is not None
        shard.stdin.close()
    assert len(store.manifest().entries) == 60


def test_a_damaged_manifest_is_said_so(store: Store) -> None:
    store.extend_manifest("s", [], entries(1))
    cut(store.root / "manifest.json")
    with pytest.raises(Damaged, match=r"manifest.json: cannot be read"):
        store.manifest()


def test_rows_are_in_the_order_of_the_study(store: Store) -> None:
    """Whatever finishes first; and what did not finish has its row."""
    asked = entries(5, 1, 4, 2)
    store.extend_manifest("s", ["vcpus"], asked)
    for entry in (asked[3], asked[0]):
        put(store, entry.key, entry.axes["vcpus"])
    store.fail(asked[2].key, "ValueError: no", 1)
    results = Results(store.root)
    assert list(results.summary["vcpus"]) == [5, 1, 4, 2]
    assert list(results.summary["status"]) == ["done", "missing", "failed", "done"]
    assert list(results.summary["sim_ns"].dropna()) == [5 * 10**9, 2 * 10**9]
    assert [result.axes for result in results] == [{"vcpus": 5}, {"vcpus": 2}]
    assert list(results.locks["vcpus"]) == [5] * 3 + [2] * 3
    assert list(results.locks["acquisitions"]) == [5, 6, 7, 2, 3, 4]
    assert [failure["reason"] for failure in results.failed] == ["ValueError: no"]
    assert list(results.passes.columns) == ["vcpus", *COLUMNS["passes"]]


def test_a_store_without_a_finished_point_has_rows_and_columns(store: Store) -> None:
    store.extend_manifest("s", ["vcpus"], entries(1, 2))
    results = Results(store.root)
    assert list(results.summary["status"]) == ["missing"] * 2
    assert list(results.timeline.columns) == ["vcpus", *COLUMNS["timeline"]]
    assert "missing" in results._repr_html_()


def test_a_folder_without_a_study_is_no_store(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="holds no study"):
        Results(tmp_path)


def test_a_file_cannot_become_a_store(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="cannot be a folder: File exists"):
        Store(tmp_path / "file").extend_manifest("s", [], [])


def test_notebook_tables_escape_what_people_wrote(store: Store) -> None:
    evil = "<script>alert('x')</script>"
    store.extend_manifest(evil, [evil], [Entry(KEY, {evil: evil})])
    store.write(
        KEY,
        replace(fake_world.record(7), summary={"safety": evil, evil: evil}),
        {**certificate(), "scenario": {"name": evil}},
    )
    results = Results(store.root)
    for html in (results._repr_html_(), results[0]._repr_html_()):
        assert "script&gt;" in html
        assert "<script" not in html
