"""The main thread of a selftest: makes the vCPUs, drives them phase by phase, prints what it took.

Everything here is user space of one process. The thread has a CPU of its own, and so has each
vCPU's; virtual machines that follow one another use the same ones.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Generator, Iterator
from typing import TYPE_CHECKING, Any, ClassVar

from simpy import Event

from simkvm.guest.patterns import Chunk
from simkvm.guest.pause import Pause
from simkvm.guest.software_af import vcpu_class
from simkvm.kernel.aging_call import Pass
from simkvm.kernel.cpu import NEVER
from simkvm.kernel.kvm import Kvm
from simkvm.kernel.task import Task, reach
from simkvm.kernel.zap_roots import teardown_of
from simkvm.selftests.rendezvous import Crossing, Rendezvous
from simkvm.units import NS_PER_S

if TYPE_CHECKING:
    from simkvm.kernel.world import World

Steps = Generator[Event, Any, int]
Thread = Iterator[Chunk | Pause]


def seconds(ns: int) -> str:
    """A ``struct timespec`` as the tests print it: ``0.123456789s``."""
    return f"{ns // NS_PER_S}.{ns % NS_PER_S:09}s"


class Killed(Exception):  # noqa: N818 (what becomes of the main thread)
    """The OOM killer chose the test's process: its main thread does not return to user space."""


class MainThread(ABC):
    """One test. A subclass says what vCPU threads do and what the main thread does meanwhile.

    ``t_ns``: the main thread's clock, which may run ahead of the world's. ``passes``: ageing
    passes that it made.
    """

    name: ClassVar[str]
    #: How the VM ends: the file is closed, or the process just exits.
    ending: ClassVar[str] = "close_vm"

    def __init__(self, world: World) -> None:
        self.world = world
        self.env = world.env
        self.machine = world.machine
        self.kvm: Kvm = world.kvms[0]
        self.t_ns = 0
        self.passes: list[Pass] = []
        self.killed = False
        self._flags: list[Rendezvous] = []
        self._half_ns = round(world.machine["exit_to_user_ns"] / 2)
        self.ioctl_ns = round(world.machine["ioctl_ns"])
        self.run_vcpu = Crossing(self._half_ns, to_user=False)
        self.ucall = Crossing(self._half_ns, to_user=True)
        pin = getattr(world.scenario.selftest, "pin", None) or ()
        vcpus = max(guest.vcpus for guest in world.guests.values())
        order = [world.cpus[n] for n in pin]
        rest = [cpu for cpu in world.cpus if cpu not in order]
        self._cpus = [*order, *rest] if order else rest
        self.task = Task("main", self._cpus[vcpus])
        self.spare_cpus = iter(self._cpus[vcpus + 1 :])  #: for other threads
        for kvm in world.kvms:
            guest = world.guests[kvm.name]
            for index in range(guest.vcpus):
                thread = self.vcpu_thread(kvm, index)
                kvm.vcpus.append(vcpu_class(kvm)(kvm, index, self._cpus[index], thread))

    # -- what a test says ---------------------------------------------------------------------

    @abstractmethod
    def vcpu_thread(self, kvm: Kvm, index: int) -> Thread:
        """What the thread of vCPU ``index`` does, from its creation to its end."""

    @abstractmethod
    def main(self) -> Generator[Event, Any, None]:
        """The test, from its first line of output to its last."""

    # -- the process --------------------------------------------------------------------------

    def run(self) -> Generator[Event, Any, None]:
        """The main thread: the test, then the end of the VM.

        If the process is killed, so is the VM: its end is the OOM killer's to see to.
        """
        self.task.cpu.enter_user(0, NEVER)
        try:
            yield from self.main()
            yield from self.destroy(self.kvm)
        except Killed:
            self.t_ns = yield from reach(self.env, self.t_ns)
        self.task.cpu.sleep(self.t_ns)

    def kill(self, t_ns: int) -> None:
        """SIGKILL at ``t_ns``: who waits in user space ends, others on their way back there."""
        self.killed = True
        for flags in self._flags:
            flags.end(t_ns)

    def in_user_space(self) -> None:
        """A place where the main thread is in user space: it gets no further if it was killed."""
        if self.killed:
            raise Killed

    def destroy(self, kvm: Kvm) -> Generator[Event, Any, None]:
        """The last reference to ``kvm`` goes, after its vCPU threads were joined."""
        teardown = teardown_of(kvm.kernel)(kvm, self.task, self.ending, self.t_ns)
        self.world.teardowns.append(teardown)
        self.t_ns = yield from teardown.run()
        self.task.cpu.enter_user(self.t_ns, NEVER)

    def create_threads(self, number: int) -> None:
        """``number`` calls of pthread_create, until all threads run."""
        self.t_ns += number * round(self.machine["thread_create_ns"])

    def join(self, kvm: Kvm) -> Generator[Event, Any, None]:
        """Wait for the vCPU threads of ``kvm`` to end."""
        self.t_ns = yield from reach(self.env, self.t_ns)
        asleep = False
        for vcpu in kvm.vcpus:
            assert vcpu.process is not None
            if vcpu.process.is_alive:
                if not asleep:
                    self.task.cpu.sleep(self.t_ns)
                asleep = True
                yield vcpu.process
        ended = max(vcpu.finished_ns for vcpu in kvm.vcpus)
        if ended > self.t_ns:
            self.t_ns = ended + kvm.costs.wakeup_ns
        self.task.cpu.enter_user(self.t_ns, NEVER)
        self.in_user_space()

    def ioctl(self, steps: Steps) -> Generator[Event, Any, None]:
        """A system call: ``steps`` in the kernel, begun when it got there, and the way there."""
        self.task.cpu.enter_kernel(self.t_ns)
        self.t_ns = yield from reach(self.env, (yield from steps))
        self.t_ns += self.task.cpu.take_stolen()
        self.task.cpu.enter_user(self.t_ns, NEVER)
        self.in_user_space()

    def flags(self, kvm: Kvm) -> Rendezvous:
        """A rendezvous of the vCPU threads of ``kvm`` by spinning on memory."""
        number = self.world.guests[kvm.name].vcpus
        self._flags.append(Rendezvous(self.env, number, kvm.costs.line.transfer_ns))
        return self._flags[-1]

    # -- output -------------------------------------------------------------------------------

    def message(self, line: str) -> None:
        """Print a line that measures nothing."""
        self.in_user_space()
        self.world.recorder.phase("message", 0, self.t_ns, self.t_ns, line)

    def phase(
        self, name: str, begin_ns: int, line: str = "", iteration: int = 0, end_ns: int = -1
    ) -> None:
        """Something began at ``begin_ns`` and ends now (or at ``end_ns``); print ``line``."""
        self.in_user_space()
        end = self.t_ns if end_ns < 0 else end_ns
        self.world.recorder.phase(name, iteration, begin_ns, end, line)
