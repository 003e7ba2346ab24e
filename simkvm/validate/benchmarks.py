"""The benchmarks behind the published figures, as scenarios, and where their figures stand.

Each is run with its own parameters. Where a run would take minutes the guest's memory is cut;
vCPUs, page sizes, costs a page and the pattern stay. What is measured grows in proportion to
memory, so the figure of the whole is that of the part times the cut. What is a cost a run and not a
page (the reading of ``lru_gen``) is cut with it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

from simkvm.scenario.errors import InputError
from simkvm.scenario.machine import load_machine
from simkvm.scenario.schema import Scenario
from simkvm.units import GIB, MIB, NS_PER_MS, NS_PER_S, format_size

if TYPE_CHECKING:
    from simkvm.study.result import Result
    from simkvm.validate.hosts import Host

LEAST_BYTES = 4 * MIB  #: a vCPU with less has no two blocks, and its costs a run outweigh its pages
NS = {"s": NS_PER_S, "ms": NS_PER_MS}


@dataclass(frozen=True)
class Figure:
    """One line of the record: what was measured, on which arm, and how much it was."""

    id: str
    message_id: str
    date: str
    workload: str
    params: str
    metric: str
    unit: str
    arm: str
    value: float
    note: str


@dataclass(frozen=True)
class Run:
    """A scenario that shows a figure, and the share of the published memory that it has."""

    scenario: Scenario
    scale: float = 1.0


class Benchmark(Protocol):
    """How one group of figures is run again."""

    def run(self, figure: Figure, host: Host, limit_bytes: int) -> Run:
        """The run for one figure, with at most ``limit_bytes`` of guest memory to fault in."""
        ...

    def value(self, figure: Figure, result: Result, scale: float) -> float:
        """The figure, of the whole, in its own unit."""
        ...


def cut(bytes_: int, limit_bytes: int) -> int:
    """How many times a memory has to be halved, as a factor, to stay below a limit."""
    factor = 1
    while bytes_ // factor > limit_bytes:
        factor *= 2
    return factor


def _cut_guest(vcpus: int, each: int, limit_bytes: int) -> int:
    """`cut` of a guest with ``each`` bytes a vCPU; InputError if too little would be left."""
    factor = cut(vcpus * each, limit_bytes)
    if each // factor < LEAST_BYTES:
        least = format_size(vcpus * LEAST_BYTES)
        raise InputError(f"{vcpus} vCPUs need {least} at least", key="--memory")
    return factor


def _number(pattern: str, text: str) -> int:
    found = re.search(pattern, text)
    if found is None:
        raise ValueError(f"{text!r} does not say {pattern!r}")
    return int(found[1])


def _scenario(figure: Figure, host: Host, machine: Mapping[str, float], **keys: Any) -> Scenario:
    document = {"name": figure.id, "machine": host.machine(**machine)} | keys
    return Scenario.model_validate(document)


def _phase_ns(result: Result, name: str) -> int:
    """How long a selftest's phase took, all of its iterations together."""
    phases = result.phases
    chosen = phases[phases["name"] == name]
    if chosen.empty:
        raise ValueError(f"no phase {name!r}")
    return int((chosen["end_ns"] - chosen["begin_ns"]).sum())


@dataclass(frozen=True)
class DirtyLogPerf:
    """``dirty_log_perf_test -s anonymous_thp -b 4G``: populate by blocks, then write to all of it
    under dirty logging, which splits them.
    """

    kernels: ClassVar[Mapping[str, str]] = {
        "parallel faults (read lock)": "linux-6.4",
        "write-locked faults": "linux-6.1",
    }
    phases: ClassVar[Mapping[str, str]] = {
        "dirty_memory": "dirty memory",
        "populate": "Populate memory",
    }

    def run(self, figure: Figure, host: Host, limit_bytes: int) -> Run:
        """Populating costs little to simulate, so one run serves both figures."""
        vcpus = _number(r"-v (\d+)", figure.params)
        factor = _cut_guest(vcpus, 4 * GIB, limit_bytes)
        selftest = {
            "test": "dirty_log_perf_test",
            "vcpus": vcpus,
            "vcpu_memory": 4 * GIB // factor,
            "backing_src": "anonymous_thp",
        }
        keys = {"kernel": self.kernels[figure.arm], "selftest": selftest}
        return Run(_scenario(figure, host, {}, **keys), 1 / factor)

    def value(self, figure: Figure, result: Result, scale: float) -> float:
        """Seconds of a phase."""
        return _phase_ns(result, self.phases[figure.metric]) / scale / NS[figure.unit]


@dataclass(frozen=True)
class SparseWrites:
    """One write to each 2 MiB of hugetlb memory under dirty logging, split before or by it."""

    start_ns: ClassVar[int] = 4 * NS_PER_S  #: by when logging is on and blocks are split

    def run(self, figure: Figure, host: Host, limit_bytes: int) -> Run:
        """Logging begins at once, the writes when it is through."""
        vcpus = _number(r"(\d+) vCPUs", figure.params)
        wait = {"pattern": "uniform", "touches": 1, "write_ratio": 0, "think": self.start_ns}
        writes = {"pattern": "populate", "every": 2 * MIB // (4 * 1024)}
        guest = {
            "vcpus": vcpus,
            "memory_per_vcpu": GIB,
            "mapping": 2 * MIB,
            "mapped": True,
            "access": {"pattern": "phases", "phases": [wait, writes]},
        }
        log = {
            "kind": "dirty_log",
            "guest": "vm",
            "rounds": 1,
            "interval": 2 * self.start_ns,
            "eager_split_chunk": GIB if figure.arm == "eager split" else None,
        }
        keys = {"kernel": "linux-6.12", "guests": {"vm": guest}, "contenders": {"log": log}}
        return Run(_scenario(figure, host, {}, **keys))

    def value(self, figure: Figure, result: Result, scale: float) -> float:
        """Milliseconds until the last vCPU has written."""
        return (float(result.summary["vcpu_wall_ns"]) - self.start_ns) / NS[figure.unit]


@dataclass(frozen=True)
class Unmap:
    """Stage-2 unmapping of a whole guest in one call, with and without range invalidation."""

    kernels: ClassVar[Mapping[str, str]] = {"TLBI per PTE": "linux-6.4", "range TLBI": "linux-6.12"}

    def run(self, figure: Figure, host: Host, limit_bytes: int) -> Run:
        """The memory is mapped beforehand: what is measured is the unmapping."""
        memory = _number(r"(\d+) GB", figure.params) * GIB
        guest = {
            "memory": memory,
            "mapped": True,
            "ipa_bits": 44,
            "access": {"pattern": "uniform", "touches": 1, "write_ratio": 0},
        }
        unmap = {
            "kind": "madvise_dontneed",
            "guest": "vm",
            "range": memory,
            "rate": "1 / s",
            "start": "1 ms",
            "stop": "2 ms",
        }
        keys = {
            "duration": 200 * NS_PER_S,
            "kernel": self.kernels[figure.arm],
            "guests": {"vm": guest},
            "contenders": {"unmap": unmap},
        }
        return Run(_scenario(figure, host, {}, **keys))

    def value(self, figure: Figure, result: Result, scale: float) -> float:
        """Seconds for which ``mmu_lock`` was held to unmap."""
        locks = result.locks
        held = locks[locks["site"] == "range_start"]["hold_total_ns"].sum()
        return float(held) / NS[figure.unit]


@dataclass(frozen=True)
class AgeingWhilePopulating:
    """``access_tracking_perf_test -l -p``: vCPUs populate while MGLRU ages without a pause."""

    kernels: Mapping[str, Any]  #: by arm

    def run(self, figure: Figure, host: Host, limit_bytes: int) -> Run:
        """Without ageing the vCPUs alone."""
        vcpus = _number(r"-v (\d+)", figure.params)
        factor = _cut_guest(vcpus, GIB, limit_bytes)
        memory = GIB // factor
        if figure.arm == "no ageing":
            guest = {"vcpus": vcpus, "memory_per_vcpu": memory, "access": {"pattern": "populate"}}
            keys: dict[str, Any] = {"kernel": self.kernels[figure.arm], "guests": {"vm": guest}}
            return Run(_scenario(figure, host, {}, **keys), 1 / factor)
        selftest = {
            "test": "access_tracking_perf_test",
            "vcpus": vcpus,
            "vcpu_memory": memory,
            "lru_gen": True,
            "age_while_populating": True,
        }
        keys = {"kernel": self.kernels[figure.arm], "selftest": selftest}
        read_ns = load_machine(host.machine())["lru_gen_read_ns"]
        scaled = {"lru_gen_read_ns": read_ns / factor}
        return Run(_scenario(figure, host, scaled, **keys), 1 / factor)

    def value(self, figure: Figure, result: Result, scale: float) -> float:
        """Seconds: of the slowest vCPU, or of a pass on average."""
        if figure.arm == "no ageing":
            took = float(result.summary["vcpu_wall_ns"])
        elif figure.metric == "vcpu_wall":
            took = _phase_ns(result, "vcpu wall time")
        else:
            passes = int(result.summary["ageing_passes"])
            took = _phase_ns(result, "lru_gen avg pass duration") / passes
        return took / scale / NS[figure.unit]


@dataclass(frozen=True)
class AgeingWhileIdle:
    """``access_tracking_perf_test -l``: a pass over what was touched, one over what was not."""

    wait_ns: ClassVar[int] = 10 * NS_PER_S  #: longer than a pass
    passes: ClassVar[Mapping[str, int]] = {"pass_young": 1, "pass_old": 2}
    kernel: Any
    vcpus: int

    def run(self, figure: Figure, host: Host, limit_bytes: int) -> Run:
        """Static memory: mapped and aged once, then touched and aged, then aged again.

        Without the first pass the pages would be new to MGLRU. Two calls for each are simulated one
        by one, which takes so much longer that an eighth of the memory has to do.
        """
        twice = figure.arm == "two notifier calls per PTE"
        factor = _cut_guest(self.vcpus, GIB, limit_bytes // 8 if twice else limit_bytes)
        kernel = self.kernel
        if twice:
            kernel = {"base": kernel["base"], "set": {**kernel["set"], **TWICE}}
        guest = {
            "vcpus": self.vcpus,
            "memory_per_vcpu": GIB // factor,
            "mapped": figure.metric != "populate",
            "access": {"pattern": "populate"},
        }
        keys: dict[str, Any] = {"kernel": kernel, "guests": {"vm": guest}}
        if figure.metric != "populate":
            keys["ageing"] = {"passes": 3, "start": self.wait_ns // 2, "interval": self.wait_ns}
            wait = {"pattern": "uniform", "touches": 1, "think": self.wait_ns}
            phases = [guest["access"], wait, guest["access"], wait, wait, wait]
            guest["access"] = {"pattern": "phases", "phases": phases}
        return Run(_scenario(figure, host, {}, name="static-memory", **keys), 1 / factor)

    def value(self, figure: Figure, result: Result, scale: float) -> float:
        """Seconds of a pass, or of populating."""
        if figure.metric == "populate":
            return float(result.summary["vcpu_wall_ns"]) / scale / NS[figure.unit]
        done = result.passes.iloc[self.passes[figure.metric]]
        return float(done["end_ns"] - done["start_ns"]) / scale / NS[figure.unit]


@dataclass(frozen=True)
class Kill:
    """The end of a fully mapped VM in one walk."""

    def run(self, figure: Figure, host: Host, limit_bytes: int) -> Run:
        """The walk is computed in one go, whatever the size."""
        guest = {
            "memory": _number(r"(\d+) GB", figure.workload) * GIB,
            "ipa_bits": 48,
            "mapped": True,
            "access": {"pattern": "uniform", "touches": 1000, "think": "1 us"},
            "teardown": {"order": "process_exit", "at": "2 ms"},
        }
        return Run(_scenario(figure, host, {}, kernel="linux-6.12", guests={"vm": guest}))

    def value(self, figure: Figure, result: Result, scale: float) -> float:
        """Seconds of the longest stretch without a point to reschedule."""
        return float(result.summary["teardown_longest_ns"]) / NS[figure.unit]


TWICE = {"ageing_call": "per_pte_twice"}
READ_LOCKED = {"base": "linux-6.12", "set": {"ageing_lock": "read"}}
LOCK_FREE = {"base": "linux-6.15-x86", "set": {}}
AGEING_ON_X86 = AgeingWhilePopulating(
    {
        "no ageing": "linux-6.12-x86",
        "write-locked ageing": "linux-6.12-x86",
        "lock-free ageing": "linux-6.15-x86",
    }
)
#: Where kernels were patched to ask once for each PTE.
AGEING_ON_ARM64 = AgeingWhilePopulating(
    {
        "one notifier call per PTE": READ_LOCKED,
        "read-locked ageing": READ_LOCKED,
        "write-locked ageing": "linux-6.12",
    }
)

BENCHMARKS: Mapping[str, Benchmark] = {
    "A-*": DirtyLogPerf(),
    "K-1": Kill(),
    "S-1.*": SparseWrites(),
    "T-3.*": Unmap(),
    "V4-*": AGEING_ON_X86,
    "V5-[123]": AgeingWhileIdle(LOCK_FREE, 32),
    "V5-[45]": AgeingWhileIdle(READ_LOCKED, 16),
    "V5-6": AGEING_ON_ARM64,
    "V6-1": AGEING_ON_ARM64,
}
"""Which benchmark shows which figures, by their ids."""

UNANSWERED: Mapping[str, str] = {
    "D-1": "how long the test ran, and what a write without a fault costs there, was not said: a "
    "count of writes cannot be had from the model",
}
"""Figures that nothing is run for, and why."""
