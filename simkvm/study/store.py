"""Where points are kept: a folder a study, a folder a point, and nothing that needs a lock to read.

    root/manifest.json                  which points were asked for, in order, and their axes
    root/.lock                          held while the manifest is written
    root/points/ab/<32 hex digits>/     a finished point: point.json, and a Parquet file a table
    root/points/.tmp-<pid>-<key>/       being written
    root/failed/<32 hex digits>.json    why a point has no result

A point is written aside, flushed to the disk and renamed into place, so that it is there whole or
not at all, whoever is killed when. Its name is its content: two writers of one name write the same,
and the second finds the folder taken. A store can be copied, and two copies merged, with any tool.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import math
import os
import re
import shutil
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from simkvm.scenario.errors import InputError
from simkvm.study.columns import COLUMNS, arrow_table, write_table

if TYPE_CHECKING:
    from simkvm.observe.record import Record

SCHEMA_VERSION = 1
"""Of the files here. A point of another version counts as missing."""

_TEMPORARY = re.compile(r"\.tmp-(\d+)-.+")


@dataclass(frozen=True)
class Entry:
    """A point that a study asked for: its key and its place on the axes."""

    key: str
    axes: dict[str, Any]


@dataclass(frozen=True)
class Manifest:
    """What a store was asked for. `studies` are the names of the files, oldest first."""

    studies: tuple[str, ...] = ()
    axes: tuple[str, ...] = ()
    entries: tuple[Entry, ...] = ()

    def merged(self, study: str, axes: Sequence[str], entries: Sequence[Entry]) -> Manifest:
        """With another study's points behind these, each known point once.

        A point already here that now has a place on more axes takes these on in its row.
        """
        rows = list(self.entries)
        place: dict[str, list[int]] = {}
        for index, entry in enumerate(rows):
            place.setdefault(entry.key, []).append(index)
        for entry in entries:
            for index in place.get(entry.key, []):
                if _agree(rows[index].axes, entry.axes):
                    rows[index] = Entry(entry.key, {**rows[index].axes, **entry.axes})
                    break
            else:
                place.setdefault(entry.key, []).append(len(rows))
                rows.append(entry)
        return Manifest(
            tuple(dict.fromkeys((*self.studies, study))),
            tuple(dict.fromkeys((*self.axes, *axes))),
            tuple(rows),
        )


def _agree(first: Mapping[str, Any], second: Mapping[str, Any]) -> bool:
    return all(first[axis] == second[axis] for axis in first.keys() & second.keys())


class Store:
    """A store in the folder `root`, which need not exist before the first write."""

    def __init__(self, root: str | os.PathLike[str]) -> None:
        self.root = Path(root)

    def folder(self, key: str) -> Path:
        """Where the point is, once it is."""
        return self.root / "points" / key[:2] / key

    def __contains__(self, key: str) -> bool:
        try:
            read_document(self.folder(key))
        except Damaged:
            return False
        return True

    def document(self, key: str) -> dict[str, Any] | None:
        """The point's certificate, summary and violations; None if it is not there, or not whole.

        A point that is there but damaged is reported on stderr: a re-run replaces it.
        """
        folder = self.folder(key)
        if not folder.is_dir():
            return None
        try:
            return read_document(folder)
        except Damaged as damage:
            _warn(f"point {key} counts as missing: {damage.message}")
            return None

    def write(self, key: str, record: Record, certificate: Mapping[str, Any]) -> bool:
        """Put a point into the store. False: somebody else had finished it, and theirs stays.

        Raises OSError if the disk does not take it; no trace of the point is left then.
        """
        temporary = self._temporary(key)
        try:
            published = self._write(temporary, key, record, certificate)
        except FileNotFoundError:
            # Another machine took this process for a dead one and swept its folder: once more.
            published = self._write(temporary, key, record, certificate)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
        self.failure_path(key).unlink(missing_ok=True)
        if not published:
            self._compare(key, record.fingerprint)
        return published

    def _write(
        self, temporary: Path, key: str, record: Record, certificate: Mapping[str, Any]
    ) -> bool:
        self.folder(key).parent.mkdir(parents=True, exist_ok=True)
        _write_point(temporary, record, certificate)
        return self._publish(temporary, key)

    def _publish(self, temporary: Path, key: str) -> bool:
        target = self.folder(key)
        try:
            read_document(target)
        except Damaged:
            _discard(target, self._temporary(f"damaged-{key}"))
        try:
            temporary.rename(target)
        except OSError as error:
            if error.errno in (errno.ENOTEMPTY, errno.EEXIST):
                return False
            raise
        _flush(target.parent)
        return True

    def _compare(self, key: str, fingerprint: str) -> None:
        """A run is the same everywhere; if it was not, that is worth more than the point."""
        stored = self.document(key)
        if stored is not None and stored["certificate"].get("fingerprint") != fingerprint:
            print(
                f"simkvm: warning: point {key} was run twice and the two runs differ",
                file=sys.stderr,
            )

    def _temporary(self, key: str) -> Path:
        return self.root / "points" / f".tmp-{os.getpid()}-{key}"

    def sweep_stale(self) -> int:
        """Remove what dead processes left half-written; how many folders that were.

        Process numbers of another machine that shares the folder mean nothing here. Taking the
        folder away by a rename first makes that harmless: its owner finds it gone, never
        half-gone, and writes it again.
        """
        swept = 0
        for folder in sorted((self.root / "points").glob(".tmp-*")):
            match = _TEMPORARY.fullmatch(folder.name)
            if match and not _alive(int(match[1])):
                swept += _discard(folder, self._temporary(f"stale-{folder.name[5:]}"))
        return swept

    def failure_path(self, key: str) -> Path:
        """The file that says why the point failed, if it did."""
        return self.root / "failed" / f"{key}.json"

    def fail(self, key: str, reason: str, attempts: int, where: Sequence[str] = ()) -> None:
        """Record that a point could not be run."""
        failure = {"key": key, "reason": reason, "attempts": attempts, "where": list(where)}
        _replace(self.failure_path(key), failure)

    def failure(self, key: str) -> dict[str, Any] | None:
        """What `fail` recorded, if anything."""
        try:
            failure = json.loads(self.failure_path(key).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None
        return failure if isinstance(failure, dict) else None

    def manifest(self) -> Manifest:
        """What was asked for.

        Raises InputError if `root` holds no study, and Damaged if the manifest cannot be read:
        without it the points are still good, and running the study again writes another.
        """
        path = self.root / "manifest.json"
        try:
            document = json.loads(path.read_text(encoding="utf-8"))
            return Manifest(
                tuple(document["studies"]),
                tuple(document["axes"]),
                tuple(Entry(point["key"], dict(point["axes"])) for point in document["points"]),
            )
        except (FileNotFoundError, NotADirectoryError):
            raise InputError("holds no study", file=str(self.root)) from None
        except (ValueError, LookupError, TypeError, AttributeError) as error:
            message = f"cannot be read ({type(error).__name__}); remove it and run the study again"
            raise Damaged(message, file=str(path)) from None

    def extend_manifest(self, study: str, axes: Sequence[str], entries: Sequence[Entry]) -> None:
        """Add a study's points. Shards that start together may all do so at once.

        Raises InputError if the folder cannot be made, and Damaged as `manifest` does.
        """
        try:
            self.root.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InputError(f"cannot be a folder: {error.strerror}", file=str(self.root)) from None
        with _alone(self.root / ".lock"):
            asked = (self.root / "manifest.json").exists()
            before = self.manifest() if asked else Manifest()
            after = before.merged(study, axes, entries)
            if after != before:
                points = [{"key": entry.key, "axes": entry.axes} for entry in after.entries]
                document = {
                    "schema_version": SCHEMA_VERSION,
                    "studies": list(after.studies),
                    "axes": list(after.axes),
                    "points": points,
                }
                _replace(self.root / "manifest.json", document)


class Damaged(InputError):  # noqa: N818 (a state of a file)
    """A file of a store is not there, or not what was written there."""


def read_document(folder: Path) -> dict[str, Any]:
    """The point.json of a point's folder. Raises Damaged if any file of the point is not whole."""
    try:
        document = json.loads((folder / "point.json").read_text(encoding="utf-8"))
        complaint = _complaint(folder, document)
    except OSError as error:
        complaint = f"{Path(error.filename).name} cannot be read"
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        complaint = f"point.json cannot be read ({type(error).__name__})"
    if complaint is not None:
        raise Damaged(complaint, file=str(folder))
    return dict(document)


def _complaint(folder: Path, document: Any) -> str | None:
    names = ("certificate", "summary", "files", "violations")
    if [type(document[name]) for name in names] != [dict, dict, dict, list]:
        return "point.json has another shape"
    if document["schema_version"] != SCHEMA_VERSION:
        return f"its files are of version {document['schema_version']}"
    for name, size_bytes in document["files"].items():
        if (folder / name).stat().st_size != size_bytes:
            return f"{name} was cut or changed"
    return None


def plain(value: Any) -> Any:
    """The JSON form of a value: NumPy's numbers as Python's, and null for what is no number."""
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if hasattr(value, "item"):
        value = value.item()
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _write_point(folder: Path, record: Record, certificate: Mapping[str, Any]) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    sizes = {}
    for name in COLUMNS:
        path = folder / f"{name}.parquet"
        write_table(path, arrow_table(name, getattr(record, name)))
        sizes[path.name] = path.stat().st_size
    document = {
        "schema_version": SCHEMA_VERSION,
        "certificate": certificate,
        "summary": record.summary,
        "violations": record.violations,
        "files": sizes,
    }
    _write_json(folder / "point.json", document)
    _flush(folder)


def _write_json(path: Path, document: Mapping[str, Any]) -> None:
    with path.open("w", encoding="utf-8") as file:
        json.dump(plain(document), file, indent=1, allow_nan=False)
        file.write("\n")
        file.flush()
        os.fsync(file.fileno())


def _replace(path: Path, document: Mapping[str, Any]) -> None:
    """Write a file so that a reader sees the old one or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    _write_json(aside, document)
    aside.replace(path)
    _flush(path.parent)


def _discard(folder: Path, grave: Path) -> bool:
    """Remove a folder in one step for whoever looks. False: somebody else did."""
    try:
        folder.rename(grave)
    except FileNotFoundError:
        return False
    shutil.rmtree(grave, ignore_errors=True)
    return True


def _flush(folder: Path) -> None:
    """Make the names in a folder survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def _alone(path: Path) -> Iterator[None]:
    """One process at a time, where the file system can. Where it cannot, the last writer wins,
    and what it left out comes back when that study is run again.
    """
    with path.open("w") as file:
        with contextlib.suppress(OSError):
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _warn(message: str) -> None:
    print(f"simkvm: warning: {message}", file=sys.stderr)
