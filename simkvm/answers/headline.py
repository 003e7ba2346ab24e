"""The figures that the pages quote first, and which constants each of them hangs on."""

from __future__ import annotations

from dataclasses import dataclass

from simkvm.answers.page import assumptions
from simkvm.answers.runs import Runs
from simkvm.study.sensitivity import Sensitivity


@dataclass(frozen=True)
class Headline:
    """One figure of one point (or of one over another) that is taken apart by constants.

    `title` is `about` in a few words, for a drawing. `small` and `parameters` reduce it for a test.
    Where passes and faults get into each other's way, a nanosecond anywhere shifts who comes first:
    `replications` tell that from an effect.
    """

    about: str
    title: str
    file: str
    metric: str
    sets: tuple[str, ...]
    over: str | None = None
    small: tuple[str, ...] = ()
    parameters: tuple[str, ...] = ()
    replications: int = 1

    def analyse(self, runs: Runs) -> Sensitivity:
        """Run it, or take it from the store."""
        return runs.sensitivity(
            self.file,
            self.metric,
            self.sets,
            over=self.over,
            small=self.small,
            parameters=self.parameters,
            replications=self.replications,
        )

    def hangs_on(self, runs: Runs) -> str:
        """A paragraph and a table for a page."""
        analysis = self.analyse(runs)
        return f"**{self.about}.** {assumptions(analysis, analysis.tornados[0])}"


_ALTRA_8 = (
    *("machine=ampere-altra-80c", "guests.vm0.vcpus=8"),
    *("guests.vm0.memory_per_vcpu=8 MiB", "guests.vm0.access.touches=4096"),
)
_SMALL = (
    "guests.vm0.vcpus=2",
    "guests.vm0.memory_per_vcpu=2 MiB",
    "guests.vm0.access.touches=512",
)

AGEING_RATIO = Headline(
    "The ageing thread's time for a page under the write lock over that without a lock, 8 vCPUs "
    "that fault on 4 KiB pages, Altra profile",
    "Ageing's time for a page, write lock over no lock",
    "answers/ageing-faults-4k.yaml",
    "ageing_ns_per_page",
    ("kernel=[linux-7.1, linux-7.1-lockless]", *_ALTRA_8),
    over="kernel=linux-7.1-lockless",
    small=_SMALL,
    parameters=("fault_hold_ns", "age_walk_ns"),
    replications=5,
)
GUEST_WALL = Headline(
    "The guest's time under ageing with the write lock, 8 vCPUs that fault on 4 KiB pages, "
    "Altra profile",
    "The guest's time under ageing with the write lock",
    "answers/ageing-faults-4k.yaml",
    "vcpu_wall_ns",
    ("kernel=linux-7.1", *_ALTRA_8),
    small=_SMALL,
    parameters=("fault_hold_ns", "s2_fault4k_alloc_total_ns"),
    replications=5,
)
BLOCKS_RATIO = Headline(
    "The guest's time under the write lock over that without a lock, 8 vCPUs that fault on 2 MiB "
    "blocks, Altra profile",
    "The guest's time with blocks, write lock over no lock",
    "answers/ageing-faults-2m.yaml",
    "vcpu_wall_ns",
    (
        "kernel=[linux-7.1, linux-7.1-lockless]",
        *("machine=ampere-altra-80c", "guests.vm0.vcpus=8", "guests.vm0.access.touches=256"),
    ),
    over="kernel=linux-7.1-lockless",
    small=("guests.vm0.vcpus=2", "guests.vm0.memory_per_vcpu=32 MiB"),
    parameters=("dcache_clean_2m_ns", "lock_handoff_ns"),
    replications=5,
)
DEFERRED_BYTES = Headline(
    "Mean memory in tables that wait, over a run of 300 ms, 1000 calls a second, HZ 250, "
    "Graviton3 profile",
    "Mean memory in tables that wait",
    "answers/deferred-rate.yaml",
    "deferred_bytes_mean",
    ("host.hz=250", "contenders.vmm.rate=1000 / s", "duration=300 ms"),
    small=("duration=130 ms", "guests.vm0.memory=16 MiB"),
    parameters=("call_rcu_ns", "unmap_s2_4k_noflush_ns"),
)
CALLBACK = Headline(
    "Time in the callback of one table of 512 entries that free_removed_table() walks, "
    "Graviton3 profile",
    "Time in the callback of an empty table",
    "questions/empty-table-walk.yaml",
    "callback_ns_per_table",
    ("kernel=linux-6.4-upton", "guests.vm0.page_size=4 KiB", "guests.vm0.memory=512 MiB"),
    small=("guests.vm0.memory=4 MiB", "contenders.vmm.range=2 MiB"),
    parameters=("stage2_leaf_visit_ns", "callback_invoke_ns"),
)
OF_LOCKS = (AGEING_RATIO, GUEST_WALL, BLOCKS_RATIO)
HEADLINES = (*OF_LOCKS, DEFERRED_BYTES)
"""Those of the page on assumptions."""
