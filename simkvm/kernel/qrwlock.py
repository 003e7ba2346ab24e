"""``kvm->mmu_lock``: the queued rwlock, to the rule (kernel/locking/qrwlock.c, v6.12).

The lock word holds a count of readers, a bit "a writer waits" and a byte "a writer holds". A
reader adds itself and is in, unless a writer bit is set; then it takes itself off again and joins
the waiting line. A writer is in if the word is zero, else it joins the line. Only the head of the
line watches the word: a head reader waits while a writer *holds*, a head writer sets *waits*,
which shuts the fast path to new readers, and waits for the readers that are inside. Whoever gets
in makes the next one head, so readers that stand in a row enter together.

How the model runs it: a critical section is a function that the lock calls when it grants; it does
its work on the model's state at once and returns how long the lock is held and when the caller
goes on. So a hold costs no event, an uncontended acquire costs none either, and a contended one
shares an event with everybody that the same release lets in.

What happens at the same time is ordered by the line of the lock word
(:mod:`simkvm.kernel.cacheline`):

* a section's end is a posted release: it is served when its time comes, before any later request;
* the head of the line sees a release ``handoff_ns`` after it was served;
* the next one becomes head ``next_ns`` (a line transfer) after the one before it got in;
* a hand-over to readers in a row is served in one go, before any later request.
"""

from __future__ import annotations

from bisect import insort
from collections import deque
from collections.abc import Callable
from heapq import heappush
from typing import Final

from simpy import Environment, Event
from simpy.events import NORMAL

from simkvm.kernel.cacheline import CacheLine, LineCosts

#: Called with the time of entry; returns (hold_ns, time when the caller goes on).
Section = Callable[[int], tuple[int, int]]

NEVER: Final = 1 << 62
OPEN: Final = -1  #: a section that returns this hold keeps the lock until :meth:`release`
ROW: Final = 6  #: columns of an account row: site, mode, arrival, wait, hold, waiters met
FAST: Final = -1  #: "waiters met" of an acquisition that did not have to join the line


#: One that stands in the line: (write, cpu, site, arrival, waiters met, section, event).
Waiter = tuple[bool, int, int, int, int, Section, Event]


class QueuedRwlock:
    """A queued rwlock whose word lives on one cache line.

    ``rows`` is its account, flat, :data:`ROW` integers an acquisition, in the order of entry.
    """

    __slots__ = (
        "_calendar",
        "_due_ns",
        "_env",
        "_handoff_ns",
        "_holder",
        "_line",
        "_next_ns",
        "_numbers",
        "_open",
        "_queue",
        "_readers",
        "_release",
        "_unlocks",
        "_waiting",
        "_writer",
        "_writer_cpu",
        "on_contention",
        "rows",
    )

    def __init__(self, env: Environment, costs: LineCosts, handoff_ns: int, next_ns: int) -> None:
        self._env = env
        self._calendar = env._queue  # for planning at absolute times, as env.schedule() would
        self._numbers = env._eid
        self._line = CacheLine(costs)
        self._handoff_ns = handoff_ns
        self._next_ns = next_ns
        self._readers = 0
        self._writer = False
        self._waiting = False
        self._unlocks: deque[tuple[int, int]] = deque()  # (time, cpu): releases of readers inside
        self._due_ns = NEVER  # the earliest posted release
        self._writer_cpu = -1
        self._holder: Event | None = None  # an event already planned for the moment of release
        self._open: tuple[int, int, int, int] | None = None
        self._queue: deque[Waiter] = deque()
        self._release = self._on_due  # bound once
        self.rows: list[int] = []
        #: Called with the time at which the first one joins the line of a lock held open.
        self.on_contention: Callable[[int], None] | None = None

    # -- asking -------------------------------------------------------------------------------

    def read(self, t_ns: int, cpu: int, site: int, section: Section) -> int | Event:
        """Ask to read at ``t_ns``: returns when the caller goes on, or the event that tells it."""
        if self._due_ns <= t_ns:
            self._settle(t_ns)
        line = self._line
        if self._writer or self._waiting:
            line.serve(cpu, t_ns, 3)  # add itself, take itself off again, join the line
            event = Event(self._env)
            queue = self._queue
            met = len(queue)
            queue.append((False, cpu, site, t_ns, met, section, event))
            if not met:
                self._watch()
            return event
        entry = line.serve(cpu, t_ns)
        hold, resume = section(entry)
        unlock = entry + hold
        self._readers += 1
        unlocks = self._unlocks
        if not unlocks:
            self._due_ns = unlock
            unlocks.append((unlock, cpu))
        elif (unlock, cpu) >= unlocks[-1]:
            unlocks.append((unlock, cpu))
        else:
            insort(unlocks, (unlock, cpu))
            self._due_ns = unlocks[0][0]
        self.rows += (site, 0, t_ns, entry - t_ns, hold, FAST)
        return resume

    def write(self, t_ns: int, cpu: int, site: int, section: Section) -> int | Event:
        """Ask to write at ``t_ns``: returns when the caller goes on, or the event that tells it."""
        if self._due_ns <= t_ns:
            self._settle(t_ns)
        if self._writer or self._readers or self._waiting:
            # line.serve(cpu, t_ns, 2), written out: a failed cmpxchg, join the line.
            line, queue = self._line, self._queue
            start = line.free_ns
            if start < t_ns:
                start = t_ns
            if cpu == line.owner or not line.one_node:
                line.serve(cpu, start, 2)
            else:
                line.free_ns = start + line.fetch_ns[2]
                line.owner = cpu
            event = Event(self._env)
            met = len(queue)
            queue.append((True, cpu, site, t_ns, met, section, event))
            if not met:
                self._watch()
            return event
        entry = self._line.serve(cpu, t_ns)
        self._holder = None
        return self._enter_writer(cpu, site, t_ns, entry, FAST, section)

    def release(self, t_ns: int) -> None:
        """Let go, at ``t_ns``, of a lock taken by a section that returned :data:`OPEN`."""
        assert self._open is not None, "release of a lock that nobody holds open"
        site, arrival, entry, met = self._open
        self._open = None
        self._holder = None
        self.rows += (site, 1, arrival, entry - arrival, t_ns - entry, met)
        self._due_ns = t_ns
        if self._queue:
            self._watch()

    @property
    def contended(self) -> bool:
        """Whether somebody stands in the line; of what kind it does not say."""
        return bool(self._queue)

    def idle_for(self, cpu: int, t_ns: int) -> bool:
        """Whether nobody holds or waits at ``t_ns`` and ``cpu`` had the lock word last."""
        if self._due_ns <= t_ns:
            self._settle(t_ns)
        line = self._line
        free = not (self._writer or self._readers or self._waiting)
        return free and line.owner == cpu and line.free_ns <= t_ns

    def advance(self, t_ns: int) -> None:
        """The CPU that had the word last went on using it, alone, until ``t_ns``."""
        self._line.free_ns = max(self._line.free_ns, t_ns)

    # -- inside -------------------------------------------------------------------------------

    def _watch(self) -> None:
        """The head of the line looks at the word: plan the moment at which it can get in."""
        if not self._writer:
            self._waiting = True
            self._arm(self._unlocks[-1][0])
        elif self._open is None:
            holder = self._holder
            if holder is not None and holder.callbacks is not None:
                holder.callbacks.insert(0, self._release)  # who goes on at the release itself
            else:
                self._arm(self._due_ns)
        elif self.on_contention is not None:
            self.on_contention(self._queue[0][3])

    def _arm(self, at_ns: int) -> None:
        event = Event(self._env)
        event.callbacks.append(self._release)
        self._trigger(event, max(at_ns, int(self._env.now)))

    def _trigger(self, event: Event, at_ns: int) -> None:
        # What env.schedule() does, in absolute integer time.
        event._ok = True
        event._value = at_ns
        heappush(self._calendar, (at_ns, NORMAL, next(self._numbers), event))

    def _on_due(self, _: Event) -> None:
        due = self._due_ns
        if self._writer and self._queue and due <= self._env._now:
            # The commonest part of _settle(): a writer lets go, and somebody waits.
            self._due_ns = NEVER
            self._writer = False
            self._hand_over(self._line.serve(self._writer_cpu, due))
        else:
            self._settle(self._env._now)  # type: ignore[arg-type]  # all delays are whole

    def _settle(self, t_ns: int) -> None:
        """Serve every release that has reached the line by ``t_ns``, in order, and hand over."""
        line = self._line
        while self._due_ns <= t_ns:
            if self._writer:
                seen = line.serve(self._writer_cpu, self._due_ns)
                self._due_ns = NEVER
                self._writer = False
            else:
                unlocks = self._unlocks
                at, cpu = unlocks.popleft()
                seen = line.serve(cpu, at)
                self._due_ns = unlocks[0][0] if unlocks else NEVER
                self._readers -= 1
                if unlocks:
                    continue
            if self._queue:
                self._hand_over(seen)

    def _hand_over(self, seen_ns: int) -> None:
        """The word is free for the head: let it in, and those that may enter with it."""
        queue, line = self._queue, self._line
        self._waiting = False
        write, cpu, site, arrival, met, section, event = queue.popleft()
        # line.occupy(), written out: this and the next lines are the model's hottest.
        free = line.free_ns
        entry = line.free_ns = (free if free > seen_ns else seen_ns) + self._handoff_ns
        line.owner = cpu
        if write:
            self._writer = True
            self._writer_cpu = cpu
            hold, resume = section(entry)
            event._ok = True
            event._value = resume
            heappush(self._calendar, (resume, NORMAL, next(self._numbers), event))
            if hold == OPEN:
                self._open = (site, arrival, entry, met)
                return
            due = self._due_ns = entry + hold
            self.rows += (site, 1, arrival, entry - arrival, hold, met)
            if resume != due:
                self._holder = None
                if queue:
                    self._arm(due)
            elif queue:
                event.callbacks.insert(0, self._release)
            else:
                self._holder = event
            return
        unlocks, rows, calendar, numbers = self._unlocks, self.rows, self._calendar, self._numbers
        while True:
            hold, resume = section(entry)
            unlock = entry + hold
            self._readers += 1
            if not unlocks or (unlock, cpu) >= unlocks[-1]:
                unlocks.append((unlock, cpu))
            else:
                insort(unlocks, (unlock, cpu))
            rows += (site, 0, arrival, entry - arrival, hold, met)
            event._ok = True
            event._value = resume
            heappush(calendar, (resume, NORMAL, next(numbers), event))
            if not queue or queue[0][0]:
                break
            _, cpu, site, arrival, met, section, event = queue.popleft()
            entry = line.serve(cpu, entry + self._next_ns)
        self._due_ns = unlocks[0][0]
        if queue:
            line.serve(queue[0][1], entry + self._next_ns)  # sets the writer's "waits" bit
            self._watch()

    def _enter_writer(
        self, cpu: int, site: int, arrival: int, entry: int, met: int, section: Section
    ) -> int:
        self._writer = True
        self._writer_cpu = cpu
        hold, resume = section(entry)
        if hold == OPEN:
            self._open = (site, arrival, entry, met)
        else:
            self._due_ns = entry + hold
            self.rows += (site, 1, arrival, entry - arrival, hold, met)
        return resume
