"""What was written, against what the dirty log says: the worst bug it can have is a lost bit.

A watcher times every write that a vCPU makes. The access that a fault was taken for counts with the
map; its bit has to be set there and then. Any other write needs the right to write, so it is of a
page whose bit is set, unless it is made while bits are taken, before the flush, when translations
still allow it: those writes are in what was just taken, for user space reads a page only after the
ioctl.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
from worlds import before

from simkvm.guest.vcpu import Vcpu
from simkvm.kernel.dirty_log import DirtyLog
from simkvm.kernel.kvm import Kvm
from simkvm.kernel.stage2 import WRITE


@dataclass
class Written:
    """The writes of one guest. ``reported``: pages that some get or take showed."""

    kvm: Kvm | None = None
    logging: bool = False
    last_write_ns: Any = None
    safe_until_ns: Any = None  #: writes up to then are known to whoever reads the page
    reported: Any = None
    taken: int = 0
    writes: int = field(default=0)

    def begin(self, kvm: Kvm, t_ns: int) -> None:
        self.kvm, self.logging = kvm, True
        self.last_write_ns = np.full(kvm.leaves, -1, np.int64)
        self.safe_until_ns = np.full(kvm.leaves, t_ns, np.int64)
        self.reported = np.zeros(kvm.leaves, np.bool_)

    def note(self, leaves: Any, times: Any) -> None:
        """Writes of ``leaves`` at ``times``."""
        if self.logging:
            np.maximum.at(self.last_write_ns, leaves, times)
            self.writes += len(leaves)

    def check(self) -> None:
        """No write is unknown; no page is writable without its bit."""
        if not self.logging:
            return
        assert self.kvm is not None
        bitmap = self.kvm.dirty_log._bitmap
        unknown = (self.last_write_ns > self.safe_until_ns) & ~bitmap
        assert not unknown.any(), f"lost: {np.flatnonzero(unknown)[:9]}"
        silent = ((self.kvm.stage2.leaf.entries & WRITE) != 0) & ~bitmap
        assert not silent.any(), f"writable without a bit: {np.flatnonzero(silent)[:9]}"


@contextmanager
def watched_writes() -> Iterator[Written]:
    """Listen to the only guest with a dirty log of every world that is run meanwhile."""
    seen = Written()

    def caught_up(vcpu: Vcpu, t_ns: int) -> None:
        first, last = vcpu._position, vcpu._reached(t_ns)
        times = vcpu._run_from_ns + vcpu._cost[first:last] - vcpu._cost[first]
        wrote = (vcpu._needs[first:last] & WRITE) != 0
        seen.note(vcpu._leaves[first:last][wrote], times[wrote])

    def mapped(vcpu: Vcpu, _: int) -> None:
        leaf = vcpu._list[vcpu._position]
        if vcpu._need_list[vcpu._position] & WRITE and seen.logging:
            assert vcpu.kvm.dirty_log._bitmap[leaf], f"{leaf} is written, its bit is not set"
            seen.writes += 1

    take = DirtyLog._protect_words
    enable, disable, get = DirtyLog.enable, DirtyLog.disable, DirtyLog.get

    def taken(log: DirtyLog, t_ns: int, part: range) -> Any:
        result = take(log, t_ns, part)
        if seen.logging:
            bits = part.start + np.flatnonzero(log.got[part.start : part.stop])
            if log.manual_protect:
                assert seen.reported[bits].all(), "taken although no get showed it"
            seen.reported[bits] = True
            seen.safe_until_ns[bits] = t_ns + result[0]
            seen.taken += len(bits)
        return result

    def enabled(log: DirtyLog, task: Any, t_ns: int, slot: range) -> Generator[Any, Any, int]:
        t_ns = yield from enable(log, task, t_ns, slot)
        seen.begin(log._kvm, t_ns)
        return t_ns

    def got(log: DirtyLog, task: Any, t_ns: int, slot: range) -> Generator[Any, Any, int]:
        t_ns = yield from get(log, task, t_ns, slot)
        if log.manual_protect:
            seen.reported[:] = log.got
        return t_ns

    def disabled(log: DirtyLog, *args: Any) -> Generator[Any, Any, int]:
        seen.logging = False
        return (yield from disable(log, *args))

    with pytest.MonkeyPatch.context() as patch:
        before(patch, Vcpu, "catch_up", caught_up)
        before(patch, Vcpu, "mapped", mapped)
        patch.setattr(DirtyLog, "_protect_words", taken)
        patch.setattr(DirtyLog, "enable", enabled)
        patch.setattr(DirtyLog, "disable", disabled)
        patch.setattr(DirtyLog, "get", got)
        yield seen
