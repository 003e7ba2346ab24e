"""Results as a run would yield them, made up: for tests of what shows results, which never
simulate.

Holds and waits are log-normal, bucketed as the recorder does; deferred tables pile up within 8 ms
grace periods and leave at their ends.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pandas as pd

GRACE_NS = 8_000_000
KERNELS = ("linux-7.1", "linux-7.1-read-locked", "linux-7.1-lockless")

#           site: (mode, acquisitions, median hold, spread, median wait, contended share)
SITES: dict[str, tuple[str, int, float, float, float, float]] = {
    "fault": ("read", 60_000, 900.0, 0.45, 2_500.0, 0.35),
    "range_start": ("write", 2_000, 60_000.0, 0.8, 9_000.0, 0.6),
    "range_end": ("write", 2_000, 90.0, 0.2, 4_000.0, 0.5),
    "age": ("write", 150_000, 320.0, 0.35, 1_200.0, 0.4),
}


@dataclass
class SyntheticResult:
    """The attributes of a Result, and nothing of its behaviour."""

    summary: pd.Series
    locks: pd.DataFrame
    histograms: pd.DataFrame
    timeline: pd.DataFrame
    grace_periods: pd.DataFrame
    passes: pd.DataFrame
    series: pd.DataFrame
    violations: list[dict[str, Any]]
    fingerprint: str
    scenario: dict[str, Any]
    axes: dict[str, Any]


@dataclass
class SyntheticResults:
    """The attributes of Results that figures and tables read."""

    points: list[SyntheticResult]
    failed: list[dict[str, Any]] = field(default_factory=list)

    def __iter__(self):
        return iter(self.points)

    def __len__(self) -> int:
        return len(self.points)


def edges_ns(top: int = 1 << 34) -> np.ndarray:
    """Edges of a log-linear histogram: every ns to 32, then 32 buckets an octave."""
    edges = list(range(32))
    width = 1
    while edges[-1] < top:
        start = edges[-1] + (1 if width == 1 else width)
        edges += [start + i * width for i in range(32)]
        width *= 2
    return np.unique(np.array(edges, dtype=np.int64))


def bucketed(values: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    edges = edges_ns()
    counts, _ = np.histogram(values, edges)
    kept = counts > 0
    return edges[:-1][kept], edges[1:][kept], counts[kept]


def site_values(
    site: str, kernel: str, load: float, rng: np.random.Generator, scale: float
) -> tuple[str, np.ndarray, np.ndarray] | None:
    """Mode, holds and waits of one site, or None where this kernel takes no lock there."""
    mode, times, hold, spread, wait, contended = SITES[site]
    if site == "age" and kernel.endswith("lockless"):
        return None
    if site == "age" and kernel.endswith("read-locked"):
        mode, wait, contended = "read", wait / 3, contended / 3
    if kernel.endswith("lockless"):
        wait, contended = wait / 2, contended / 2
    n = max(int(times * scale), 50)
    holds = rng.lognormal(np.log(hold), spread, n)
    waits = rng.lognormal(np.log(wait * load), 1.1, n) * (rng.random(n) < contended)
    return mode, holds.astype(np.int64), waits.astype(np.int64)


def deferral(
    rate: float, lockless: bool, rng: np.random.Generator, sim_ns: int
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Timeline : tables wait for the end of the grace period after the next start."""
    starts = np.arange(0, sim_ns, GRACE_NS) + rng.integers(0, 400_000)
    grace = pd.DataFrame(
        {
            "number": np.arange(len(starts)),
            "start_ns": starts,
            "end_ns": starts + GRACE_NS - 150_000,
            "fqs_scans": 2,
        }
    )
    unlinks = (
        np.sort(rng.integers(0, sim_ns, int(rate * sim_ns / 1e9))) if lockless else np.array([])
    )
    steps: dict[int, int] = {0: 0}
    starts_ns, ends_ns = grace["start_ns"].to_numpy(), grace["end_ns"].to_numpy()
    for t in unlinks:
        following = int(np.searchsorted(starts_ns, t))
        steps[int(t)] = steps.get(int(t), 0) + 1
        if following < len(ends_ns):
            freed = int(ends_ns[following])
            steps[freed] = steps.get(freed, 0) - 1
    times = sorted(t for t in steps if t < sim_ns)
    tables = np.cumsum([steps[t] for t in times])
    timeline = pd.DataFrame(
        {
            "t_ns": times,
            "deferred_tables": tables,
            "deferred_bytes": tables * 4096,
            "reported_table_bytes": 8 << 20,
            "table_bytes": (8 << 20) + tables * 4096,
        }
    )
    return timeline, grace


def result(
    kernel: str = "linux-7.1",
    *,
    vcpus: int = 8,
    rate: float = 2_000.0,
    axes: dict[str, Any] | None = None,
    seed: int = 1,
    replication: int = 0,
    guests: int = 1,
    sim_ns: int = 200_000_000,
    violations: list[dict[str, Any]] | None = None,
    expect: str = "safe",
    scale: float = 0.05,
) -> SyntheticResult:
    rng = np.random.default_rng([seed, replication, vcpus, len(kernel)])
    names = [f"vm{i}" for i in range(guests)]
    lockless = kernel.endswith("lockless")
    locks, histograms = _lock_tables(names, kernel, vcpus / 8, rng, scale)
    timeline, grace = deferral(rate, lockless, rng, sim_ns)
    passes = _passes(names, vcpus, lockless, rng, sim_ns)
    return SyntheticResult(
        summary=_summary(
            kernel,
            vcpus=vcpus,
            locks=locks,
            timeline=timeline,
            grace=grace,
            passes=passes,
            sim_ns=sim_ns,
            violations=violations,
        ),
        locks=locks,
        histograms=histograms,
        timeline=timeline,
        grace_periods=grace,
        passes=passes,
        series=_series(names, sim_ns),
        violations=violations or [],
        fingerprint=hashlib.sha256(
            f"{kernel}{vcpus}{rate}{seed}{replication}".encode()
        ).hexdigest(),
        scenario={
            "name": "synthetic",
            "description": "made up",
            "seed": seed,
            "replication": replication,
            "machine": "ampere-altra",
            "kernel": kernel,
            "duration": sim_ns,
            "guests": {
                name: {
                    "vcpus": vcpus,
                    "memory": 8 << 30,
                    "page_size": 4096,
                    "mapping": 4096,
                    "access": {"pattern": "zipf", "touches": None},
                }
                for name in names
            },
            "expect": expect,
        },
        axes=axes or {},
    )


def _lock_tables(
    names: list[str], kernel: str, load: float, rng: np.random.Generator, scale: float
) -> tuple[pd.DataFrame, pd.DataFrame]:
    locks: list[dict[str, Any]] = []
    rows: list[pd.DataFrame] = []
    for guest in names:
        for site in SITES:
            values = site_values(site, kernel, load, rng, scale)
            if values is None:
                continue
            mode, holds, waits = values
            locks.append(_lock_row(guest, site, mode, holds, waits))
            for quantity, data in (("hold", holds), ("wait", waits)):
                low, high, count = bucketed(data)
                rows.append(
                    pd.DataFrame(
                        {
                            "guest": guest,
                            "lock": "mmu_lock",
                            "site": site,
                            "mode": mode,
                            "quantity": quantity,
                            "low_ns": low,
                            "high_ns": high,
                            "count": count,
                        }
                    )
                )
    return pd.DataFrame(locks), pd.concat(rows, ignore_index=True)


def _lock_row(
    guest: str, site: str, mode: str, holds: np.ndarray, waits: np.ndarray
) -> dict[str, Any]:
    row: dict[str, Any] = {
        "guest": guest,
        "lock": "mmu_lock",
        "site": site,
        "mode": mode,
        "acquisitions": len(holds),
        "contended": int((waits > 0).sum()),
        "queue_mean": 0.8,
        "queue_max": 5,
    }
    for name, data in (("wait", waits), ("hold", holds)):
        row |= {
            f"{name}_mean_ns": float(data.mean()),
            f"{name}_p50_ns": int(np.percentile(data, 50)),
            f"{name}_p99_ns": int(np.percentile(data, 99)),
            f"{name}_max_ns": int(data.max()),
            f"{name}_total_ns": int(data.sum()),
        }
    return row


def _passes(
    names: list[str], vcpus: int, lockless: bool, rng: np.random.Generator, sim_ns: int
) -> pd.DataFrame:
    rows = []
    for guest in names:
        t = 0
        while t < sim_ns * 0.9:
            took = int(4_000_000 * (1 if lockless else 1 + vcpus / 6) * rng.uniform(0.9, 1.2))
            rows.append((guest, t, t + took, 200_000, 40_000, 3_200))
            t += took
    return pd.DataFrame(rows, columns=["guest", "start_ns", "end_ns", "scanned", "young", "calls"])


def _series(names: list[str], sim_ns: int) -> pd.DataFrame:
    rows = [
        (guest, t, t // 500 * (1 + i), t // 40_000, t // 4_000_000)
        for i, guest in enumerate(names)
        for t in (0, sim_ns // 2, sim_ns)
    ]
    return pd.DataFrame(rows, columns=["guest", "t_ns", "touches", "faults", "retries"])


def _summary(
    kernel: str,
    *,
    vcpus: int,
    locks: pd.DataFrame,
    timeline: pd.DataFrame,
    grace: pd.DataFrame,
    passes: pd.DataFrame,
    sim_ns: int,
    violations: list[dict[str, Any]] | None,
) -> pd.Series:
    width = np.diff(np.append(timeline["t_ns"], sim_ns))
    took = passes["end_ns"] - passes["start_ns"]
    lasted = grace["end_ns"] - grace["start_ns"]
    lockless = kernel.endswith("lockless")
    return pd.Series(
        {
            "sim_ns": sim_ns,
            "touches": sim_ns // 500,
            "touches_per_s": 2e6 * vcpus / (1 if lockless else 1.2),
            "vcpu_wall_ns": int(sim_ns * (0.5 + (0.02 if lockless else 0.09) * vcpus)),
            "faults": 5_000,
            "fault_retries": 50,
            "ageing_passes": len(passes),
            "ageing_pass_mean_ns": float(took.mean()),
            "ageing_pass_p50_ns": float(took.median()),
            "ageing_pass_max_ns": int(took.max()),
            "ageing_ns_per_page": 150.0,
            "ageing_calls": int(passes["calls"].sum()),
            "young_pages": int(passes["young"].sum()),
            "mmu_lock_wait_p50_ns": 0,
            "mmu_lock_wait_p99_ns": int(locks["wait_p99_ns"].max()),
            "mmu_lock_wait_max_ns": int(locks["wait_max_ns"].max()),
            "mmu_lock_hold_p50_ns": int(locks["hold_p50_ns"].min()),
            "mmu_lock_hold_p99_ns": int(locks["hold_p99_ns"].max()),
            "mmu_lock_hold_max_ns": int(locks["hold_max_ns"].max()),
            "grace_periods": len(grace),
            "grace_period_p50_ns": int(lasted.median()),
            "grace_period_p99_ns": int(lasted.max()),
            "callbacks": int(timeline["deferred_tables"].max()) * 3,
            "callback_ns_total": int(timeline["deferred_tables"].max()) * 300,
            "callback_ns_per_table": 100.0 * vcpus,
            "callback_ns_per_unmapped_gib": 50_000.0 / vcpus,
            "deferred_tables_mean": float((timeline["deferred_tables"] * width).sum() / sim_ns),
            "deferred_tables_peak": int(timeline["deferred_tables"].max()),
            "deferred_bytes_mean": float((timeline["deferred_bytes"] * width).sum() / sim_ns),
            "deferred_bytes_peak": int(timeline["deferred_bytes"].max()),
            "tables_allocated": 4_096,
            "tables_freed": 2_048,
            "tlbi_broadcasts": 120_000,
            "unmapped_pages": 1_024_000,
            "events": 1_234_567,
            "safety": "violated" if violations else "clean",
        }
    )


def violation(kind: str = "use_after_free", time_ns: int = 12_345_678) -> dict[str, Any]:
    return {
        "kind": kind,
        "time_ns": time_ns,
        "guest": "vm0",
        "message": "the ageing walker reads table 17 (level 3) after its page was freed",
        "timeline": [
            "12.301 ms  ageing: enters table 17",
            "12.333 ms  madvise: unlinks table 17",
            "12.334 ms  madvise: frees the page of table 17 inline",
            "12.345 ms  ageing: reads entry 211 of table 17",
        ],
    }


def kernel_sweep(
    kernels: tuple[str, ...] = KERNELS,
    vcpus: tuple[int, ...] = (1, 2, 4, 8, 16, 32),
    **options: Any,
) -> SyntheticResults:
    """Kernels against vCPUs, first axis slowest, as `simkvm sweep` yields them."""
    return SyntheticResults(
        [
            result(kernel, vcpus=n, axes={"kernel": kernel, "guests.vm0.vcpus": n}, **options)
            for kernel in kernels
            for n in vcpus
        ]
    )


def rate_sweep(
    kernels: tuple[str, ...] = ("linux-7.1", "linux-7.1-lockless"),
    rates: tuple[str, ...] = ("200 / s", "1000 / s", "5 / ms", "20 / ms"),
    **options: Any,
) -> SyntheticResults:
    """Kernels against the rate of unmaps."""
    factor = {"s": 1, "ms": 1000}
    return SyntheticResults(
        [
            result(
                kernel,
                rate=float(rate.split(" / ")[0]) * factor[rate.split(" / ")[1]],
                axes={"kernel": kernel, "contenders.unmap.rate": rate},
                **options,
            )
            for kernel in kernels
            for rate in rates
        ]
    )


def memory_sweep(
    kernels: tuple[str, ...] = ("linux-7.1", "linux-7.1-lockless"),
    sizes: tuple[str, ...] = ("64 MiB", "56 MiB", "48 MiB"),
) -> SyntheticResults:
    """Kernels against the host's memory, with a server whose clients feel it."""
    found = []
    for kernel in kernels:
        for number, size in enumerate(sizes):
            made = result(kernel, axes={"kernel": kernel, "host.memory.size": size})
            pressed(made, number, kernel.endswith("lockless"))
            found.append(made)
    return SyntheticResults(found)


def pressed(made: SyntheticResult, number: int, lockless: bool) -> None:
    """Let a result tell of requests and of pages that were stolen, the more the higher `number`."""
    slower = (1 + number) * (1 if lockless else 1.3)
    made.summary["requests_per_s"] = 1e6 / slower
    made.summary["latency_p99_ns"] = 8e4 * slower
    made.summary["latency_p999_ns"] = 2e5 * slower**4
    made.summary["pgsteal_kswapd"] = 1000 * number


def page_size_sweep(
    kernels: tuple[str, ...] = ("linux-7.1-lockless",),
    sizes: tuple[str, ...] = ("4 KiB", "16 KiB", "64 KiB"),
) -> SyntheticResults:
    """Kernels that free tables by RCU against the page size."""
    return SyntheticResults(
        [
            result(
                kernel,
                vcpus=1 << number,
                rate=1000.0,
                axes={"kernel": kernel, "guests.vm0.page_size": size},
            )
            for kernel in kernels
            for number, size in enumerate(sizes)
        ]
    )
