"""Memory bandwidth: what CPUs write to fresh pages goes through one server.

One CPU alone clears pages at its own speed, which is part of what a fault costs. Many at once
cannot clear faster than the machine's memory takes it (measured: populating by 2 MiB blocks ends at
130 GB/s from 16 vCPUs up, message 20221107215644.1895162-1-oliver.upton@linux.dev). Like the path
of invalidations (:mod:`simkvm.kernel.tlb`) it is a recurrence and costs no event: requests come in
order of time. A fault asks when it comes to ``mmap_lock`` for what it writes later, and the memory
may begin at once: were it to wait for the fault, a VM whose faults queue for their ``mmap_lock``
would keep it from the others'. There is one server for all nodes, and reads are free.
"""

from __future__ import annotations

from simkvm.scenario.machine import Machine
from simkvm.units import NS_PER_S


class Dram:
    """The server: ``bytes_per_s`` is what it takes."""

    __slots__ = ("_bytes_per_s", "_free_ns", "_service_ns")

    def __init__(self, bytes_per_s: int) -> None:
        self._bytes_per_s = bytes_per_s
        self._free_ns = 0
        self._service_ns: dict[int, int] = {}

    @classmethod
    def of(cls, machine: Machine) -> Dram:
        """The memory of ``machine``."""
        return cls(round(machine["dram_bw_total_bytes_per_s"]))

    def service_ns(self, size: int) -> int:
        """How long the memory is busy with ``size`` bytes."""
        if size not in self._service_ns:
            self._service_ns[size] = round(size * NS_PER_S / self._bytes_per_s)
        return self._service_ns[size]

    def write(self, t_ns: int, end_ns: int, size: int) -> int:
        """``size`` bytes are asked for at ``t_ns``, not before anybody's before, and written by
        ``end_ns`` if nobody else writes; returns when they are.
        """
        free_ns = self._free_ns
        if free_ns < t_ns:
            free_ns = t_ns
        free_ns += self.service_ns(size)
        self._free_ns = free_ns
        return free_ns if free_ns > end_ns else end_ns
