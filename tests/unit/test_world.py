"""A world: who gets which CPU, when a run is over, and what its record says."""

from __future__ import annotations

from collections import Counter
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from lab import world

from simkvm.kernel.world import World
from simkvm.observe.record import Record
from simkvm.observe.recorder import SAMPLES
from simkvm.scenario.errors import InputError
from simkvm.study.columns import COLUMNS
from simkvm.units import MIB

GUEST = {"memory": MIB, "access": {"pattern": "populate", "repeat": 3, "think": 500}}
LARGE = {"memory": 4 * MIB, "access": {"pattern": "populate", "repeat": 5, "think": 4000}}
BUSY: dict[str, Any] = {
    "guests": {"a": LARGE | {"vcpus": 3}, "b": GUEST},
    "ageing": {"interval": 50_000},
    "contenders": {"c": {"kind": "madvise_dontneed", "guest": "a", "range": 2 * MIB, "rate": 5000}},
    "kernel": "linux-6.4-yuzhao-v2",
}


def run(**keys: Any) -> tuple[World, Record]:
    built = world(**keys)
    return built, built.run()


@pytest.fixture(scope="module")
def busy() -> tuple[World, Record]:
    return run(**BUSY)


# -- building ---------------------------------------------------------------------------------


def test_a_kernel_needs_its_architecture() -> None:
    with pytest.raises(InputError, match=r"linux-6\.12 is for arm64.*x86-icelake-64c is x86"):
        world(machine="x86-icelake-64c")


def test_everybody_has_a_cpu_vcpus_first() -> None:
    built = world(**BUSY)
    vcpus = [vcpu.cpu.id for kvm in built.kvms for vcpu in kvm.vcpus]
    assert vcpus == [0, 1, 2, 3]
    assert [vcpu.task.name for vcpu in built.kvms[0].vcpus] == ["a/vcpu0", "a/vcpu1", "a/vcpu2"]
    assert [contender.task.cpu.id for contender in built.contenders] == [5], "ageing has CPU 4"
    assert len(built.cpus) == 64
    assert len(world(host={"cpus": 3}).cpus) == 3


@pytest.mark.parametrize("nohz_full", ["none", "vcpus"])
def test_nohz_full_is_for_cpus_of_vcpus(nohz_full: str) -> None:
    built = world(host={"nohz_full": nohz_full}, guest={"vcpus": 3}, ageing={})
    tickless = [cpu.id for cpu in built.cpus if cpu.nohz_full]
    assert tickless == ([0, 1, 2] if nohz_full == "vcpus" else [])


@pytest.mark.parametrize(
    ("host", "offloaded"),
    [
        ({}, 0),
        ({"nohz_full": "vcpus"}, 3),
        ({"rcu": {"nocbs": "vcpus"}}, 3),
        ({"rcu": {"nocbs": "all"}}, 8),
        ({"nohz_full": "vcpus", "rcu": {"nocbs": "all"}}, 8),
    ],
)
def test_callbacks_are_offloaded_as_asked_and_where_there_is_no_tick(
    host: dict[str, Any], offloaded: int
) -> None:
    built = world(host={"cpus": 8, **host}, guest={"vcpus": 3})
    assert [cpu.offloaded for cpu in built.cpus] == [n < offloaded for n in range(8)]
    tickless = 3 if "nohz_full" in host else 0
    assert [cpu.nohz_full for cpu in built.cpus] == [n < tickless for n in range(8)]


@pytest.mark.parametrize(
    ("preemption", "said", "rcu", "breaks"),
    [
        ("none", None, False, False),
        ("voluntary", None, False, False),
        ("full", None, True, True),
        ("lazy", None, True, True),
        ("none", True, True, False),  # PREEMPT_DYNAMIC, preempt=none
        ("none", False, False, False),
    ],
)
def test_preemptible_rcu_is_built_in_and_lock_breaking_is_a_matter_of_run_time(
    preemption: str, said: bool | None, rcu: bool, breaks: bool
) -> None:
    built = world(host={"preemption": preemption, "rcu": {"preemptible": said}})
    assert built.kernel["lock_break"] == "runtime"
    assert (built.rcu._config.preemptible, built.kvms[0].break_lock) == (rcu, breaks)


@pytest.mark.parametrize(("policy", "freed"), [("call_rcu", False), ("call_rcu_hurry", True)])
def test_tables_wait_with_lazy_callbacks_unless_they_hurry(policy: str, freed: bool) -> None:
    _, record = run(
        kernel={"base": "linux-6.4-yuzhao-v2", "set": {"table_callback": policy}},
        host={"rcu": {"nocbs": "all", "lazy": True}},
        guest={"memory": 8 * MIB, "access": {"pattern": "uniform", "think": 2_000}},
        contenders={
            "vmm": {"kind": "madvise_dontneed", "guest": "vm", "range": 2 * MIB, "rate": 200.0}
        },
        duration=100_000_000,
    )
    assert record.summary["tables_allocated"] > 10
    assert (record.summary["tables_freed"] > 0) is freed


def test_cpus_lie_on_the_nodes_of_the_machine() -> None:
    built = world()
    per_node = built.machine.cores // built.machine.nodes
    assert [cpu.node for cpu in built.cpus] == [n // per_node for n in range(built.machine.cores)]


def test_guest_memory_may_be_given_by_vcpu() -> None:
    guest = {"memory": None, "memory_per_vcpu": MIB, "vcpus": 3}
    kvm = world(guest=guest).kvms[0]
    assert (kvm.pages, kvm.leaves) == (768, 768)
    blocks = world(guest={"memory": 64 * MIB, "mapping": 2 * MIB}).kvms[0]
    assert (blocks.pages, blocks.leaves, blocks.leaf_pages) == (16384, 32, 512)


# -- the end ----------------------------------------------------------------------------------


def test_a_run_is_over_when_the_vcpus_are() -> None:
    built, record = run(guest=GUEST | {"vcpus": 2})
    ends = [vcpu.finished_ns for vcpu in built.kvms[0].vcpus]
    assert record.summary["sim_ns"] == max(ends)
    assert record.summary["vcpu_wall_ns"] == round(np.mean(ends))
    assert record.summary["touches"] == 3 * 256


def test_a_pass_that_has_begun_is_finished() -> None:
    built, record = run(guest=GUEST, ageing={})
    last = built.ageing.passes[-1]
    finished = built.kvms[0].vcpus[0].finished_ns
    assert last.start_ns <= finished
    assert record.summary["sim_ns"] == max(finished, last.end_ns)


@pytest.mark.parametrize("duration", [1, 100_000, 1_000_000, 50_000_000])
def test_a_duration_is_exact(duration: int) -> None:
    access = {"pattern": "uniform", "touches": None, "think": 500}
    built, record = run(guest={"memory": MIB, "access": access}, duration=duration)
    assert record.summary["sim_ns"] == duration
    assert record.summary["vcpu_wall_ns"] == duration, "it never finished"
    touch = built.kvms[0].costs.touch_ns + 500
    assert int(record.summary["touches"]) <= duration // touch + 1
    if duration == 50_000_000:
        assert int(record.summary["touches"]) > 0.9 * duration / touch


ZIPF: dict[str, Any] = {
    "guest": {"memory": MIB, "vcpus": 2, "access": {"pattern": "zipf", "think": 500}},
    "ageing": {"interval": 100_000},
}


def early_passes(duration: int) -> list[tuple[int, int]]:
    """Begin and end of the passes of the first 1.9 ms."""
    _, record = run(**ZIPF, duration=duration)
    passes = zip(record.passes["start_ns"], record.passes["end_ns"], strict=True)
    return [times for times in passes if times[1] < 1_900_000]


def test_a_longer_run_begins_with_the_shorter_one() -> None:
    shorter, longer = early_passes(2_000_000), early_passes(4_000_000)
    assert len(shorter) > 5
    assert shorter == longer


# -- the record -------------------------------------------------------------------------------


def test_tables_have_their_columns(busy: tuple[World, Record]) -> None:
    _, record = busy
    for name, columns in COLUMNS.items():
        table = getattr(record, name)
        assert tuple(table) == columns, name
        assert len({len(column) for column in table.values()}) == 1, name


SUMMARY = {
    *("sim_ns", "touches", "touches_per_s", "vcpu_wall_ns", "faults", "fault_retries"),
    *("ageing_passes", "ageing_pass_mean_ns", "ageing_pass_p50_ns", "ageing_pass_max_ns"),
    *("ageing_calls", "young_pages", "mmu_lock_wait_p50_ns", "mmu_lock_wait_p99_ns"),
    *("mmu_lock_wait_max_ns", "mmu_lock_hold_p50_ns", "mmu_lock_hold_p99_ns"),
    *("mmu_lock_hold_max_ns", "grace_periods", "grace_period_p50_ns", "grace_period_p99_ns"),
    *("callbacks", "deferred_tables_mean", "deferred_tables_peak", "deferred_bytes_mean"),
    *("deferred_bytes_peak", "tables_allocated", "tables_freed", "tlbi_broadcasts"),
    *("unmapped_pages", "events", "safety"),
}


def test_the_summary_is_complete_and_plain(busy: tuple[World, Record]) -> None:
    _, record = busy
    assert set(record.summary) >= SUMMARY
    assert {type(value) for value in record.summary.values()} <= {int, float, str}


def test_the_summary_agrees_with_the_tables(busy: tuple[World, Record]) -> None:
    built, record = busy
    summary, locks, passes = record.summary, record.locks, record.passes
    taken: Counter[str] = Counter()
    for site, number in zip(locks["site"], locks["acquisitions"], strict=True):
        taken[site] += number
    assert taken["fault"] == summary["faults"]
    assert taken["range_start"] == taken["range_end"]
    assert max(locks["wait_max_ns"]) == summary["mmu_lock_wait_max_ns"]
    assert max(locks["hold_max_ns"]) == summary["mmu_lock_hold_max_ns"]
    assert len(passes["start_ns"]) == summary["ageing_passes"]
    assert sum(passes["calls"]) == summary["ageing_calls"]
    assert sum(passes["young"]) == summary["young_pages"]
    assert len(record.grace_periods["number"]) == summary["grace_periods"]
    assert sum(record.histograms["count"]) == 2 * sum(locks["acquisitions"])
    assert max(record.timeline["deferred_bytes"]) == summary["deferred_bytes_peak"]
    assert summary["deferred_bytes_peak"] == 4096 * int(summary["deferred_tables_peak"])
    assert summary["touches"] == sum(v.touches for kvm in built.kvms for v in kvm.vcpus)
    assert summary["safety"] == "clean"
    assert summary["violations"] == len(record.violations) == 0


def test_tables_are_accounted_for(busy: tuple[World, Record]) -> None:
    """Allocated is linked, waiting or freed."""
    built, record = busy
    linked = sum(kvm.stage2.linked_tables for kvm in built.kvms)
    last = {name: column[-1] for name, column in record.timeline.items()}
    allocated, freed = record.summary["tables_allocated"], record.summary["tables_freed"]
    assert allocated == linked + int(freed) + last["deferred_tables"]
    roots = sum(kvm.stage2.geometry.root_pages for kvm in built.kvms)
    assert last["table_bytes"] == 4096 * (linked + roots + last["deferred_tables"])


def test_every_guest_has_its_own_lock(busy: tuple[World, Record]) -> None:
    _, record = busy
    sites = {
        guest: {
            site
            for name, site in zip(record.locks["guest"], record.locks["site"], strict=True)
            if name == guest
        }
        for guest in ("a", "b")
    }
    assert {"range_start", "range_end", "fault"} <= sites["a"]
    assert sites["b"] == {"fault"}, "nothing is taken back there, and ageing takes no lock"


def test_the_series_only_grows(busy: tuple[World, Record]) -> None:
    _, record = busy
    series = record.series
    rows = list(zip(*series.values(), strict=True))
    for guest in ("a", "b"):
        mine = [row[1:] for row in rows if row[0] == guest]
        assert len(mine) <= 2 * SAMPLES
        for before, after in pairwise(mine):
            assert all(a <= b for a, b in zip(before, after, strict=True))


def test_the_time_line_goes_up_to_the_end(busy: tuple[World, Record]) -> None:
    _, record = busy
    times = record.timeline["t_ns"]
    assert times[0] == 0
    assert all(a < b for a, b in pairwise(times))
    assert times[-1] <= int(record.summary["sim_ns"])


def test_violations_come_in_order_of_time() -> None:
    kernel = {"base": "linux-7.1-lockless", "set": {"table_free": "inline"}}
    guest = {"memory": MIB, "access": {"pattern": "uniform", "touches": 1500, "think": 300}}
    ranges = {"kind": "madvise_dontneed", "range": MIB, "rate": 20_000, "stop": 2_000_000}
    _, record = run(
        kernel=kernel,
        guests={"a": guest, "b": guest},
        contenders={name: ranges | {"guest": name} for name in ("a", "b")},
        ageing={},
    )
    times = [violation["time_ns"] for violation in record.violations]
    assert times == sorted(times)
    assert times
    assert set(record.violations[0]) == {"kind", "time_ns", "guest", "message", "timeline"}
    assert record.summary["safety"] == "violated"


# -- identity ---------------------------------------------------------------------------------


def test_the_same_run_has_the_same_fingerprint(busy: tuple[World, Record]) -> None:
    assert run(**BUSY)[1] == busy[1]


@pytest.mark.parametrize(
    "change",
    [
        {"kernel": "linux-6.12"},
        {"machine": {"base": "graviton3-64c", "set": {"lock_handoff_ns": 91}}},
        {"ageing": {"interval": 50_001}},
        {"seed": 2},
        {"replication": 1},
        {"host": {"hz": 1000}},
    ],
    ids=str,
)
def test_another_run_has_another_fingerprint(
    busy: tuple[World, Record], change: dict[str, Any]
) -> None:
    """The host's HZ shows in grace periods, a seed in the ranges that are drawn."""
    assert run(**BUSY | change)[1].fingerprint != busy[1].fingerprint


def fingerprint_if_looked(
    first_ns: int, monkeypatch: pytest.MonkeyPatch, **keys: Any
) -> tuple[str, Any, Any]:
    """What a run is known by if its first sample is taken at ``first``."""
    monkeypatch.setattr("simkvm.kernel.world.FIRST_SAMPLE_NS", first_ns)
    _, record = run(**keys)
    return record.fingerprint, record.locks, record.histograms


@pytest.mark.parametrize("first", [7000, 123_457, 10_000_000])
def test_looking_changes_nothing(first: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """However often samples are taken."""
    keys = BUSY | {"ageing": None}
    usual = fingerprint_if_looked(1_000_000, monkeypatch, **keys)
    assert fingerprint_if_looked(first, monkeypatch, **keys) == usual


def test_looking_changes_nothing_for_ageing(monkeypatch: pytest.MonkeyPatch) -> None:
    access = {"pattern": "zipf", "think": 500, "touches": 4000}
    keys = ZIPF | {"guest": {"memory": MIB, "vcpus": 2, "access": access}}
    usual = fingerprint_if_looked(1_000_000, monkeypatch, **keys)
    assert fingerprint_if_looked(7000, monkeypatch, **keys) == usual


def test_folding_the_account_early_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    usual = fingerprint_if_looked(10_000, monkeypatch, **BUSY)
    monkeypatch.setattr("simkvm.observe.lock_stat.KEEP_ROWS", 10)
    assert fingerprint_if_looked(10_000, monkeypatch, **BUSY) == usual


# -- streams ----------------------------------------------------------------------------------


def test_a_stream_belongs_to_a_name_a_seed_and_a_replication() -> None:
    draws = [
        world(seed=seed, replication=replication).stream(name).integers(1 << 60)
        for seed in (1, 2)
        for replication in (0, 1)
        for name in ("vm/vcpu0", "vm/vcpu1", "c")
    ]
    assert len(set(draws)) == len(draws)
    assert world().stream("c").integers(1 << 60) == world(guest={"vcpus": 9}).stream("c").integers(
        1 << 60
    )


def test_shuffled_ties_are_drawn_and_repeat() -> None:
    spec = {"guest": {"memory": 4 * MIB, "vcpus": 8}}
    prints = [
        run(**spec, ties=ties, seed=seed)[1].fingerprint
        for ties, seed in (("fifo", 1), ("shuffle", 1), ("shuffle", 1), ("shuffle", 2))
    ]
    assert prints[1] == prints[2]
    assert len(set(prints)) == 3
