"""``MADV_DONTNEED`` of ranges of guest memory at a given rate: what a VMM does to return memory."""

from __future__ import annotations

from collections.abc import Generator, Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
from simpy import Event

from simkvm.contenders.contender import Contender
from simkvm.kernel.task import Task
from simkvm.scenario.contenders import MadviseDontneed as Spec
from simkvm.units import NS_PER_S

if TYPE_CHECKING:
    from simkvm.kernel.kvm import Kvm


class MadviseDontneed(Contender):
    """Calls at fixed or exponential distances; a thread that falls behind calls back to back."""

    def __init__(self, kvm: Kvm, task: Task, rng: np.random.Generator, spec: Spec) -> None:
        super().__init__(kvm, task, rng)
        self._spec = spec
        step = spec.range if spec.align is None else spec.align
        self._starts = range(0, kvm.leaves * kvm.stage2.leaf_bytes - spec.range + 1, step)

    def run(self) -> Generator[Event, Any, None]:
        """Call after call until ``stop`` or the end of the run."""
        spec = self._spec
        t_ns = 0
        for due_ns, start in zip(self._due(), self._targets(), strict=False):
            if spec.stop is not None and due_ns >= spec.stop:
                return
            t_ns = yield from self.sleep_until(t_ns, due_ns)
            if not self.kvm.alive:
                return
            t_ns = yield from self.take_back(t_ns, start, spec.range)

    def _due(self) -> Iterator[int]:
        spec, due_ns, number = self._spec, float(self._spec.start), 0
        while True:
            if spec.arrivals == "poisson":
                due_ns += float(self.rng.exponential(NS_PER_S / spec.rate))
                yield int(due_ns)
            else:
                yield spec.start + int(number * NS_PER_S / spec.rate)
                number += 1

    def _targets(self) -> Iterator[int]:
        starts = self._starts
        while True:
            if self._spec.order == "random":
                yield starts[int(self.rng.integers(len(starts)))]
            else:
                yield from starts
