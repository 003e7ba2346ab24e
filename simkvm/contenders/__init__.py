"""Takers of ``mmu_lock`` other than faults and ageing: one small file each, found by its kind."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from simkvm.contenders.balloon import Balloon
from simkvm.contenders.contender import Contender
from simkvm.contenders.dirty_log import DirtyLog
from simkvm.contenders.fork import Fork
from simkvm.contenders.free_page_reporting import FreePageReporting
from simkvm.contenders.in_turn import Turns
from simkvm.contenders.khugepaged import Khugepaged
from simkvm.contenders.ksm import Ksm
from simkvm.contenders.madvise_dontneed import MadviseDontneed
from simkvm.contenders.memslot import Memslot
from simkvm.contenders.migration import Compaction, Migration
from simkvm.contenders.mprotect import Mprotect
from simkvm.contenders.numa_balancing import NumaBalancing
from simkvm.contenders.oom_reaper import OomReaper
from simkvm.contenders.pre_fault import PreFault
from simkvm.contenders.thp_split import ThpSplit
from simkvm.kernel.kvm import Kvm
from simkvm.kernel.task import Task

KINDS: dict[str, Any] = {
    "madvise_dontneed": MadviseDontneed,
    "free_page_reporting": FreePageReporting,
    "balloon": Balloon,
    "dirty_log": DirtyLog,
    "khugepaged": Khugepaged,
    "thp_split": ThpSplit,
    "ksm": Ksm,
    "migration": Migration,
    "compaction": Compaction,
    "numa_balancing": NumaBalancing,
    "mprotect": Mprotect,
    "fork": Fork,
    "oom_reaper": OomReaper,
    "memslot": Memslot,
    "pre_fault": PreFault,
}


def build(kvm: Kvm, task: Task, rng: np.random.Generator, spec: Any) -> Contender:
    """The contender that ``spec`` (a model of the scenario) describes."""
    contender: Contender = KINDS[spec.kind](kvm, task, rng, spec)
    return contender


def build_in_turn(
    kvms: Sequence[Kvm], task: Task, rngs: Sequence[np.random.Generator], spec: Any
) -> list[Contender]:
    """Contenders for each of ``kvms``, which share the thread ``task``."""
    turns = Turns(kvms[0].env, task, len(kvms), kvms[0].sched)
    made = []
    for number, (kvm, rng) in enumerate(zip(kvms, rngs, strict=True)):
        contender = build(kvm, task, rng, spec.share(number, len(kvms)))
        contender.number, contender.turns = number, turns
        made.append(contender)
    return made
