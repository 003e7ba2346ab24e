"""Callbacks of tables that blocks replaced, many at once: how Linux cuts them into batches.

On a kernel with one CPU. In run `unlink-c` 128 tables were unlinked within a millisecond, across a
tick. Those from before the tick waited for one grace period, the rest for the next. The first
batch stopped at `blimit` though it had interrupted the idle task, because the same interrupt had
woken the grace-period kthread; ksoftirqd went on in batches of `blimit`. When the second grace
period was over nobody else wanted the CPU, and one batch took all that was left.

When tables were unlinked relative to the tick, and what a callback takes, are given; the rest is
the model's RCU with as many CPUs.
"""

from __future__ import annotations

import tomllib
from dataclasses import dataclass

from simpy import Environment

from simkvm.kernel.cpu import Cpu
from simkvm.kernel.rcu import Rcu, RcuConfig
from simkvm.validate.traced.grace_periods import COSTS, HZ
from simkvm.validate.traced.record import FILES

Batches = list[tuple[int, int]]
"""Of each batch when it began, in ticks after the first, and its callbacks."""


@dataclass(frozen=True)
class Burst:
    """``called_ns``: times of call_rcu(), from a tick on; the CPU is idle from ``busy_until_ns``.

    ``batches``: what the kernel made of it, in which ``commands`` of run ``name``.
    """

    name: str
    commands: str
    called_ns: list[int]
    busy_until_ns: int
    callback_ns: int
    batches: Batches


def traced() -> list[Burst]:
    """The bursts that were traced."""
    tables = tomllib.loads(FILES.joinpath("batches.toml").read_text(encoding="utf-8"))
    ticks = _config(HZ)
    return [
        Burst(
            name=name,
            commands=table["commands"],
            called_ns=[1000 * each for each in table["called_us"]],
            busy_until_ns=1000 * table["busy_until_us"],
            callback_ns=round(1000 * table["callback_us"]),
            batches=[(ticks.jiffies(1000 * at_us), number) for at_us, number in table["batches"]],
        )
        for name, table in tables.items()
    ]


def simulated(burst: Burst, cpus: int = 1, blimit: int = 10) -> Batches:
    """What the model makes of it."""
    env, hosts = Environment(), [Cpu(n) for n in range(cpus)]
    begun: Batches = []
    config = _config(HZ, cpus, blimit)
    rcu = Rcu(
        env,
        hosts,
        config,
        COSTS,
        on_batch=lambda cpu, t_ns, number, ns: begun.append((config.jiffies(t_ns), number)),
    )
    hosts[0].enter_kernel(0)
    hosts[0].sleep(burst.busy_until_ns)
    rcu.call_rcu_many(burst.called_ns, 0, lambda t_ns, index: burst.callback_ns)
    env.run()
    return begun


def _config(hz: int, cpus: int = 1, blimit: int = 10) -> RcuConfig:
    return RcuConfig(hz=hz, preemptible=False, nr_cpu_ids=cpus, blimit=blimit)
