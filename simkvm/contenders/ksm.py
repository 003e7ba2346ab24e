"""KSM: pages of equal content become one, write-protected, until somebody writes.

Source: mm/ksm.c (``ksm_do_scan``, ``cmp_and_merge_page``, ``should_skip_rmap_item``), v6.12. The
thread looks at ``pages_to_scan`` pages, sleeps, and goes on where it stopped. A page is compared
with what has been merged already (the stable tree) at once; only one whose checksum has not
changed since the last full scan is compared with other candidates (the unstable tree, forgotten
after each full scan). A merge is two range starts and ends of one page each, to write-protect
and to replace it; the page that the first of its kind becomes is only write-protected. A page
that failed often is passed over (``smart_scan``).

Which pages have equal content is data about the guest: it is drawn once, from the contender's
stream. A page counts as changed if the guest touched it since KSM saw it last.
"""

from __future__ import annotations

from collections.abc import Generator
from typing import TYPE_CHECKING, Any, Final

import numpy as np
from numpy.typing import NDArray
from simpy import Event

from simkvm.contenders.contender import Contender, Steps
from simkvm.kernel import host_change
from simkvm.kernel.host_change import MERGED
from simkvm.kernel.host_memory import OWN, WRPROTECT
from simkvm.kernel.task import Task, reach
from simkvm.scenario.contenders import Ksm as Spec

if TYPE_CHECKING:
    from simkvm.kernel.kvm import Kvm

UNIQUE: Final = -1
FRESH: Final = 3  #: scans in which a page is never passed over


class Ksm(Contender):
    """The ksmd thread, at work on one guest."""

    def __init__(self, kvm: Kvm, task: Task, rng: np.random.Generator, spec: Spec) -> None:
        super().__init__(kvm, task, rng)
        self._spec = spec
        kvm.remember_touches()
        self.content, self._sharers = _contents(kvm.leaves, spec.duplicates, spec.copies, rng)
        self._seen_ns: NDArray[np.int64] = np.full(kvm.leaves, -1, np.int64)
        self._unstable: dict[int, int] = {}  # content -> the leaf that waits for its like
        self._age = bytearray(kvm.leaves)
        self._skips = bytearray(kvm.leaves)
        self._cursor = 0
        self.merged = 0  #: pages that became KSM's
        self.full_scans = 0
        flush_ns = kvm.costs.unmap.host_page_ns  # an entry cleared, flushed and made again
        self._protect = self.change(host_change.write_protect, flush_ns)
        self._replace = self.change(host_change.merge, flush_ns)

    def run(self) -> Generator[Event, Any, None]:
        """Batch after batch until the guest is gone."""
        t_ns, due_ns = 0, self._spec.start
        while True:
            t_ns = yield from self.sleep_until(t_ns, due_ns)
            if not self.kvm.alive:
                return
            t_ns = yield from self._scan(t_ns)
            due_ns = t_ns + self._spec.sleep

    def _scan(self, t_ns: int) -> Steps:
        self.kvm.accesses.catch_up(t_ns, 0, self.kvm.leaves)
        for _ in range(self._spec.pages_to_scan):
            leaf = self._next()
            if leaf is None:
                break
            t_ns = yield from self._consider(t_ns, leaf)
        return t_ns

    def _next(self) -> int | None:
        """The next page of the guest that is present and not passed over."""
        state, leaves = self.kvm.host.fast, self.kvm.leaves
        for _ in range(leaves):
            leaf = self._cursor
            self._cursor = (leaf + 1) % leaves
            if not self._cursor:
                self.full_scans += 1
                self._unstable.clear()
            own = state[leaf] & OWN
            if state[leaf] & MERGED == MERGED and not own:
                return leaf
            if own and not self._passed_over(leaf):
                return leaf
        return None

    def _passed_over(self, leaf: int) -> bool:
        if not self._spec.smart_scan:
            return False
        age = self._age[leaf]
        self._age[leaf] = min(255, age + 1)
        if age < FRESH:
            return False
        if not self._skips[leaf]:
            self._skips[leaf] = _skips(age)
            return False
        self._skips[leaf] -= 1
        return True

    def _consider(self, t_ns: int, leaf: int) -> Steps:
        """Look at one page (``cmp_and_merge_page``)."""
        kvm = self.kvm
        t_ns = yield from self.read_lock_mmap(t_ns)  # to get the page; let go of at once
        kvm.host.mmap_lock.post(self.task.cpu.id, t_ns)
        if not kvm.host.fast[leaf] & OWN:
            return t_ns + kvm.costs.ageing.scan_ns  # merged already
        t_ns = yield from reach(kvm.env, t_ns + kvm.costs.takers.ksm_scan_ns)
        content = int(self.content[leaf])
        if content != UNIQUE and any(map(self._is_merged, self._sharers[content])):
            return (yield from self._merge(t_ns, leaf))
        same = self._seen_ns[leaf] >= 0 and self._unchanged(leaf)
        self._seen_ns[leaf] = t_ns
        if not same or content == UNIQUE:
            return t_ns
        twin = self._unstable.setdefault(content, leaf)
        if twin == leaf:
            return t_ns
        del self._unstable[content]
        if not (kvm.host.fast[twin] & OWN and self._unchanged(twin)):
            return t_ns  # they are not identical any more
        t_ns = yield from self._found(t_ns, leaf)
        return (yield from self._merge(t_ns, twin))

    def _unchanged(self, leaf: int) -> bool:
        return bool(self.kvm.last_touch_ns[leaf] <= self._seen_ns[leaf])

    def _is_merged(self, leaf: int) -> bool:
        return self.kvm.host.fast[leaf] & (OWN | MERGED) == MERGED

    def _found(self, t_ns: int, leaf: int) -> Steps:
        """The first of its kind: write-protected, it is KSM's page itself."""
        kvm = self.kvm

        def become(t_ns: int, first: int, last: int) -> int:
            end = self._protect(t_ns, first, last)
            self.merged += host_change.merge(kvm.host, first, last)
            return end

        t_ns = yield from self.read_lock_mmap(t_ns)
        return (
            yield from self.invalidate(t_ns, leaf, leaf + 1, become, leaving=kvm.host.mmap_lock)
        )

    def _merge(self, t_ns: int, leaf: int) -> Steps:
        """Write-protect, compare, replace (``try_to_merge_one_page``)."""
        kvm = self.kvm
        t_ns = yield from self.read_lock_mmap(t_ns)
        t_ns = yield from self.invalidate(t_ns, leaf, leaf + 1, self._protect)
        before = kvm.host.fast[leaf]
        t_ns = yield from self.invalidate(
            t_ns, leaf, leaf + 1, self._replace, leaving=kvm.host.mmap_lock
        )
        self.merged += bool(before & WRPROTECT) and self._is_merged(leaf)
        return t_ns


def _contents(
    leaves: int, share: float, copies: int, rng: np.random.Generator
) -> tuple[NDArray[np.int64], list[list[int]]]:
    """What each leaf contains (:data:`UNIQUE`, or a number), and the leaves of each number."""
    contents = round(leaves * share) // copies
    drawn = rng.permutation(leaves)[: contents * copies]
    content: NDArray[np.int64] = np.full(leaves, UNIQUE, np.int64)
    content[drawn] = np.arange(contents * copies) // copies
    return content, np.sort(drawn.reshape(contents, copies), axis=1).tolist()


def _skips(age: int) -> int:
    """How often a page that failed for ``age`` scans is passed over (``skip_age``)."""
    return next((skips for upto, skips in ((3, 1), (5, 2), (8, 4)) if age <= upto), 8)
