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
from collections.abc import Callable
from typing import Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

KEPT: Final = 256  #: stores, or batches of loads, that are remembered at most

Times = NDArray[np.int64]


class Loads(NamedTuple):
    """A batch of loads; ``times`` are computed only if somebody comes near."""

    leaves: Times  #: in order
    times: Callable[[], Times]
    first_ns: int  #: no load is earlier,
    last_ns: int  #: and none later


class CmpxchgRaces:
    """Loads and stores of one guest's leaves. ``failed``: swaps that failed so far."""

    def __init__(self, window_ns: int) -> None:
        self._window_ns = window_ns  #: from the load to the compare-and-swap
        self._loads: deque[tuple[Loads, NDArray[np.bool_]]] = deque(maxlen=KEPT)
        self._stores: deque[tuple[Times, Times]] = deque(maxlen=KEPT)  # leaves, when
        self.failed = 0

    def stored(self, leaves: Times, times_ns: Times) -> None:
        """``leaves``, young until then, are changed by somebody else at ``times_ns``."""
        if not len(leaves):
            return
        log, first_ns = self._loads, int(times_ns.min()) - self._window_ns
        while log and log[0][0].last_ns < first_ns:
            log.popleft()
        for batch, swapped in log:
            _, mine, theirs = np.intersect1d(leaves, batch.leaves, True, return_indices=True)
            if len(mine):
                late = self._between(batch.times()[theirs], times_ns[mine]) & swapped[theirs]
                self.failed += int(np.count_nonzero(late))
        self._stores.append((leaves, times_ns))

    def loaded(self, batch: Loads, young: NDArray[np.bool_]) -> NDArray[np.bool_] | None:
        """A walk loads a batch: returns whose compare-and-swap fails; None if nobody's does.

        ``young``: which of its leaves have the flag now, and get the compare-and-swap if it can
        succeed. A leaf that somebody changed in between was young when it was loaded.
        """
        stores = self._stores
        while stores and int(stores[0][1][-1]) < batch.first_ns:
            stores.popleft()
        if not stores:
            self._loads.append((batch, young))
            return None
        failed = np.zeros(len(batch.leaves), np.bool_)
        for changed, times_ns in stores:
            _, mine, theirs = np.intersect1d(batch.leaves, changed, True, return_indices=True)
            if len(mine):
                failed[mine] |= self._between(batch.times()[mine], times_ns[theirs])
        self.failed += int(np.count_nonzero(failed))
        self._loads.append((batch, young & ~failed))
        return failed

    def _between(self, loads_ns: Times, stores_ns: Times) -> NDArray[np.bool_]:
        """Which stores come after the load and not after the swap."""
        into = stores_ns - loads_ns
        late: NDArray[np.bool_] = (into > 0) & (into <= self._window_ns)
        return late
