"""The OOM reaper: takes all memory of a process that was killed but does not get to exit.

Source: mm/oom_kill.c (``queue_oom_reaper``, ``__oom_reap_task_mm``), v6.12. The kill ends the
threads of the vCPUs; if the process has not taken its memory down 2 s later, the reaper does it:
one range start and end, not blockable, so that the lock is never dropped between chunks, however
many wait for it. It only tries ``mmap_lock``: ten times, a tenth of a second apart.
"""

from __future__ import annotations

from collections.abc import Generator
from typing import TYPE_CHECKING, Any, Final

import numpy as np
from simpy import Event

from simkvm.contenders.contender import Contender
from simkvm.kernel.task import Task, reach
from simkvm.scenario.contenders import OomReaper as Spec

if TYPE_CHECKING:
    from simkvm.kernel.kvm import Kvm

RETRIES: Final = 10  #: ``MAX_OOM_REAP_RETRIES``
RETRY_NS: Final = 100_000_000  #: HZ/10


class OomReaper(Contender):
    """Kills at ``start`` and reaps ``delay`` later."""

    def __init__(self, kvm: Kvm, task: Task, rng: np.random.Generator, spec: Spec) -> None:
        super().__init__(kvm, task, rng)
        self._spec = spec

    def run(self) -> Generator[Event, Any, None]:
        """The kill, the wait, the reaping."""
        kvm, host = self.kvm, self.kvm.host
        t_ns = yield from self.sleep_until(0, self._spec.start)
        t_ns = yield from reach(kvm.env, t_ns)
        kvm.alive = False
        for vcpu in kvm.vcpus:
            vcpu.stop(t_ns)
        t_ns = yield from self.sleep_until(t_ns, t_ns + self._spec.delay)
        for _ in range(RETRIES):
            if host.mmap_writer is None:
                t_ns = yield from self.read_lock_mmap(t_ns)
                t_ns = yield from self.invalidate(
                    t_ns, 0, kvm.leaves, leaving=host.mmap_lock, blockable=False
                )
                break
            t_ns = yield from self.sleep_until(t_ns, t_ns + RETRY_NS)
        self.kvm.sched.sleep(self.task, t_ns)
