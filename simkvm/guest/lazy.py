"""The lazy access engine: touches are counted, and decided only where somebody could tell.

For patterns of independent touches (:mod:`simkvm.guest.leaf_weights`). Every touch of the guest
faults with one probability, the summed share of the leaves it would fault on: so how many touches
lie before the next fault is geometric, which vCPU makes it follows from the order in which they
touch (:mod:`simkvm.guest.touch_order`), and its leaf is drawn by weight
(:mod:`simkvm.guest.faulting`). When mappings come or go the number is drawn anew: touches have no
memory. Accessed flags are drawn when somebody looks (:mod:`simkvm.guest.lazy_flags`).

The clock is touches done: a vCPU that waits for a fault makes none. A guest that stays inside its
memory costs no event, however often it touches.
"""

from __future__ import annotations

from collections.abc import Generator, Iterable, Iterator
from math import log, log1p
from typing import TYPE_CHECKING, Any, Final

import numpy as np
from numpy.typing import NDArray
from simpy import Event

from simkvm.guest.faulting import FaultingLeaves
from simkvm.guest.lazy_flags import LazyFlags
from simkvm.guest.leaf_weights import leaf_weights
from simkvm.guest.touch_order import Place, TouchOrder
from simkvm.guest.vcpu import IN, Vcpu
from simkvm.kernel.cpu import GUEST, NEVER, Cpu
from simkvm.kernel.stage2 import VALID, WRITE
from simkvm.kernel.task import reach

if TYPE_CHECKING:
    from simkvm.kernel.kvm import Kvm

DRAWS: Final = 1024  #: uniform numbers drawn at once


class Lazy:
    """vCPUs of ``kvm`` on ``cpus``, which all do ``access``.

    ``layout_rng`` says where popular pages lie.
    """

    def __init__(
        self,
        kvm: Kvm,
        access: Any,
        cpus: Iterable[Cpu],
        layout_rng: np.random.Generator,
        rng: np.random.Generator,
    ) -> None:
        self._kvm = kvm
        self._env = kvm.env
        self._rng = rng
        self.touches: int | None = access.touches  #: that each vCPU makes; None: no end
        self.step_ns = access.think + kvm.costs.touch_ns
        self._order = TouchOrder(self.step_ns)
        self.vcpus = [LazyVcpu(kvm, number, cpu, self) for number, cpu in enumerate(cpus)]
        weights = leaf_weights(access, kvm.leaves, kvm.leaf_pages, layout_rng)
        self._faulting = FaultingLeaves(weights, kvm.stage2.leaf.entries, access.write_ratio)
        self.flags = LazyFlags(
            kvm,
            weights,
            access.write_ratio,
            len(self.vcpus),
            self._counts,
            self._order.total,
            rng,
        )
        self._uniform = self._draws()
        self._left: int | None = None  #: touches up to the next fault, with it, if drawn
        self._due: Place | None = None  #: that touch
        self._timer: Event | None = None
        self._timer_ns = NEVER

    def _counts(self, t_ns: int) -> NDArray[np.int64]:
        return np.array([vcpu.touches_by(t_ns) for vcpu in self.vcpus], np.int64)

    def _draws(self) -> Iterator[float]:
        while True:
            yield from self._rng.random(DRAWS).tolist()

    # -- asked by the kernel's side -----------------------------------------------------------

    def catch_up(self, t_ns: int, first: int, last: int) -> None:
        """Decide the flags of these leaves; of none: only count the vCPUs' touches."""
        if last > first:
            self.flags.look(t_ns, first, last)
            return
        self._past(t_ns)
        for vcpu in self.vcpus:
            if vcpu.index in self._order:
                self._move(vcpu, t_ns, 0)
        self._plan()

    def going(self, t_ns: int, first: int, last: int) -> None:
        """Flags of what goes are nobody's business, but for a walk without lock."""
        if self._kvm.races is not None:
            self.flags.look(t_ns, first, last)

    def cleared(self, leaves: NDArray[np.int64], t_ns: int) -> None:
        """Nothing is planned that counts on a flag."""

    def flushed(self, t_ns: int, first: int, last: int) -> None:
        """TLBs are filled anew, and touches of what is gone fault."""
        self._past(t_ns)
        self.flags.flush(t_ns)
        for vcpu in self.vcpus:
            vcpu.flushed(t_ns)
        self._changed(first, last)

    def interrupted(self, t_ns: int, lost_ns: int) -> int:
        """As :meth:`flushed`, by interrupt; returns how many vCPUs ran the guest."""
        self._past(t_ns)
        self.flags.flush(t_ns)
        running = 0
        for vcpu in self.vcpus:
            inside = vcpu.cpu.state(t_ns) is GUEST
            vcpu.interrupted(t_ns, lost_ns if inside else 0)
            running += inside
        self._plan()
        return running

    def unmapped(self, t_ns: int, first: int, last: int) -> None:
        """Touches of what is gone fault from ``t_ns`` on."""
        self._past(t_ns)
        self._changed(first, last)

    def _changed(self, first: int, last: int) -> None:
        if last > first and self._faulting.refresh(first, last):
            self._left = None
        self._plan()

    # -- told by vCPUs ------------------------------------------------------------------------

    def mapped(self, vcpu: LazyVcpu, leaf: int, t_ns: int) -> None:
        """A fault of ``vcpu`` mapped ``leaf`` at ``t_ns``; its touch is the last that it made.

        That the clock may be behind is because no touch faults before ``t_ns``: to draw these again
        would be to let some of them fault after all.
        """
        self._past(t_ns)
        if self._faulting.refresh(leaf, leaf + 1):
            self._left = None
        self.flags.mapped(leaf, self._order.made)
        self.touched(vcpu, leaf)

    def touched(self, vcpu: LazyVcpu, leaf: int) -> None:
        """The last touch that ``vcpu`` made was of ``leaf``; this one was not drawn here."""
        self._order.made += 1
        if not vcpu.flushes:  # else the translation goes again when it enters
            self.flags.touched(vcpu.index, leaf, vcpu.touches)

    def start(self, vcpu: LazyVcpu, t_ns: int) -> None:
        """``vcpu`` touches from ``t_ns`` on."""
        self._past(0)
        self._order.join(vcpu.index, t_ns)
        self._plan()

    def stop(self, vcpu: LazyVcpu, t_ns: int) -> None:
        """``vcpu`` makes no touch from ``t_ns`` on."""
        self._past(t_ns)
        if vcpu.index in self._order:
            vcpu.touches += self._order.leave(vcpu.index)
        self._plan()

    def delay(self, vcpu: LazyVcpu, t_ns: int, delay_ns: int) -> None:
        """What ``vcpu`` touches from ``t_ns`` on comes ``delay_ns`` later.

        Who calls this has :meth:`_plan` called afterwards.
        """
        self._past(t_ns)
        self._move(vcpu, t_ns, delay_ns)

    def _move(self, vcpu: LazyVcpu, t_ns: int, delay_ns: int) -> None:
        order = self._order
        start_ns = order.next_ns(vcpu.index, max(t_ns, order.here.t_ns)) + delay_ns
        vcpu.touches += order.leave(vcpu.index)
        order.join(vcpu.index, start_ns)

    def __contains__(self, vcpu: LazyVcpu) -> bool:
        return vcpu.index in self._order

    def next_ns(self, vcpu: LazyVcpu, t_ns: int) -> int:
        """When ``vcpu``, which runs, touches next from ``t_ns`` on."""
        return self._order.next_ns(vcpu.index, t_ns)

    def made_by(self, vcpu: LazyVcpu, t_ns: int) -> int:
        """Touches of ``vcpu`` up to ``t_ns`` since it was started or delayed last."""
        return self._order.made_by(vcpu.index, t_ns) if vcpu.index in self._order else 0

    # -- the next fault -----------------------------------------------------------------------

    def _past(self, t_ns: int) -> None:
        """Touches before ``t_ns``, and before now, were none that fault."""
        t_ns = max(t_ns, int(self._env.now))
        passed = self._order.go_to(Place(t_ns, 0))
        if self._left is not None:
            self._left = max(1, self._left - passed)

    def _plan(self) -> None:
        """Find the next fault from here on, and be there."""
        self._due = None
        if not len(self._order):
            return
        if self._left is None:
            hazard = self._faulting.hazard
            if not hazard:
                return
            self._left = 1
            if hazard < 1:
                self._left += int(log(1 - next(self._uniform)) / log1p(-hazard))
        self._due = self._order.nth(self._left)
        if self._due.t_ns < self._timer_ns:
            self._timer_ns = self._due.t_ns
            self._timer = timer = self._env.timeout(max(0, self._timer_ns - int(self._env.now)))
            assert timer.callbacks is not None
            timer.callbacks.append(self._fire)

    def _fire(self, timer: Event) -> None:
        """The time of the touch that faults, as planned at some time, has come."""
        if timer is not self._timer:
            return  # an earlier one took its place
        self._timer, self._timer_ns = None, NEVER
        due = self._due
        if due is not None and due.t_ns <= self._env.now:
            self._touch(due)
        self._plan()

    def _touch(self, due: Place) -> None:
        """The touch at ``due`` is the one that faults."""
        self._order.go_to(due)
        vcpu, behind = self.vcpus[due.vcpu], Place(due.t_ns, due.vcpu + 1)
        if vcpu.end_ns is not None and vcpu.end_ns <= due.t_ns:
            self._left = 1  # it has none left: the next in order makes it
            vcpu.finish(due.t_ns)
            return
        self._left = None
        drawn = self._uniform
        leaf, write = self._faulting.draw(next(drawn), next(drawn), next(drawn))
        need = VALID | WRITE if write else VALID
        if self._kvm.stage2.leaf.fast[leaf] & need == need:
            self._faulting.refresh(leaf, leaf + 1)  # somebody mapped it who told nobody
            self._order.go_to(behind)
            return
        vcpu.touches += self._order.leave(due.vcpu)
        self._order.go_to(behind)
        vcpu.faults(due.t_ns, leaf, need)


class LazyVcpu(Vcpu):
    """A vCPU whose touches ``engine`` counts, and whose faults it draws."""

    def __init__(self, kvm: Kvm, index: int, cpu: Cpu, engine: Lazy) -> None:
        super().__init__(kvm, index, cpu, iter(()))
        self._engine = engine
        self._step_ns = engine.step_ns
        self.end_ns: int | None = None  #: when it has made all its touches, as planned
        self._end_timer_ns = NEVER
        self._again = False  #: the touch that faulted is made again
        self._over = False  #: all touches are done
        self._flushed_at = 0  #: touches made when the TLB was emptied last
        self._reached_ns = 0  #: when its fault came to ``mmu_lock``

    # -- the process --------------------------------------------------------------------------

    def run(self) -> Generator[Event, Any, None]:
        """The vCPU thread: fault after fault until its touches are done or the VM dies."""
        kvm, fault = self.kvm, self.fault
        self.next_ns = yield from kvm.sched.checkpoint(self.task, 0)
        if kvm.alive:
            self._go_on(self.next_ns, 0)
        while kvm.alive:
            if not (yield from self._next_fault()):
                break
            next_ns, leaf = self.next_ns, self._list[0]
            self._running = False
            if kvm.refusals or kvm.host.mmap_writer is not None:
                next_ns, refused = yield from self._hindered(next_ns, leaf)
                if refused:
                    continue
            t_ns = fault.look_up(next_ns, leaf, self._need_list[0] & WRITE != 0)
            t_ns = yield from reach(self._env, t_ns)
            if fault.lacking:
                rest = fault.install(t_ns)
                if rest is not None:
                    t_ns = yield from rest
            self._reached_ns = t_ns
            grant = fault.take(t_ns)
            if isinstance(grant, int):
                self.next_ns = grant
            else:
                self.cpu.spin(t_ns)
                yield grant
        self.finished_ns = self.next_ns
        kvm.sched.sleep(self.task, self.next_ns)

    def _next_fault(self) -> Generator[Event, Any, bool]:
        """Run in the guest until it faults, and exit; False if there will be no more."""
        while self._again or self._left_ns != IN or self._to_go:
            if self._to_go:  # since it was in the kernel
                self._leave_order(int(self._env.now))
            if self._left_ns != IN:
                yield from self._give_way()
                continue
            self._again = False
            t_ns = yield from reach(self._env, self._run_from_ns)
            if not self.kvm.alive:
                return False
            leaf, need = self._list[0], self._need_list[0]
            if self._entries[leaf] & need != need:
                self.next_ns = self._arrival_ns(t_ns, leaf)
                yield from reach(self._env, self.next_ns)
                return self.kvm.alive
            self.touches += 1
            self._engine.touched(self, leaf)
            self._go_on(t_ns, self._step_ns)
        if not self.kvm.alive:
            return False
        self.alarm = alarm = Event(self._env)
        yield alarm
        self.alarm = None
        if self._left_ns != IN:
            return (yield from self._next_fault())
        return self.kvm.alive and not self._over

    def _arrival_ns(self, t_ns: int, leaf: int) -> int:
        """When a guest whose touch of ``leaf`` at ``t_ns`` faults comes to ``mmap_lock``."""
        exit_ns = t_ns + self._touch_ns
        self.cpu.enter_kernel(exit_ns)
        if self.fault.slotted:
            exit_ns += self.fault.slot_ns(leaf)
        return self.fault.arrival_ns(exit_ns)

    # -- sharing a CPU ------------------------------------------------------------------------

    def preempted(self, t_ns: int) -> None:
        """Leave the guest at ``t`` for another thread; in the kernel, on the way back to it.

        A guest that is about to make the touch that faulted again makes it first.
        """
        if self in self._engine and self.alarm is not None:
            self._leave_order(t_ns)
            self._wake(self.next_ns)

    @property
    def _to_go(self) -> bool:
        return self.task.need_resched and self in self._engine

    def _leave_order(self, t_ns: int) -> None:
        """Make no more touches from ``t``, now; out of the guest then, or where it would enter."""
        inside = t_ns > self._entry_ns
        at_ns = t_ns if inside else self._entry_ns
        self._run_from_ns = self._engine.next_ns(self, at_ns)
        self._engine.stop(self, t_ns)
        self._leave_guest(at_ns)
        self._reenter_ns = self.kvm.costs.fault.enter_ns if inside else 0

    def _leave_guest(self, t_ns: int) -> None:
        super()._leave_guest(t_ns)
        self.end_ns = None

    def _go_in(self, t_ns: int) -> int:
        left_ns, self._left_ns = self._left_ns, IN
        if self._again:
            return self.enter(t_ns, left_ns)
        if self.kvm.alive:
            self._go_on(t_ns, left_ns)
        return t_ns

    # -- running in the guest -----------------------------------------------------------------

    def mapped(self, t_ns: int) -> int:
        """The page of the touch that faulted is mapped; the guest goes on at ``t_ns``."""
        if not self.kvm.alive:
            return t_ns
        self.touches += 1
        self._engine.mapped(self, self._list[0], self._reached_ns)
        self._go_on(t_ns, self._step_ns)
        return t_ns

    def enter(self, t_ns: int, busy_ns: int = 0) -> int:
        """The guest goes on at ``t_ns`` and makes the touch that faulted again."""
        if not self.kvm.alive:
            return t_ns
        self._again = True
        self._run_from_ns = start_ns = self._resumed_ns(t_ns, busy_ns)
        self._running = True
        self.cpu.enter_guest(t_ns, start_ns + self._touch_ns)
        return start_ns

    def _go_on(self, t_ns: int, busy_ns: int) -> None:
        """The guest runs from ``t_ns`` on, the first ``busy_ns`` without a touch."""
        self._list = []
        self._run_from_ns = start_ns = self._resumed_ns(t_ns, busy_ns)
        self._running = True
        limit = self._engine.touches
        if limit is not None:
            self._ends_at(start_ns + (limit - self.touches) * self._step_ns)
        self.cpu.enter_guest(t_ns, NEVER if self.end_ns is None else self.end_ns)
        if limit is None or self.touches < limit:
            self._engine.start(self, start_ns)

    def _resumed_ns(self, t_ns: int, busy_ns: int) -> int:
        self._entry_ns = t_ns
        start_ns = t_ns + busy_ns + self.cpu.take_stolen()
        return start_ns + self._refill_ns() if self._flushes else start_ns

    def faults(self, t_ns: int, leaf: int, need: int) -> None:
        """Its touch of ``leaf`` at ``t_ns``, now, lacks ``need`` of what stage 2 allows."""
        self._list, self._need_list = [leaf], [need]
        self.end_ns = None
        self.next_ns = self._arrival_ns(t_ns, leaf)
        self._wake(self.next_ns)

    def _wake(self, t_ns: int) -> None:
        alarm = self.alarm
        assert alarm is not None
        alarm._ok = True
        alarm._value = None
        self._env.schedule(alarm, delay=max(0, t_ns - int(self._env.now)))

    # -- the end ------------------------------------------------------------------------------

    def _ends_at(self, t_ns: int) -> None:
        """All touches are done at ``t_ns`` if nothing holds the guest up."""
        self.end_ns = t_ns
        if t_ns >= self._end_timer_ns:
            return  # looked at then
        self._end_timer_ns = t_ns
        timer = self._env.timeout(max(0, t_ns - int(self._env.now)))
        assert timer.callbacks is not None
        timer.callbacks.append(self._end_due)

    def _end_due(self, _: Event) -> None:
        self._end_timer_ns = NEVER
        if self.end_ns is None or self._over or not self.kvm.alive:
            return
        if self.end_ns > self._env.now:
            self._ends_at(self.end_ns)
        else:
            self.finish(self.end_ns)

    def finish(self, t_ns: int) -> None:
        """All touches are done at ``t_ns``, now."""
        if self._over:
            return
        self._over = True
        self._running = False
        self._engine.stop(self, t_ns)
        self.next_ns = t_ns
        self._wake(t_ns)

    def stop(self, t_ns: int) -> None:
        """The VM dies at ``t_ns``: leave the guest; a fault in flight is handled to its end."""
        self._engine.stop(self, t_ns)
        if self._running and self.alarm is not None:
            self._running = False
            self.next_ns = t_ns
            self._wake_at(t_ns)

    # -- seen from outside --------------------------------------------------------------------

    @property
    def flushes(self) -> bool:
        """Whether it has to flush before it enters the guest."""
        return self._flushes

    def touches_by(self, t_ns: int) -> int:
        """Touches made before ``t_ns``."""
        return self.touches + self._engine.made_by(self, t_ns)

    def catch_up(self, t_ns: int) -> None:
        """The engine does, for all vCPUs."""

    def flushed(self, t_ns: int) -> None:
        """The VM's translations were invalidated at ``t_ns``."""
        self.interrupted(t_ns, 0)

    def interrupted(self, t_ns: int, lost_ns: int) -> None:
        """As :meth:`flushed`, by an interrupt that costs a running guest ``lost_ns``."""
        self._flushes = True
        if self not in self._engine:
            return
        self._owed_ns += self._refill(t_ns)
        self._flushes = False
        delay_ns, self._owed_ns = self._owed_ns + lost_ns + self.cpu.take_stolen(), 0
        self._engine.delay(self, t_ns, delay_ns)
        if self.end_ns is not None:
            self.end_ns += delay_ns
        until_ns = NEVER if self.end_ns is None else self.end_ns
        self.cpu.enter_guest(max(t_ns, self._entry_ns), until_ns)

    def unmapped(self, t_ns: int) -> None:
        """The engine knows what would fault."""

    def _empty_tlb(self) -> int:
        """Between two runs in the guest."""
        return self._refill(0)

    def _refill(self, t_ns: int) -> int:
        """Forget all translations at ``t_ns``: what filling the TLB again will cost."""
        made = self.touches_by(t_ns)
        places = self._engine.flags.occupied(made - self._flushed_at)
        self._flushed_at = made
        return places * self.kvm.costs.tlb_refill_ns
