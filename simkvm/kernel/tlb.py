"""Invalidation of stage-2 translations: no interrupts, one machine-wide path.

Source: arch/arm64/kvm/hyp/vhe/tlb.c, v6.12. One flush is a TLBI by IPA (or of a range, or of the
whole VMID), a barrier, a TLBI of the VM's stage-1 entries and another barrier. All of them are
broadcast, and the barrier waits for every CPU to answer, so the machine has one server for them:
with N CPUs that flush all the time each waits N services (measured: 1.2 to 1.4 us a broadcast,
machine-wide, on 152 CPUs, message 20221112081714.2169495-1-ricarkol@google.com).
"""

from __future__ import annotations

from simkvm.scenario.machine import Machine


class TlbiPath:
    """The server. ``latency_ns``: a flush alone; ``service_ns``: what it occupies."""

    def __init__(self, latency_ns: int, service_ns: int) -> None:
        self._latency_ns = latency_ns
        self._service_ns = service_ns
        self._free_ns = 0
        self._streams: list[int] = []  # ends of walks that flush again and again
        self.broadcasts = 0
        self.flushes = 0  #: that interrupt vCPUs, and
        self.interrupts = 0  #: whom: see :mod:`simkvm.kernel.remote_flush`

    @classmethod
    def of(cls, machine: Machine) -> TlbiPath:
        """The path of ``machine``."""
        return cls(round(machine["tlbi_s2_page_ns"]), round(machine["tlbi_global_service_ns"]))

    def each_ns(self, t_ns: int) -> int:
        """What each flush costs a walk that starts at ``t_ns`` and issues one after the other.

        A CPU has one flush in flight, so with k such walks a flush waits for at most k - 1 others.
        """
        self._streams = [end for end in self._streams if end > t_ns]
        return max(self._latency_ns, (len(self._streams) + 1) * self._service_ns)

    def walk(self, until_ns: int, flushes: int) -> None:
        """Account for a walk that ends at ``until_ns`` and issues ``flushes``."""
        self.broadcasts += flushes
        if flushes > 1:
            self._streams.append(until_ns)

    def flush(self, t_ns: int, latency_ns: int | None = None) -> int:
        """One flush issued at ``t_ns``; returns when its barrier is done."""
        self.broadcasts += 1
        self._streams = [end for end in self._streams if end > t_ns]
        start = max(t_ns, self._free_ns) + len(self._streams) * self._service_ns
        self._free_ns = start + self._service_ns
        alone = self._latency_ns if latency_ns is None else latency_ns
        return max(t_ns + alone, self._free_ns)
