"""``mmu_stress_test``: ``max_guest_memory_test``, then writes against ``mprotect``.

Source: tools/testing/selftests/kvm/mmu_stress_test.c, v6.14. After the two runs the memory is made
read-only while vCPUs read and then write it; every write that fails comes out of KVM_RUN, and the
thread moves the guest behind it. When all have failed once, and the memory is surely read-only,
they meet; then the memory is made writable again under vCPUs that write it all.
"""

from __future__ import annotations

from collections.abc import Generator
from typing import TYPE_CHECKING, Any, ClassVar

from simpy import Event

from simkvm.guest.vcpu import Vcpu
from simkvm.kernel import mmap_lock
from simkvm.kernel.host_change import make_writable, write_protect
from simkvm.kernel.kvm import Kvm
from simkvm.kernel.memslot import Refusal
from simkvm.scenario.selftests import FilledMemory
from simkvm.selftests.main_thread import Thread
from simkvm.selftests.max_guest_memory import MaxGuestMemory
from simkvm.selftests.rendezvous import Wait
from simkvm.units import GIB

if TYPE_CHECKING:
    from simkvm.kernel.world import World

Steps = Generator[Event, Any, None]


class MmuStress(MaxGuestMemory):
    """The test."""

    name: ClassVar[str] = "mmu_stress_test"

    def __init__(self, world: World, spec: FilledMemory) -> None:
        super().__init__(world, spec)
        kvm = self.kvm
        self._refusal = Refusal(0, kvm.leaves, reads=False)
        self._host_leaves = spec.slot_size // kvm.stage2.leaf_bytes  #: all memslots map the same
        kvm.user_exit = self._efault
        self._read_only = False  #: the main thread has said so
        self._failed: set[int] = set()  #: vCPUs that hit the read-only memory
        self._skipping: set[int] = set()  #: vCPUs in the stage that skips writes that fail

    @property
    def _all_failed(self) -> bool:
        return len(self._failed) == self.vcpus

    def vcpu_thread(self, kvm: Kvm, index: int) -> Thread:
        """The stages 0 to 4 of the test."""
        yield from super().vcpu_thread(kvm, index)
        yield self.run_vcpu
        yield from self.guest_code(index, False)
        yield self.ucall
        yield self.run_vcpu
        self._skipping.add(index)
        while True:
            yield from self.guest_code(index, True)
            if self._read_only and self._all_failed:
                break
        self._skipping.discard(index)
        yield self.ucall
        yield Wait(self._threads)
        yield from self._write_all(index)
        yield Wait(self._threads)

    def _efault(self, vcpu: Vcpu, t_ns: int) -> int:
        """KVM_RUN failed at ``t_ns``: move the guest on, or just try again."""
        self._failed.add(vcpu.index)
        behind = vcpu.index in self._skipping
        if not behind:
            return t_ns
        vcpu.pass_over()
        return t_ns + 2 * self.ioctl_ns  # its registers are read and written

    def main(self) -> Steps:
        """Two runs, then protection away and back."""
        self.create_threads(self.vcpus)
        memory = self.spec.slots * self.spec.slot_size
        self.message(f"Running with {memory // GIB}gb of guest memory and {self.vcpus} vCPUs")
        times: list[int] = []
        for name in self.runs:
            times.append((yield from self.rendezvous(name)))
        yield from self._mprotect(False)
        self._read_only = True
        times.append((yield from self.rendezvous("mprotect RO")))
        yield from self._mprotect(True)
        times.append((yield from self.rendezvous("mprotect RW")))
        lengths = self.took(times, ("run1", "reset", "run2", "ro", "rw"))
        named = zip(("run1", "reset", "run2", "ro", "rw"), lengths, strict=True)
        self.message(", ".join(f"{name} = {length}" for name, length in named))
        yield from self.clean_up()

    def _mprotect(self, writable: bool) -> Steps:
        begin = self.t_ns
        yield from self.ioctl(self._change_protection(self.t_ns + self.ioctl_ns, writable))
        self.phase("mprotect RW" if writable else "mprotect RO", begin)

    def _change_protection(self, t_ns: int, writable: bool) -> Generator[Event, Any, int]:
        """``mprotect_fixup``: one notifier range, which each memslot lies behind."""
        kvm, task = self.kvm, self.task
        t_ns = yield from mmap_lock.write_lock(kvm, task, t_ns)
        if writable:
            kvm.refusals.remove(self._refusal)
        else:
            kvm.refusals.append(self._refusal)
        t_ns = yield from kvm.notifier.invalidate(
            task, t_ns, 0, kvm.leaves, change=self._make_writable if writable else self._protect
        )
        return (yield from mmap_lock.write_unlock(kvm, task, t_ns))

    def _protect(self, t_ns: int, first: int, last: int) -> int:
        return self._changed(t_ns, write_protect(self.kvm.host, first, last))

    def _make_writable(self, t_ns: int, first: int, last: int) -> int:
        return self._changed(t_ns, make_writable(self.kvm.host, first, last))

    def _changed(self, t_ns: int, entries: int) -> int:
        """The host has one mapping of the memory, however many memslots do."""
        shared = entries // (self.kvm.leaves // self._host_leaves)
        return t_ns + shared * self.kvm.costs.takers.pte_ns
