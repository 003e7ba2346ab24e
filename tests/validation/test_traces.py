"""Does the model count what the traced kernel counted, and would it be noticed if it did not?"""

from __future__ import annotations

import re
from collections.abc import Generator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from simpy import Event

from simkvm.guest.vcpu import Vcpu
from simkvm.kernel.folio_referenced import EvictionCheck
from simkvm.kernel.vmscan import Reclaimer
from simkvm.validate import traces
from simkvm.validate.traced import batches, grace_periods, record
from simkvm.validate.traced.grace_periods import EXPERIMENTS, Experiment

RUNS = {run.name: run for run in record.runs()}
BY_RUN = {f"{each.set}/{each.run}": each for each in EXPERIMENTS}
LIMITS = Path(__file__).parents[2] / "docs" / "limits.md"


# -- rows and their verdicts ------------------------------------------------------------------


@pytest.mark.parametrize("name", RUNS)
def test_counts_are_the_kernels(name: str) -> None:
    for row in traces.counted(RUNS[name]):
        expected = "abstracted" if row.id in traces.ABSTRACTIONS else "equal"
        assert row.verdict == expected, f"{row.id}: {row.measured} traced, {row.simulated} here"


def test_batches_are_the_kernels() -> None:
    """Not only the rows: every batch, its tick and its callbacks."""
    for burst in batches.traced():
        assert {row.verdict for row in traces.batched(burst)} == {"equal"}
        assert batches.simulated(burst) == burst.batches
        assert sum(number for _, number in burst.batches) == len(burst.called_ns)


@pytest.mark.parametrize("name", BY_RUN)
def test_ticks_are_the_kernels(name: str) -> None:
    found = list(traces.lengths(BY_RUN[name]))
    assert len(found) >= 2
    for row in found:
        expected = "equal" if row.p_value is None else "inside"
        assert row.verdict == expected, f"{row.id}: {row.measured} traced, {row.simulated} here"


def test_what_is_usual_is_the_same_in_every_clean_run() -> None:
    """Without a test's tolerance: most of the traced samples are the model's one number."""
    for experiment in EXPERIMENTS:
        if not experiment.clean:
            continue
        kernels = grace_periods.traced()[experiment.set, experiment.run]
        models = grace_periods.simulated(experiment, 20)
        for what in grace_periods.WHAT:
            assert len(set(models[what])) == 1
            assert kernels[what].count(models[what][0]) > 0.85 * len(kernels[what]), what


def test_every_count_becomes_a_row_of_its_own() -> None:
    counts = [
        f"{run.name}/{number}/{what}"
        for run in RUNS.values()
        for number, counted in run.counts.items()
        for what in counted
    ]
    assert len(counts) == len(set(counts)) > 300
    assert set(traces.ABSTRACTIONS) <= set(counts)
    for run in RUNS.values():
        assert run.counts, run.name
        assert max(run.counts) < len(run.commands)
        for counted in run.counts.values():
            assert all(traces.meaning(what) for what in counted)
    assert set(grace_periods.traced()) == {(each.set, each.run) for each in EXPERIMENTS}


def test_abstractions_are_limits() -> None:
    limits = " ".join(LIMITS.read_text().split())
    for words in traces.ABSTRACTIONS.values():
        assert words in limits


# -- what another kernel would show -----------------------------------------------------------

OTHERS = {
    # policy: value, run, a count that it changes, one that stays
    "table_free": ("put_page_rcu", "locks-fault", "1/nr_sec_page_table_pages", "1/mmu_lock write"),
    "unmap_tlbi": (
        *("per_leaf", "sparse512-c", "1/__kvm_tlb_flush_vmid_ipa, _range"),
        "1/stage2_unmap_walker",
    ),
    "unmap_tables": ("keep", "locks-fault", "1/nr_sec_page_table_pages", "1/mmu_lock write"),
    "ageing_call": ("blind", "cost-age-thp", "1/kvm_age_gfn", "0/nr_sec_page_table_pages"),
    "ageing_lock": ("read", "locks-age", "1/mmu_lock write", "1/max_seq"),
    "fault_lock": ("write", "locks-fault", "0/mmu_lock read", "1/mmu_lock write"),
    "eviction_young": ("clear_flush_young", "evict-hot-c", "5/kvm_age_gfn", "3/kvm_age_gfn"),
    "promotion": ("two_step", "evict-mixed-c", "5/pgrefill", "3/max_seq"),
    "collapse_free": (
        *("inline", "dirty2-c", "5/stage2_free_unlinked_table_rcu_cb"),
        "4/stage2_free_unlinked_table",
    ),
}


@pytest.mark.parametrize("policy", OTHERS)
def test_another_policy_counts_otherwise(policy: str) -> None:
    """Each changes what it is about, and leaves alone what it is not."""
    value, run, changed, kept = OTHERS[policy]
    kernel = {"base": "linux-6.12", "set": {policy: value}}
    verdicts = {row.id.partition("/")[2]: row.verdict for row in traces.counted(RUNS[run], kernel)}
    assert verdicts[kept] == "equal"
    assert verdicts[changed] == "differs"


EVICTING = ("evict-cold-c", "evict-hot-c", "evict-mixed-c", "pageout-c")


def differing(name: str) -> set[str]:
    """What of a run is not the kernel's, as number of the command and count."""
    rows = traces.counted(RUNS[name])
    return {row.id.partition("/")[2] for row in rows if row.verdict == "differs"}


def test_a_smaller_window_around_a_used_page_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    span = EvictionCheck.span

    def half(check: EvictionCheck, leaf: int) -> tuple[int, int]:
        first, last = span(check, leaf)
        low = max(first, min(leaf - 16, last - 32))
        return low, low + 32

    monkeypatch.setattr(EvictionCheck, "span", half)
    assert not differing("evict-cold-c")  # where nothing is used nobody looks around
    assert differing("evict-hot-c") >= {"5/lru_gen_look_around", "5/kvm_age_gfn"}
    assert differing("evict-mixed-c") >= {"5/lru_gen_look_around", "5/kvm_age_gfn", "5/pgrefill"}


def test_a_second_range_for_each_page_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    unmap = Reclaimer._unmap

    def twice(reclaimer: Reclaimer, *args: Any) -> Generator[Event, Any, int]:
        t_ns = yield from unmap(reclaimer, *args)
        return (yield from unmap(reclaimer, *args[:-1], t_ns))

    monkeypatch.setattr(Reclaimer, "_unmap", twice)
    start = "kvm_mmu_notifier_invalidate_range_start"
    for name, command in zip(EVICTING, (4, 5, 5, 1), strict=True):
        found = differing(name)
        assert f"{command}/{start}" in found
        assert not any(each.endswith(("pgsteal_direct", "pswpin")) for each in found)


def test_a_tlb_that_outlives_the_host_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """A page whose translation is still there looks unused: the emulated machine had none."""
    monkeypatch.setattr(Vcpu, "forget_translations", lambda vcpu: None)
    assert not differing("evict-cold-c")
    assert differing("evict-mixed-c") >= {"5/pgsteal_direct", "6/pgsteal_direct", "7/pswpin"}


def test_what_waits_for_the_lru_is_not_evicted() -> None:
    """The pages that the CPU keeps back are neither found nor missed by chance."""
    run = RUNS["evict-mixed-c"]
    assert run.others is not None
    others = replace(run.others, waiting=run.others.waiting + 1)
    rows = {row.id: row.verdict for row in traces.counted(replace(run, others=others))}
    assert rows["evict-mixed-c/6/pgsteal_direct"] == "differs"
    assert rows["evict-mixed-c/5/pgsteal_direct"] == "equal"


def test_another_clock_rate_has_other_grace_periods() -> None:
    """At HZ=1000 the first scan comes after 3 jiffies, not 1 of four times the length."""
    verdicts = {
        row.id.rpartition("/")[2]: row.verdict
        for row in traces.lengths(BY_RUN["a-rcu-none/rcu-idle"], hz=1000)
    }
    assert verdicts["length"] == verdicts["synchronize_rcu"] == "outside"
    assert verdicts["scans"] == "inside"


@pytest.mark.parametrize(
    ("name", "changed"),
    [
        ("a-rcu-none/rcu-hogsys2", {"preemptible": False}),
        ("a-rcu-none/rcu-hogsysall", {"preemptible": False}),
        ("deb-rcu/rcu-idle", {"busy": 2, "state": "kernel"}),
    ],
)
def test_a_bound_can_be_passed(name: str, changed: dict[str, object]) -> None:
    """A kernel whose ticks are no quiescent states in the kernel waits until it presses CPUs."""
    experiment: Experiment = replace(BY_RUN[name], **changed)  # type: ignore[arg-type]
    rows = [row for row in traces.lengths(experiment) if row.p_value is not None]
    assert {row.verdict for row in rows} == {"outside"}


def test_other_batches_are_noticed() -> None:
    """A second CPU puts the grace-period kthread elsewhere, and a larger limit cuts later."""
    for keys, changed in (
        ({"cpus": 2}, {"batches", "first tick", "first batch", "last tick", "at the first tick"}),
        ({"blimit": 20}, {"batches", "first batch"}),
    ):
        rows = list(traces.batched(batches.traced()[0], **keys))
        found = {row.id.rpartition("/")[2] for row in rows if row.verdict != "equal"}
        assert found >= {"batches", "first batch"}
        assert found <= changed | {"last batch"}


# -- the data ---------------------------------------------------------------------------------


def test_sources_name_a_set_and_a_run() -> None:
    for run in RUNS.values():
        assert re.fullmatch(r"(deb|a)-[a-z0-9-]+", run.set)
        assert run.kernel in traces.PREEMPTION
