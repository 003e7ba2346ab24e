"""Marking memory idle through ``/sys/kernel/mm/page_idle/bitmap``, a page at a time.

Source: ``access_tracking_perf_test`` (``mark_vcpu_memory_idle``), v6.12. For each page the test
reads its frame number from pagemap, reads the word of the bitmap that its bit is in, and writes a
word with that bit: three system calls. What the last two do is :mod:`simkvm.kernel.page_idle`;
reading looks for references to every page of the word that is marked already, so a page is asked
about again and again until its word is done. Pages behind a folio's first have no bit.
"""

from __future__ import annotations

from collections.abc import Generator, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from simpy import Event

from simkvm.kernel.aging_call import Leaves, Pass
from simkvm.kernel.host_memory import IDLE, OWN, PRESENT
from simkvm.kernel.page_idle import WORD, PageIdle
from simkvm.kernel.task import Task, reach

if TYPE_CHECKING:
    from simkvm.kernel.kvm import Kvm


@dataclass
class Marked:
    """What one thread did: when it was done, pages it looked at, and those that were idle still."""

    end_ns: int
    pages: int = 0
    still_idle: int = 0
    no_pfn: int = 0


class Marker:
    """A thread, ``task``, that marks memory of ``kvm``; ``syscall_ns``: a system call."""

    def __init__(self, kvm: Kvm, task: Task, syscall_ns: int) -> None:
        self._kvm = kvm
        self._task = task
        self._syscall_ns = syscall_ns
        self._idle = PageIdle(kvm, task)
        self._folio_pages = kvm.folio_leaves * kvm.leaf_pages

    def mark(self, t_ns: int, pages: Iterable[int]) -> Generator[Event, Any, Marked]:
        """Mark ``pages`` of the host from ``t_ns`` on."""
        kvm, state = self._kvm, self._kvm.host.fast
        report, done = Pass(kvm.name, t_ns), Marked(t_ns)
        self._task.cpu.enter_kernel(t_ns)
        for page in pages:
            done.pages += 1
            t_ns += self._syscall_ns  # pagemap
            leaf = page // kvm.leaf_pages
            if not state[leaf] & PRESENT:
                done.no_pfn += 1
                continue
            t_ns += self._syscall_ns  # the word is read
            t_ns = yield from self._idle.read(t_ns, self._marked(page), report)
            head = page % self._folio_pages == 0
            if head and state[leaf] & IDLE:
                done.still_idle += 1
                continue
            t_ns += self._syscall_ns  # the bit is set
            if head:
                folio = np.arange(leaf, min(leaf + kvm.folio_leaves, kvm.leaves))
                t_ns = yield from self._idle.mark(t_ns, folio, report)
        done.end_ns = yield from reach(kvm.env, t_ns)
        return done

    def _marked(self, page: int) -> list[Leaves]:
        """Folios that are marked and whose first page has its bit in the word of ``page``."""
        kvm, size = self._kvm, self._folio_pages
        word = page - page % WORD
        first, behind = -(-word // size), -(-(word + WORD) // size)
        leaves = np.arange(first, behind) * kvm.folio_leaves
        leaves = leaves[leaves < kvm.leaves]
        marked = leaves[(kvm.host.state[leaves] & (IDLE | OWN)) == (IDLE | OWN)]
        whole = np.arange(kvm.folio_leaves)
        return [folio[folio < kvm.leaves] for folio in marked[:, None] + whole]
