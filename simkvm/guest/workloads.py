"""Guests that work off jobs: which program each workload is, and the vCPUs that run it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from copy import deepcopy
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from simkvm.guest.barrier import Barrier
from simkvm.guest.chase import Chaser
from simkvm.guest.interactive import Browser
from simkvm.guest.job_accesses import JobAccesses
from simkvm.guest.job_threads import ThreadedVcpu
from simkvm.guest.job_vcpu import JobVcpu
from simkvm.guest.jobs import Seat, Stage
from simkvm.guest.memcached import Server
from simkvm.guest.sort import Executor
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


PROGRAMS: dict[str, type[Program]] = {
    "memcached": Server,
    "sort": Executor,
    "chase": Chaser,
    "interactive": Browser,
}
"""Adding a workload: a class as above, a line here, its model in ``scenario/workloads.py``."""


def is_workload(access: object) -> bool:
    """Whether vCPUs with this access work off jobs."""
    return isinstance(access, Workload)


def join(
    kvm: Kvm,
    guest: Guest,
    cpus: Iterator[Cpu],
    streams: Sequence[np.random.Generator],
    layout: np.random.Generator,
    machine: Machine,
) -> None:
    """Give ``kvm`` its vCPUs and the access engine for them.

    Each vCPU has a random stream of its own, ``layout`` is one for what they agree on.
    """
    access: Any = guest.access
    vcpus: list[JobVcpu] = []
    accesses = JobAccesses(vcpus, kvm.leaves, kvm.kernel["remote_flush"] == "broadcast")
    barrier = Barrier(kvm.env, guest.vcpus)
    kind = ThreadedVcpu if guest.async_pf else JobVcpu
    for index, rng in enumerate(streams):
        seat = Seat(
            vcpu=index,
            vcpus=guest.vcpus,
            pages=kvm.pages,
            page_bytes=guest.page_size,
            rng=rng,
            layout_rng=deepcopy(layout),
            touch_ns=kvm.costs.touch_ns,
            machine=machine,
            mapped=guest.mapped,
        )
        stages = PROGRAMS[access.pattern](access, seat).stages()
        vcpus.append(kind(kvm, index, next(cpus), stages, access, accesses, barrier))
    kvm.vcpus.extend(vcpus)
    kvm.accesses = accesses
