"""A shared cache line as a first-come first-served server.

Every atomic on a line has to own it. A CPU that had the line last pays little; any other CPU waits
for its turn and then for a transfer between cores, so a line that everybody writes serves one
atomic after the other, however many CPUs the machine has. That, and not the length of the
critical section, is what bounds read-side locks (measured on Ampere Altra: 123 to 182 ns a fault
from 8 vCPUs up, message 20221107215644.1895162-1-oliver.upton@linux.dev).

The server is a recurrence, not a process: asking for the line at ``t`` returns when the atomic is
done. Requests must come in order of time; what a CPU will do later (a release whose time is
already known) is *posted* and served in its turn.
"""

from __future__ import annotations

from bisect import insort
from collections import deque
from dataclasses import dataclass

from simkvm.scenario.machine import Machine


@dataclass(frozen=True)
class LineCosts:
    """What an atomic costs by where the line was: integer nanoseconds."""

    same_ns: int
    transfer_ns: int
    remote_ns: int
    cpus_per_node: int

    @classmethod
    def of(cls, machine: Machine) -> LineCosts:
        """Costs of ``machine``: the last owner's own, another core's, another node's."""
        transfer = machine["atomic_contended_service_ns"]
        remote = transfer
        if machine.nodes > 1:
            remote = transfer * machine["c2c_remote_ns"] / machine["c2c_same_ns"]
        return cls(
            same_ns=round(machine["atomic_uncontended_ns"]),
            transfer_ns=round(transfer),
            remote_ns=round(remote),
            cpus_per_node=machine.cores // machine.nodes,
        )


MOST_ATOMICS = 5  #: atomics on one line that one CPU issues in a row


class CacheLine:
    """One line: who had it last, and until when it is taken."""

    __slots__ = (
        "_cpus_per_node",
        "_local_ns",
        "_posted",
        "_remote_ns",
        "_transfer_ns",
        "fetch_ns",
        "free_ns",
        "one_node",
        "owner",
    )

    def __init__(self, costs: LineCosts) -> None:
        self._local_ns = [n * costs.same_ns for n in range(MOST_ATOMICS + 1)]
        self.fetch_ns = [costs.transfer_ns + n * costs.same_ns for n in range(-1, MOST_ATOMICS)]
        self._transfer_ns = costs.transfer_ns
        self._remote_ns = costs.remote_ns
        self._cpus_per_node = costs.cpus_per_node
        self.one_node = costs.remote_ns == costs.transfer_ns
        self._posted: deque[tuple[int, int]] = deque()  # (time, cpu), in order of time
        self.free_ns = 0
        self.owner = -1

    def serve(self, cpu: int, t_ns: int, atomics: int = 1) -> int:
        """Serve ``atomics`` in a row that ``cpu`` issues at ``t_ns``; returns when they are done.

        The first one fetches the line; the others find it there.
        """
        done = self.free_ns
        if done < t_ns:
            done = t_ns
        if cpu == self.owner:
            done += self._local_ns[atomics]
        elif self.one_node:
            done += self.fetch_ns[atomics]
            self.owner = cpu
        else:
            done += self._transfer(cpu) + self._local_ns[atomics - 1]
            self.owner = cpu
        self.free_ns = done
        return done

    def visit(self, cpu: int, t_ns: int, atomics: int) -> int:
        """As :meth:`serve`, after what was posted up to ``t_ns``.

        Atomics of one visit lie some nanoseconds apart: if others wait for the line they take it
        in between, and then each of the atomics has to fetch it.
        """
        posted = self._posted
        while posted and posted[0][0] <= t_ns:
            at_ns, by = posted.popleft()
            self.serve(by, at_ns)
        if self.free_ns <= t_ns or cpu == self.owner:
            return self.serve(cpu, t_ns, atomics)
        fetch_ns = self.fetch_ns[1] if self.one_node else self._transfer(cpu)
        self.owner = cpu
        self.free_ns += atomics * fetch_ns
        return self.free_ns

    def post(self, cpu: int, t_ns: int) -> None:
        """An atomic that ``cpu`` will issue at ``t_ns`` and not wait for: a release."""
        posted = self._posted
        if posted and (t_ns, cpu) < posted[-1]:
            insort(posted, (t_ns, cpu))
        else:
            posted.append((t_ns, cpu))

    def occupy(self, cpu: int, t_ns: int, service_ns: int) -> int:
        """Take the line at ``t_ns`` for ``service_ns`` (a hand-over); returns when that is done."""
        done = (t_ns if t_ns > self.free_ns else self.free_ns) + service_ns
        self.free_ns = done
        self.owner = cpu
        return done

    def _transfer(self, cpu: int) -> int:
        if self.owner < 0 or cpu // self._cpus_per_node == self.owner // self._cpus_per_node:
            return self._transfer_ns
        return self._remote_ns
