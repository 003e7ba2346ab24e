"""Free page reporting: the guest tells the VMM which pageblocks it does not use.

Source: mm/page_reporting.c and drivers/virtio/virtio_balloon.c, v6.12. A worker runs ``delay``
after there is something to report (2 s in Linux), takes at most a sixteenth of the free blocks in a
pass, and hands them over in requests of 32; the VMM drops each with ``MADV_DONTNEED``. The
model has no guest allocator: a block counts as free when the guest has left it alone for ``idle``.
"""

from __future__ import annotations

from collections.abc import Generator
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from simpy import Event

from simkvm.contenders.contender import Contender
from simkvm.kernel.task import Task
from simkvm.scenario.contenders import FreePageReporting as Spec

if TYPE_CHECKING:
    from simkvm.kernel.kvm import Kvm


class FreePageReporting(Contender):
    """A pass every ``delay``."""

    def __init__(self, kvm: Kvm, task: Task, rng: np.random.Generator, spec: Spec) -> None:
        super().__init__(kvm, task, rng)
        self._spec = spec
        kvm.remember_touches()
        # Nothing smaller than a leaf can be taken back, and a block that is cut off is never free.
        self._block_leaves = max(1, spec.block // kvm.stage2.leaf_bytes)
        self._block_bytes = self._block_leaves * kvm.stage2.leaf_bytes
        self._blocks = kvm.leaves // self._block_leaves

    def run(self) -> Generator[Event, Any, None]:
        """Pass after pass until the end of the run."""
        spec = self._spec
        t_ns, due_ns = 0, spec.start + spec.delay
        while True:
            t_ns = yield from self.sleep_until(t_ns, due_ns)
            if not self.kvm.alive:
                return
            free = self._free_blocks(t_ns)
            requests = -(-len(free) // (spec.batch * 16))
            for block in free[: requests * spec.batch].tolist():
                t_ns = yield from self.take_back(t_ns, block * self._block_bytes, self._block_bytes)
            due_ns = t_ns + spec.delay

    def _free_blocks(self, t_ns: int) -> NDArray[np.int64]:
        """Blocks that are backed and have been idle, in ascending order."""
        kvm, shape = self.kvm, (self._blocks, self._block_leaves)
        kvm.accesses.catch_up(t_ns, 0, kvm.leaves)
        whole = self._blocks * self._block_leaves
        backed = (kvm.host.state[:whole] != 0).reshape(shape).any(axis=1)
        touched = kvm.last_touch_ns[:whole].reshape(shape).max(axis=1)
        idle = (touched >= 0) & (touched <= t_ns - self._spec.idle)
        return np.flatnonzero(backed & idle)
