"""Remote flush of a guest's translations on x86: a request, and an interrupt to who runs the guest.

Source: virt/kvm/kvm_main.c (``kvm_flush_remote_tlbs``, ``kvm_make_all_cpus_request``), v6.12. Every
vCPU gets a request bit. A vCPU in guest mode is interrupted: it exits, flushes and enters again;
the caller waits until all of them have answered. One that is out of the guest flushes when it
enters. So a flush costs by the *running* vCPUs of the one VM, where arm64's broadcast
(:mod:`simkvm.kernel.tlb`) costs by who else broadcasts, and interrupts nobody.

A new way to flush is a class with a ``name``, listed in :data:`FLUSHES`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from simkvm.kernel.tlb import TlbiPath
from simkvm.scenario.machine import Machine

if TYPE_CHECKING:
    from simkvm.kernel.kvm import Kvm


class Ipi:
    """Flushes by interrupt. All costs in nanoseconds.

    ``base_ns``: one round, if anybody has to be interrupted; ``per_cpu_ns``: for each of them;
    ``exit_ns``: what an interrupted vCPU loses; ``request_ns``: setting one vCPU's request bit.
    """

    name: ClassVar[str] = "ipi"

    def __init__(self, base_ns: int, per_cpu_ns: int, exit_ns: int, request_ns: int) -> None:
        self._base_ns = base_ns
        self._per_cpu_ns = per_cpu_ns
        self._exit_ns = exit_ns
        self._request_ns = request_ns
        self.broadcasts = 0  #: of translations: x86 has none
        self.flushes = 0
        self.interrupts = 0

    @classmethod
    def of(cls, machine: Machine) -> Ipi:
        """The flushes of ``machine``."""
        return cls(
            round(machine["remote_flush_base_ns"]),
            round(machine["remote_flush_per_cpu_ns"]),
            round(machine["exit_roundtrip_ns"]),
            round(machine["atomic_uncontended_ns"]),
        )

    def flush(self, kvm: Kvm, t_ns: int) -> int:
        """Flush all vCPUs of ``kvm`` at ``t_ns``, not later than now; returns when that is done."""
        running = kvm.accesses.interrupted(t_ns, self._exit_ns)
        self.flushes += 1
        self.interrupts += running
        if not running:
            return t_ns + len(kvm.vcpus) * self._request_ns
        return t_ns + self._base_ns + running * self._per_cpu_ns


FLUSHES: dict[str, type[TlbiPath] | type[Ipi]] = {"broadcast": TlbiPath, "ipi": Ipi}
"""By the value of ``remote_flush``."""
