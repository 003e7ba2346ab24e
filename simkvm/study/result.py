"""What people hold in their hands after a run: one point as a Result, a store of them as Results.

Both read their tables when asked and keep them; pandas is imported then and not before.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from simkvm.study.columns import COLUMNS, arrow_table, read_table
from simkvm.study.store import Entry, Store, plain, read_document
from simkvm.units import format_count, format_duration, format_rate, format_size

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from simkvm.observe.record import Record

Quantity = Literal["hold", "wait"]

SHOWN = (
    "touches_per_s",
    "ageing_pass_mean_ns",
    "mmu_lock_wait_p99_ns",
    "mmu_lock_hold_p99_ns",
    "grace_period_p99_ns",
    "deferred_bytes_peak",
    "safety",
)
"""Summary columns of the small table that a notebook shows."""

SHOWN_ROWS = 30


class Result:
    """One finished run.

    `axes` is its place in the study, by dotted key, as the file wrote the values; `certificate`
    says what was run, with which versions, and what its fingerprint is; `violations` is what the
    safety oracle found. Tables are DataFrames with the columns of `simkvm.observe.record.Record`.
    """

    def __init__(
        self,
        document: Mapping[str, Any],
        tables: Callable[[str], pd.DataFrame],
        axes: Mapping[str, Any] | None = None,
    ) -> None:
        self.certificate: dict[str, Any] = dict(document["certificate"])
        self.violations: list[dict[str, Any]] = list(document["violations"])
        self.axes: dict[str, Any] = dict(self.certificate.get("axes", {}) if axes is None else axes)
        self._summary: dict[str, Any] = dict(document["summary"])
        self._tables = tables

    @classmethod
    def from_record(
        cls,
        record: Record,
        certificate: Mapping[str, Any],
        axes: Mapping[str, Any] | None = None,
    ) -> Result:
        """The result of a run that was not stored. It equals the stored one in every value."""
        document = {
            "certificate": certificate,
            "summary": record.summary,
            "violations": record.violations,
        }

        def table(name: str) -> pd.DataFrame:
            frame: pd.DataFrame = arrow_table(name, getattr(record, name)).to_pandas()
            return frame

        return cls(plain(document), table, axes)

    @classmethod
    def from_folder(
        cls, path: str | os.PathLike[str], axes: Mapping[str, Any] | None = None
    ) -> Result:
        """The result in a point's folder. Raises Damaged if it is not whole."""
        folder = Path(path)
        return cls(read_document(folder), lambda name: read_table(folder, name), axes)

    @property
    def fingerprint(self) -> str:
        """Hash over the run's events, in hex."""
        return str(self.certificate["fingerprint"])

    @property
    def scenario(self) -> dict[str, Any]:
        """The resolved scenario that was run."""
        return dict(self.certificate["scenario"])

    @cached_property
    def summary(self) -> pd.Series[Any]:
        """One figure a name; the unit is in the name."""
        import pandas as pd

        return pd.Series(_numbers(self._summary), dtype=object, name=self.certificate.get("key"))

    @cached_property
    def locks(self) -> pd.DataFrame:
        """Waits, holds and queue lengths, one row a lock, call site and mode."""
        return self._tables("locks")

    @cached_property
    def histograms(self) -> pd.DataFrame:
        """Log-linear histograms of waits and holds, one row a bucket that is not empty."""
        return self._tables("histograms")

    @cached_property
    def timeline(self) -> pd.DataFrame:
        """Table memory over time as steps: a row's values hold from its t_ns on."""
        return self._tables("timeline")

    @cached_property
    def grace_periods(self) -> pd.DataFrame:
        """RCU's grace periods in order."""
        return self._tables("grace_periods")

    @cached_property
    def passes(self) -> pd.DataFrame:
        """Ageing passes in order."""
        return self._tables("passes")

    @cached_property
    def series(self) -> pd.DataFrame:
        """Touches, faults and retries since the start, sampled over time."""
        return self._tables("series")

    @cached_property
    def phases(self) -> pd.DataFrame:
        """What a selftest measured and printed, in order; empty for other workloads."""
        return self._tables("phases")

    def plot_lock(self, quantity: Quantity = "hold", ax: Axes | None = None) -> Axes:
        """Distribution of holds of (or waits for) mmu_lock, a line a call site."""
        from simkvm.show import figures

        return figures.lock_sites(self, quantity, ax=ax)

    def plot_deferred(self, ax: Axes | None = None) -> Axes:
        """Table memory that waits for grace periods, over time."""
        from simkvm.show import figures

        if ax is not None:
            return figures.deferred_panel(ax, self)
        return figures.deferred_memory(self).axes[0]

    def __repr__(self) -> str:
        return f"<Result {self.certificate.get('key', '')} {self._summary.get('safety', '')}>"

    def _repr_html_(self) -> str:
        rows = [(name, _people(name, value)) for name, value in self._summary.items()]
        title = str(self.scenario.get("name", "")) or self.fingerprint[:12]
        return _table(title, ("quantity", "value"), rows)


class Results:
    """The points of a store, in the order in which they were asked for, whichever finished first.

    Iterating yields the finished ones. Raises InputError if the folder holds no study.
    """

    def __init__(self, root: str | os.PathLike[str]) -> None:
        self.store = Store(root)
        self.manifest = self.store.manifest()

    @cached_property
    def points(self) -> list[Result]:
        """The finished points."""
        return [result for _, result in self._rows if result is not None]

    @cached_property
    def failed(self) -> list[dict[str, Any]]:
        """Why points have no result: key, axes, reason, attempts, where."""
        failures = (
            (entry, self.store.failure(entry.key)) for entry, result in self._rows if result is None
        )
        return [{**failure, "axes": entry.axes} for entry, failure in failures if failure]

    @cached_property
    def _rows(self) -> list[tuple[Entry, Result | None]]:
        return [(entry, self._result(entry)) for entry in self.manifest.entries]

    def _result(self, entry: Entry) -> Result | None:
        document = self.store.document(entry.key)
        if document is None:
            return None
        folder = self.store.folder(entry.key)
        return Result(document, lambda name: read_table(folder, name), entry.axes)

    def __iter__(self) -> Iterator[Result]:
        return iter(self.points)

    def __len__(self) -> int:
        return len(self.points)

    def __getitem__(self, index: int) -> Result:
        return self.points[index]

    @cached_property
    def summary(self) -> pd.DataFrame:
        """One row a point that was asked for: its axes, its summary, and a column `status`.

        The status is "done", "failed", or "missing" for a point that nobody has run yet.
        """
        import pandas as pd

        failed = {failure["key"] for failure in self.failed}
        rows = []
        for entry, result in self._rows:
            status = "done" if result else "failed" if entry.key in failed else "missing"
            found = _numbers(result._summary) if result else {}
            rows.append(self._place(entry.axes) | found | {"status": status})
        names = dict.fromkeys(name for row in rows for name in row if name != "status")
        return pd.DataFrame(rows, columns=[*(names or self.manifest.axes), "status"])

    @property
    def locks(self) -> pd.DataFrame:
        """`Result.locks` of all points, with the axes in front."""
        return self.table("locks")

    @property
    def histograms(self) -> pd.DataFrame:
        """`Result.histograms` of all points, with the axes in front."""
        return self.table("histograms")

    @property
    def timeline(self) -> pd.DataFrame:
        """`Result.timeline` of all points, with the axes in front."""
        return self.table("timeline")

    @property
    def grace_periods(self) -> pd.DataFrame:
        """`Result.grace_periods` of all points, with the axes in front."""
        return self.table("grace_periods")

    @property
    def passes(self) -> pd.DataFrame:
        """`Result.passes` of all points, with the axes in front."""
        return self.table("passes")

    @property
    def series(self) -> pd.DataFrame:
        """`Result.series` of all points, with the axes in front."""
        return self.table("series")

    @property
    def phases(self) -> pd.DataFrame:
        """`Result.phases` of all points, with the axes in front."""
        return self.table("phases")

    def table(self, name: str) -> pd.DataFrame:
        """One table of all finished points, in their order, with the axes in front."""
        import pandas as pd

        frames = [self._placed(result, getattr(result, name)) for result in self.points]
        full = [frame for frame in frames if len(frame)] or frames[:1]
        if not full:
            return pd.DataFrame(columns=[*self.manifest.axes, *COLUMNS[name]])
        return pd.concat(full, ignore_index=True)

    def _placed(self, result: Result, frame: pd.DataFrame) -> pd.DataFrame:
        place = self._place(result.axes)
        return frame.assign(**place)[[*place, *frame.columns]]

    def _place(self, axes: Mapping[str, Any]) -> dict[str, Any]:
        return {axis: axes.get(axis) for axis in self.manifest.axes}

    def plot_lock(self, quantity: Quantity = "hold", **options: Any) -> Figure:
        """Distribution of holds or waits, a panel a call site and a line a kernel variant."""
        from simkvm.show import figures

        return figures.lock_distribution(self, quantity, **options)

    def plot_deferred(self, **options: Any) -> Figure:
        """Table memory that waits for grace periods, over time, a panel a kernel variant."""
        from simkvm.show import figures

        return figures.deferred_memory(self, **options)

    def plot_ageing_scaling(self, **options: Any) -> Figure:
        """Time of an ageing pass, and of the guest, against the number of vCPUs."""
        from simkvm.show import figures

        return figures.ageing_scaling(self, **options)

    def plot_under_pressure(self, **options: Any) -> Figure:
        """Throughput and tail latency against the host's memory, a line a kernel variant."""
        from simkvm.show import figures

        return figures.under_pressure(self, **options)

    def plot_callback_cost(self, **options: Any) -> Figure:
        """Time of RCU callbacks that free tables, against the page size: of a table, of a GiB."""
        from simkvm.show import figures

        return figures.callback_cost(self, **options)

    def __repr__(self) -> str:
        asked = len(self.manifest.entries)
        return f"<Results {self.store.root.name}: {len(self)} of {asked} points>"

    def _repr_html_(self) -> str:
        frame = self.summary
        shown = [name for name in (*self.manifest.axes, *SHOWN, "status") if name in frame]
        rows = [
            [_people(name, row[name]) for name in shown]
            for row in frame.head(SHOWN_ROWS).to_dict("records")
        ]
        title = f"{', '.join(self.manifest.studies)}: {len(self)} of {len(frame)} points"
        more = len(frame) - len(rows)
        return _table(title, shown, rows) + (f"<p>… and {more} more</p>" if more else "")


def _numbers(summary: Mapping[str, Any]) -> dict[str, Any]:
    """With the gaps, which JSON calls null, as pandas knows them."""
    return {name: math.nan if value is None else value for name, value in summary.items()}


def _people(name: str, value: Any) -> str:
    if isinstance(value, str | bool) or value is None:
        return "" if value is None else str(value)
    if math.isnan(value):
        return ""
    for suffix, form in (
        ("_ns", format_duration),
        ("_bytes", format_size),
        ("_per_s", format_rate),
    ):
        if suffix in name:
            return form(value)
    return format_count(value)


def _table(title: str, head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A small HTML table; every text is somebody's, so every text is escaped."""

    def line(tag: str, cells: Sequence[str]) -> str:
        return "<tr>" + "".join(f"<{tag}>{escape(cell)}</{tag}>" for cell in cells) + "</tr>"

    body = "".join(line("td", row) for row in rows)
    return (
        f"<table><caption>{escape(title)}</caption>"
        f"<thead>{line('th', head)}</thead><tbody>{body}</tbody></table>"
    )
