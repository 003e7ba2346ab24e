"""Guests that work off jobs: which program each workload is, and the vCPUs that run it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from simkvm.guest.barrier import Barrier
from simkvm.guest.job_accesses import JobAccesses
from simkvm.guest.job_vcpu import JobVcpu
from simkvm.guest.jobs import Seat, Stage
from simkvm.guest.memcached import Server
from simkvm.kernel.cpu import Cpu
from simkvm.scenario.machine import Machine
from simkvm.scenario.schema import Guest
from simkvm.scenario.workloads import Workload

if TYPE_CHECKING:
    from simkvm.kernel.kvm import Kvm


class Program(Protocol):
    """What the registry holds. ``access`` is the workload's model."""

    def __init__(self, access: Any, seat: Seat) -> None: ...

    def stages(self) -> Iterator[Stage]:
        """What one vCPU does, from the start."""


PROGRAMS: dict[str, type[Program]] = {"memcached": Server}
"""Adding a workload: a class as above, a line here, its model in ``scenario/workloads.py``."""


def is_workload(access: object) -> bool:
    """Whether vCPUs with this access work off jobs."""
    return isinstance(access, Workload)


def join(
    kvm: Kvm,
    guest: Guest,
    cpus: Iterator[Cpu],
    streams: Sequence[np.random.Generator],
    machine: Machine,
) -> None:
    """Give ``kvm`` its vCPUs, with a random stream each, and the access engine for them."""
    access: Any = guest.access
    vcpus: list[JobVcpu] = []
    accesses = JobAccesses(vcpus)
    barrier = Barrier(kvm.env, guest.vcpus)
    for index, rng in enumerate(streams):
        seat = Seat(
            index, guest.vcpus, kvm.pages, guest.page_size, rng, kvm.costs.touch_ns, machine
        )
        stages = PROGRAMS[access.pattern](access, seat).stages()
        vcpus.append(JobVcpu(kvm, index, next(cpus), stages, access, accesses, barrier))
    kvm.vcpus.extend(vcpus)
    kvm.accesses = accesses
