"""A vCPU: touches memory as its pattern says, and exits where stage 2 stops it.

Touches cost no events. A run of touches up to the next fault is planned at once and applied when
somebody looks (ageing, an unmap, the vCPU's own next step), so warm pages can be touched often at
little cost. An unmap that takes a planned page away, or an invalidation that empties the TLB,
moves the next fault to where it now belongs.

A touch sets the accessed flag only on a TLB miss: ageing clears flags without invalidating, so a
page whose translation is still cached looks old although it is used (arm64, like x86, accepts
that). The TLB is direct-mapped with as many entries as the machine's second level.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator
from heapq import heappush
from typing import TYPE_CHECKING, Any, Final

import numpy as np
from numpy.typing import NDArray
from simpy import Environment, Event, Process
from simpy.events import NORMAL

from simkvm.guest.patterns import Chunk
from simkvm.guest.pause import Pause
from simkvm.kernel import mmap_lock
from simkvm.kernel.cpu import Cpu
from simkvm.kernel.stage2 import AF, VALID, WRITE
from simkvm.kernel.task import Task

if TYPE_CHECKING:
    from simkvm.kernel.kvm import Kvm
    from simkvm.observe.requests import Answers

DONE: Final = -1
IN: Final = -1  #: not preempted
FEW: Final = 48  #: touches up to which a plain loop is faster than arrays
WINDOW: Final = 256  #: touches looked ahead at once, doubled while none of them faults


class Vcpu:
    """One vCPU of ``kvm``, on ``cpu``, that touches what ``chunks`` yields.

    A :class:`~simkvm.guest.pause.Pause` among them is what its thread does outside the guest.
    """

    answers: Answers | None = None  #: of one that works off jobs
    lacks_flag = False  #: whether the next fault, as planned, is for want of the accessed flag

    def __init__(self, kvm: Kvm, index: int, cpu: Cpu, chunks: Iterator[Chunk | Pause]) -> None:
        self.kvm = kvm
        self.index = index
        self.cpu = cpu
        self.task = Task(f"{kvm.name}/vcpu{index}", cpu)
        self.fault = kvm.fault_path(kvm, self, self.task)
        self._env = kvm.env
        self._chunks = chunks
        self._touch_ns = kvm.costs.touch_ns
        self._entries = kvm.stage2.leaf.fast
        self._tags: NDArray[np.int64] = np.full(kvm.costs.tlb_entries, -1, np.int64)
        self._fast_tags = memoryview(self._tags)  # type: ignore[arg-type]  # a buffer
        self._tlb_entries = kvm.costs.tlb_entries
        self._last_touch: memoryview | None = None  #: when each leaf was touched, if anybody asks
        self._flushes = False
        self._owed_ns = 0  #: for filling a TLB that :meth:`forget_translations` emptied
        self._shared = kvm.shared
        # The chunk being worked on: leaves, what each needs, when each is touched.
        self._leaves: NDArray[np.int64] = np.empty(0, np.int64)
        self._list: list[int] = []
        self._needs: NDArray[np.uint8] = np.empty(0, np.uint8)
        self._need_list: list[int] = []
        self._cost: NDArray[np.int64] = np.zeros(1, np.int64)
        self._cost_list: list[int] = []
        self._position = 0
        self._pausing = False  #: the thread is in user space, between two chunks
        # The run in the guest: touches [position, _run_to) from _run_from_ns on.
        self._running = False
        self._run_from_ns = 0
        self._run_to = 0
        self._exit_ns = 0
        self._entry_ns = 0
        self._left_ns = IN  #: preempted: what the guest still computes until its next touch
        self._reenter_ns = 0
        self.next_ns = 0  #: when the host is needed next, as planned
        self.alarm: Event | None = None  #: the event that wakes the thread then
        self._sleeper = certain(self._env)
        self.process: Process | None = None
        self.touches = 0
        self.access_faults = 0  #: access-flag faults: with a hardware flag there are none
        self.finished_ns = DONE

    # -- the process --------------------------------------------------------------------------

    def run(self) -> Generator[Event, Any, None]:
        """The vCPU thread: fault after fault until the pattern ends or the VM dies."""
        env, fault, task = self._env, self.fault, self.task
        queue, numbers = env._queue, env._eid
        take = fault.take
        arrival = certain(env)
        kvm, host = self.kvm, self.kvm.host
        next_ns = yield from self._proceed((yield from kvm.sched.checkpoint(task, 0)))
        while self._list and self.kvm.alive:
            if self._left_ns != IN:
                next_ns = yield from self._give_way()
                continue
            while next_ns > env._now and queue and next_ns >= queue[0][0]:
                self.alarm = alarm = self._sleeper
                alarm.callbacks = []
                heappush(queue, (next_ns, NORMAL, next(numbers), alarm))
                yield alarm
                next_ns = self.next_ns  # it may have been moved meanwhile
            self.alarm = None
            if not self.kvm.alive:
                break  # type: ignore[unreachable]  # a teardown may have come meanwhile
            if self._left_ns != IN:
                continue
            if self._position != self._run_to:
                self.catch_up(next_ns)
            self._running = False
            position = self._position
            if position == len(self._list):
                next_ns = yield from self._proceed(next_ns)
                continue
            if self.lacks_flag:
                next_ns = yield from self.set_flag(next_ns)
                continue
            leaf = self._list[position]
            if kvm.refusals or host.mmap_writer is not None:
                next_ns, refused = yield from self._hindered(next_ns, leaf)
                if refused:
                    continue
            t_ns = fault.look_up(next_ns, leaf, self._need_list[position] & WRITE != 0)
            if queue and t_ns >= queue[0][0]:
                arrival.callbacks = []  # nobody else ever sees it: the same one every time
                heappush(queue, (t_ns, NORMAL, next(numbers), arrival))
                yield arrival
            if fault.lacking:
                rest = fault.install(t_ns)
                if rest is not None:
                    t_ns = yield from rest
            grant = take(t_ns)
            if isinstance(grant, int):
                self.next_ns = next_ns = grant
            else:
                self.cpu.spin(t_ns)
                self.alarm = grant
                yield grant
                next_ns = self.next_ns  # an unmap may have moved it since the grant
        self.finished_ns = next_ns
        kvm.sched.sleep(task, next_ns)

    # -- sharing a CPU ------------------------------------------------------------------------

    def preempted(self, t_ns: int) -> None:
        """Leave the guest at ``t`` for another thread; in the kernel, on the way back to it."""
        if not self._running or self.alarm is None:
            return
        self.catch_up(t_ns)
        if t_ns >= self._exit_ns or (self._position == self._run_to and t_ns > self._run_from_ns):
            return  # on its way out already
        inside = t_ns > self._entry_ns
        self._leave_guest(t_ns if inside else self._entry_ns)
        self._reenter_ns = self.kvm.costs.fault.enter_ns if inside else 0
        self._wake_at(self.next_ns)

    def placed(self, cpu: Cpu) -> None:
        """Run on ``cpu``: the translations are lost with the CPU where they were.

        arm64 also drops them where another vCPU of the VM ran meanwhile (``kvm_arch_vcpu_load``,
        arch/arm64/kvm/arm.c, v6.12); on x86 each vCPU has a VPID.
        """
        last_ran = self.kvm.last_ran
        another = last_ran.get(cpu.id, self.index) != self.index and self.kvm.kernel.arch == "arm64"
        if cpu is not self.cpu or another:
            self.forget_translations()
        last_ran[cpu.id] = self.index
        self.cpu = cpu

    def _leave_guest(self, t_ns: int) -> None:
        """Out of the guest at ``t``, with the touches up to then applied.

        What it computes until the next one is left.
        """
        self._left_ns = max(0, self._run_from_ns - t_ns)
        self._running = False
        self.next_ns = t_ns

    def _give_way(self) -> Generator[Event, Any, int]:
        """Let another thread run; returns when the host is needed next, as :meth:`enter`."""
        t_ns = yield from self.kvm.sched.checkpoint(self.task, self.next_ns)
        reenter_ns, self._reenter_ns = self._reenter_ns, 0
        return self._go_in(t_ns + reenter_ns)

    def _go_in(self, t_ns: int) -> int:
        """The guest goes on at ``t``, where it was when it left; returns as :meth:`enter`."""
        left_ns, self._left_ns = self._left_ns, IN
        return self.enter(t_ns, left_ns)

    # -- the process: its steps ---------------------------------------------------------------

    def _hindered(self, t_ns: int, leaf: int) -> Generator[Event, Any, tuple[int, bool]]:
        """A fault that may be refused, or finds ``mmap_lock`` held for write.

        Returns when it comes to ``mmap_lock``, or, refused, when the host is needed next.
        """
        kvm, write = self.kvm, self._need_list[self._position] & WRITE != 0
        if not kvm.no_memslot(leaf):  # else it is MMIO before it comes to the lock
            t_ns = yield from mmap_lock.wait(kvm, self.task, t_ns)
        back_ns = self.fault.refused(t_ns, leaf, write)
        if back_ns is None:
            return t_ns, False
        if kvm.user_exit is not None:
            back_ns = kvm.user_exit(self, back_ns)
        return self.enter(back_ns), True

    @property
    def faulting(self) -> bool:
        """Whether a fault of this vCPU is being handled, so that it reads the memory slots."""
        inside = not self._running and not self._pausing and self._left_ns == IN
        return inside and self.finished_ns < 0 and self.process is not None

    def _proceed(self, t_ns: int) -> Generator[Event, Any, int]:
        """Take the next chunk at ``t_ns``, after the pauses before it.

        Returns when the host is needed next; without a chunk, when the last pause was over.
        """
        item = next(self._chunks, None)
        while isinstance(item, Pause):
            self._pausing = True
            self._list = []
            self._position = self._run_to = 0
            t_ns = yield from item.spend(self, t_ns)
            self._pausing = False
            item = next(self._chunks, None) if self.kvm.alive else None
        if item is None:
            self._list = []
            return t_ns
        self._load(item)
        return self.enter(t_ns)

    def pass_over(self) -> None:
        """The touch that faulted is not made: user space moved the guest behind it."""
        self._position += 1

    def _load(self, chunk: Chunk) -> None:
        kvm = self.kvm
        if kvm.leaf_pages == 1:
            self._leaves = chunk.pages
        else:
            self._leaves = kvm.stage2.leaves_of(chunk.pages)
        self._needs = np.where(chunk.writes, VALID | WRITE, VALID).astype(np.uint8)
        self._list = self._leaves.tolist()
        self._need_list = self._needs.tolist()
        cost = np.zeros(len(self._list) + 1, np.int64)
        np.cumsum(np.broadcast_to(chunk.gaps_ns, len(self._list)) + self._touch_ns, out=cost[1:])
        self._cost = cost
        self._cost_list = cost.tolist()
        self._position = 0

    # -- running in the guest -----------------------------------------------------------------

    def mapped(self, t_ns: int) -> int:
        """The page at the present position was mapped; the guest goes on at ``t_ns``.

        Returns when it needs the host next. As :meth:`enter`, in one go for a guest whose next
        touch faults too: filling memory is what faults are mostly about.
        """
        if not self.kvm.alive:
            return t_ns
        position = self._position
        leaf = self._list[position]
        self.touches += 1
        if self._last_touch is not None:
            self._last_touch[leaf] = t_ns
        self._fast_tags[leaf % self._tlb_entries] = leaf
        costs = self._cost_list
        busy_ns = costs[position + 1] - costs[position]
        self._position = position = position + 1
        cpu = self.cpu
        if cpu.stolen_ns or self._flushes or position == len(self._list) or self.task.need_resched:
            return self.enter(t_ns, busy_ns)
        need = self._need_list[position]
        if self._entries[self._list[position]] & need == need:
            return self.enter(t_ns, busy_ns)
        self._running = True
        self._run_to = position
        self._run_from_ns = start = t_ns + busy_ns
        self._exit_ns = exit_ns = start + self._touch_ns
        fault = self.fault
        if fault.cached < fault.cache_minimum:
            self.next_ns = next_ns = fault.arrival_ns(exit_ns)
        else:
            self.next_ns = next_ns = exit_ns + fault.exit_ns
        self._entry_ns = t_ns
        cpu.enter_guest(t_ns, exit_ns)
        if fault.slotted:
            self.next_ns = next_ns = next_ns + fault.slot_ns(self._list[position])
        if self._shared:
            self._expect(self._list[position])
        return next_ns

    def enter(self, t_ns: int, busy_ns: int = 0) -> int:
        """The guest runs from ``t_ns`` on, the first ``busy_ns`` without a touch.

        Returns when it needs the host: at its next fault, or at the end of the chunk; at once if
        another thread is to have the CPU (xfer_to_guest_mode_handle_work, kernel/entry/kvm.c).
        """
        if not self.kvm.alive:
            return t_ns
        cpu = self.cpu
        start = t_ns + busy_ns
        if cpu.stolen_ns:
            start += cpu.take_stolen()
        if self._flushes:
            start += self._refill_ns()
        self._run_from_ns = start
        if self.task.need_resched:
            self._leave_guest(t_ns)
            return t_ns
        self._running = True
        self._entry_ns = t_ns
        self.next_ns = next_ns = self._plan(start)
        cpu.enter_guest(t_ns, self._exit_ns)
        return next_ns

    def _plan(self, start: int) -> int:
        """Find the next fault of a guest that touches on from ``start``."""
        position = first = self._position
        stop = len(self._list)
        if position < stop:
            need = self._need_list[position]
            if self._entries[self._list[position]] & need == need:
                position = self._first_fault(position + 1, stop)
        self._run_to = position
        exit_ns = start + self._cost_list[position] - self._cost_list[first]
        if position == stop:
            self._exit_ns = exit_ns
            return exit_ns
        if self._shared:
            self._expect(self._list[position])
        self._exit_ns = exit_ns = exit_ns + self._touch_ns
        if self.fault.slotted:
            exit_ns += self.fault.slot_ns(self._list[position])
        return self.fault.arrival_ns(exit_ns)

    def _expect(self, leaf: int) -> None:
        """Ask to be told if another vCPU maps ``leaf`` before this one touches it."""
        self.kvm.expected.setdefault(leaf, {})[self.index] = self

    def _first_fault(self, position: int, stop: int) -> int:
        """First touch from ``position`` on that stage 2 does not allow; ``stop`` if all are."""
        entries, window = self.kvm.stage2.leaf.entries, WINDOW
        while position < stop:
            end = min(position + window, stop)
            needs = self._needs[position:end]
            lacks = (entries[self._leaves[position:end]] & needs) != needs
            first = int(lacks.argmax())
            if lacks[first]:
                return position + first
            position, window = end, 2 * window
        return stop

    # -- seen from outside --------------------------------------------------------------------

    def touches_by(self, t_ns: int) -> int:
        """Touches made before ``t_ns``; unlike :meth:`catch_up` this changes nothing."""
        return self.touches + self._reached(t_ns) - self._position

    def _reached(self, t_ns: int) -> int:
        """Position behind the last touch planned before ``t_ns``."""
        first = self._position
        if not self._running or t_ns <= self._run_from_ns or first == self._run_to:
            return first
        into = t_ns - self._run_from_ns + self._cost_list[first]
        return min(self._run_to, int(np.searchsorted(self._cost, into, side="left")))

    def remember_touches(self, last_touch_ns: NDArray[np.int64]) -> None:
        """Note in ``last_touch_ns``, a leaf a place, when each was touched."""
        self._last_touch = memoryview(last_touch_ns)  # type: ignore[arg-type]  # a buffer

    def catch_up(self, t_ns: int) -> None:
        """Apply the touches planned before ``t_ns``."""
        first, last = self._position, self._reached(t_ns)
        if last == first:
            return
        leaves = self._leaves[first:last]
        if last - first <= FEW:
            self._touch_few(self._list[first:last])
        else:
            self._touch(leaves)
        if self._last_touch is not None:
            self.kvm.last_touch_ns[leaves] = t_ns
        self.touches += last - first
        self._position = last
        self._run_from_ns += self._cost_list[last] - self._cost_list[first]

    def _touch_few(self, leaves: list[int]) -> None:
        """As :meth:`_touch`, without arrays."""
        tags, entries, size = self._fast_tags, self._entries, self._tlb_entries
        for leaf in leaves:
            slot = leaf % size
            if tags[slot] != leaf:
                tags[slot] = leaf
                entries[leaf] |= AF

    def _touch(self, leaves: NDArray[np.int64]) -> None:
        """Look ``leaves`` up in the TLB, in order; each miss sets the accessed flag."""
        tags = self._tags
        slots = leaves % len(tags)
        order = np.argsort(slots, kind="stable")
        slots, pages = slots[order], leaves[order]
        first = np.empty(len(slots), np.bool_)
        first[0] = True
        np.not_equal(slots[1:], slots[:-1], out=first[1:])
        before = np.empty_like(pages)
        before[1:] = pages[:-1]
        before[first] = tags[slots[first]]
        missed = pages[pages != before]
        self.kvm.stage2.leaf.entries[missed] |= np.uint8(AF)
        last = np.empty(len(slots), np.bool_)
        last[-1] = True
        last[:-1] = first[1:]
        tags[slots[last]] = pages[last]

    def set_flag(self, t_ns: int) -> Generator[Event, Any, int]:
        """An access-flag fault: see :class:`simkvm.guest.software_af.SoftwareAfVcpu`."""
        raise NotImplementedError

    def cleared(self, leaves: NDArray[np.int64], t_ns: int) -> None:
        """Ageing cleared the accessed flags of ``leaves``: the hardware will set them again."""

    def given(self, leaf: int, t_ns: int) -> None:
        """Another vCPU mapped ``leaf`` at ``t_ns``: a fault planned there may not be one."""
        target = self._run_to
        if not self._running or target == len(self._list) or self._list[target] != leaf:
            return
        ahead_ns = self._cost_list[target] - self._cost_list[self._position]
        if self._run_from_ns + ahead_ns < t_ns:
            return  # touched before: the exit has happened
        self.next_ns = self._plan(self._run_from_ns)
        self.cpu.enter_guest(t_ns, self._exit_ns)

    def stop(self, t_ns: int) -> None:
        """The VM dies at ``t_ns``: leave the guest; a fault in flight is handled to its end."""
        self.catch_up(t_ns)
        if self._running and self.alarm is not None:
            self._running = False
            if t_ns < self.next_ns:
                self.next_ns = t_ns
                self._wake_at(t_ns)

    def flushed(self, t_ns: int) -> None:
        """The VM's translations were invalidated, and mappings may have gone, at ``t_ns``."""
        self._flushes = True
        if not self._running or self.alarm is None:
            return
        if self._position == self._run_to and t_ns > self._run_from_ns:
            return  # its faulting touch lies in the past: it is on its way out
        self._resume(max(self._run_from_ns, t_ns) + self._refill_ns())
        self.cpu.enter_guest(t_ns, self._exit_ns)

    def unmapped(self, t_ns: int) -> None:
        """Mappings may have gone at ``t_ns``; whoever took them flushes later."""
        self._disturbed(t_ns, 0)

    def interrupted(self, t_ns: int, lost_ns: int) -> None:
        """As :meth:`flushed`, by an interrupt at ``t_ns`` that costs a running guest ``lost_ns``.

        A vCPU that is out of the guest flushes when it enters.
        """
        self._flushes = True
        self._disturbed(t_ns, lost_ns)

    def _disturbed(self, t_ns: int, lost_ns: int) -> None:
        if not self._running or self.alarm is None:
            return
        if self._position == self._run_to and t_ns > self._run_from_ns:
            return  # on its way out already
        refill_ns = self._refill_ns() if self._flushes else 0
        self._resume(max(self._run_from_ns, t_ns) + lost_ns + refill_ns)
        self.cpu.enter_guest(max(t_ns, self._entry_ns), self._exit_ns)

    def _resume(self, t_ns: int) -> None:
        """The guest goes on at ``t_ns``: find its next fault anew."""
        self._run_from_ns = t_ns
        moved = self._plan(t_ns)
        if moved < self.next_ns:
            self._wake_at(moved)
        self.next_ns = moved

    def forget_translations(self) -> None:
        """An invalidation emptied the TLB; mappings stay, so what comes next is as planned.

        Filling it again is paid for at the next entry to the guest.
        """
        self._flushes = True
        self._owed_ns += self._empty_tlb()

    def _refill_ns(self) -> int:
        """The TLB is empty: what filling it again costs the guest."""
        self._flushes = False
        owed_ns, self._owed_ns = self._owed_ns, 0
        return owed_ns + self._empty_tlb()

    def _empty_tlb(self) -> int:
        """Forget all translations: returns what they will cost again."""
        lost = int(np.count_nonzero(self._tags >= 0))
        self._tags.fill(-1)
        return lost * self.kvm.costs.tlb_refill_ns

    def _wake_at(self, t_ns: int) -> None:
        """Move the alarm to an earlier time."""
        late = self.alarm
        if late is self._sleeper:
            self._sleeper = certain(self._env)  # the old one still lies in the calendar
        assert late is not None
        assert late.callbacks is not None
        early = self._env.timeout(max(0, t_ns - int(self._env.now)))
        assert early.callbacks is not None
        early.callbacks.extend(late.callbacks)
        late.callbacks.clear()
        self.alarm = early


def certain(env: Environment) -> Event:
    """An event that cannot fail, to be planned by hand, again and again: cheaper than timeouts."""
    event = Event(env)
    event._ok = True
    event._value = None
    return event
