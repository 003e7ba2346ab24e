"""The same system once more, as plainly as can be: what the fast model has to equal exactly.

Every actor is a SimPy process that takes one step an event and does its work when the step's time
has come. A page is an object, a table is an object, the lock word is three variables with a queue
beside it, the cache line is a process that serves one request after the other. Nothing is planned,
saved, bundled or computed ahead, with one exception: a fault that is let in asks the line when it
will have the lock, because the model's rule for tables under construction compares times of entry.

Rules of the model that are not Linux's but its own; both models state and keep them:

* what a section does under ``mmu_lock`` is done when the lock is *granted* (at the request if the
  word is free, else at the release that lets it in), which is some transfers of the line before
  the entry; only guests see a mapping no earlier than the entry;
* a release comes before anything else of its nanosecond, a guest's touch after everything else;
  one of a writer whose section was not planned on entry (an unmap, a flush) has no such right;
* an unmap takes a whole chunk away, and empties TLBs, at the start of that chunk's walk; the host's
  own mappings go at the start of theirs;
* the host learns of touches (accessed flags) when ageing begins a host page table, when an unmap
  begins, and when the vCPU comes to ``mmap_lock`` or ends a chunk of its pattern;
* lock-free calls read and clear the flags of 64 calls, or of a window of 64, at its start;
* ``mmap_lock`` and a host table's lock are only lines and times: faults do not exclude one another;
* faults get their share of the memory's bandwidth from the moment on in which they come to
  ``mmap_lock``, and in the order in which they do, whichever guest's;
* steps of one nanosecond are taken in the order in which their times became known.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Generator, Iterable
from dataclasses import dataclass, field
from heapq import heappush
from itertools import groupby
from types import SimpleNamespace
from typing import Any

import numpy as np
from simpy import Environment, Event

from simkvm.guest import patterns
from simkvm.kernel.costs import Costs
from simkvm.kernel.cpu import Cpu
from simkvm.kernel.rcu import Rcu, RcuConfig, RcuCosts
from simkvm.kernel.sites import ACCESS_FAULT, AGE, FAULT, RANGE_END, RANGE_START
from simkvm.kernel.world import World
from simkvm.scenario.contenders import MadviseDontneed
from simkvm.scenario.kernel import KernelVariant
from simkvm.scenario.machine import Machine
from simkvm.scenario.schema import Ageing, Guest, Scenario

Steps = Generator[Event, Any, Any]

NEVER = 1 << 62
#: Order of what happens in one nanosecond; SimPy's own events have 0 and 1.
SERVED, RELEASE, GRANT, TAKE_TABLE, STEP, TOUCH = -9, -7, -5, -3, 1, 2
CACHE = 40  #: pages in a full memory cache of a vCPU
WINDOW = 64  #: PTEs, or calls, whose accessed flags are read at once
BATCH = 4096  #: promotions after which a walk gives ``mmap_lock`` back


class Clock(Environment):
    """Events at absolute integer times, ordered within a nanosecond by rank, then number.

    ``doubtful``: whether an order was given to what has none. A vCPU that an unmap or another
    vCPU's mapping made come at another time than it expected has no place among those that come
    in the same nanosecond.
    """

    doubtful = False

    def number(self) -> int:
        """The next place in the order of those that know their time."""
        return next(self._eid)

    def at(self, t: int, rank: int = STEP, number: Any = None) -> Event:
        """An event that happens at ``t``."""
        assert t >= self.now
        return self.fire(Event(self), t, rank, number, at=t)

    def pause(self, ns: int, number: Any = None) -> Generator[Event, Any, None]:
        """``ns`` of work, if any."""
        if ns:
            yield self.at(int(self.now) + ns, STEP, number)

    def let_go(self, t: int, cpu: int) -> Event:
        """The moment at which ``cpu`` lets go of something; one nanosecond's go by CPU."""
        return self.at(t, RELEASE, (cpu, self.number()))

    def fire(
        self, event: Event, value: Any, rank: int = GRANT, number: Any = None, at: int | None = None
    ) -> Event:
        """Have ``event`` happen, now unless ``at`` says otherwise."""
        event._ok, event._value = True, value
        number = self.number() if number is None else number
        heappush(self._queue, (int(self.now) if at is None else at, rank, number, event))
        return event


# -- the lock -------------------------------------------------------------------------------------


@dataclass(eq=False)
class Request:
    """Atomics that one CPU wants to do on a line, after a pause in which nobody else gets it."""

    cpu: int
    done: Event
    atomics: int
    pause: int
    service: int | None  #: given for a hand-over, which is not a count of atomics
    scattered: bool  #: each atomic has to fetch the line
    number: int  #: its place in the order of those that know their time


class Line:
    """A cache line: serves requests first come, first served."""

    def __init__(self, clock: Clock, costs: Any) -> None:
        self.clock = clock
        self.costs = costs
        self.owner = -1
        self.requests: deque[Request] = deque()
        self.serving = False
        self.free_at = 0
        self.last_visit = (-1, False)  #: when, and whether its place in that moment was in doubt
        self.wanted = clock.event()
        clock.process(self.serve())

    def ask(
        self,
        cpu: int,
        atomics: int = 1,
        pause: int = 0,
        service: int | None = None,
        scattered: bool = False,
    ) -> Request:
        """Stand in line; the request's ``done`` tells when it was served."""
        number = self.clock.number()
        request = Request(cpu, self.clock.event(), atomics, pause, service, scattered, number)
        self.requests.append(request)
        if not self.wanted.triggered:
            self.clock.fire(self.wanted, None, SERVED)
        return request

    def visit(self, cpu: int, atomics: int, moved: bool = False) -> Request:
        """Several atomics some nanoseconds apart: whoever waits for the line gets it in between.

        ``moved``: the visitor once expected to come at another time.
        """
        now, doubt = int(self.clock.now), self.last_visit[1] or moved
        self.clock.doubtful |= self.last_visit[0] == now and doubt
        self.last_visit = (now, moved)
        last = self.requests[-1].cpu if self.requests else self.owner
        return self.ask(cpu, atomics, scattered=bool(self.requests) and last != cpu)

    def forecast(self) -> int:
        """When the request that stands last will be done."""
        t, owner = int(self.clock.now), self.owner
        for place, request in enumerate(self.requests):
            t = self.free_at if place == 0 and self.serving else t + self.time_of(request, owner)
            owner = request.cpu
        return t

    def time_of(self, request: Request, owner: int) -> int:
        """How long ``request`` takes if ``owner`` had the line before."""
        if request.service is not None:
            return request.pause + request.service
        costs, cpu = self.costs, request.cpu
        near = owner < 0 or owner // costs.cpus_per_node == cpu // costs.cpus_per_node
        fetch = costs.transfer_ns if near else costs.remote_ns
        if request.scattered:
            return request.atomics * fetch
        first = costs.same_ns if owner == cpu else fetch
        return request.pause + first + (request.atomics - 1) * costs.same_ns

    def serve(self) -> Steps:
        """The server."""
        clock = self.clock
        while True:
            if not self.requests:
                self.wanted = clock.event()
                yield self.wanted
            request = self.requests[0]
            self.free_at = int(clock.now) + self.time_of(request, self.owner)
            self.serving = True
            yield clock.at(self.free_at, SERVED)
            self.serving = False
            self.owner = request.cpu
            self.requests.popleft()
            clock.fire(request.done, int(clock.now))


@dataclass(eq=False)
class Ask:
    """One that wants the lock, from its request on."""

    cpu: int
    site: int
    write: bool
    arrival: int
    met: int = -1
    granted: Event | None = None  #: None if it had not to wait
    entered: Event | None = None
    forecast: int = 0
    entry: int = 0
    number: int = 0


class Lock:
    """The queued rwlock: a word, a queue, and the line that the word lies on."""

    def __init__(self, clock: Clock, costs: Costs) -> None:
        self.clock = clock
        self.handoff, self.next = costs.handoff_ns, costs.next_ns
        self.line = Line(clock, costs.line)
        self.readers = 0
        self.writer = False
        self.waiting = False
        self.queue: deque[Ask] = deque()
        self.rows: list[tuple[int, ...]] = []

    def ask(self, cpu: int, site: int, write: bool) -> Ask:
        """Ask to get in: ``granted`` happens when that is settled, ``entered`` when it is in."""
        ask = Ask(cpu, site, write, int(self.clock.now))
        closed = self.writer or self.waiting or (write and self.readers > 0)
        if not closed:
            self.admit(ask, self.line.ask(cpu))
            return ask
        ask.met, ask.granted = len(self.queue), self.clock.event()
        self.line.ask(cpu, 2 if write else 3)
        self.queue.append(ask)
        if len(self.queue) == 1 and not self.writer:
            self.waiting = True
        return ask

    def admit(self, ask: Ask, request: Request) -> None:
        """``ask`` is let in, and is in when ``request`` is served."""
        if ask.write:
            self.writer = True
        else:
            self.readers += 1
        ask.entered, ask.forecast = request.done, self.line.forecast()
        ask.number = self.clock.number()
        if ask.granted is not None:
            self.clock.fire(ask.granted, None)

    def enter(self, ask: Ask) -> Steps:
        """Wait until ``ask``, which was granted, is in."""
        assert ask.entered is not None
        ask.entry = yield ask.entered
        assert ask.entry == ask.forecast

    def hold(self, ask: Ask, hold: int) -> Steps:
        """Be in for ``hold``, then let go."""
        yield from self.enter(ask)
        yield self.clock.let_go(ask.entry + hold, ask.cpu)
        self.release(ask)

    def release(self, ask: Ask) -> None:
        """Let go now; the last one out lets the head of the queue in, and readers next to it."""
        now = int(self.clock.now)
        wait, hold = ask.entry - ask.arrival, now - ask.entry
        self.rows.append((ask.site, int(ask.write), ask.arrival, wait, hold, ask.met))
        self.line.ask(ask.cpu)
        if ask.write:
            self.writer = False
        else:
            self.readers -= 1
        if self.readers or not self.queue:
            return
        self.waiting = False
        head = self.queue.popleft()
        self.admit(head, self.line.ask(head.cpu, service=self.handoff))
        if head.write:
            return
        while self.queue and not self.queue[0].write:
            follower = self.queue.popleft()
            self.admit(follower, self.line.ask(follower.cpu, pause=self.next))
        if self.queue:
            self.line.ask(self.queue[0].cpu, pause=self.next)
            self.waiting = True


# -- memory ---------------------------------------------------------------------------------------


@dataclass(eq=False)
class Page:
    """What one stage-2 leaf maps: its entry there, the host's, and the folio's generation."""

    leaf: int
    valid: bool = False
    granted_at: int = 0
    valid_from: int = 0  #: entry of the fault that mapped it: the guest can use it from then on
    accessed: bool = False
    flag_since: int = 0  #: software AF: before that the flag was the other way round
    idle: bool = False
    writable: bool = False
    present: bool = False
    own: bool = False
    young: bool = False
    generation: int | None = None
    referenced: bool = False

    def usable(self, write: bool, t: int) -> bool:
        """Whether a touch at ``t`` is possible without a fault."""
        return self.valid and self.valid_from <= t and (self.writable or not write)

    def flagged(self, t: int) -> bool:
        """Whether a touch at ``t`` finds the accessed flag set."""
        return self.accessed if t >= self.flag_since else not self.accessed


@dataclass(eq=False)
class Table:
    """A stage-2 table: only entries that are not zero are there, so their number is its count."""

    level: int
    entries: dict[int, Any] = field(default_factory=dict)
    installing_until: int = 0


@dataclass(eq=False)
class HostTable:
    """A table of the host: its entries and its lock."""

    pages: dict[int, Page] = field(default_factory=dict)
    faults_inside: int = 0
    claims: list[tuple[int, int]] = field(default_factory=list)  #: when faults want the lock
    aged: Event | None = None  #: happens when ageing, which has the lock, lets go


class Generations:
    """The multi-gen LRU of one guest."""

    def __init__(self, two_step: bool) -> None:
        self.two_step = two_step
        self.oldest, self.youngest = 0, 3
        self.pages: set[Page] = set()

    def add(self, page: Page) -> None:
        page.generation, page.referenced = self.youngest, False
        self.pages.add(page)

    def remove(self, page: Page) -> None:
        self.pages.remove(page)

    def promote(self, page: Page) -> bool:
        """``page`` was seen young; whether it moved."""
        if self.two_step and not page.referenced:
            page.referenced = True
            return False
        moved = page.generation != self.youngest
        self.add(page)
        return moved

    def open_one(self) -> int:
        """A new generation; returns how many pages of the oldest had to move up for it."""
        moved = [p for p in self.pages if p.generation == self.oldest]
        if self.youngest - self.oldest < 3:
            moved = []
        else:
            self.oldest += 1
            for page in moved:
                page.generation = self.oldest
        self.youngest += 1
        return len(moved)

    def sizes(self) -> list[int]:
        """Pages in each generation, by sequence number modulo four."""
        counted = Counter((page.generation or 0) % 4 for page in self.pages)
        return [counted[n] for n in range(4)]


class Flushes:
    """The invalidation path of the machine: walks that flush again and again share it."""

    def __init__(self, machine: Machine) -> None:
        self.alone = round(machine["tlbi_s2_page_ns"])
        self.service = round(machine["tlbi_global_service_ns"])
        self.ends: list[int] = []
        self.free_at = 0
        self.broadcasts = 0

    def each(self, now: int) -> int:
        """What one flush costs a walk that starts now."""
        return max(self.alone, (1 + sum(end > now for end in self.ends)) * self.service)

    def all(self, now: int, alone: int) -> int:
        """A flush of everything, issued now: when its barrier is done."""
        self.broadcasts += 1
        start = max(now, self.free_at) + sum(end > now for end in self.ends) * self.service
        self.free_at = start + self.service
        return max(now + alone, self.free_at)

    def walk(self, end: int, flushes: int) -> None:
        self.broadcasts += flushes
        if flushes > 1:
            self.ends.append(end)


class Memory:
    """The machine's memory: what is written to fresh pages goes through it one after the other."""

    def __init__(self, machine: Machine) -> None:
        self.bytes_per_s = round(machine["dram_bw_total_bytes_per_s"])
        self.free_at = 0

    def fill(self, now: int, alone: int, size: int) -> int:
        """``size`` bytes wanted now, written by ``alone`` if nobody else writes; the end."""
        busy = round(size * 1_000_000_000 / self.bytes_per_s)
        self.free_at = max(self.free_at, now) + busy
        return max(alone, self.free_at)


class Vm:
    """One guest: its tables, its lock, its memory on the host, its invalidations."""

    def __init__(self, host: Host, name: str, spec: Guest) -> None:
        self.host, self.name, self.clock = host, name, host.clock
        kernel, machine = host.kernel, host.machine
        self.kernel = kernel
        self.software = not machine.hw_af
        self.costs = Costs.of(machine, spec.mapping, spec.page_size)
        self.base = spec.ipa_base
        self.page_bytes, self.leaf_bytes = spec.page_size, spec.mapping
        self.memory = spec.memory_bytes
        self.folio = max(1, spec.folio // spec.mapping)
        # Shape of the stage-2 table: a level resolves so many bits, up to 16 roots lie together.
        self.page_shift = spec.page_size.bit_length() - 1
        self.bits = self.page_shift - 3
        self.start = 2
        while spec.ipa_bits > self.shift(self.start) + self.bits + 4:
            self.start -= 1
        self.leaf_level = next(n for n in (1, 2, 3) if 1 << self.shift(n) == spec.mapping)
        self.chunk = 1 << self.shift(1 if spec.page_size == 4096 else 2)
        self.entries = 1 << self.bits
        self.root = Table(self.start)
        self.tables: dict[int, HostTable] = {}
        self.pages: dict[int, Page] = {}
        self.generations = Generations(kernel["promotion"] == "two_step")
        self.promoted: set[int] = set()  #: folios that a look-around found in this pass
        self.lock = Lock(self.clock, self.costs)
        self.mmap = Line(self.clock, self.costs.line)
        self.deferred_flush = (
            kernel["unmap_tlbi"] == "deferred" and machine.tlbirange and machine.fwb
        )
        self.in_progress = 0
        self.moved = -1
        self.allocated = self.freed = self.unmapped = 0
        self.vcpus: list[Vcpu] = []

    def shift(self, level: int) -> int:
        """Address bits below those that ``level`` resolves."""
        return self.page_shift + self.bits * (3 - level)

    def page(self, leaf: int) -> Page:
        return self.pages.setdefault(leaf, Page(leaf))

    def host_table(self, leaf: int) -> HostTable:
        return self.tables.setdefault(leaf // self.entries, HostTable())

    # -- stage 2 --

    def entry_of(self, table: Table, leaf: int) -> int:
        """Which entry of ``table`` leads to ``leaf``; roots that lie together count on."""
        index = (self.base + leaf * self.leaf_bytes) >> self.shift(table.level)
        return index if table is self.root else index % self.entries

    def leaf_table(self, leaf: int) -> Table | None:
        """The table that has, or would have, the entry of ``leaf``."""
        table = self.root
        while table.level < self.leaf_level:
            below = table.entries.get(self.entry_of(table, leaf))
            if below is None:
                return None
            table = below
        return table

    def map(self, page: Page) -> tuple[Table, int]:
        """Map ``page``; returns its table and how many tables had to be made for it."""
        table, made = self.root, 0
        while table.level < self.leaf_level:
            entry = self.entry_of(table, page.leaf)
            if entry not in table.entries:
                table.entries[entry] = Table(table.level + 1)
                made += 1
            table = table.entries[entry]
        table.entries[self.entry_of(table, page.leaf)] = page
        page.valid, page.accessed, page.writable = True, True, page.own
        page.flag_since = 0
        self.allocated += made
        return table, made

    # -- taking memory back --

    def invalidate(self, cpu: Cpu, first: int, last: int, taken: Request | None = None) -> Steps:
        """Range start, the host's own page table, range end, for leaves ``first`` up to ``last``.

        ``taken``: the request for ``mmap_lock`` of a caller that lets go of it when this is over.
        """
        clock, costs = self.clock, self.costs
        yield from clock.pause(costs.ageing.call_ns, taken.number if taken else None)
        ask = yield from self.lock_for_walk(cpu)
        self.in_progress += 1
        yield clock.at(ask.entry + costs.unmap.bookkeeping_ns)
        low = first
        while low < last:
            high = min(last, self.end_of_chunk(low))
            end = yield from self.walk(cpu, low, high, ask.entry)
            yield clock.at(end)
            low = high
            if low < last and self.host.break_lock and self.lock.queue:
                self.lock.release(ask)
                cpu.context_switch(clock.now)
                yield clock.at(clock.now + costs.ageing.resched_ns)
                ask = yield from self.lock_for_walk(cpu)
        self.lock.release(ask)
        cpu.enter_kernel(clock.now)
        yield from clock.pause(self.zap(first, last) * costs.unmap.host_page_ns)
        yield from clock.pause(costs.ageing.call_ns)
        cpu.spin(clock.now)
        ask = self.lock.ask(cpu.id, RANGE_END, True)
        if ask.granted is not None:
            yield ask.granted
        yield from self.lock.enter(ask)
        self.moved = ask.entry
        self.in_progress -= 1
        yield clock.let_go(ask.entry + costs.unmap.bookkeeping_ns, cpu.id)
        self.lock.release(ask)
        if taken:
            self.mmap.ask(cpu.id)
        yield clock.at(clock.now, STEP, ask.number)
        cpu.enter_kernel(clock.now)

    def lock_for_walk(self, cpu: Cpu) -> Steps:
        """Range start takes the lock."""
        cpu.spin(self.clock.now)
        ask = self.lock.ask(cpu.id, RANGE_START, True)
        if ask.granted is not None:
            yield ask.granted
        yield from self.lock.enter(ask)
        yield self.clock.at(ask.entry, STEP, ask.number)
        return ask

    def end_of_chunk(self, leaf: int) -> int:
        """First leaf behind the largest block that holds ``leaf``."""
        address = self.base + leaf * self.leaf_bytes
        return ((address // self.chunk + 1) * self.chunk - self.base) // self.leaf_bytes

    def walk(self, cpu: Cpu, first: int, last: int, begin: int) -> Steps:
        """Unmap one chunk; returns when its walk and flush are over."""
        clock, now = self.clock, int(self.clock.now)
        self.tell_touches()
        work = Walk(self, self.host.flushes.each(now))
        work.table(self.root, first, last)
        flushes = len(work.freed_after) + (1 if self.deferred_flush else work.leaves)
        self.host.flushes.walk(now + work.spent, flushes)
        end = now + work.spent + (self.costs.tlbi_all_ns if self.deferred_flush else 0)
        self.unmapped += work.leaves
        cpu.atomic(begin, end)
        if flushes:
            for vcpu in self.vcpus:
                vcpu.flush()
        if self.kernel["table_free"] == "inline":
            self.freed += len(work.freed_after)
        else:
            for after in work.freed_after:
                yield clock.at(now + after)
                self.host.rcu.call_rcu(now + after, cpu.id, self.callback)
        return end

    def callback(self, _: int) -> int:
        """An RCU callback frees a table."""
        self.freed += 1
        return self.costs.free.callback_ns

    def zap(self, first: int, last: int) -> int:
        """The host forgets these leaves; returns how many it had."""
        gone = 0
        for leaf in range(first, last):
            page = self.pages.get(leaf)
            if page is None or not page.present:
                continue
            if page.own:
                self.generations.remove(page)
            page.present = page.own = page.young = page.idle = False
            del self.host_table(leaf).pages[leaf]
            gone += 1
        return gone

    def install(self, page: Page, own: bool) -> None:
        """The host maps ``page``: a page of its own or, for a reader of nothing, the zero page."""
        self.host_table(page.leaf).pages[page.leaf] = page
        page.present = page.young = True
        if own and not page.own:
            page.own = True
            self.generations.add(page)

    def tell_touches(self) -> None:
        for vcpu in self.vcpus:
            vcpu.tell()


class Walk:
    """An unmap walk: visits entry after entry and adds up what that costs."""

    def __init__(self, vm: Vm, flush: int) -> None:
        self.vm, self.flush = vm, flush
        self.spent = self.leaves = 0
        self.freed_after: list[int] = []

    def table(self, table: Table, first: int, last: int) -> None:
        """Walk ``table``'s entries that lead to leaves ``first`` up to ``last``."""
        vm, steps = self.vm, self.vm.costs.unmap
        per_entry = (1 << vm.shift(table.level)) // vm.leaf_bytes
        offset = vm.base // vm.leaf_bytes
        while first < last:
            behind = min(last, (first + offset) // per_entry * per_entry + per_entry - offset)
            entry = vm.entry_of(table, first)
            below = table.entries.get(entry)
            if isinstance(below, Table):
                self.spent += steps.descend_ns
                self.table(below, first, behind)
                self.spent += steps.table_visit_ns
                if not below.entries:
                    self.free(table, entry)
            else:
                self.spent += steps.visit_ns
                if below is not None:
                    self.leaf(table, entry)
            first = behind

    def leaf(self, table: Table, entry: int) -> None:
        page = table.entries.pop(entry)
        page.valid = page.accessed = page.writable = False
        self.leaves += 1
        self.spent += self.vm.costs.unmap.leaf_ns + (0 if self.vm.deferred_flush else self.flush)

    def free(self, table: Table, entry: int) -> None:
        """The table below ``entry`` is empty: unlink it."""
        del table.entries[entry]
        free, inline = self.vm.costs.free, self.vm.kernel["table_free"] == "inline"
        self.spent += self.flush + (free.free_ns if inline else free.call_rcu_ns)
        self.freed_after.append(self.spent)


# -- vCPUs ----------------------------------------------------------------------------------------


class Vcpu:
    """Touches one page after the other; faults where stage 2 says no."""

    def __init__(self, vm: Vm, cpu: Cpu, chunks: Iterable[patterns.Chunk]) -> None:
        self.vm, self.clock, self.cpu, self.chunks = vm, vm.clock, cpu, chunks
        self.costs = vm.costs.fault
        self.tlb: dict[int, int] = {}
        self.untold: list[Page] = []  #: accessed, but nobody looked yet
        self.inside = False
        self.flushed_outside = False
        self.owed = 0  #: time that flushes cost since the last touch
        self.number = 0
        self.entered_at = 0
        self.moved = False  #: whether the next exit is not the one that was due on entry
        self.cached = 0
        self.touches = self.faults = self.retries = self.access_faults = 0
        self.finished = -1

    def run(self) -> Steps:
        """Chunk after chunk."""
        t, touch = 0, self.vm.costs.touch_ns
        for chunk in self.chunks:
            t += self.enter(self.clock.number())
            self.cpu.enter_guest(t, NEVER)
            gaps = np.broadcast_to(chunk.gaps_ns, len(chunk.pages)).tolist()
            for number, write, gap in zip(
                chunk.pages.tolist(), chunk.writes.tolist(), gaps, strict=True
            ):
                address = self.vm.base + number * self.vm.page_bytes
                leaf = address // self.vm.leaf_bytes - self.vm.base // self.vm.leaf_bytes
                t = yield from self.touch(t, self.vm.page(leaf), write, touch + gap)
            t = yield from self.wait(t, STEP)
            self.tell()
        self.finished = t
        self.cpu.sleep(t)

    def wait(self, t: int, rank: int) -> Steps:
        """Run in the guest until ``t``, and as much longer as flushes cost; returns the end."""
        while True:
            yield self.clock.at(t, rank, self.number if rank == STEP else None)
            if not self.owed:
                return t
            t, self.owed = t + self.owed, 0

    def touch(self, t: int, page: Page, write: bool, busy: int) -> Steps:
        """One touch that begins at ``t``; returns when the next may."""
        while True:
            t = yield from self.wait(t, TOUCH)
            cached = self.tlb.get(page.leaf % self.vm.costs.tlb_entries) == page.leaf
            there = page.valid and page.valid_from <= t
            if self.vm.software and there and not cached and not page.flagged(t):
                self.inside = False
                done, t = yield from self.access_fault(page, write, busy)
                if done:
                    return t
                continue
            if page.usable(write, t):
                self.moved |= page.granted_at > self.entered_at
                self.touches += 1
                slot = page.leaf % self.vm.costs.tlb_entries
                if self.tlb.get(slot) != page.leaf:
                    self.tlb[slot] = page.leaf
                    if not self.vm.software:
                        self.untold.append(page)
                return t + busy
            self.inside = False
            mapped, t = yield from self.fault(page, write, busy)
            if mapped:
                return t

    def tell(self) -> None:
        """The accessed flags of what was touched since the last time."""
        for page in self.untold:
            page.accessed = page.accessed or page.valid
        self.untold.clear()

    def flush(self) -> None:
        """This VM's translations are invalidated now."""
        if self.inside:
            self.moved = True
            self.owed += self.refill()
        else:
            self.flushed_outside = True

    def refill(self) -> int:
        lost = len(self.tlb)
        self.tlb.clear()
        return lost * self.vm.costs.tlb_refill_ns

    def enter(self, number: int) -> int:
        """Back to the guest; returns what is owed for softirqs and flushes met outside."""
        self.inside, self.number, self.moved = True, number, False
        self.entered_at = int(self.clock.now)
        extra = self.cpu.take_stolen()
        if self.flushed_outside:
            self.flushed_outside = False
            extra += self.refill()
        return extra

    # -- the faults --

    def access_fault(self, page: Page, write: bool, busy: int) -> Steps:
        """Software sets the accessed flag: as :meth:`fault`."""
        clock, vm, costs = self.clock, self.vm, self.vm.costs.access_fault
        left = int(clock.now) + vm.costs.touch_ns
        self.cpu.enter_kernel(left)
        yield clock.at(left + costs.exit_ns, STEP, self.number)
        self.access_faults += 1
        ask = vm.lock.ask(self.cpu.id, ACCESS_FAULT, vm.kernel["access_fault_lock"] == "write")
        if ask.granted is not None:
            self.cpu.spin(clock.now)
            yield ask.granted
        if page.valid and not page.accessed:
            page.accessed, page.flag_since, page.granted_at = True, ask.forecast, int(clock.now)
        done = page.valid and (page.writable or not write)
        if done:
            self.touches += 1
            self.tlb[page.leaf % vm.costs.tlb_entries] = page.leaf
        extra = self.enter(ask.number) + (busy if done else 0)
        yield from vm.lock.hold(ask, costs.hold_ns)
        self.cpu.enter_guest(int(clock.now) + costs.enter_ns, NEVER)
        return done, int(clock.now) + costs.enter_ns + extra

    def fault(self, page: Page, write: bool, busy: int) -> Steps:
        """Handle the abort of a touch that begins now.

        Returns whether the page was mapped, and when the guest may touch next (again, if not).
        """
        clock, costs, vm = self.clock, self.costs, self.vm
        left = int(clock.now) + vm.costs.touch_ns
        self.cpu.enter_kernel(left)
        topup = 0
        if self.cached < 3 - vm.start:
            topup = (CACHE - self.cached) * costs.object_ns
        yield clock.at(left + costs.exit_ns + topup, STEP, self.number)
        if topup:
            self.cached = CACHE
        self.tell()
        self.faults += 1
        there = page.own or (page.present and not write)
        request = vm.mmap.visit(self.cpu.id, 3 if there else 5, self.moved)
        noted = vm.mmap.forecast() + costs.vma_ns
        got = noted + costs.gup_zero_ns
        if write and not there:
            alone = costs.gup_copy_ns if page.present else costs.gup_alloc_ns
            got = vm.host.memory.fill(int(clock.now), noted + alone, vm.leaf_bytes)
        assert noted == (yield request.done) + costs.vma_ns
        if there:
            yield clock.at(noted + costs.gup_hit_ns, STEP, request.number)
        else:
            yield from self.get_page(page, write, got, request.number)
        ask = vm.lock.ask(self.cpu.id, FAULT, vm.kernel["fault_lock"] == "write")
        if ask.granted is not None:
            self.cpu.spin(clock.now)
            yield ask.granted
        mapped, hold = self.map(page, write, noted, ask.forecast)
        extra = self.enter(ask.number) + (busy if mapped else 0)
        yield from vm.lock.hold(ask, hold)
        self.cpu.enter_guest(int(clock.now) + costs.enter_ns, NEVER)
        return mapped, int(clock.now) + costs.enter_ns + extra

    def get_page(self, page: Page, write: bool, t: int, number: int) -> Steps:
        """GUP's slow path, which would be over at ``t`` if nobody had the host table's lock."""
        clock, vm = self.clock, self.vm
        table, lock_ns = vm.host_table(page.leaf), self.costs.ptl_ns
        table.claims.append((t - lock_ns, t))
        clock.process(self.leave_mmap(t))
        yield clock.at(t - lock_ns, TAKE_TABLE)
        freed = -1
        if table.aged is not None:
            freed = yield table.aged
        if freed <= t - lock_ns:
            table.faults_inside += 1
            yield clock.let_go(t, self.cpu.id)
            table.faults_inside -= 1
        else:
            self.cpu.spin(t)
            number = clock.number()
            t = max(t, freed + vm.costs.line.transfer_ns + lock_ns)
        yield clock.at(t, STEP, number)
        if write and page.present and not page.own:
            yield from vm.invalidate(self.cpu, page.leaf, page.leaf + 1)
        vm.install(page, write)

    def leave_mmap(self, t: int) -> Steps:
        yield self.clock.let_go(t, self.cpu.id)
        self.vm.mmap.ask(self.cpu.id)

    def map(self, page: Page, write: bool, noted: int, entry: int) -> tuple[bool, int]:
        """What the fault does under ``mmu_lock``: whether it mapped, and how long it takes."""
        vm, costs = self.vm, self.costs
        if vm.in_progress or vm.moved > noted or not page.present:
            self.retries += 1
            return False, costs.retry_ns
        table = vm.leaf_table(page.leaf)
        if table is not None and table.installing_until > entry:
            return False, costs.hold_ns
        if page.valid and (page.writable or not write):
            return False, costs.hold_ns
        table, made = vm.map(page)
        hold = costs.hold_ns + made * costs.table_ns
        if made:
            self.cached -= made
            table.installing_until = entry + made * costs.table_ns
        page.valid_from, page.granted_at = entry, int(self.clock.now)
        self.touches += 1
        self.tlb[page.leaf % vm.costs.tlb_entries] = page.leaf
        return True, hold


# -- ageing ---------------------------------------------------------------------------------------


@dataclass
class Pass:
    """One ageing pass over one guest."""

    guest: str
    start: int
    end: int = 0
    scanned: int = 0
    young: int = 0
    calls: int = 0
    skipped: int = 0
    idle: int = 0


class Ager:
    """The thread that ages all guests, one after the other, again and again."""

    def __init__(self, host: Host, cpu: Cpu, spec: Ageing) -> None:
        self.host, self.clock, self.cpu, self.spec = host, host.clock, cpu, spec
        self.passes: list[Pass] = []

    def run(self) -> Steps:
        clock, cpu, spec = self.clock, self.cpu, self.spec
        costs = self.host.vms[0].costs
        yield from clock.pause(spec.start)
        rounds = 0
        while any(vcpu.finished < 0 for vm in self.host.vms for vcpu in vm.vcpus):
            cpu.enter_kernel(clock.now)
            for vm in self.host.vms:
                yield from METHODS[spec.method](self, vm)
            t = int(clock.now) + cpu.take_stolen()
            if spec.interval:
                cpu.sleep(t)
                t += spec.interval + costs.wakeup_ns
            else:
                cpu.enter_user(t, t + costs.switch_ns)
                t += costs.switch_ns
            rounds += 1
            if rounds == spec.passes:
                break
            yield clock.at(t)
        cpu.sleep(clock.now)

    def age(self, vm: Vm) -> Steps:
        """One pass over ``vm``."""
        clock, costs = self.clock, vm.costs.ageing
        report = Pass(vm.name, int(clock.now))
        if not vm.software:
            yield from self.walk(vm, report)
        yield from clock.pause(costs.lru_lock_ns + costs.resched_ns)
        yield from clock.pause(vm.generations.open_one() * costs.folio_move_ns)
        report.end = int(clock.now)
        self.passes.append(report)

    def walk(self, vm: Vm, report: Pass) -> Steps:
        """Every host table that maps something."""
        clock, costs, cpu = self.clock, vm.costs.ageing, self.cpu.id
        yield from self.take_mmap(vm)
        promoted = 0
        for number in range(-(-vm.memory // vm.leaf_bytes // vm.entries)):
            if number and number % (vm.entries if vm.leaf_bytes == vm.page_bytes else 1) == 0:
                if promoted >= BATCH:
                    vm.mmap.ask(cpu)
                    self.cpu.enter_kernel(clock.now)
                    yield from clock.pause(costs.lru_lock_ns + costs.resched_ns)
                    yield from self.take_mmap(vm)
                promoted = 0
            table = vm.tables.get(number)
            if table is not None and table.pages:
                promoted += yield from self.age_table(vm, table, report)
        yield clock.let_go(clock.now, cpu)
        vm.mmap.ask(cpu)

    def take_mmap(self, vm: Vm) -> Steps:
        request = vm.mmap.visit(self.cpu.id, 2)
        t = yield request.done
        yield self.clock.at(t, STEP, request.number)

    def age_table(self, vm: Vm, table: HostTable, report: Pass) -> Steps:
        """Age what one host table maps, under its lock; returns how many pages moved."""
        clock, costs = self.clock, vm.costs.ageing
        if table.faults_inside:
            report.skipped += 1
            return 0
        table.aged = clock.event()
        self.cpu.spin(clock.now)
        vm.tell_touches()
        pages = [page for _, page in sorted(table.pages.items()) if page.own]
        young = {page for page in pages if page.young}
        for page in pages:
            page.young = False
        report.scanned += len(pages)
        used = yield from self.ask(vm, pages, report)
        lines = {page.leaf >> 3 for page in young}, {page.leaf >> 3 for page in used}
        fetched = len(young) + sum(map(len, lines))
        fetch_ns = fetched * vm.costs.line.transfer_ns
        yield from clock.pause(len(young - used) * costs.promote_ns + fetch_ns)
        clock.fire(table.aged, int(clock.now))
        table.aged = None
        self.cpu.enter_kernel(clock.now)
        young = {page for page in young | used if page.own}
        report.young += len(young)
        return sum([vm.generations.promote(page) for page in young])

    def ask(self, vm: Vm, pages: list[Page], report: Pass) -> Steps:
        """Find out which of ``pages`` the guest used, and return them."""
        kind, lock = vm.kernel["ageing_call"], vm.kernel["ageing_lock"]
        if not pages or not self.answers(vm):
            yield from self.clock.pause(len(pages) * vm.costs.ageing.scan_ns)
            return set()
        if kind == "bitmap":
            return (yield from self.ask_windows(vm, pages, report))
        size = vm.folio if kind == "per_folio" else 1
        runs: list[list[Page]] = []
        for page in pages:
            leaf = page.leaf
            if runs and runs[-1][-1].leaf == leaf - 1 and (leaf - 1) // size == leaf // size:
                runs[-1].append(page)
            else:
                runs.append([page])
        report.calls += len(runs)
        if lock == "none":
            return (yield from self.ask_without_lock(vm, runs))
        return (yield from self.ask_with_lock(vm, runs, lock == "write"))

    def ask_with_lock(self, vm: Vm, runs: list[list[Page]], write: bool) -> Steps:
        """One call for each run, under ``mmu_lock``."""
        clock, costs = self.clock, vm.costs.ageing
        used: set[Page] = set()
        t, number = int(clock.now), clock.number()
        for run in runs:
            yield clock.at(t + costs.call_ns, STEP, number)
            ask = vm.lock.ask(self.cpu.id, AGE, write)
            if ask.granted is not None:
                yield ask.granted
            young = self.test_and_clear(run, ask.forecast)
            hold = costs.walk_ns + (len(run) - 1) * costs.visit_ns
            flush = bool(young) and vm.kernel["ageing_flush"] == "per_call"
            yield from self.hold(vm, ask, hold, flush)
            number = ask.number
            t = int(clock.now) + len(run) * costs.scan_ns + (costs.promote_ns if young else 0)
            used |= young
        yield clock.at(t, STEP, number)
        return used

    def hold(self, vm: Vm, ask: Ask, hold: int, flush: bool) -> Steps:
        """Be inside ``mmu_lock`` for ``hold``, and as long as it takes to flush what the VM has."""
        clock = self.clock
        if not flush:
            yield from vm.lock.hold(ask, hold)
            return
        yield from vm.lock.enter(ask)
        yield clock.at(ask.entry + hold, STEP, ask.number)
        vm.tell_touches()
        for vcpu in vm.vcpus:
            vcpu.flush()
        done = self.host.flushes.all(int(clock.now), vm.costs.tlbi_all_ns)
        yield clock.at(done) if ask.write else clock.let_go(done, ask.cpu)
        vm.lock.release(ask)

    def ask_without_lock(self, vm: Vm, runs: list[list[Page]]) -> Steps:
        """One call for each run, under RCU only."""
        clock, costs = self.clock, vm.costs.ageing
        used: set[Page] = set()
        for first in range(0, len(runs), WINDOW):
            batch = runs[first : first + WINDOW]
            young = {page for run in batch for page in self.test_and_clear(run)}
            number = clock.number()
            for run in batch:
                walk = costs.walk_ns + (len(run) - 1) * costs.visit_ns
                yield from clock.pause(costs.call_ns + walk + len(run) * costs.scan_ns, number)
            yield from clock.pause(len(young) * costs.promote_ns, number)
            used |= young
        return used

    def ask_windows(self, vm: Vm, pages: list[Page], report: Pass) -> Steps:
        """A call that tests each window, and one that clears from its first to its last bit."""
        clock, costs = self.clock, vm.costs.ageing
        used: set[Page] = set()
        size = max(1, WINDOW * vm.page_bytes // vm.leaf_bytes)
        for _, group in groupby(pages, lambda page: page.leaf // size):
            window = list(group)
            young = self.test_and_clear(window)
            number = clock.number()
            yield from clock.pause(self.span(vm, window), number)
            report.calls += 1
            scan = len(window) * costs.scan_ns + len(young) * costs.promote_ns
            yield from clock.pause(scan, number)
            if young:
                yield from clock.pause(self.span(vm, young), number)
                report.calls += 1
            used |= young
        return used

    def span(self, vm: Vm, pages: Iterable[Page]) -> int:
        """Time of one lock-free call from the first to the last of ``pages``."""
        leaves = [page.leaf for page in pages]
        costs = vm.costs.ageing
        return costs.call_ns + costs.walk_ns + (max(leaves) - min(leaves)) * costs.visit_ns

    def test_and_clear(self, pages: Iterable[Page], at: int = -1) -> set[Page]:
        """The accessed flags in stage 2; ``at``: when, if not now."""
        young = {page for page in pages if page.valid and page.accessed}
        for page in young:
            page.accessed, page.flag_since = False, int(self.clock.now) if at < 0 else at
        return young

    # -- a folio at a time --

    def folios(self, vm: Vm, pages: list[Page]) -> list[list[Page]]:
        return [list(group) for _, group in groupby(pages, lambda page: page.leaf // vm.folio)]

    def check(self, vm: Vm, folio: list[Page], owed: int, at_entry: Any) -> Steps:
        """Find and lock the entries of ``folio`` and ask at each; ``owed``: work to do before.

        Returns whether one of them was young.
        """
        clock = self.clock
        yield from clock.pause(owed + vm.costs.ageing.rmap_ns)
        table = vm.host_table(folio[0].leaf)
        while any(begin <= clock.now < end for begin, end in table.claims):
            yield clock.at(int(clock.now) + 1)
        table.aged = clock.event()
        self.cpu.spin(clock.now)
        vm.tell_touches()
        young = False
        for page in folio:
            if page.own:
                young |= yield from at_entry(page)
        clock.fire(table.aged, int(clock.now))
        table.aged = None
        self.cpu.enter_kernel(clock.now)
        return young

    def ask_one(self, vm: Vm, page: Page, report: Pass, flush: bool = False) -> Steps:
        """The host's flag, then one call for one page; returns both answers."""
        clock, costs = self.clock, vm.costs.ageing
        by_host, page.young = page.young, False
        yield from clock.pause(costs.call_ns)
        report.calls += 1
        lock, falls_back = vm.kernel["ageing_lock"], False
        if lock == "none":
            falls_back = vm.software and vm.kernel["ageing_call"] == "bitmap"
        if lock == "none" and not falls_back:
            young = self.test_and_clear([page])
            yield from clock.pause(costs.walk_ns)
            return by_host, bool(young)
        ask = vm.lock.ask(self.cpu.id, AGE, lock != "read")
        if ask.granted is not None:
            yield ask.granted
        young = self.test_and_clear([page], ask.forecast)
        flush = flush or vm.kernel["ageing_flush"] == "per_call"
        yield from self.hold(vm, ask, costs.walk_ns, flush and bool(young))
        yield clock.at(int(clock.now), STEP, ask.number)
        return by_host, bool(young)

    def page_idle(self, vm: Vm) -> Steps:
        """Read every word of the bitmap back and mark what is not idle."""
        clock, costs = self.clock, vm.costs.ageing
        report = Pass(vm.name, int(clock.now))

        def at_entry(page: Page) -> Steps:
            by_host, by_guest = yield from self.ask_one(vm, page, report)
            return by_host or by_guest

        owed = 0
        per_word = WINDOW * vm.page_bytes
        for table in range(-(-vm.memory // vm.leaf_bytes // vm.entries)):
            pages = sorted(vm.host_table(table * vm.entries).pages.items())
            heads = [
                (page.leaf // vm.folio * vm.folio * vm.leaf_bytes // per_word, page)
                for _, page in pages
                if page.own
            ]
            for _, group in groupby(heads, lambda pair: pair[0]):
                folios = self.folios(vm, [page for _, page in group])
                report.scanned += sum(map(len, folios))
                for folio in folios:
                    if not folio[0].idle:
                        continue
                    used = yield from self.check(vm, folio, owed, at_entry)
                    owed = costs.resched_ns
                    if used:
                        report.young += len(folio)
                        for page in folio:
                            page.idle = False
                    elif folio[0].idle:
                        report.idle += len(folio)
                for folio in folios:
                    there = [page for page in folio if page.own]
                    if there and not there[0].idle:
                        yield from self.check(vm, there, owed, at_entry)
                        owed = costs.resched_ns
                        for page in there:
                            page.idle = page.own
        yield from clock.pause(owed)
        report.end = int(clock.now)
        self.passes.append(report)

    def folio_referenced(self, vm: Vm) -> Steps:
        """Eviction's check of every folio."""
        clock, costs = self.clock, vm.costs.ageing
        report = Pass(vm.name, int(clock.now))
        blocks = vm.leaf_bytes > vm.page_bytes
        flush = blocks or vm.kernel["eviction_young"] == "clear_flush_young"
        vm.promoted.clear()

        def at_entry(page: Page) -> Steps:
            asks = not flush and self.answers(vm)
            by_host, page.young = page.young, False
            if by_host and not blocks and not asks and not self.awaited(vm, page):
                yield from self.look_around(vm, page, report, asks)
            _, by_guest = yield from self.ask_one(vm, page, report, flush)
            if (by_host or by_guest) and asks and not self.awaited(vm, page):
                yield from self.look_around(vm, page, report, asks)
            return by_host or by_guest

        owed = 0
        for table in range(-(-vm.memory // vm.leaf_bytes // vm.entries)):
            pages = sorted(vm.host_table(table * vm.entries).pages.items())
            for folio in self.folios(vm, [page for _, page in pages if page.own]):
                if folio[0].leaf // vm.folio in vm.promoted:
                    continue
                report.scanned += len(folio)
                used = yield from self.check(vm, folio, owed, at_entry)
                owed = costs.resched_ns
                if used:
                    there = [page for page in folio if page.own]
                    report.young += len(there)
                    for page in there:
                        vm.generations.promote(page)
                    owed += costs.promote_ns
        yield from clock.pause(owed)
        report.end = int(clock.now)
        self.passes.append(report)

    def awaited(self, vm: Vm, page: Page) -> bool:
        """Whether a fault waits for the lock of the host table that maps ``page``."""
        aged = vm.host_table(page.leaf).aged
        return aged is not None and bool(aged.callbacks)

    def answers(self, vm: Vm) -> bool:
        """Whether a guest is asked for many pages at once, and answers."""
        kind = vm.kernel["ageing_call"]
        return kind != "blind" and not (kind == "bitmap" and vm.software)

    def look_around(self, vm: Vm, page: Page, report: Pass, asks: bool) -> Steps:
        """Ask for the other pages of the window of 64 around ``page``, within its host table."""
        clock, costs = self.clock, vm.costs.ageing
        low = page.leaf // vm.entries * vm.entries
        high = min(low + vm.entries, -(-vm.memory // vm.leaf_bytes))
        first = max(low, min(page.leaf - WINDOW // 2, high - WINDOW))
        around = [vm.page(n) for n in range(first, min(first + WINDOW, high)) if n != page.leaf]
        pages = [other for other in around if other.own]
        if not pages:
            return
        young = {other for other in pages if other.young}
        for other in pages:
            other.young = False
        used: set[Page] = set()
        if asks:
            used = yield from self.ask(vm, pages, report)
        else:
            yield from clock.pause(len(pages) * costs.scan_ns)
        yield from clock.pause(len(young - used) * costs.promote_ns)
        for other in sorted(young | used, key=lambda one: one.leaf):
            if other.own:
                vm.generations.promote(other)
                vm.promoted.add(other.leaf // vm.folio)
                report.young += other.leaf // vm.folio != page.leaf // vm.folio


METHODS = {
    "lru_gen": Ager.age,
    "page_idle": Ager.page_idle,
    "folio_referenced": Ager.folio_referenced,
}


# -- the rest of the host -------------------------------------------------------------------------


class Madvise:
    """The thread that gives ranges of a guest's memory back."""

    def __init__(self, vm: Vm, cpu: Cpu, rng: np.random.Generator, spec: MadviseDontneed) -> None:
        self.vm, self.cpu, self.rng, self.spec = vm, cpu, rng, spec

    def run(self) -> Steps:
        vm, spec, clock = self.vm, self.spec, self.vm.clock
        number, due, following = 0, float(spec.start), 0
        step = spec.align or spec.range
        places = (vm.memory - spec.range) // step + 1
        while True:
            if spec.arrivals == "poisson":
                due += float(self.rng.exponential(1e9 / spec.rate))
            else:
                due = spec.start + int(number * 1_000_000_000 / spec.rate)
            place = following % places
            if spec.order == "random":
                place = int(self.rng.integers(places))
            number, following = number + 1, following + 1
            if spec.stop is not None and int(due) >= spec.stop:
                return
            if int(due) > clock.now:
                self.cpu.sleep(clock.now)
                yield clock.at(int(due))
                self.cpu.enter_kernel(clock.now)
            first, last = place * step, place * step + spec.range
            request, leaf = vm.mmap.visit(self.cpu.id, 2), vm.leaf_bytes
            yield request.done
            yield from vm.invalidate(self.cpu, first // leaf, -(-last // leaf), request)
            yield from clock.pause(self.cpu.take_stolen())


@dataclass
class Outcome:
    """What a run gives, for comparison."""

    end: int
    rows: dict[str, list[tuple[int, ...]]]
    vcpus: list[tuple[Any, ...]]  #: guest, finish, touches, faults, retries, access faults
    passes: list[tuple[Any, ...]]
    tables: dict[str, tuple[int, int, int]]  #: allocated, freed, leaves unmapped
    generations: dict[str, list[int]]
    broadcasts: int
    grace_periods: list[tuple[int, ...]]
    doubtful: bool = False  #: see :class:`Clock`


class Host:
    """Builds everything and runs it."""

    def __init__(self, scenario: Scenario, machine: Machine, kernel: KernelVariant) -> None:
        self.scenario, self.machine, self.kernel = scenario, machine, kernel
        self.clock = Clock()
        self.flushes, self.memory = Flushes(machine), Memory(machine)
        preemptible = scenario.host.preemption in ("full", "lazy")
        self.break_lock = preemptible or kernel["lock_break"] == "build"
        self.cpus = [Cpu(n) for n in range(scenario.host.cpus or machine.cores)]
        self.grace_periods: list[tuple[int, ...]] = []
        self.rcu = self.build_rcu(preemptible)
        free = iter(self.cpus)
        self.vms = [self.build_vm(name, spec, free) for name, spec in scenario.guests.items()]
        self.ager = None
        if scenario.ageing is not None:
            self.ager = Ager(self, next(free), scenario.ageing)
        by_name = {vm.name: vm for vm in self.vms}
        self.others = [
            Madvise(by_name[spec.guest], next(free), self.stream(name), spec)
            for name, spec in scenario.contenders.items()
        ]
        self.running = 0
        self.over = self.clock.event()

    def stream(self, component: str) -> np.random.Generator:
        """The same random numbers as the fast model's component of that name."""
        return World.stream(SimpleNamespace(scenario=self.scenario), component)  # type: ignore[arg-type]

    def build_rcu(self, preemptible: bool) -> Rcu:
        host, machine = self.scenario.host, self.machine
        limits = host.rcu
        config = RcuConfig(
            host.hz,
            preemptible,
            machine.cores,
            limits.blimit,
            qhimark=limits.qhimark,
            qlowmark=limits.qlowmark,
        )
        names = ("call_rcu_ns", "callback_invoke_ns", "wakeup_ns", "context_switch_ns")
        costs = RcuCosts(*(round(machine[name]) for name in names))
        return Rcu(
            self.clock,
            self.cpus,
            config,
            costs,
            on_grace_period=lambda *row: self.grace_periods.append(row),
        )

    def build_vm(self, name: str, spec: Guest, cpus: Iterable[Cpu]) -> Vm:
        vm = Vm(self, name, spec)
        for index in range(spec.vcpus):
            chunks = patterns.build(
                spec.access,
                vcpu=index,
                vcpus=spec.vcpus,
                pages=vm.memory // vm.page_bytes,
                page_bytes=vm.page_bytes,
                rng=self.stream(f"{name}/vcpu{index}"),
                layout_rng=self.stream(f"{name}/layout"),
            )
            vm.vcpus.append(Vcpu(vm, next(iter(cpus)), chunks))
        return vm

    def run(self) -> Outcome:
        clock, duration = self.clock, self.scenario.duration
        actors: list[Any] = [vcpu for vm in self.vms for vcpu in vm.vcpus]
        if self.ager is not None:
            actors.append(self.ager)
        self.running = len(actors)
        for actor in actors:
            clock.process(self.watched(actor.run()))
        for other in self.others:
            clock.process(other.run())
        clock.run(self.over if duration is None else duration)
        return self.outcome()

    def watched(self, steps: Steps) -> Steps:
        yield from steps
        self.running -= 1
        if not self.running:
            self.over.succeed()

    def outcome(self) -> Outcome:
        passes = self.ager.passes if self.ager is not None else []
        return Outcome(
            end=int(self.clock.now),
            rows={vm.name: vm.lock.rows for vm in self.vms},
            vcpus=[
                (vm.name, v.finished, v.touches, v.faults, v.retries, v.access_faults)
                for vm in self.vms
                for v in vm.vcpus
            ],
            passes=[
                (p.guest, p.start, p.end, p.scanned, p.young, p.calls, p.skipped, p.idle)
                for p in passes
            ],
            tables={vm.name: (vm.allocated, vm.freed, vm.unmapped) for vm in self.vms},
            generations={vm.name: vm.generations.sizes() for vm in self.vms},
            broadcasts=self.flushes.broadcasts,
            grace_periods=self.grace_periods,
            doubtful=self.clock.doubtful,
        )


def run(scenario: Scenario, machine: Machine, kernel: KernelVariant) -> Outcome:
    """Run ``scenario`` to its end."""
    return Host(scenario, machine, kernel).run()
