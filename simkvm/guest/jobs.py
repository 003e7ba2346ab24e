"""Jobs: what a vCPU of a closed-loop workload works off, batch by batch and stage by stage.

A job is a request, a burst, a piece of a scan. What it touches, and after how much work, is known
when it is drawn; when it begins depends on the client that asks for it and on the jobs before it.
Jobs are numbered in the order in which a vCPU serves them, and draws go by that number, so they do
not depend on when the vCPU gets there.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from simkvm.scenario.machine import Machine
from simkvm.scenario.workloads import Workload

Int64s = NDArray[np.int64]
Bools = NDArray[np.bool_]

BATCH_JOBS: Final = 1024  #: jobs drawn at once. A part of the model: keys are drawn before kinds
ENDLESS: Final = 1 << 62


@dataclass(frozen=True)
class Jobs:
    """A batch of n jobs with m touches in all.

    Job j makes the touches ``offsets[j]`` up to ``offsets[j + 1]``; shape (n + 1,). ``pages``,
    ``writes``: what each touches and how, shape (m,); ``at_ns``: after how much of its job's CPU
    time it begins, ascending within a job. ``total_ns``: CPU time of each job, shape (n,), touches
    included. ``gap_ns``: how long after the end of each its client asks again, shape (n,).
    ``work``: what each gets done, in the workload's unit, shape (n,). ``last``: no batch of this
    stage follows.
    """

    offsets: Int64s
    pages: Int64s
    writes: Bools
    at_ns: Int64s
    total_ns: Int64s
    gap_ns: Int64s
    work: Int64s
    last: bool = False

    def __len__(self) -> int:
        return len(self.total_ns)


@dataclass(frozen=True)
class Stage:
    """Batches of jobs for the clients of one vCPU.

    ``first_ns``: when each client asks first, from the start of the stage on; ``each``: jobs of a
    client, then it is done. ``extra_ns``: what a client waits beyond the time from its job's
    arrival to its end. ``requests``: whether somebody waits for the answers, so that latencies are
    of interest. ``barrier``: the next stage begins when all vCPUs have done this one.
    """

    batches: Iterator[Jobs]
    first_ns: tuple[int, ...] = (0,)
    each: int = ENDLESS
    extra_ns: int = 0
    requests: bool = False
    counts: bool = True  #: whether its jobs are work, or only prepare some
    barrier: bool = False
    threads: int = 1  #: among whom the clients are dealt out in turn


@dataclass(frozen=True)
class Seat:
    """Where a workload runs: on vCPU ``vcpu`` of ``vcpus``, in ``pages`` pages of ``page_bytes``.

    ``rng`` is the vCPU's own, ``layout_rng`` in the same state for all of the guest's.
    ``touch_ns``: what a touch of a page takes; ``mapped``: whether all memory is there already.
    """

    vcpu: int
    vcpus: int
    pages: int
    page_bytes: int
    rng: np.random.Generator
    layout_rng: np.random.Generator
    touch_ns: int
    machine: Machine
    mapped: bool = False


def share_of(pages: int, which: int, parts: int) -> range:
    """Part number ``which`` of ``pages`` pages cut into ``parts``, equal but for a page."""
    return range(which * pages // parts, (which + 1) * pages // parts)


def back_to_back(
    pages: Int64s, writes: Bools, step_ns: int, per_job: int, work: int, last: bool = True
) -> Jobs:
    """Touches in order, ``step_ns`` of CPU time each, cut into jobs of ``per_job``.

    ``work``: what each touch gets done.
    """
    starts = np.arange(0, len(pages), per_job)
    offsets = np.append(starts, len(pages))
    counts = np.diff(offsets)
    within = np.arange(len(pages)) - np.repeat(starts, counts)
    return Jobs(
        offsets=offsets,
        pages=pages,
        writes=writes,
        at_ns=within * step_ns,
        total_ns=counts * step_ns,
        gap_ns=np.zeros(len(starts), np.int64),
        work=counts * work,
        last=last,
    )


PIECE_PAGES: Final = 64  #: touches of a job that nobody waits for


def loading(access: Workload, seat: Seat, pages: Int64s) -> Iterator[Stage]:
    """The vCPUs write ``pages``, one each in turn, as fast as memory takes them.

    Nothing if the workload does not want it, or memory is mapped already.
    """
    if not access.load or seat.mapped:
        return
    pages = pages[seat.vcpu :: seat.vcpus]
    jobs = back_to_back(pages, np.ones(len(pages), np.bool_), seat.touch_ns, PIECE_PAGES, 0)
    yield Stage(in_batches(jobs), counts=False, barrier=True)


def in_batches(jobs: Jobs) -> Iterator[Jobs]:
    """A long batch cut into short ones, so that none of them is long in use."""
    for first in range(0, len(jobs), BATCH_JOBS):
        last = min(first + BATCH_JOBS, len(jobs))
        low, high = int(jobs.offsets[first]), int(jobs.offsets[last])
        yield Jobs(
            offsets=jobs.offsets[first : last + 1] - low,
            pages=jobs.pages[low:high],
            writes=jobs.writes[low:high],
            at_ns=jobs.at_ns[low:high],
            total_ns=jobs.total_ns[first:last],
            gap_ns=jobs.gap_ns[first:last],
            work=jobs.work[first:last],
            last=jobs.last and last == len(jobs),
        )
