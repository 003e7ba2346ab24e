"""The OOM killer: what happens when an allocation has reclaimed in vain for too long.

Source: mm/oom_kill.c (``out_of_memory``, ``oom_badness``, ``__oom_kill_process``), v6.12. The
victim is the process with the most memory: pages, swap entries and page tables of its own. Those
of stage 2 do not count (``mm_pgtables_bytes`` knows nothing of KVM's). That is a result of the run,
and the others go on. The victim's memory is free at once, as if the OOM reaper had no walk to make;
:mod:`simkvm.contenders.oom_reaper` has that walk. Its page tables and its vCPUs' memory caches
follow when its process has ended (:mod:`simkvm.kernel.teardown`).
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from simpy import Event

from simkvm.kernel.swap_fault import SwapFaultPath
from simkvm.kernel.swappable import SLOT, SwappableMemory

if TYPE_CHECKING:
    from simkvm.kernel.kvm import Kvm
    from simkvm.kernel.pgdat import Pgdat
    from simkvm.observe.recorder import Recorder


ProcessExit = Callable[["Kvm", int], Generator[Event, Any, Any]]


class OomKiller:
    """Kills VMs among ``kvms``; ``kills``: when, and whom. ``exit_of``: how a process ends.

    ``recorder`` notes each kill as a phase ``oom_kill`` that takes no time.
    """

    def __init__(
        self, pgdat: Pgdat, kvms: Sequence[Kvm], exit_of: ProcessExit, recorder: Recorder
    ) -> None:
        self._pgdat = pgdat
        self._exit_of = exit_of
        self._recorder = recorder
        self._kvms = kvms
        self.kills: list[tuple[int, str]] = []
        pgdat.pages.out_of_memory = self.kill

    def kill(self, t_ns: int) -> None:
        """Kill the VM that has most, if any is alive."""
        alive = [kvm for kvm in self._kvms if kvm.alive]
        if not alive:
            return
        victim = max(alive, key=_badness)  # the first of equals
        victim.alive = False
        for vcpu in victim.vcpus:
            vcpu.stop(t_ns)
        host = victim.host
        assert isinstance(host, SwappableMemory)
        host.give_all_up()
        self._pgdat.vmstat.oom_kills += 1
        self._recorder.phase("oom_kill", len(self.kills), t_ns, t_ns, victim.name)
        self.kills.append((t_ns, victim.name))
        self._pgdat.pages.env.process(self._exit(victim, t_ns))

    def _exit(self, victim: Kvm, t_ns: int) -> Generator[Event, Any, None]:
        """The victim's process ends, with KVM's hold on it."""
        yield from self._exit_of(victim, t_ns)
        host = victim.host
        assert isinstance(host, SwappableMemory)
        host.free_tables()
        for vcpu in victim.vcpus:
            assert isinstance(vcpu.fault, SwapFaultPath)
            vcpu.fault.free_cache()
        self._pgdat.pages.put(victim.stage2.geometry.root_pages)


def _badness(kvm: Kvm) -> int:
    host = kvm.host
    assert isinstance(host, SwappableMemory)
    swapped = 0 if host.file else int(np.count_nonzero(host.swap & SLOT))
    return host.page_count + swapped + host.table_pages
