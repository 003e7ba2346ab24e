"""One figure of a result by its name: `ageing_pass_mean_ns` is a column of the summary,
`fault.wait_p99_ns` a column of the locks, of all guests and both modes of one call site.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING

from simkvm.kernel.sites import NAMES as SITES
from simkvm.scenario.errors import InputError, nearest
from simkvm.study.columns import COLUMNS

if TYPE_CHECKING:
    import pandas as pd

    from simkvm.study.result import Result

LOCK_COLUMNS = tuple(
    column for column in COLUMNS["locks"] if column not in ("guest", "lock", "site", "mode")
)
QUANTILES = {"p50": 0.5, "p99": 0.99}


@dataclass(frozen=True)
class Metric:
    """A figure that every result has; `site` is None for one of the summary."""

    name: str
    site: str | None
    column: str

    @classmethod
    def named(cls, name: str) -> Metric:
        """The metric of that name. Raises InputError, with the nearest name, if there is none."""
        if name in summary_columns():
            return cls(name, None, name)
        site, dot, column = name.partition(".")
        if dot and site in SITES and column in LOCK_COLUMNS:
            return cls(name, site, column)
        hint = nearest(name, names())
        raise InputError(f"no metric '{name}'", key="metric", hint=hint)

    def of(self, result: Result) -> float:
        """Its value in a finished run; nan if there is none, as of a site that took no lock."""
        if self.site is None:
            return float(result.summary.get(self.column, math.nan))
        locks = result.locks
        rows = locks[locks["site"] == self.site]
        if rows.empty:
            return math.nan
        return _together(rows, self.column, result.histograms, self.site)


def names() -> list[str]:
    """Every metric: the summary's first, then those of each call site."""
    return [*summary_columns(), *(f"{site}.{column}" for site in SITES for column in LOCK_COLUMNS)]


@cache  # the same for every scenario
def summary_columns() -> tuple[str, ...]:
    """Names of the summary's numbers, as the smallest run there is yields them."""
    from simkvm.scenario.schema import Scenario
    from simkvm.study.point import run_point

    guest = {"memory": 1 << 20, "access": {"pattern": "populate"}}
    least = {
        "name": "least",
        "machine": "ampere-altra-80c",
        "kernel": "linux-6.12",
        "guests": {"vm0": guest},
    }
    summary = run_point(Scenario.model_validate(least)).summary
    return tuple(name for name, value in summary.items() if not isinstance(value, str))


def _together(rows: pd.DataFrame, column: str, histograms: pd.DataFrame, site: str) -> float:
    """One column of several guests and modes: sums, maxima, weighted means, merged quantiles."""
    if len(rows) == 1:
        return float(rows[column].iloc[0])
    if column in ("acquisitions", "contended") or column.endswith("_total_ns"):
        return float(rows[column].sum())
    if column.endswith(("_max", "_max_ns")):
        return float(rows[column].max())
    if "_mean" in column:
        weights = rows["acquisitions"]
        return float((rows[column] * weights).sum() / weights.sum())
    quantity, figure, _ = column.split("_")
    here = histograms[(histograms["site"] == site) & (histograms["quantity"] == quantity)]
    merged = here.groupby("high_ns", sort=True)["count"].sum()
    reached = merged.cumsum()
    top = reached.index[reached >= QUANTILES[figure] * merged.sum()][0] - 1
    return float(min(top, rows[f"{quantity}_max_ns"].max()))
