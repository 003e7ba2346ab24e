"""Compare-and-swaps of lock-free ageing that fail because somebody else changed the entry.

A walk without ``mmu_lock`` loads an entry and, a moment later, swaps it for the same with the
accessed flag clear (arch/arm64/kvm/hyp/pgtable.c, ``stage2_try_set_pte``, v6.12). If an unmap's
plain store or a fault's change of permissions comes between, the swap fails, the walk goes on
(<Zlog5Yk_Pjq0jQhC@linux.dev>: the page is most likely young anyway) and the entry is what the
other one made of it. The model does not do these steps one by one, so it finds the races by their
times: who comes later compares with what the others did lately, and both logs are cut at what can
still be met.
"""

from __future__ import annotations

from collections import deque
from typing import Final

import numpy as np
from numpy.typing import NDArray

KEPT: Final = 256  #: stores, or batches of loads, that are remembered at most

Times = NDArray[np.int64]
Log = deque[tuple[Times, Times]]  # (leaves, in order; when each was loaded or stored to)


class CmpxchgRaces:
    """Loads and stores of one guest's leaves. ``failed``: swaps that failed so far."""

    def __init__(self, window_ns: int) -> None:
        self._window_ns = window_ns  #: from the load to the compare-and-swap
        self._loads: Log = deque(maxlen=KEPT)
        self._stores: Log = deque(maxlen=KEPT)
        self.failed = 0

    def stored(self, leaves: Times, times_ns: Times) -> None:
        """``leaves``, young until then, are changed by somebody else at ``times_ns``."""
        if not len(leaves):
            return
        _forget(self._loads, int(times_ns.min()) - self._window_ns)
        for loaded, loads_ns in self._loads:
            _, mine, theirs = np.intersect1d(leaves, loaded, True, return_indices=True)
            into = times_ns[mine] - loads_ns[theirs]
            self.failed += int(np.count_nonzero((into > 0) & (into <= self._window_ns)))
        self._stores.append((leaves, times_ns))

    def loaded(self, leaves: Times, loads_ns: Times, young: NDArray[np.bool_]) -> NDArray[np.bool_]:
        """``leaves`` are loaded at ``loads_ns``; returns whose compare-and-swap fails.

        ``young``: which of them have the flag now, and get the compare-and-swap if it can succeed.
        A leaf that somebody changed in between was young when it was loaded.
        """
        failed = np.zeros(len(leaves), np.bool_)
        if not len(leaves):
            return failed
        _forget(self._stores, int(loads_ns.min()))
        for changed, times_ns in self._stores:
            _, mine, theirs = np.intersect1d(leaves, changed, True, return_indices=True)
            into = times_ns[theirs] - loads_ns[mine]
            failed[mine[(into > 0) & (into <= self._window_ns)]] = True
        self.failed += int(np.count_nonzero(failed))
        swapped = young & ~failed
        if swapped.any():
            self._loads.append((leaves[swapped], loads_ns[swapped]))
        return failed


def _forget(log: Log, before_ns: int) -> None:
    """Drop what nobody who comes from now on can meet: entries are nearly in order of time."""
    while log and int(log[0][1][-1]) < before_ns:
        log.popleft()
