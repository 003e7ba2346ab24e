"""Marking memory idle through ``/sys/kernel/mm/page_idle/bitmap``, a page at a time.

Source: mm/page_idle.c, v6.12, and ``access_tracking_perf_test``. For each page the test reads its
frame number from pagemap, reads its idle bit and sets it: three system calls. Setting the bit
walks the reverse map and clears the accessed flags of all mappings; reading the bit of a page
that is marked does the same, and finds the page in use if it was young. Each walk asks the
secondary MMU about the page, whatever MGLRU does.
"""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from simpy import Event

from simkvm.kernel.aging_call import Pass, PerPte
from simkvm.kernel.host_memory import YOUNG
from simkvm.kernel.task import Task, reach
from simkvm.scenario.machine import Machine

if TYPE_CHECKING:
    from simkvm.kernel.kvm import Kvm


@dataclass
class Marked:
    """What one thread did: when it was done, pages it looked at, and those that were idle still."""

    end_ns: int
    pages: int = 0
    still_idle: int = 0
    no_pfn: int = 0


class PageIdle:
    """The idle bits of one guest's host pages."""

    def __init__(self, kvm: Kvm, machine: Machine) -> None:
        self._kvm = kvm
        self._idle = np.zeros(kvm.leaves, np.bool_)
        self._syscall_ns = round(machine["ioctl_ns"])
        self._rmap_ns = round(machine["rmap_check_single_ns"])

    def mark(self, task: Task, t_ns: int, first: int, last: int) -> Generator[Event, Any, Marked]:
        """Mark the host pages of leaves ``first`` up to ``last`` from ``t_ns`` on, as ``task``."""
        kvm, env = self._kvm, self._kvm.env
        call, report = PerPte(kvm, task), Pass(kvm.name, t_ns)
        done = Marked(t_ns)
        task.cpu.enter_kernel(t_ns)
        for leaf in range(first, last):
            done.pages += 1
            t_ns += self._syscall_ns  # pagemap
            if not kvm.host.fast[leaf]:
                done.no_pfn += 1
                continue
            t_ns += self._syscall_ns  # the bit is read
            if self._idle[leaf]:
                t_ns = yield from self._clear_references(call, report, t_ns, leaf)
                if self._idle[leaf]:
                    done.still_idle += 1
                    continue
            t_ns = yield from self._clear_references(call, report, t_ns + self._syscall_ns, leaf)
            self._idle[leaf] = True
        done.end_ns = yield from reach(env, t_ns)
        return done

    def _clear_references(
        self, call: PerPte, report: Pass, t_ns: int, leaf: int
    ) -> Generator[Event, Any, int]:
        """``page_idle_clear_pte_refs``: a page found young is idle no more."""
        kvm = self._kvm
        t_ns = yield from reach(kvm.env, t_ns + self._rmap_ns)
        for vcpu in kvm.vcpus:
            vcpu.catch_up(t_ns)
        by_host = kvm.host.fast[leaf] & YOUNG
        kvm.host.fast[leaf] &= ~YOUNG & 0xFF
        t_ns, young = yield from call.ask(t_ns, np.array([leaf]), report)
        if by_host or len(young):
            self._idle[leaf] = False
        return t_ns
