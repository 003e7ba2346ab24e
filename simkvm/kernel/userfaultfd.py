"""userfaultfd: faults that a thread of the VMM serves, one message at a time.

Source: fs/userfaultfd.c and mm/userfaultfd.c, v6.12. A fault on a page that is not there puts
itself on the list of pending faults, wakes one reader that sleeps in epoll_wait, and sleeps. A
reader takes the oldest pending fault, which then is on the list of those that wait; UFFDIO_COPY or
UFFDIO_CONTINUE installs the page and wakes every fault of that range, for which it looks through
both lists. All of it happens under the spin lock of the lists, one cache line for the whole file
descriptor, which is what limits many vCPUs with one of it.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Generator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from simpy import Environment, Event

from simkvm.kernel.cacheline import CacheLine
from simkvm.kernel.cpu import NEVER
from simkvm.kernel.fault import FaultPath
from simkvm.kernel.mmap_lock import LOCK, UNLOCK
from simkvm.kernel.task import Task, reach
from simkvm.scenario.machine import Machine

if TYPE_CHECKING:
    from simkvm.guest.vcpu import Vcpu
    from simkvm.kernel.kvm import Kvm

Steps = Generator[Event, Any, int]
TIMER_SLACK_NS = 50_000  #: what a nap of an ordinary thread may be late (init_task.timer_slack_ns)


@dataclass(frozen=True)
class UffdCosts:
    """Integer nanoseconds of serving a fault, the lists' lock apart."""

    syscall_ns: int  #: epoll_wait, read or ioctl, apart from what it does
    install_ns: int  #: installing one page: a new one with its copy, or one of the page cache
    scan_ns: int  #: looking at one fault on a list: its line is the faulting thread's

    @classmethod
    def of(cls, machine: Machine, minor: bool) -> UffdCosts:
        """Costs of UFFDIO_COPY, or of UFFDIO_CONTINUE for ``minor`` faults."""
        install = machine["host_ptl_hold_ns"]
        if not minor:
            install += machine["page_alloc_free_ns"] + machine["copy_4k_ns"]
        return cls(
            round(machine["ioctl_ns"]),
            round(install),
            round(machine["c2c_same_ns"]),
        )


class Userfaultfd:
    """One file descriptor over some of the memory of ``kvm``.

    ``served``: leaves that one ioctl installs, aligned; ``pages``: 4 KiB pages that these are.
    """

    def __init__(self, kvm: Kvm, costs: UffdCosts, served: int, pages: int) -> None:
        self.kvm = kvm
        self.env: Environment = kvm.env
        self.costs = costs
        self._served = served
        self._pages = pages
        self._lock = CacheLine(kvm.costs.line)
        self._pending: deque[tuple[int, Event]] = deque()
        self._read: list[tuple[int, Event]] = []  # faults whose message a reader has
        self._sleepers: deque[Event] = deque()  # readers in epoll_wait, woken one by one
        self.stopped = False
        self.messages = 0
        self.collisions = 0  #: pages that were there already (EEXIST)

    # -- the fault ----------------------------------------------------------------------------

    def handle(self, task: Task, t_ns: int, leaf: int) -> Steps:
        """``handle_userfault`` of ``leaf`` at ``t_ns``; returns when the fault may try again."""
        t_ns = yield from reach(self.env, t_ns)
        t_ns = self._lock.visit(task.cpu.id, t_ns, 2)
        t_ns = yield from reach(self.env, t_ns)
        if self.kvm.host.fast[leaf]:
            return t_ns  # served meanwhile: userfaultfd_must_wait() says so
        woken = Event(self.env)
        self._pending.append((leaf, woken))
        if self._sleepers:
            self._tell(self._sleepers.popleft(), t_ns + self.kvm.costs.wakeup_ns)
        task.cpu.sleep(t_ns)
        t_ns = yield woken
        task.cpu.enter_kernel(t_ns)
        return t_ns

    # -- readers ------------------------------------------------------------------------------

    def wait(self, task: Task, t_ns: int) -> Steps:
        """epoll_wait at ``t_ns``; returns when there is something to read, or nothing ever."""
        t_ns = yield from reach(self.env, t_ns + self.costs.syscall_ns)
        while not self._pending and not self.stopped:
            sleeper = Event(self.env)
            self._sleepers.append(sleeper)
            task.cpu.sleep(t_ns)
            t_ns = yield sleeper
            task.cpu.enter_kernel(t_ns)
        return t_ns

    def read(self, task: Task, t_ns: int) -> Generator[Event, Any, tuple[int, int]]:
        """Take a message at ``t_ns``: when that is done, and the leaf that is wanted, or -1."""
        t_ns = yield from reach(self.env, t_ns + self.costs.syscall_ns)
        t_ns = self._lock.visit(task.cpu.id, t_ns, 2)
        if not self._pending:
            return t_ns, -1  # another reader was first
        fault = self._pending.popleft()
        self._read.append(fault)
        self.messages += 1
        return t_ns, fault[0]

    def serve(self, task: Task, t_ns: int, leaf: int) -> Steps:
        """UFFDIO_COPY or UFFDIO_CONTINUE at ``t_ns`` for the page of ``leaf``."""
        kvm = self.kvm
        first = leaf // self._served * self._served
        last = min(first + self._served, kvm.leaves)
        t_ns = yield from reach(self.env, t_ns + self.costs.syscall_ns)
        t_ns = kvm.host.mmap_lock.visit(task.cpu.id, t_ns, LOCK + UNLOCK) + kvm.costs.fault.vma_ns
        if kvm.host.fast[leaf]:
            self.collisions += 1
            return t_ns
        t_ns = yield from reach(self.env, t_ns + self._pages * self.costs.install_ns)
        if kvm.host.fast[leaf]:
            self.collisions += 1
            return t_ns
        kvm.host.populate(first, last, kvm.huge_pages)
        waiting = len(self._pending) + len(self._read)
        t_ns = self._lock.occupy(
            task.cpu.id,
            t_ns,
            kvm.costs.line.transfer_ns + waiting * self.costs.scan_ns,
        )
        self._wake(first, last, t_ns + kvm.costs.wakeup_ns)
        return t_ns

    def _wake(self, first: int, last: int, t_ns: int) -> None:
        """``userfaultfd_wake``: every fault in the range, whether its message was read or not."""
        here = [f for f in (*self._pending, *self._read) if first <= f[0] < last]
        self._pending = deque(f for f in self._pending if not first <= f[0] < last)
        self._read = [f for f in self._read if not first <= f[0] < last]
        for _, woken in here:
            self._tell(woken, t_ns)

    def stop(self, t_ns: int) -> None:
        """Tell every reader to end."""
        self.stopped = True
        for sleeper in self._sleepers:
            self._tell(sleeper, t_ns + self.kvm.costs.wakeup_ns)
        self._sleepers.clear()

    def _tell(self, event: Event, t_ns: int) -> None:
        event._ok = True
        event._value = t_ns
        self.env.schedule(event, delay=max(0, t_ns - int(self.env.now)))


class UffdReader:
    """A thread of the VMM that serves ``uffd``; ``delay_ns``: its nap before each page."""

    def __init__(self, uffd: Userfaultfd, task: Task, delay_ns: int) -> None:
        self._uffd = uffd
        self._task = task
        self._delay_ns = delay_ns
        self.pages = 0

    def run(self) -> Generator[Event, Any, None]:
        """Message after message until told to stop."""
        uffd, cpu = self._uffd, self._task.cpu
        t_ns = 0
        while True:
            t_ns = yield from uffd.wait(self._task, t_ns)
            if uffd.stopped:
                break
            t_ns, leaf = yield from uffd.read(self._task, t_ns)
            if leaf < 0:
                continue
            if self._delay_ns:
                t_ns = yield from reach(uffd.env, t_ns)
                cpu.sleep(t_ns)
                late_ns = TIMER_SLACK_NS + uffd.kvm.costs.wakeup_ns
                t_ns = yield from reach(uffd.env, t_ns + self._delay_ns + late_ns)
                cpu.enter_kernel(t_ns)
            t_ns = yield from uffd.serve(self._task, t_ns, leaf)
            t_ns += cpu.take_stolen()
            cpu.enter_user(t_ns, NEVER)
            self.pages += 1
        cpu.sleep(t_ns)


class UserfaultPath(FaultPath):
    """Faults of a vCPU whose memory is registered; stands in front of an MMU's own handler.

    See :func:`registered`.
    """

    uffd: Userfaultfd

    def _resolve(self, asked_ns: int, t_ns: int, state: int, write: bool) -> int:
        """Nothing is allocated: GUP comes to the missing entry, and waits."""
        if not state:
            return t_ns + self._costs.gup_hit_ns
        return super()._resolve(asked_ns, t_ns, state, write)

    def install(self, t_ns: int) -> Generator[Event, Any, int] | None:
        """Sleep until somebody has served the fault, then look again."""
        if self._host_state[self._leaf]:
            return super().install(t_ns)
        return self._served(t_ns)

    def _served(self, t_ns: int) -> Steps:
        self.ptl_table = -1  # no entry is installed, so no lock is taken for one
        while not self._host_state[self._leaf]:  # mmap_lock was let go of before the fault sleeps
            t_ns = yield from self.uffd.handle(self._task, t_ns, self._leaf)
            t_ns = (
                self._mmap_lock.visit(self._task.cpu.id, t_ns, LOCK + UNLOCK) + self._costs.vma_ns
            )
            t_ns = yield from reach(self._env, t_ns + self._costs.gup_hit_ns)
            self._mmap_lock.post(self._task.cpu.id, t_ns)
        return t_ns


def registered(vcpu: Vcpu, uffd: Userfaultfd) -> UserfaultPath:
    """The fault handler of ``vcpu``, whichever its MMU has, with its memory registered."""
    kind = type("Registered", (UserfaultPath, vcpu.kvm.fault_path), {})
    handler: UserfaultPath = kind(vcpu.kvm, vcpu, vcpu.task)
    handler.uffd = uffd
    return handler
