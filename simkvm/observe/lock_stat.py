"""The account of one lock by call site and mode: what ``/proc/lock_stat`` would say, and more."""

from __future__ import annotations

import hashlib
from array import array
from typing import Any, Final

import numpy as np

from simkvm.kernel.qrwlock import FAST, ROW
from simkvm.kernel.sites import NAMES
from simkvm.observe.histogram import Histogram

MODES: Final = ("read", "write")
KEEP_ROWS: Final = 200_000  #: acquisitions kept raw before they are folded into histograms


class SiteStat:
    """Acquisitions of one site in one mode."""

    __slots__ = ("contended", "hold", "queue_max", "queue_total", "wait")

    def __init__(self) -> None:
        self.wait = Histogram()
        self.hold = Histogram()
        self.contended = 0
        self.queue_total = 0
        self.queue_max = 0


class LockStat:
    """Statistics of one lock, and a digest over every acquisition in order."""

    def __init__(self, guest: str, lock: str) -> None:
        self.guest = guest
        self.lock = lock
        self.sites: dict[tuple[int, int], SiteStat] = {}
        self._digest = hashlib.blake2b(digest_size=16)

    def absorb(self, rows: list[int], everything: bool = True) -> None:
        """Fold a lock's flat ``rows`` in and empty them; if not ``everything``, only many rows."""
        if not everything and len(rows) < KEEP_ROWS * ROW:
            return
        # By way of array: three times as fast as from a list of integers.
        table = np.frombuffer(array("q", rows), np.int64).reshape(-1, ROW)
        rows.clear()
        self._digest.update(table.astype("<i8").tobytes())
        kinds = table[:, 0] * len(MODES) + table[:, 1]
        for kind in np.flatnonzero(np.bincount(kinds)).tolist():
            site, mode = divmod(kind, len(MODES))
            part = table[kinds == kind]
            stat = self.sites.setdefault((site, mode), SiteStat())
            stat.wait.add(part[:, 3])
            stat.hold.add(part[:, 4])
            met = part[:, 5]
            stat.contended += int((met != FAST).sum())
            stat.queue_total += int(np.maximum(met, 0).sum())
            stat.queue_max = max(stat.queue_max, int(met.max()))

    @property
    def digest(self) -> bytes:
        """Digest over the acquisitions absorbed so far."""
        return self._digest.digest()

    def merged(self, quantity: str) -> Histogram:
        """``wait`` or ``hold`` of all sites together."""
        whole = Histogram()
        for stat in self.sites.values():
            whole.merge(getattr(stat, quantity))
        return whole

    def rows(self) -> list[dict[str, Any]]:
        """One row a site and mode, times in nanoseconds."""
        return [
            {
                "guest": self.guest,
                "lock": self.lock,
                "site": NAMES[site],
                "mode": MODES[mode],
                "acquisitions": stat.wait.number,
                "contended": stat.contended,
                **_quantiles("wait", stat.wait),
                **_quantiles("hold", stat.hold),
                "queue_mean": stat.queue_total / stat.wait.number,
                "queue_max": stat.queue_max,
            }
            for (site, mode), stat in sorted(self.sites.items())
        ]

    def histogram_rows(self) -> list[dict[str, Any]]:
        """One row a bucket."""
        return [
            {
                "guest": self.guest,
                "lock": self.lock,
                "site": NAMES[site],
                "mode": MODES[mode],
                "quantity": quantity,
                "low_ns": low,
                "high_ns": high,
                "count": count,
            }
            for (site, mode), stat in sorted(self.sites.items())
            for quantity in ("wait", "hold")
            for low, high, count in getattr(stat, quantity).rows()
        ]


def _quantiles(name: str, histogram: Histogram) -> dict[str, float | int]:
    return {
        f"{name}_mean_ns": histogram.mean,
        f"{name}_p50_ns": histogram.quantile(0.5),
        f"{name}_p99_ns": histogram.quantile(0.99),
        f"{name}_max_ns": histogram.largest,
        f"{name}_total_ns": histogram.total,
    }
