"""The OOM killer: what happens when an allocation has reclaimed in vain for too long.

Source: mm/oom_kill.c (``out_of_memory``, ``oom_badness``, ``__oom_kill_process``), v6.12. The
victim is the process with the most memory: pages, swap entries and page tables. That is a result
of the run, and the others go on. The victim's memory is free at once, as if the OOM reaper
had no walk to make; :mod:`simkvm.contenders.oom_reaper` has that walk.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from simkvm.kernel.swappable import SLOT, SwappableMemory

if TYPE_CHECKING:
    from simkvm.kernel.kvm import Kvm
    from simkvm.kernel.pgdat import Pgdat


class OomKiller:
    """Kills VMs among ``kvms``; ``kills``: when, and whom."""

    def __init__(self, pgdat: Pgdat, kvms: Sequence[Kvm]) -> None:
        self._pgdat = pgdat
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
        self.kills.append((t_ns, victim.name))


def _badness(kvm: Kvm) -> int:
    host = kvm.host
    assert isinstance(host, SwappableMemory)
    swapped = int(np.count_nonzero(host.swap & SLOT))
    tables = kvm.tables_allocated - kvm.tables_freed + host.table_pages
    return host.page_count + swapped + tables
