"""Grace periods of a traced kernel, one call of synchronize_rcu() after the other.

A program calls synchronize_rcu(), again at once (`b2b`) or after a sleep of 3 ms, while the other
CPUs are idle, or run

* `hog1`, `hogall`: loops in user mode, on one CPU or all;
* `hogsys2`, `hogsysall`: loops in the kernel (`dd` from /dev/zero to /dev/null, 1 MiB a call);
* `vm1`, `vm3`: one or three vCPUs that leave the guest only for ticks and after 512 touches.

Set `a-rcu-none`: 2 CPUs, PREEMPT_DYNAMIC booted with preempt=none, so RCU is preemptible. Set
`deb-rcu`: 4 CPUs, PREEMPT_VOLUNTARY. HZ=250, jiffies_till_first_fqs and _next_fqs 1,
jiffies_to_sched_qs 25, in both. See :mod:`simkvm.validate.traced.record` for the rest.

What is compared are ticks, because nothing else is real. The emulated CPUs shared two host CPUs,
and one that lost its own got its interrupts late by a tick of the host (4 ms) or more. In the idle
runs of `a-rcu-none` that shows in about one call of ten. Loaded, it is everywhere: in `hog1` four
grace periods of ten end more than 3 ms after the last CPU reported, though the kthread that was
woken for it had an idle CPU; and the host of `deb-rcu` had other work, too. Lengths of those runs
only bound the kernel's from above. Where a grace period lasts until a scan presses a CPU
(`deb-rcu`, `hogsys2`), lateness also sets how many scans fit in before that.
"""

from __future__ import annotations

import tomllib
from collections.abc import Generator
from dataclasses import dataclass, field
from typing import Any, Final

from simpy import Environment, Event

from simkvm.kernel.cpu import NEVER, Cpu
from simkvm.kernel.rcu import Rcu, RcuConfig, RcuCosts
from simkvm.validate.traced.record import FILES

WHAT: Final = ("start", "length", "scans", "invoke", "synchronize_rcu")
HZ: Final = 250
SLEEP_NS: Final = 3_050_000  #: usleep(3000), with the default timer slack of 50 us
FIRST_CALL_NS: Final = 1_500_000

#: Of the order of a machine's; what takes ticks does not depend on them.
COSTS: Final = RcuCosts(
    call_rcu_ns=100, callback_invoke_ns=100, wakeup_ns=4000, context_switch_ns=1500
)


@dataclass(frozen=True)
class Experiment:
    """One run. ``busy``: CPUs, from the first on, that are in ``state`` all the time."""

    set: str
    run: str
    cpus: int
    preemptible: bool  #: RCU readers can be preempted
    sleep_ns: int = SLEEP_NS
    busy: int = 0
    state: str = "idle"
    clean: bool = False  #: the emulator kept time, so lengths are to be equal and not only bounds
    counts_scans: bool = True  #: their usual number does not depend on the emulator's lateness

    @property
    def about(self) -> str:
        """The load, and how often the program calls."""
        load = f"{self.busy} of {self.cpus} CPUs in {self.state} mode" if self.busy else "idle"
        return f"{load}, {'a call every 4 ticks' if self.sleep_ns else 'back to back'}"


EXPERIMENTS: Final = (
    Experiment("a-rcu-none", "rcu-idle", 2, True, clean=True),
    Experiment("a-rcu-none", "rcu-idle-b2b", 2, True, sleep_ns=0, clean=True),
    Experiment("a-rcu-none", "rcu-hog1", 2, True, busy=1, state="user"),
    Experiment("a-rcu-none", "rcu-hogall", 2, True, busy=2, state="user"),
    Experiment("a-rcu-none", "rcu-hogsys2", 2, True, busy=2, state="kernel"),
    Experiment("a-rcu-none", "rcu-hogsysall", 2, True, busy=2, state="kernel"),
    Experiment("a-rcu-none", "rcu-vm1", 2, True, busy=1, state="guest"),
    Experiment("a-rcu-none", "rcu-vm3", 2, True, busy=2, state="guest"),
    Experiment("deb-rcu", "rcu-idle", 4, False),
    Experiment("deb-rcu", "rcu-idle-b2b", 4, False, sleep_ns=0),
    Experiment("deb-rcu", "rcu-hogsys2", 4, False, busy=2, state="kernel", counts_scans=False),
)

Samples = dict[str, list[int]]


def traced() -> dict[tuple[str, str], Samples]:
    """The traced samples by set and run."""
    tables = tomllib.loads(FILES.joinpath("grace_periods.toml").read_text(encoding="utf-8"))
    found: dict[tuple[str, str], Samples] = {}
    for name, samples in tables.items():
        set_name, _, run = name.partition("/")
        found[set_name, run] = samples
    return found


def simulated(experiment: Experiment, calls: int, hz: int = HZ) -> Samples:
    """The same from the model: ``calls`` of synchronize_rcu(), in ticks of 4 ms.

    ``hz``: of the simulated kernel.
    """
    return Probe(experiment, hz).run(calls)


@dataclass
class Probe:
    """A host whose last CPU runs the program; one that is busy does not make it wait."""

    experiment: Experiment
    hz: int
    periods: list[tuple[int, int, int, int]] = field(default_factory=list)
    calls: list[tuple[int, int]] = field(default_factory=list)

    def __post_init__(self) -> None:
        what = self.experiment
        self.env = Environment()
        self.cpus = [Cpu(n) for n in range(what.cpus)]
        for cpu in self.cpus[: what.busy]:
            if what.state == "user":
                cpu.enter_user(0, NEVER)
            elif what.state == "guest":
                cpu.enter_guest(0, NEVER)
            else:
                cpu.enter_kernel(0)
        config = RcuConfig(hz=self.hz, preemptible=what.preemptible, nr_cpu_ids=what.cpus)
        self.ticks = RcuConfig(hz=HZ, preemptible=True, nr_cpu_ids=1)
        self.rcu = Rcu(
            self.env,
            self.cpus,
            config,
            COSTS,
            on_grace_period=lambda *row: self.periods.append(row),
        )

    def run(self, calls: int) -> Samples:
        """The samples of ``calls``."""
        self.env.run(self.env.process(self._calls(calls)))
        jiffy = self.ticks.jiffies
        samples: Samples = {what: [] for what in WHAT}
        for called_ns, back_ns in self.calls:
            start_ns, end_ns = [row[1:3] for row in self.periods if row[2] <= back_ns][-1]
            samples["start"].append(jiffy(start_ns) - jiffy(called_ns))
            samples["invoke"].append(jiffy(back_ns) - jiffy(end_ns))
            samples["synchronize_rcu"].append(jiffy(back_ns) - jiffy(called_ns))
        for _, start_ns, end_ns, scans in self.periods:
            samples["length"].append(jiffy(end_ns) - jiffy(start_ns))
            samples["scans"].append(scans)
        return samples

    def _calls(self, calls: int) -> Generator[Event, Any, None]:
        cpu, alone = self.cpus[-1], self.experiment.busy < self.experiment.cpus
        yield self.env.timeout(FIRST_CALL_NS)
        for _ in range(calls):
            called_ns = int(self.env.now)
            if alone:
                cpu.sleep(called_ns)
            yield self.rcu.synchronize_rcu(cpu.id)
            back_ns = int(self.env.now)
            self.calls.append((called_ns, back_ns))
            if alone:
                cpu.context_switch(back_ns)
            if self.experiment.sleep_ns:
                yield self.env.timeout(self.experiment.sleep_ns)
