"""What a traced kernel did, each experiment done again with the model's parts.

Three kinds of rows. Counts have to be equal. Ticks of grace periods are compared as distributions:
where the emulated machine kept time, by a two-sample Kolmogorov-Smirnov test (with ties it
rejects too seldom rather than too often); where it did not, so that the traced lengths only
bound the kernel's, by a one-sided Mann-Whitney test of the model's being longer. Of scans, which
lateness can add or save, the usual number has to be equal there.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from statistics import fmean
from typing import Any, Final

from simkvm.validate.row import TraceRow
from simkvm.validate.traced import batches, grace_periods, memcg, record
from simkvm.validate.traced.batches import Burst
from simkvm.validate.traced.grace_periods import Experiment, Samples
from simkvm.validate.traced.labvm import LabVm
from simkvm.validate.traced.record import Run

PREEMPTION: Final = {"deb": "voluntary", "a": "full"}  #: by traced kernel

OTHER_THREADS: Final = "Threads that have nothing to do with the guests do not run"
ABSTRACTIONS: Final[Mapping[str, str]] = {
    "locks-sparse/1/mmu_lock write": OTHER_THREADS,
    "locks-sparse/3/mmu_lock write": OTHER_THREADS,
}
"""By the id of a row, in words of docs/limits.md: what the model leaves out on purpose."""

MEANINGS: Final[Mapping[str, str]] = {
    "kvm_handle_guest_abort": "aborts, one at the end of each vCPU's work included",
    "kvm_guest_fault": "aborts, one at the end of each vCPU's work included",
    "kvm_pgtable_stage2_map": "maps",
    "stage2_map_walker": "entries visited by maps",
    "stage2_memcache_zalloc_page": "tables allocated",
    "kvm_mmu_notifier_invalidate_range_start": "notifier ranges begun",
    "kvm_mmu_notifier_invalidate_range_end": "notifier ranges ended",
    "kvm_pgtable_stage2_unmap": "walks",
    "kvm_unmap_gfn_range": "unmaps asked for by notifier ranges",
    "kvm_unmap_hva_range backwards": "notifier ranges that lie below the one before",
    "stage2_unmap_walker": "entries visited by unmaps",
    "kvm_s2_put_page": "references to pages of tables dropped",
    "__kvm_tlb_flush_vmid_ipa, _range": "invalidations of an address or a range",
    "__cond_resched_rwlock_write": "offers to break mmu_lock",
    "kvm_age_gfn": "ageing calls that reach the slots",
    "stage2_free_unlinked_table": "tables replaced by blocks",
    "stage2_free_unlinked_table_rcu_cb": "their callbacks run",
    "rcu_do_batch": "batches of callbacks",
    "synchronize_srcu_expedited": "waits for who reads the memory slots",
    "stage2_free_walker": "entries visited by the end of the VM",
    "nr_sec_page_table_pages": "pages of tables afterwards, roots and code's included",
    "mmu_lock read": "read acquisitions of mmu_lock",
    "mmu_lock write": "write acquisitions of mmu_lock",
    "min_seq": "oldest generation afterwards",
    "max_seq": "youngest generation afterwards",
    "evict_folios": "batches of eviction",
    "shrink_folio_list": "lists of isolated pages to be reclaimed",
    "folio_referenced": "pages asked about",
    "lru_gen_look_around": "mappings asked about, with a look around if one was used",
    "kvm_mmu_notifier_clear_young": "ageing calls, the VMM's own pages included",
    "mm_vmscan_lru_shrink_inactive nr_scanned": "pages scanned as the events say",
    "pgscan_direct": "pages isolated",
    "pgsteal_direct": "pages reclaimed",
    "pgrefill": "pages sorted or moved to another list unasked",
    "pswpout": "pages written to swap",
    "pswpin": "pages read from swap",
    "pgmajfault": "faults that read from swap",
    "workingset_refault_anon": "evicted pages that came back",
    "workingset_activate_anon": "of those the ones evicted from the oldest generation of now",
    "workingset_restore_anon": "of those the ones that count as in the working set",
    "errno": "error of the write to lru_gen",
}
PAGES: Final = (
    *("mm_vmscan_lru_shrink_inactive nr_scanned", "pgscan_direct", "pgsteal_direct", "pgrefill"),
    *("pswpout", "pswpin", "workingset_refault_anon", "workingset_activate_anon"),
    "workingset_restore_anon",
)
UNITS: Final[Mapping[str, str]] = {
    "mmu_lock read": "acquisitions",
    "mmu_lock write": "acquisitions",
    "nr_sec_page_table_pages": "pages",
    "min_seq": "number",
    "max_seq": "number",
    "errno": "number",
    "pgmajfault": "faults",
    **dict.fromkeys(PAGES, "pages"),
}

TICKS: Final[Mapping[str, str]] = {
    "start": "from the call to the start of its grace period",
    "length": "length of a grace period",
    "scans": "scans for quiescent states in a grace period",
    "invoke": "from the end of the grace period to the return",
    "synchronize_rcu": "length of synchronize_rcu()",
}
BOUNDED: Final = ("length", "synchronize_rcu")


def rows(kernel: str = "linux-6.12") -> Iterator[TraceRow]:
    """The rows, each as it is computed. ``kernel``: the variant that should count the same."""
    for run in record.runs():
        yield from counted(run, kernel)
    for burst in batches.traced():
        yield from batched(burst)
    for experiment in grace_periods.EXPERIMENTS:
        yield from lengths(experiment)


# -- counts -----------------------------------------------------------------------------------


def counted(run: Run, kernel: str = "linux-6.12", **keys: Any) -> Iterator[TraceRow]:
    """The rows of one run of commands. ``keys``: more of the scenario's."""
    host: dict[str, Any] = {"preemption": PREEMPTION[run.kernel]}
    if run.others is not None:
        host |= memcg.HOST
    vm = LabVm(
        run.memory,
        run.vcpus,
        run.thp,
        apart="slotdel" in run.commands,
        meet="bgstop" in run.commands,
        others=run.others,
        kernel=kernel,
        host=host,
        **keys,
    )
    for number, command in enumerate(run.commands[: max(run.counts, default=-1) + 1]):
        simulated = vm.do(command)
        for what, measured in run.counts.get(number, {}).items():
            name = f"{run.name}/{number}/{what}"
            yield TraceRow(
                id=name,
                about=f"{command}: {meaning(what)}",
                unit=UNITS.get(what, "calls"),
                measured=measured,
                simulated=simulated[what],
                source=f"{run.set}, {run.name}, command {number}",
                abstraction=ABSTRACTIONS.get(name, ""),
            )


def meaning(what: str) -> str:
    """What a count is of, in words."""
    if what.startswith("kvm_pgtable_stage2_unmap of "):
        return f"walks over {what.removeprefix('kvm_pgtable_stage2_unmap of ')}"
    return MEANINGS[what]


# -- callbacks and grace periods --------------------------------------------------------------


def batched(burst: Burst, cpus: int = 1, blimit: int = 10) -> Iterator[TraceRow]:
    """The rows of one burst of callbacks."""
    models = batches.simulated(burst, cpus, blimit)
    parts = {
        "batches": ("batches of callbacks", "batches", len),
        "first tick": ("ticks passed when the first batch begins", "ticks", lambda b: b[0][0]),
        "at the first tick": (
            "callbacks in batches that begin before the next tick",
            "callbacks",
            lambda b: sum(number for tick, number in b if tick == b[0][0]),
        ),
        "first batch": ("callbacks of the first batch", "callbacks", lambda b: b[0][1]),
        "last tick": ("ticks passed when the last batch begins", "ticks", lambda b: b[-1][0]),
        "last batch": ("callbacks of the last batch", "callbacks", lambda b: b[-1][1]),
    }
    for name, (about, unit, of) in parts.items():
        yield TraceRow(
            id=f"{burst.name}/rcu_do_batch/{name}",
            about=f"{len(burst.called_ns)} tables unlinked at once: {about}",
            unit=unit,
            measured=of(burst.batches),
            simulated=of(models),
            source=f"deb-unmap2-ic1, {burst.name}, commands {burst.commands}",
        )


def lengths(experiment: Experiment, hz: int = grace_periods.HZ) -> Iterator[TraceRow]:
    """The rows of one run of synchronize_rcu(). ``hz``: of the simulated kernel."""
    kernels = grace_periods.traced()[experiment.set, experiment.run]
    models = grace_periods.simulated(experiment, len(kernels["synchronize_rcu"]), hz)
    for what, about in TICKS.items():
        if experiment.clean:
            yield _same(experiment, what, about, kernels, models)
        elif what in BOUNDED:
            yield _no_longer(experiment, what, about, kernels, models)
        elif what == "scans" and experiment.counts_scans:
            yield _usual(experiment, what, about, kernels, models)


def _same(
    experiment: Experiment, what: str, about: str, kernels: Samples, models: Samples
) -> TraceRow:
    from scipy.stats import ks_2samp

    p_value = float(ks_2samp(models[what], kernels[what]).pvalue)
    return _row(experiment, what, f"{about} (mean)", fmean, kernels, models, p_value)


def _no_longer(
    experiment: Experiment, what: str, about: str, kernels: Samples, models: Samples
) -> TraceRow:
    from scipy.stats import mannwhitneyu

    p_value = float(mannwhitneyu(models[what], kernels[what], alternative="greater").pvalue)
    said = f"{about} (mean), at most"
    return _row(experiment, what, said, fmean, kernels, models, p_value)


def _usual(
    experiment: Experiment, what: str, about: str, kernels: Samples, models: Samples
) -> TraceRow:
    return _row(experiment, what, f"{about} (usual number)", _mode, kernels, models)


def _mode(sample: list[int]) -> int:
    return Counter(sample).most_common(1)[0][0]


def _row(
    experiment: Experiment,
    what: str,
    about: str,
    of: Any,
    kernels: Samples,
    models: Samples,
    p_value: float | None = None,
) -> TraceRow:
    return TraceRow(
        id=f"{experiment.set}/{experiment.run}/{what}",
        about=f"{experiment.about}: {about}",
        unit="scans" if what == "scans" else "ticks",
        measured=of(kernels[what]),
        simulated=of(models[what]),
        source=f"{experiment.set}, {experiment.run}",
        p_value=p_value,
    )
