"""A latency distribution read back from the recorder's histogram rows."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pandas as pd

from simkvm.show.points import ResultLike

PERCENTILES = {"p50": 0.50, "p99": 0.99}

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Distribution:
    """Counts of whole nanoseconds in rising buckets [low_ns, high_ns), and the lock modes seen."""

    low_ns: Floats
    high_ns: Floats
    count: Floats
    modes: tuple[str, ...]

    @property
    def total(self) -> int:
        """How many values were recorded."""
        return int(self.count.sum())

    def quantile_ns(self, share: float) -> float:
        """What `share` of all values do not exceed, values taken as even within a bucket."""
        wanted = share * self.count.sum()
        reached = np.cumsum(self.count)
        i = min(int(np.searchsorted(reached, wanted)), len(self.count) - 1)
        inside = (wanted - reached[i] + self.count[i]) / self.count[i]
        return float(self.low_ns[i] + inside * (self._last_ns[i] - self.low_ns[i]))

    @property
    def _last_ns(self) -> Floats:
        return np.maximum(self.high_ns - 1, self.low_ns)

    def tail(self) -> tuple[Floats, Floats]:
        """The complementary distribution as a line: points x in ns, the share of values above x.

        Flat where buckets are empty and straight within one. Starts where a logarithmic axis can:
        if some did not wait at all, at 1 ns with the share of those that did.
        """
        above = self.count[::-1].cumsum()[::-1] / self.count.sum()
        x = np.column_stack([self.low_ns, self._last_ns]).ravel()
        y = np.column_stack([above, np.append(above[1:], above[-1])]).ravel()
        start = max(int((x < 1).sum()) - 1, 0)
        return np.maximum(x[start:], 1), y[start:]


def distribution(
    results: Iterable[ResultLike], site: str, quantity: str, *, lock: str = "mmu_lock"
) -> Distribution | None:
    """One site's holds or waits over all guests, modes and points; None if it took no lock."""
    rows = [_rows(result.histograms, site, quantity, lock) for result in results]
    table = pd.concat(rows) if rows else pd.DataFrame()
    if table.empty:
        return None
    return _merged(table)


def together(locks: pd.DataFrame, histograms: pd.DataFrame) -> pd.DataFrame:
    """The locks of several guests as if they were one: a row a call site and mode.

    Counts and maxima are exact, percentiles come from the histograms; the other columns of `locks`
    are left out.
    """
    rows = []
    for (site, mode), table in locks.groupby(["site", "mode"]):
        row = {"site": site, "mode": mode, "queue_max": table["queue_max"].max()}
        row |= {name: table[name].sum() for name in ("acquisitions", "contended")}
        here = histograms[(histograms["site"] == site) & (histograms["mode"] == mode)]
        for quantity in ("wait", "hold"):
            seen = _merged(here[(here["quantity"] == quantity) & (here["count"] > 0)])
            top = row[f"{quantity}_max_ns"] = table[f"{quantity}_max_ns"].max()
            for figure, share in PERCENTILES.items():
                row[f"{quantity}_{figure}_ns"] = min(top, seen.quantile_ns(share))
        rows.append(row)
    return pd.DataFrame(rows)


def _merged(table: pd.DataFrame) -> Distribution:
    merged = table.groupby(["low_ns", "high_ns"], sort=True)["count"].sum().reset_index()
    return Distribution(
        low_ns=merged["low_ns"].to_numpy(dtype=np.float64),
        high_ns=merged["high_ns"].to_numpy(dtype=np.float64),
        count=merged["count"].to_numpy(dtype=np.float64),
        modes=tuple(sorted(set(table["mode"]))),
    )


def site_figure(
    results: Sequence[ResultLike], site: str, quantity: str, figure: str, *, lock: str = "mmu_lock"
) -> float | None:
    """p50, p99 or max in ns of one site's waits or holds over all guests, modes and points.

    None if it never took the lock. A maximum is exact; so are the recorder's own percentiles, and
    those of several rows together come from their histograms, and are at most the maximum.
    """
    found = [result.locks for result in results]
    rows = pd.concat([t[(t["site"] == site) & (t["lock"] == lock)] for t in found])
    if rows.empty:
        return None
    top = float(rows[f"{quantity}_max_ns"].max())
    if figure == "max":
        return top
    if len(rows) == 1:
        return float(rows[f"{quantity}_{figure}_ns"].max())
    merged = distribution(results, site, quantity, lock=lock)
    return None if merged is None else min(top, merged.quantile_ns(PERCENTILES[figure]))


def _rows(histograms: pd.DataFrame, site: str, quantity: str, lock: str) -> pd.DataFrame:
    wanted = (
        (histograms["site"] == site)
        & (histograms["quantity"] == quantity)
        & (histograms["lock"] == lock)
        & (histograms["count"] > 0)
    )
    return histograms[wanted]
