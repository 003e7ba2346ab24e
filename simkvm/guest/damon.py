"""Importer of what DAMON recorded: how often each region of memory was accessed, over time.

DAMON looks at one page of every region each sampling interval, and says after an aggregation
interval in how many of them that page had been accessed (``nr_accesses``,
Documentation/mm/damon/design.rst, v6.12). So ``nr_accesses`` over the sampling intervals of an
aggregation interval is the share of pages that a sampling interval sees accessed. That is the heat
that a trace can keep; the order of accesses and what is hot within a region were never recorded.

The trace is drawn to match. Time is cut into steps of ``resolution``, by default a sampling
interval. In each step every page of a region is touched once with the probability that it is
accessed at all in a step, 1 - (1 - share) ** (resolution / sampling interval), independently. The
pages of a step come in random order, evenly spaced. The first touch of a page writes, any later
one with probability ``writes``: DAMON does not tell reads from writes. All draws come from one
generator, seeded by ``seed``; the same recording gives the same trace.

A region without accesses is left out, or touched once at the start with ``idle``: DAMON does not
know whether such a region holds memory. Addresses are compacted as the sister importer does it
(`simkvm.guest.lackey`): each 2-MiB region with any touch becomes the next one.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np
import numpy.typing as npt

from simkvm.guest.damon_text import Recording, Region, recordings
from simkvm.guest.trace import REGION_BYTES, Trace, TraceHeader, assemble, write_trace
from simkvm.scenario.errors import InputError, nearest
from simkvm.units import format_duration, parse_duration

Int64s = npt.NDArray[np.int64]

MOST_TOUCHES: Final = 20_000_000
LONGEST_GAP: Final = 2**31 - 1


@dataclass(frozen=True)
class Imported:
    """The trace's header, and what had to be assumed or cut."""

    header: TraceHeader
    recording: Recording
    resolution_ns: int
    pauses_cut: int


def convert(
    source_path: str,
    out_path: str | Path,
    *,
    target: str | None = None,
    sample: str | None = None,
    resolution: str | None = None,
    ghz: float = 3.0,
    writes: float = 0.3,
    idle: bool = False,
    seed: int = 1,
    page_size: int = 4096,
) -> Imported:
    """Make a trace file at ``out_path`` of the recording at ``source_path``.

    ``target``: the target to take, if there are several. ``sample``: the sampling interval, for
    recordings that do not say it (5 ms is DAMON's default). ``ghz``: instructions a nanosecond, as
    many as the machine of the replay has GHz. Raises InputError for what is wrong with any of it,
    and if the trace would have more than `MOST_TOUCHES` touches; nothing is written then.
    """
    folder = Path(out_path).parent
    if not folder.is_dir():
        raise InputError("no such folder", file=str(folder))
    if page_size & (page_size - 1) or not 4096 <= page_size <= REGION_BYTES:
        raise InputError(
            f"{page_size} bytes are not a power of two from 4 KiB to 2 MiB", key="--page-size"
        )
    if not 0 < ghz < 1000:
        raise InputError(f"{ghz} is not a processor's GHz", key="--ghz")
    sample_ns = None if sample is None else _time(sample, "--sample")
    recording = _chosen(recordings(source_path, sample_ns), target, source_path)
    resolution_ns = recording.sample_ns if resolution is None else _time(resolution, "--resolution")
    if resolution_ns < recording.sample_ns:
        shown = format_duration(recording.sample_ns)
        raise InputError(f"is finer than the sampling interval of {shown}", key="--resolution")
    drawing = Drawing(recording, resolution_ns, page_size, seed)
    _check_size(drawing, source_path)
    trace, cut = drawing.trace(ghz=ghz, writes=writes, idle=idle, name=source_path)
    write_trace(out_path, trace)
    return Imported(trace.header, recording, resolution_ns, cut)


def _time(text: str, key: str) -> int:
    try:
        ns = parse_duration(text)
    except InputError as error:
        raise InputError(error.message, key=key, hint=error.hint) from None
    if not ns:
        raise InputError("has to be longer than nothing", key=key)
    return ns


def _chosen(found: Sequence[Recording], target: str | None, name: str) -> Recording:
    targets = [recording.target for recording in found]
    if target is None and len(found) == 1:
        return found[0]
    for recording in found:
        if recording.target == target:
            return recording
    listed = ", ".join(targets)
    if target is None:
        raise InputError(f"has several targets, choose with --target: {listed}", file=name)
    hint = nearest(target, targets)
    raise InputError(f"has no target {target}, only {listed}", file=name, hint=hint)


def _check_size(drawing: Drawing, name: str) -> None:
    expected = drawing.expected()
    if expected <= MOST_TOUCHES:
        return
    step_ns = drawing.resolution_ns
    while drawing.expected() > MOST_TOUCHES and drawing.resolution_ns < 2**40:
        drawing.resolution_ns *= 2
    fits = format_duration(drawing.resolution_ns)
    raise InputError(
        f"would make {expected:.3g} touches at a resolution of {format_duration(step_ns)}, and "
        f"{MOST_TOUCHES:.0e} are the most: try --resolution '{fits}'",
        file=name,
    )


class Drawing:
    """One recording on its way to a trace. The module states the rule."""

    def __init__(self, recording: Recording, resolution_ns: int, page_size: int, seed: int) -> None:
        self.recording = recording
        self.resolution_ns = resolution_ns
        self.page_size = page_size
        self.rng = np.random.default_rng(seed)

    def expected(self) -> float:
        """Touches that the trace will have on average, those of idle memory apart."""
        return sum(
            math.ceil(snapshot.duration_ns / self.resolution_ns)
            * self._pages(region)
            * self._chance(region.share)
            for snapshot in self.recording.snapshots
            for region in snapshot.regions
        )

    def trace(self, *, ghz: float, writes: float, idle: bool, name: str) -> tuple[Trace, int]:
        """The trace, and how many pauses had to be cut to the longest that a trace can say."""
        steps = [step for step in self._steps(idle) if step[0].size]
        if not steps:
            raise InputError("no region was accessed in the recording", file=name)
        pages = np.concatenate([step[0] for step in steps])
        times = np.concatenate([step[1] for step in steps])
        begun = np.floor(np.maximum.accumulate(times) * ghz).astype(np.int64)
        gaps = np.diff(begun, prepend=0)
        cut = int((gaps > LONGEST_GAP).sum())
        write = self.rng.random(pages.size) < writes
        write[np.unique(pages, return_index=True)[1]] = True
        after = int(self.recording.duration_ns * ghz) - int(begun[-1])
        try:
            made = assemble(
                _compacted(pages, REGION_BYTES // self.page_size),
                write,
                np.minimum(gaps, LONGEST_GAP),
                page_size=self.page_size,
                instructions_after_last=max(0, after),
                program=f"DAMON target {self.recording.target}",
            )
        except ValueError as error:
            raise InputError(f"cannot be made a trace: {error}", file=name) from error
        return made, cut

    def _steps(self, idle: bool) -> Iterator[tuple[Int64s, npt.NDArray[np.float64]]]:
        """Pages touched, and when, in nanoseconds from the start of the recording."""
        origin_ns = self.recording.snapshots[0].start_ns
        if idle:
            yield self._spread(self._everything(), 0, 0)
        for snapshot in self.recording.snapshots:
            steps = max(1, math.ceil(snapshot.duration_ns / self.resolution_ns))
            length_ns = snapshot.duration_ns / steps
            warm = [region for region in snapshot.regions if region.share > 0]
            # A last step that is shorter than the others sees fewer pages.
            scale = length_ns / self.resolution_ns
            for step in range(steps):
                touched = [self._drawn(region, scale) for region in warm]
                at_ns = snapshot.start_ns - origin_ns + step * length_ns
                yield self._spread(touched, at_ns, length_ns)

    def _everything(self) -> list[Int64s]:
        """Every page that lies in a region of any snapshot, once."""
        ranges: list[tuple[int, int]] = []
        regions = (region for snapshot in self.recording.snapshots for region in snapshot.regions)
        for low, high in sorted({self._range(region) for region in regions}):
            if ranges and low <= ranges[-1][1]:
                ranges[-1] = (ranges[-1][0], max(high, ranges[-1][1]))
            else:
                ranges.append((low, high))
        total = sum(high - low for low, high in ranges)
        if total > MOST_TOUCHES:
            message = f"has {total:.3g} pages to touch, and {MOST_TOUCHES:.0e} touches are the most"
            raise InputError(message, key="--idle")
        return [np.arange(low, high) for low, high in ranges]

    def _drawn(self, region: Region, scale: float) -> Int64s:
        low, high = self._range(region)
        chance = self._chance(region.share, scale)
        if chance >= 1:
            return np.arange(low, high)
        return low + np.flatnonzero(self.rng.random(high - low) < chance)

    def _spread(
        self, touched: Sequence[Int64s], at_ns: float, length_ns: float
    ) -> tuple[Int64s, npt.NDArray[np.float64]]:
        pages = np.concatenate([np.zeros(0, np.int64), *touched])
        self.rng.shuffle(pages)
        return pages, at_ns + length_ns * (np.arange(pages.size) + 0.5) / max(1, pages.size)

    def _chance(self, share: float, scale: float = 1.0) -> float:
        if share >= 1:
            return 1.0
        samples = scale * self.resolution_ns / self.recording.sample_ns
        return float(-math.expm1(samples * math.log1p(-share)))

    def _pages(self, region: Region) -> int:
        low, high = self._range(region)
        return high - low

    def _range(self, region: Region) -> tuple[int, int]:
        return region.start // self.page_size, -(-region.end // self.page_size)


def _compacted(pages: Int64s, per_region: int) -> Int64s:
    """Page numbers after each region with a touch has become the next one, in address order."""
    rank = np.unique(pages // per_region, return_inverse=True)[1]
    compacted: Int64s = rank.reshape(-1) * per_region + pages % per_region
    return compacted
