"""Takers of ``mmu_lock`` other than faults and ageing: one small file each, found by its kind."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from simkvm.contenders.balloon import Balloon
from simkvm.contenders.contender import Contender
from simkvm.contenders.free_page_reporting import FreePageReporting
from simkvm.contenders.in_turn import Turns
from simkvm.contenders.madvise_dontneed import MadviseDontneed
from simkvm.kernel.kvm import Kvm
from simkvm.kernel.task import Task

KINDS: dict[str, Any] = {
    "madvise_dontneed": MadviseDontneed,
    "free_page_reporting": FreePageReporting,
    "balloon": Balloon,
}


def build(kvm: Kvm, task: Task, rng: np.random.Generator, spec: Any) -> Contender:
    """The contender that ``spec`` (a model of the scenario) describes."""
    contender: Contender = KINDS[spec.kind](kvm, task, rng, spec)
    return contender


def build_in_turn(
    kvms: Sequence[Kvm], task: Task, rngs: Sequence[np.random.Generator], spec: Any
) -> list[Contender]:
    """Contenders for each of ``kvms``, which share the thread ``task``."""
    turns = Turns(kvms[0].env, task, len(kvms))
    made = []
    for number, (kvm, rng) in enumerate(zip(kvms, rngs, strict=True)):
        contender = build(kvm, task, rng, spec.share(number, len(kvms)))
        contender.number, contender.turns = number, turns
        made.append(contender)
    return made
