"""What damo prints and keeps of DAMON's recordings, as regions with shares over time.

Three forms (damo 2.x): its JSON (``damo report access --json``, ``damo record --output_type
json``; ``json_compressed``, which is zlib over that, is what ``damo record`` writes by default);
the raw text of ``damo report raw`` or ``damo report access --raw_form``; and the events
``damon:damon_aggregated`` as ``perf script``, ``trace-cmd report`` or ``trace_pipe`` print them.
"""

from __future__ import annotations

import json
import re
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

from simkvm.measure.text import Lines, opened
from simkvm.scenario.errors import InputError
from simkvm.units import DURATION_NS, format_duration

DEFAULT_SAMPLE_NS: Final = 5_000_000
UNITS: Final = {**DURATION_NS, "m": DURATION_NS["min"], "d": 24 * DURATION_NS["h"]}

EVENT: Final = re.compile(
    r".*?\s(?P<time>\d+\.\d+):\s+(?:damon:)?damon_aggregated:\s+"
    r"target_id=(?P<target>\d+)\s+nr_regions=(?P<regions>\d+)\s+"
    r"(?P<start>\d+)-(?P<end>\d+):\s+(?P<accesses>-?\d+)(?:\s+-?\d+)?\s*"
)
REGION: Final = re.compile(
    r"\s*(?P<start>[0-9a-f]+)-(?P<end>[0-9a-f]+)\s*\([^)]*\):?\s+(?P<accesses>-?[\d,]+)"
    r"(?P<percent>\s*%)?(?:\s+.*)?"
)
FIELD: Final = re.compile(r"\s*(?P<name>[a-z][\w ]*?):\s*(?P<value>.*?)\s*")
BOXES: Final = re.compile(r"\s*(?:heatmap:|\d+\s+addr\s|<|# damos|# min/max).*")
PART: Final = re.compile(r"([\d,]+(?:\.\d+)?)\s*([a-z]+)?\s*")
IGNORED: Final = re.compile(r"\s*|\s*#.*")


@dataclass(frozen=True)
class Region:
    """Bytes ``start`` to ``end``, ``share`` of whose pages a sampling interval sees accessed."""

    start: int
    end: int
    share: float


@dataclass(frozen=True)
class Snapshot:
    """One aggregation interval."""

    start_ns: int
    end_ns: int
    regions: tuple[Region, ...]

    @property
    def duration_ns(self) -> int:
        """How long it is."""
        return self.end_ns - self.start_ns


@dataclass(frozen=True)
class Recording:
    """What was recorded of one target. ``stated``: whether the file says the interval itself."""

    target: str
    sample_ns: int
    stated: bool
    snapshots: tuple[Snapshot, ...]

    @property
    def duration_ns(self) -> int:
        """From the start of the first snapshot to the end of the last."""
        return self.snapshots[-1].end_ns - self.snapshots[0].start_ns


@dataclass(frozen=True)
class _Raw:
    """A region before its share is known: ``samples`` or else ``percent``."""

    start: int
    end: int
    samples: float | None
    percent: float | None = None


@dataclass(frozen=True)
class _RawSnapshot:
    start_ns: int | None
    end_ns: int
    regions: tuple[_Raw, ...]


def recordings(path: str, sample_ns: int | None = None) -> list[Recording]:
    """The recordings in a file, one a target, plain or gzipped; ``-`` is standard input.

    ``sample_ns`` is for files that do not say their sampling interval; without it DAMON's default
    counts. Raises InputError, with the line's number where there is one.
    """
    packed = _zlib_json(path)
    if packed is not None:
        return _from_json(packed, path, sample_ns)
    with opened(path) as lines:
        head = lines.peek(100)
        first = next((line for line in head if line.strip()), "")
        if first.lstrip().startswith(("[", "{")):
            return _from_json("\n".join(lines), lines.name, sample_ns)
        if any(EVENT.fullmatch(line) for line in head):
            return _from_events(lines, sample_ns)
        if any(line.startswith("monitoring_start:") for line in head):
            return _from_raw(lines, sample_ns)
        if any(BOXES.fullmatch(line) for line in head):
            raise lines.error("is for people; use: damo report access --raw_form, or --json", 1)
        what = f"not what damo prints: {first.strip()[:60]!r}" if first else "is empty"
        raise lines.error(what, head.index(first) + 1 if first else None)


def _zlib_json(path: str) -> str | None:
    file = Path(path)
    if path == "-" or not file.is_file():
        return None
    with file.open("rb") as stream:
        start = stream.read(2)
        if len(start) < 2 or start[0] != 0x78 or int.from_bytes(start) % 31:
            return None
        stream.seek(0)
        try:
            return zlib.decompress(stream.read()).decode()
        except (zlib.error, UnicodeDecodeError) as error:
            raise InputError(f"incomplete or damaged zlib file: {error}", file=path) from error


def _from_json(text: str, name: str, sample_ns: int | None) -> list[Recording]:
    try:
        document = json.loads(text)
    except ValueError as error:
        line = getattr(error, "lineno", None)
        raise InputError(f"not JSON: {error}", file=name, line=line) from error
    found: dict[str, Recording] = {}
    for place, record in enumerate(document if isinstance(document, list) else [document]):
        at = _At(name, f"[{place}]")
        made = _json_record(record, at, sample_ns)
        if made is None:
            continue
        known = found.get(made.target)
        if known is not None:
            snapshots = sorted((*known.snapshots, *made.snapshots), key=lambda one: one.start_ns)
            made = replace(known, snapshots=tuple(snapshots))
        found[made.target] = made
    return _some(list(found.values()), name)


@dataclass(frozen=True)
class _At:
    """A place in a JSON document."""

    file: str
    key: str

    def below(self, key: str | int) -> _At:
        return _At(self.file, f"{self.key}[{key}]" if isinstance(key, int) else f"{self.key}.{key}")

    def take(self, record: Any, key: str) -> Any:
        if not isinstance(record, Mapping) or key not in record:
            raise InputError("missing", file=self.file, key=f"{self.key}.{key}")
        return record[key]

    def number(self, value: Any, unit: str | None = None) -> float:
        """A number as damo writes it, with commas or not; with ``unit`` a time in nanoseconds."""
        try:
            if isinstance(value, bool):
                raise ValueError
            return _number(str(value), unit)
        except ValueError:
            message = f"expected a number, not {value!r}"
            raise InputError(message, file=self.file, key=self.key) from None


def _json_record(record: Any, at: _At, sample_ns: int | None) -> Recording | None:
    snapshots = []
    for place, raw in enumerate(at.take(record, "snapshots")):
        here = at.below("snapshots").below(place)
        regions = [
            _json_region(region, here.below("regions").below(number))
            for number, region in enumerate(here.take(raw, "regions"))
        ]
        start, end = (
            int(here.below(key).number(here.take(raw, key), "ns"))
            for key in ("start_time", "end_time")
        )
        snapshots.append(_RawSnapshot(start, end, tuple(regions)))
    intervals = record.get("intervals")
    stated = None
    if intervals is not None:
        inside = at.below("intervals")
        stated = int(inside.below("sample_us").number(inside.take(intervals, "sample_us"), "us"))
    if not snapshots:
        return None
    target = str(record.get("target_id") or 0)
    return _recording(target, snapshots, stated, sample_ns, at.file)


def _json_region(region: Any, at: _At) -> _Raw:
    start, end = (int(at.below(key).number(at.take(region, key))) for key in ("start", "end"))
    accesses = at.take(region, "nr_accesses")
    inside = at.below("nr_accesses")
    if not isinstance(accesses, Mapping):
        return _Raw(start, end, inside.number(accesses))
    for unit in ("samples", "percent"):
        if accesses.get(unit) is not None:
            text = str(accesses[unit]).rstrip("% ")
            value = inside.below(unit).number(text)
            return _Raw(start, end, *((value, None) if unit == "samples" else (None, value)))
    raise InputError("has neither samples nor percent", file=at.file, key=inside.key)


def _from_raw(lines: Lines, sample_ns: int | None) -> list[Recording]:
    by_target: dict[str, list[_RawSnapshot]] = {}
    stated: int | None = None
    values: dict[str, int] = {}
    regions: list[_Raw] = []
    target = "0"

    def close() -> None:
        if not regions:
            return
        if not {"monitoring_start", "monitoring_end"} <= set(values):
            raise lines.error("regions without monitoring_start and monitoring_end above")
        made = _RawSnapshot(values["monitoring_start"], values["monitoring_end"], tuple(regions))
        by_target.setdefault(target, []).append(made)
        regions.clear()
        values.clear()

    for line in lines:
        region, found = REGION.fullmatch(line), FIELD.fullmatch(line)
        if IGNORED.fullmatch(line):
            continue
        if region is not None:
            regions.append(_raw_region(region))
        elif found is not None:
            name, value = found["name"], found["value"]
            if name in {"monitoring_start", "monitoring_end", "target_id", "intervals"}:
                close()
            if name == "target_id":
                target = value
            elif name.startswith("monitoring_"):
                values[name] = _time(lines, value)
            elif name == "intervals" and value.startswith("sample "):
                stated = _time(lines, value.removeprefix("sample ").partition(",")[0])
        else:
            raise lines.error(f"not a line of damo's raw form: {line.strip()[:60]!r}")
    close()
    return _some(
        [
            _recording(target, snapshots, stated, sample_ns, lines.name)
            for target, snapshots in by_target.items()
        ],
        lines.name,
    )


def _raw_region(match: re.Match[str]) -> _Raw:
    value = float(match["accesses"].replace(",", ""))
    start, end = int(match["start"], 16), int(match["end"], 16)
    return _Raw(start, end, *((None, value) if match["percent"] else (value, None)))


def _time(lines: Lines, text: str) -> int:
    try:
        return int(_number(text, "ns"))
    except ValueError:
        raise lines.error(f"{text!r} is not a time") from None


def _from_events(lines: Lines, sample_ns: int | None) -> list[Recording]:
    """A snapshot is complete with the last of its ``nr_regions`` events; only its end is known."""
    open_: dict[str, list[_Raw]] = {}
    by_target: dict[str, list[_RawSnapshot]] = {}
    for line in lines:
        match = EVENT.fullmatch(line)
        if match is None:
            if "damon_aggregated" in line:
                raise lines.error(f"not an event of DAMON: {line.strip()[:60]!r}")
            continue  # other events of the same trace
        target = match["target"]
        regions = open_.setdefault(target, [])
        start, end, accesses = (int(match[name]) for name in ("start", "end", "accesses"))
        regions.append(_Raw(start, end, accesses))
        if len(regions) >= int(match["regions"]):
            end_ns = round(float(match["time"]) * 1e9)
            made = _RawSnapshot(None, end_ns, tuple(regions))
            by_target.setdefault(target, []).append(made)
            open_[target] = []
    return _some(
        [
            _recording(target, snapshots, None, sample_ns, lines.name)
            for target, snapshots in by_target.items()
        ],
        lines.name,
    )


def _recording(
    target: str,
    raws: list[_RawSnapshot],
    stated_ns: int | None,
    sample_ns: int | None,
    name: str,
) -> Recording:
    if stated_ns and sample_ns and stated_ns != sample_ns:
        shown = format_duration(stated_ns)
        message = f"the recording says that its sampling interval is {shown}"
        raise InputError(message, file=name, key="--sample")
    sample = stated_ns or sample_ns or DEFAULT_SAMPLE_NS
    if raws[0].start_ns is None and len(raws) < 2:
        raise InputError(f"one snapshot of target {target} only: its length is unknown", file=name)
    longest_ns = max(
        raw.end_ns - start_ns for raw, start_ns in zip(raws, _starts(raws), strict=True)
    )
    if sample_ns and sample_ns > longest_ns > 0:
        message = f"is longer than a snapshot of the recording, {format_duration(longest_ns)}"
        raise InputError(message, file=name, key="--sample")
    snapshots = []
    for raw, start_ns in zip(raws, _starts(raws), strict=True):
        if raw.end_ns <= start_ns:
            raise InputError(f"a snapshot of target {target} ends before it begins", file=name)
        most = max(1, round((raw.end_ns - start_ns) / sample))
        regions = [
            Region(region.start, region.end, _share(region, most))
            for region in raw.regions
            # damo ends a recording of one snapshot with a region from 0 to 0.
            if region.end > region.start
        ]
        if regions:
            snapshots.append(Snapshot(start_ns, raw.end_ns, tuple(regions)))
    if not snapshots:
        raise InputError(f"no regions of target {target}", file=name)
    return Recording(target, sample, stated_ns is not None, tuple(snapshots))


def _starts(raws: list[_RawSnapshot]) -> Iterator[int]:
    """Where snapshots begin: as said, or where the one before ended, the first as long as most."""
    mean_ns = (raws[-1].end_ns - raws[0].end_ns) // max(1, len(raws) - 1)
    before = raws[0].end_ns - mean_ns
    for raw in raws:
        yield before if raw.start_ns is None else raw.start_ns
        before = raw.end_ns


def _share(region: _Raw, most: int) -> float:
    if region.samples is None:
        return min(1.0, max(0.0, (region.percent or 0.0) / 100))
    # Now and then a timer lets one more sample in.
    return min(1.0, max(0.0, region.samples / most))


def _some(found: list[Recording], name: str) -> list[Recording]:
    if not found:
        raise InputError("no regions in the recording", file=name)
    return found


def _number(text: str, unit: str | None) -> float:
    """A number; with ``unit`` a time in nanoseconds, ``8 m 59.809 s`` or a bare number of units."""
    parts = PART.findall(text)
    if not parts or "".join(PART.split(text)[::3]).strip() or not PART.sub("", text) == "":
        raise ValueError(text)
    total = 0.0
    for number, written in parts:
        named = written or unit
        if (written and unit is None) or (named is not None and named not in UNITS):
            raise ValueError(text)
        value = number.replace(",", "")
        exact = float(value) if "." in value else int(value)
        total += exact * (UNITS[named] if named is not None else 1)
    return total
