"""Balloon inflation: the guest hands single pages back, in requests of up to 256.

Source: drivers/virtio/virtio_balloon.c, v6.12 (``VIRTIO_BALLOON_ARRAY_PFNS_MAX``). The VMM drops
the pages one by one, or, if it merges neighbours, a request at a time. The guest gives from the end
of its memory downwards.
"""

from __future__ import annotations

from collections.abc import Generator
from typing import TYPE_CHECKING, Any

import numpy as np
from simpy import Event

from simkvm.contenders.contender import Contender
from simkvm.kernel.task import Task
from simkvm.scenario.contenders import Balloon as Spec
from simkvm.units import NS_PER_S

if TYPE_CHECKING:
    from simkvm.kernel.kvm import Kvm


class Balloon(Contender):
    """Inflates to ``target`` at ``rate`` pages a second."""

    def __init__(self, kvm: Kvm, task: Task, rng: np.random.Generator, spec: Spec) -> None:
        super().__init__(kvm, task, rng)
        self._spec = spec

    def run(self) -> Generator[Event, Any, None]:
        """Request after request until the balloon has its size."""
        spec, kvm = self._spec, self.kvm
        page = kvm.stage2.geometry.page_bytes
        wanted = spec.target // page
        t_ns = inflated = 0
        while inflated < wanted and kvm.alive:
            due_ns = spec.start + int(inflated * NS_PER_S / spec.rate)
            t_ns = yield from self.sleep_until(t_ns, due_ns)
            pages = min(spec.batch, wanted - inflated)
            low = kvm.pages - inflated - pages
            step = pages if spec.merge else 1
            for first in range(low, low + pages, step):
                t_ns = yield from self.take_back(t_ns, first * page, step * page)
            inflated += pages
        self.kvm.sched.sleep(self.task, t_ns)
