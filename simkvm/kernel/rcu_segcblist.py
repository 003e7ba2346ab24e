"""Segmented callback list of one CPU (kernel/rcu/rcu_segcblist.c, v6.12).

Four segments in one queue: DONE may be invoked, WAIT waits for the grace period with its number,
NEXT_READY for a later one, NEXT has no number yet. The segments are lengths, so that numbering
and advancing cost the same for one callback and for a hundred thousand.

Callers compute ahead, so a callback may carry a time that has not come. It stays outside the
segments until the CPU looks at a later time.

An offloaded CPU has a bypass list beside the segments (``nocb_bypass``): callbacks in it are
younger than all in the segments, and belong to none until they are flushed into NEXT.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from heapq import merge
from itertools import takewhile
from operator import itemgetter
from typing import Final

Callback = Callable[[int], int]  #: called with the time of invocation, returns its cost in ns
IndexedCallback = Callable[[int, int], int]  #: the same with its place in the bulk
#: Time queued, callback, place in the bulk or ALONE, whether it may wait to save power.
Entry = tuple[int, Callable[..., int], int, bool]

ALONE: Final = -1


class SegmentedCallbackList:
    """Callbacks of one CPU in order of their time. ``len()`` counts those not yet taken."""

    __slots__ = (
        "_next_ready_number",
        "_queue",
        "arriving",
        "bypass",
        "next_ready",
        "ready",
        "wait",
        "wait_number",
    )

    def __init__(self) -> None:
        self.arriving: deque[Entry] = deque()  # not yet seen by this CPU, in order of time
        self._queue: deque[Entry] = deque()
        self.bypass: deque[Entry] = deque()
        self.ready = 0  # callbacks in DONE
        self.wait = 0
        self.next_ready = 0
        self.wait_number = 0
        self._next_ready_number = 0

    def __len__(self) -> int:
        return len(self._queue) + len(self.bypass) + len(self.arriving)

    @property
    def seen(self) -> int:
        """Callbacks in the four segments and in the bypass list."""
        return len(self._queue) + len(self.bypass)

    @property
    def waiting(self) -> int:
        """Callbacks seen that may not be invoked yet: all segments but DONE."""
        return len(self._queue) - self.ready

    @property
    def unnumbered(self) -> int:
        """Callbacks in NEXT."""
        return len(self._queue) - self.ready - self.wait - self.next_ready

    def enqueue(self, t_ns: int, callback: Callback, lazy: bool = False) -> None:
        """Add a callback that is queued at ``t``, now or later."""
        arriving = self.arriving
        entry = (t_ns, callback, ALONE, lazy)
        if not arriving or arriving[-1][0] <= t_ns:
            arriving.append(entry)
            return
        # A softirq queued it while the thread on this CPU has already told a later time.
        place = len(arriving)
        while place and arriving[place - 1][0] > t_ns:
            place -= 1
        arriving.insert(place, entry)

    def enqueue_many(
        self, times_ns: Sequence[int], callback: IndexedCallback, lazy: bool = False
    ) -> None:
        """Add one callback a time; ``times_ns`` must not decrease."""
        bulk = ((t, callback, index, lazy) for index, t in enumerate(times_ns))
        if self.arriving and times_ns and self.arriving[-1][0] > times_ns[0]:
            self.arriving = deque(merge(self.arriving, bulk, key=itemgetter(0)))
        else:
            self.arriving.extend(bulk)

    def entrain(self, t_ns: int, callback: Callback) -> bool:
        """Add a callback behind those queued up to ``t``, in their segment; False if none is."""
        if self.due(t_ns):
            self.enqueue(t_ns, callback)
            return True
        if not self._queue:
            return False
        if not self.unnumbered:
            if self.next_ready:
                self.next_ready += 1
            elif self.wait:
                self.wait += 1
            else:
                self.ready += 1
        self._queue.append((t_ns, callback, ALONE, False))
        return True

    def see(self, t_ns: int) -> None:
        """Let the CPU see what was queued before ``t``, and not at ``t`` itself."""
        arriving, queue = self.arriving, self._queue
        while arriving and arriving[0][0] < t_ns:
            queue.append(arriving.popleft())

    def append(self, entry: Entry) -> None:
        """Put a callback that has arrived into NEXT (rcutree_enqueue)."""
        self._queue.append(entry)

    def flush_bypass(self) -> None:
        """Move the bypass list into NEXT (rcu_segcblist_insert_pend_cbs)."""
        self._queue.extend(self.bypass)
        self.bypass.clear()

    def due(self, t_ns: int) -> int:
        """Callbacks queued up to and including ``t`` that the CPU has not seen."""
        return sum(1 for _ in takewhile(lambda entry: entry[0] <= t_ns, self.arriving))

    def accelerate(self, number: int) -> bool:
        """Give ``number`` to what has none or a later one (rcu_segcblist_accelerate).

        False if nothing can take it: no callback waits, or both numbered segments are taken by
        earlier grace periods.
        """
        if self.next_ready and self._next_ready_number < number:
            return False
        if self.wait and self.wait_number < number:
            self.next_ready = self.waiting - self.wait
            self._next_ready_number = number
            return self.next_ready > 0
        self.wait = self.waiting
        self.next_ready = 0
        self.wait_number = self._next_ready_number = number
        return self.wait > 0

    def advance(self, completed: int) -> None:
        """Move what has waited for grace periods up to ``completed`` to DONE."""
        if completed < self.wait_number:
            return
        self.ready += self.wait
        self.wait = self.next_ready
        self.wait_number = self._next_ready_number
        self.next_ready = 0
        if self.wait_number <= completed:
            self.ready += self.wait
            self.wait = 0

    def take(self) -> Entry:
        """The oldest callback of DONE."""
        self.ready -= 1
        return self._queue.popleft()
