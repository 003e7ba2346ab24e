"""What the traced kernel did: the runs, as commands, and what was counted over each command.

Captured with Linux 6.12.117 for arm64 (HZ=250) in QEMU 7.2's software emulation of a machine with
virtualization (`-M virt,virtualization=on`, `-cpu max`), so that KVM ran in the emulated machine:
VHE, FWB, TLBIRANGE, hardware access flag, pages of 4 KiB. Two kernels: Debian's cloud kernel as
shipped (sets `deb-*`: PREEMPT_VOLUNTARY, 4 CPUs; `deb-*-ic1` and `deb-cost-icount` 1 CPU with
virtual time by instruction counts), and the same source with PREEMPT_DYNAMIC whose lock functions
are out of line (sets `a-*`). Functions were counted by ftrace's function_graph, acquisitions by
kprobes on the lock functions. No buffer overran. Counts and order are the kernel's; the times of
such a machine mean nothing, apart from those that the timer tick makes.

`runs.toml`: a table a run, commands as :mod:`simkvm.validate.traced.labvm` takes them.
`counts.csv`: run, number of the command, what was counted, how often. What was counted is a
function's calls or:

* ``mmu_lock read``, ``mmu_lock write``: acquisitions;
* ``kvm_pgtable_stage2_unmap of N KiB``: calls with that size;
* ``__kvm_tlb_flush_vmid_ipa, _range``: calls of the two together;
* ``kvm_guest_fault``: the event, once a call of kvm_handle_guest_abort();
* ``nr_sec_page_table_pages``: /proc/vmstat after the command, where that changed it;
* ``min_seq``, ``max_seq``: generations in debugfs's lru_gen after the command;
* ``kvm_unmap_hva_range backwards``: events whose addresses lie below those of the one before;
* ``errno``: what the write to it failed with, or 0;
* ``mm_vmscan_lru_shrink_inactive nr_scanned``: the sum over the events;
* ``pg...``, ``pswp...``, ``workingset_...``: changes of /proc/vmstat.

Runs that evict have a table `others` in `runs.toml`: what else was in their memcg, read from the
same traces (:class:`simkvm.validate.traced.memcg.Others`). A count from which one of those was read
and that says nothing else is left out here.

Left out of what was traced: idle page tracking, whose calls depend on which pages of the VM lie
together in physical memory; command 6 of `thp-h`, in which the host's khugepaged happened to run; a
MADV_COLLAPSE that failed.
"""

from __future__ import annotations

import csv
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import resources

from simkvm.units import parse_size
from simkvm.validate.traced.memcg import Others

FILES = resources.files("simkvm.validate.traced")


@dataclass(frozen=True)
class Run:
    """One run of the program. ``memory`` in bytes; ``thp``: on huge pages.

    ``counts``: by number of the command, what was counted over it. ``others``: what else was in
    the memcg of a run that evicts.
    """

    name: str
    set: str
    memory: int
    vcpus: int
    thp: bool
    commands: tuple[str, ...]
    counts: Mapping[int, Mapping[str, int]]
    others: Others | None = None

    @property
    def kernel(self) -> str:
        """The traced kernel: ``deb`` or ``a``."""
        return self.set.partition("-")[0]


def runs() -> list[Run]:
    """All runs, in the order of the file."""
    counts: dict[str, dict[int, dict[str, int]]] = {}
    text = FILES.joinpath("counts.csv").read_text(encoding="utf-8")
    for row in csv.DictReader(text.splitlines()):
        commands = counts.setdefault(row["run"], {})
        commands.setdefault(int(row["command"]), {})[row["what"]] = int(row["count"])
    tables = tomllib.loads(FILES.joinpath("runs.toml").read_text(encoding="utf-8"))
    return [
        Run(
            name=name,
            set=table["set"],
            memory=parse_size(table["memory"]),
            vcpus=table["vcpus"],
            thp=table["thp"],
            commands=tuple(table["commands"]),
            counts=counts.get(name, {}),
            others=Others(**table["others"]) if "others" in table else None,
        )
        for name, table in tables.items()
    ]
