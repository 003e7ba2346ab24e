"""Collects what the actors of a run tell, and makes the record of it."""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from simkvm.observe import requests
from simkvm.observe.lock_stat import LockStat
from simkvm.observe.pressure import pressure_summary
from simkvm.observe.record import PHASE_COLUMNS, Record, table
from simkvm.observe.table_memory import time_average
from simkvm.units import GIB, NS_PER_S

if TYPE_CHECKING:
    from simkvm.kernel.aging_call import Pass
    from simkvm.kernel.pgdat import Pgdat
    from simkvm.kernel.world import World

LOCK_COLUMNS = (
    *("guest", "lock", "site", "mode", "acquisitions", "contended"),
    *("wait_mean_ns", "wait_p50_ns", "wait_p99_ns", "wait_max_ns", "wait_total_ns"),
    *("hold_mean_ns", "hold_p50_ns", "hold_p99_ns", "hold_max_ns", "hold_total_ns"),
    *("queue_mean", "queue_max"),
)
HISTOGRAM_COLUMNS = ("guest", "lock", "site", "mode", "quantity", "low_ns", "high_ns", "count")
SERIES_COLUMNS = ("guest", "t_ns", "touches", "faults", "retries")
SELFTEST_PHASES = ("run1", "reset", "run2")  #: of max_guest_memory_test and mmu_stress_test
SAMPLES = 64  #: rows of the series of each guest, at most twice as many


@dataclass
class Recorder:
    """One run's notes. Flat lists of integers: a row costs no object."""

    grace_periods: list[tuple[int, int, int, int]] = field(default_factory=list)
    batches: list[tuple[int, int, int, int]] = field(default_factory=list)
    series: list[dict[str, Any]] = field(default_factory=list)
    locks: dict[str, LockStat] = field(default_factory=dict)
    phases: list[tuple[str, int, int, int, str]] = field(default_factory=list)

    def grace_period(self, number: int, start_ns: int, end_ns: int, scans: int) -> None:
        """A grace period ended."""
        self.grace_periods.append((number, start_ns, end_ns, scans))

    def batch(self, cpu: int, t_ns: int, callbacks: int, duration_ns: int) -> None:
        """A batch of callbacks was invoked."""
        self.batches.append((cpu, t_ns, callbacks, duration_ns))

    def phase(self, name: str, iteration: int, begin_ns: int, end_ns: int, line: str = "") -> None:
        """A selftest measured something, or printed ``line``."""
        self.phases.append((name, iteration, begin_ns, end_ns, line))

    def finish(self, world: World, end_ns: int) -> Record:
        """The record of ``world``, which ended at ``end_ns``."""
        for kvm in world.kvms:
            kvm.accesses.catch_up(end_ns, 0, 0)
        self.absorb(world, everything=True)
        passes = [
            *(world.ageing.passes if world.ageing else []),
            *(world.selftest.passes if world.selftest else []),
            *(world.pgdat.passes if world.pgdat else []),
        ]
        if world.pgdat is not None:
            self._generations(world.pgdat, end_ns)
        timeline = world.memory.timeline(end_ns)
        timeline["deferred_tables"] = timeline["deferred_bytes"] // min(
            kvm.table_bytes for kvm in world.kvms
        )
        violations = sorted(
            (v for kvm in world.kvms for v in kvm.oracle.violations), key=lambda v: v.time_ns
        )
        stats = [self.locks[kvm.name] for kvm in world.kvms]
        lock_rows = [row for stat in stats for row in stat.rows()]
        return Record(
            summary=self._summary(world, end_ns, passes, timeline),
            locks=table(LOCK_COLUMNS, lock_rows),
            histograms=table(
                HISTOGRAM_COLUMNS,
                [
                    *(row for stat in stats for row in stat.histogram_rows()),
                    *(row for kvm in world.kvms for row in requests.histogram_rows(kvm)),
                ],
            ),
            timeline={
                column: timeline[column].tolist()
                for column in (
                    *("t_ns", "deferred_tables", "deferred_bytes"),
                    *("reported_table_bytes", "table_bytes"),
                )
            },
            grace_periods=_columns(
                ("number", "start_ns", "end_ns", "fqs_scans"), self.grace_periods
            ),
            passes=_columns(
                ("guest", "start_ns", "end_ns", "scanned", "young", "calls", "idle"),
                [
                    (p.guest, p.start_ns, p.end_ns, p.scanned, p.young, p.calls, p.idle)
                    for p in passes
                ],
            ),
            series=table(SERIES_COLUMNS, self.series),
            violations=[violation._asdict() for violation in violations],
            fingerprint=self._fingerprint(world, passes),
            phases=_columns(PHASE_COLUMNS, self.phases),
        )

    def _generations(self, pgdat: Pgdat, end_ns: int) -> None:
        """What /sys/kernel/debug/lru_gen reads at the end."""
        from simkvm.kernel.lru_gen_file import generations

        for number, line in enumerate(generations(pgdat, end_ns)):
            self.phase("lru_gen", number, end_ns, end_ns, line)

    def absorb(self, world: World, everything: bool = False) -> None:
        """Fold the locks' raw accounts into statistics, so that memory stays bounded."""
        for kvm in world.kvms:
            stat = self.locks.setdefault(kvm.name, LockStat(kvm.name, "mmu_lock"))
            stat.absorb(kvm.mmu_lock.rows, everything)

    def sample(self, world: World, t_ns: int) -> None:
        """One row of the cumulative series for each guest."""
        for kvm in world.kvms:
            self.series.append(
                {
                    "guest": kvm.name,
                    "t_ns": t_ns,
                    "touches": sum(vcpu.touches_by(t_ns) for vcpu in kvm.vcpus),
                    "faults": sum(vcpu.fault.faults for vcpu in kvm.vcpus),
                    "retries": sum(vcpu.fault.retries for vcpu in kvm.vcpus),
                }
            )

    def _summary(
        self, world: World, end_ns: int, passes: list[Pass], timeline: dict[str, Any]
    ) -> dict[str, int | float | str]:
        vcpus = [vcpu for kvm in world.kvms for vcpu in kvm.vcpus]
        touches = sum(vcpu.touches for vcpu in vcpus)
        walls = [v.finished_ns if v.finished_ns >= 0 else end_ns for v in vcpus]
        lengths = np.array([end - start for _, start, end, _ in self.grace_periods] or [0])
        violations = sum(kvm.oracle.total for kvm in world.kvms)
        held = timeline["deferred_bytes"]
        callback_ns = sum(row[3] for row in self.batches)
        done = sum(kvm.tables_called_back for kvm in world.kvms)
        gone_gib = sum(kvm.unmapped_pages * kvm.page_bytes for kvm in world.kvms) / GIB
        return {
            "sim_ns": end_ns,
            "touches": touches,
            "touches_per_s": touches * NS_PER_S / max(1, *walls),
            "vcpu_wall_ns": round(float(np.mean(walls))),
            "faults": sum(vcpu.fault.faults for vcpu in vcpus),
            "fault_retries": sum(vcpu.fault.retries for vcpu in vcpus),
            "user_exits": sum(vcpu.fault.user_exits for vcpu in vcpus),
            "access_faults": sum(vcpu.access_faults for vcpu in vcpus),
            **requests.summary(world, end_ns),
            **_passes_summary(passes),
            **_young_summary(world),
            **self._selftest_summary(),
            **pressure_summary(world, end_ns),
            **self._lock_summary(world),
            **world.sched.summary(end_ns),
            "grace_periods": len(self.grace_periods),
            "grace_period_p50_ns": int(np.percentile(lengths, 50, method="lower")),
            "grace_period_p99_ns": int(np.percentile(lengths, 99, method="lower")),
            "callbacks": sum(row[2] for row in self.batches),
            "callback_batches": len(self.batches),
            "callback_ns_total": callback_ns,
            "callback_ns_per_table": callback_ns / done if done else math.nan,
            "callback_ns_per_unmapped_gib": callback_ns / gone_gib if gone_gib else math.nan,
            "tables_leaked": sum(kvm.tables_leaked for kvm in world.kvms),
            "collapses": sum(kvm.collapses for kvm in world.kvms),
            "splits": sum(kvm.splits for kvm in world.kvms),
            "deferred_tables_mean": time_average(
                timeline["t_ns"], timeline["deferred_tables"], end_ns
            ),
            "deferred_tables_peak": int(timeline["deferred_tables"].max()),
            "deferred_bytes_mean": time_average(timeline["t_ns"], held, end_ns),
            "deferred_bytes_peak": int(held.max()),
            "table_bytes_peak": int(timeline["table_bytes"].max()),
            "tables_allocated": sum(kvm.tables_allocated for kvm in world.kvms),
            "tables_freed": sum(kvm.tables_freed for kvm in world.kvms),
            "tlbi_broadcasts": world.remote_flush.broadcasts,
            "remote_flushes": world.remote_flush.flushes,
            "flush_interrupts": world.remote_flush.interrupts,
            "unmapped_pages": sum(kvm.unmapped_pages for kvm in world.kvms),
            "unmap_calls": sum(contender.calls for contender in world.contenders),
            "teardown_visits": sum(t.visits for t in world.teardowns),
            "teardown_longest_ns": max((t.longest_ns for t in world.teardowns), default=0),
            "teardown_walk_ns": max((t.walk_ns for t in world.teardowns), default=0),
            "events": world.events,
            "violations": violations,
            "safety": "violated" if violations else "clean",
        }

    def _selftest_summary(self) -> dict[str, int | float | str]:
        """How long those phases took that a selftest measures once; nan if there was none."""
        took: dict[str, int | float | str] = {f"{name}_ns": math.nan for name in SELFTEST_PHASES}
        for name, _, begin_ns, end_ns, _ in self.phases:
            if name in SELFTEST_PHASES:
                took[f"{name}_ns"] = end_ns - begin_ns
        return took

    def _lock_summary(self, world: World) -> dict[str, int | float | str]:
        stats = [self.locks[kvm.name] for kvm in world.kvms]
        summary: dict[str, int | float | str] = {}
        for quantity in ("wait", "hold"):
            whole = stats[0].merged(quantity)
            for stat in stats[1:]:
                whole.merge(stat.merged(quantity))
            summary[f"mmu_lock_{quantity}_p50_ns"] = whole.quantile(0.5)
            summary[f"mmu_lock_{quantity}_p99_ns"] = whole.quantile(0.99)
            summary[f"mmu_lock_{quantity}_max_ns"] = whole.largest
            summary[f"mmu_lock_{quantity}_total_ns"] = whole.total
        return summary

    def _fingerprint(self, world: World, passes: list[Pass]) -> str:
        digest = hashlib.blake2b(digest_size=16)
        for kvm in world.kvms:
            digest.update(kvm.name.encode())
            digest.update(self.locks[kvm.name].digest)
            vcpus = [(v.touches, v.fault.faults, v.finished_ns) for v in kvm.vcpus]
            digest.update(np.array(vcpus, "<i8").tobytes())
            for answers in requests.answers_of(kvm):
                digest.update(answers.digest)
        ageing = [(p.start_ns, p.end_ns, p.scanned, p.young, p.calls) for p in passes]
        for rows in (self.grace_periods, self.batches, ageing):
            digest.update(np.array(rows, "<i8").tobytes())
        if self.phases:
            digest.update(repr(self.phases).encode())
        return digest.hexdigest()


def _passes_summary(passes: list[Pass]) -> dict[str, int | float | str]:
    lengths = np.array([p.end_ns - p.start_ns for p in passes] or [0])
    return {
        "ageing_passes": len(passes),
        "ageing_pass_mean_ns": float(lengths.mean()),
        "ageing_pass_p50_ns": int(np.percentile(lengths, 50, method="lower")),
        "ageing_pass_max_ns": int(lengths.max()),
        "ageing_ns_per_page": int(lengths.sum()) / max(1, sum(p.scanned for p in passes)),
        "ageing_calls": sum(p.calls for p in passes),
        "scanned_pages": sum(p.scanned for p in passes),
        "young_pages": sum(p.young for p in passes),
        "skipped_tables": sum(p.skipped_tables for p in passes),
        "idle_pages": sum(p.idle for p in passes),
    }


def _young_summary(world: World) -> dict[str, int | float | str]:
    """How the guests were asked: fallback calls, which take the lock after all, are locked ones."""
    calls = [kvm.young_calls for kvm in world.kvms]
    return {
        "young_calls_locked": sum(call.locked for call in calls),
        "young_calls_lockless": sum(call.lockless for call in calls),
        "young_calls_fallback": sum(call.fallback for call in calls),
        "failed_cmpxchgs": sum(kvm.races.failed for kvm in world.kvms if kvm.races is not None),
    }


def _columns(names: tuple[str, ...], rows: list[tuple[Any, ...]]) -> dict[str, list[Any]]:
    return {name: [row[place] for row in rows] for place, name in enumerate(names)}
