"""What memory pressure did to a run: reclaim's counts, its time by function, stalled tasks.

Counts have the names of /proc/vmstat. Shares of kswapd's time, and of that of all direct reclaimers
together, are laid out as ``perf report
--children`` has them: a function's share includes what it called, so they do not add up to one.
Stalls are what PSI calls so (kernel/sched/psi.c, v6.12): a task is in direct reclaim, or waits for
a page of the working set from swap. *some*: the share of the time in which a task stalls; *full*,
in which all vCPUs do, or with async page faults all their threads. The kernel's averages over CPUs
are other numbers.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Final

import numpy as np
from numpy.typing import NDArray

from simkvm.kernel.sched import FairScheduler
from simkvm.scenario.workloads import Memcached

if TYPE_CHECKING:
    from simkvm.kernel.pgdat import Pgdat
    from simkvm.kernel.world import World
    from simkvm.scenario.schema import Guest

Summary = dict[str, int | float | str]
FUNCTIONS: Final = (
    *("folio_referenced", "look_around", "notifier", "write_lock", "read_lock"),
    *("ageing", "unmap", "unmap_lock", "compression", "swap_writepage"),
)
"""Functions of reclaim whose time is accounted, by the names of their columns."""


def pressure_summary(world: World, end_ns: int) -> Summary:
    """Columns of the summary; none on a host that always has enough memory."""
    pgdat = world.pgdat
    if pgdat is None:
        return {}
    tasks = sum(map(_tasks, world.guests.values()))
    some, full = stalled_shares(np.array(pgdat.stalls, np.int64).reshape(-1, 2), tasks, end_ns)
    scanned = pgdat.vmstat.pgscan_kswapd + pgdat.vmstat.pgscan_direct
    stolen = pgdat.vmstat.pgsteal_kswapd + pgdat.vmstat.pgsteal_direct
    return {
        **vars(pgdat.vmstat),
        "allocstall": pgdat.pages.allocstalls,
        "allocstall_ns_total": pgdat.pages.stall_ns,
        "free_pages_min": pgdat.pages.lowest,
        "pages_stolen_ratio": stolen / scanned if scanned else math.nan,
        "psi_some_ratio": some,
        "psi_full_ratio": full,
        **_work(world, pgdat, scanned, stolen),
        **_kswapd(world, end_ns),
        "direct_reclaim_ns_total": pgdat.direct_ns,
        **_shares("direct_reclaim", pgdat.direct_functions, pgdat.direct_ns),
    }


def _tasks(guest: Guest) -> int:
    """What can stall of ``guest``: vCPUs, or their threads if each sleeps for itself."""
    if guest.async_pf and isinstance(guest.access, Memcached):
        return guest.vcpus * guest.access.threads
    return guest.vcpus


def _work(world: World, pgdat: Pgdat, scanned: int, stolen: int) -> Summary:
    """What taking a page took: ageing, and acquisitions of ``mmu_lock``."""
    walked_ns = sum(done.end_ns - done.start_ns for done in pgdat.passes)
    asked = sum(kvm.young_calls.locked for kvm in world.kvms)
    writes = sum(
        row["acquisitions"]
        for stat in world.recorder.locks.values()
        for row in stat.rows()
        if row["mode"] == "write"
    )
    return {
        "ageing_ns_per_stolen_page": walked_ns / stolen if stolen else math.nan,
        "young_calls_locked_per_scanned_page": asked / scanned if scanned else math.nan,
        "mmu_lock_writes_per_stolen_page": writes / stolen if stolen else math.nan,
    }


def _kswapd(world: World, end_ns: int) -> Summary:
    assert world.kswapd is not None
    kswapd = world.kswapd
    busy_ns, functions = kswapd.busy_until(end_ns), kswapd.task.functions or {}
    if isinstance(world.sched, FairScheduler):  # what it waited for a CPU is no work
        busy_ns = world.sched.threads[kswapd.task].run_ns
    return {
        "kswapd_busy_ratio": busy_ns / max(1, end_ns),
        **_shares("kswapd", functions, busy_ns),
    }


def _shares(whose: str, functions: Mapping[str, int], of_ns: int) -> Summary:
    return {
        f"{whose}_share_{name}_ratio": functions.get(name, 0) / of_ns if of_ns else math.nan
        for name in FUNCTIONS
    }


def stalled_shares(stalls: NDArray[np.int64], tasks: int, end_ns: int) -> tuple[float, float]:
    """Shares of ``[0, end_ns)`` in which some, and in which all of ``tasks`` are stalled.

    ``stalls``: begin and end of each, shape (n, 2); a task is in one at a time.
    """
    if not len(stalls) or end_ns <= 0:
        return 0.0, 0.0
    stalls = np.minimum(stalls, end_ns)
    times = stalls.ravel()
    steps = np.tile(np.array([1, -1], np.int64), len(stalls))
    order = np.lexsort((steps, times))
    times, waiting = times[order], np.cumsum(steps[order])
    spans = np.diff(np.append(times, end_ns))
    some = int(spans[waiting > 0].sum())
    full = int(spans[waiting >= tasks].sum())
    return some / end_ns, full / end_ns
