"""Guests of the other access engines on shared CPUs: nothing is lost, nobody waits for nothing."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from test_sched import SWITCH, compute, ran, shared
from worlds import MS, US, world

from simkvm.guest.job_vcpu import JobVcpu
from simkvm.guest.lazy import LazyVcpu
from simkvm.guest.vcpu import Vcpu
from simkvm.kernel.sched import FairScheduler
from simkvm.kernel.world import World
from simkvm.observe.record import Record
from simkvm.units import MIB

SERVER: dict[str, Any] = {
    "memory": 32 * MIB,
    "access": {"pattern": "memcached", "keys": 3000, "requests": 300, "warmup": 0},
}
UNIFORM: dict[str, Any] = {
    "memory": 2 * MIB,
    "engine": "lazy",
    "access": {"pattern": "uniform", "touches": 40_000, "think": 1000},
}
ENGINES = [pytest.param(SERVER, JobVcpu, id="jobs"), pytest.param(UNIFORM, LazyVcpu, id="lazy")]


def run(made: World) -> tuple[World, Record]:
    return made, made.run()


def switches(made: World) -> int:
    """From one thread to another."""
    assert isinstance(made.sched, FairScheduler)
    return sum(queue.switch_ns for queue in made.sched.queues) // SWITCH


@pytest.mark.parametrize(("guest", "kind"), ENGINES)
def test_with_a_cpu_for_each_nothing_changes(guest: dict[str, Any], kind: type[Vcpu]) -> None:
    rest: dict[str, Any] = {
        "guest": guest | {"vcpus": 3},
        "contenders": {
            "drop": {"kind": "madvise_dontneed", "guest": "vm0", "range": MIB, "rate": 300}
        },
        "duration": 20 * MS,
    }
    made, own = run(world(**rest))
    assert isinstance(made.kvms[0].vcpus[0], kind)
    fair = world(host={"scheduler": "fair"}, **rest).run()
    assert fair.fingerprint == own.fingerprint
    assert fair.summary["runqueue_wait_total_ns"] == 0


@pytest.mark.parametrize(("guest", "kind"), ENGINES)
def test_a_preempted_guest_loses_nothing(
    guest: dict[str, Any], kind: type[Vcpu], monkeypatch: pytest.MonkeyPatch
) -> None:
    """All touches are made, in the CPU time that they take alone and what preemption costs."""
    reentered = 0
    go_in = kind._go_in

    def noted(vcpu: Vcpu, t_ns: int) -> int:
        nonlocal reentered
        reentered += t_ns > int(vcpu.kvm.env.now)
        return go_in(vcpu, t_ns)

    monkeypatch.setattr(kind, "_go_in", noted)
    made = shared(hz=1000, guest=guest)
    computing = compute(made, 20 * MS)
    made, record = run(made)
    alone, own = run(world(guest=guest))
    (vcpu,), (other,) = made.kvms[0].vcpus, alone.kvms[0].vcpus
    assert reentered > 5
    assert vcpu.touches == other.touches
    assert record.summary["faults"] == own.summary["faults"]
    assert np.array_equal(
        made.kvms[0].stage2.leaf.entries != 0, alone.kvms[0].stage2.leaf.entries != 0
    )
    assert ran(computing) == 20 * MS
    enter_ns = made.kvms[0].costs.fault.enter_ns
    whole = other.finished_ns + 20 * MS + switches(made) * SWITCH + reentered * enter_ns
    if kind is LazyVcpu:
        assert vcpu.finished_ns == whole
    else:  # it sleeps while its clients think, and then the CPU is the other's
        assert record.summary["requests"] == own.summary["requests"] > 0
        assert other.finished_ns < vcpu.finished_ns <= whole


@pytest.mark.parametrize(("guest", "kind"), ENGINES)
def test_half_the_cpus_take_twice_as_long(guest: dict[str, Any], kind: type[Vcpu]) -> None:
    four, two = (
        shared(cpus, guest=guest | {"vcpus": 4}).run().summary["sim_ns"] for cpus in (4, 2)
    )
    assert 1.9 < two / four < 2.1


def test_a_vcpu_without_a_job_leaves_its_cpu_to_others() -> None:
    """One client: between its requests the vCPU halts, and nobody is kept from computing."""
    access = SERVER["access"] | {"clients": 1, "requests": 100}
    made = shared(guest=SERVER | {"access": access})
    computing = compute(made, 5 * MS)
    made, record = run(made)
    own = world(guest=SERVER | {"access": access}).run()
    assert isinstance(made.sched, FairScheduler)
    served = made.sched.threads[made.kvms[0].vcpus[0].task]
    assert served.run_ns < 0.7 * own.summary["sim_ns"], "it halts"
    assert computing.stretches[-1].end_ns < 5 * MS + 2 * served.run_ns
    assert record.summary["requests"] == own.summary["requests"] == 100
    assert record.summary["sim_ns"] < own.summary["sim_ns"] + 3 * 5 * MS
    assert not made.cpus[0].halted


@pytest.mark.parametrize("order", ["process_exit", "close_vm"])
@pytest.mark.parametrize(("guest", "kind"), ENGINES)
def test_a_vm_ends_while_vcpus_halt_or_wait(
    guest: dict[str, Any], kind: type[Vcpu], order: str
) -> None:
    end = {"order": order, "at": 3 * MS + 77}
    made, _ = run(shared(2, guest=guest | {"vcpus": 5, "teardown": end}))
    assert all(each.done for each in made.teardowns)
    assert all(vcpu.finished_ns < 40 * MS for vcpu in made.kvms[0].vcpus)


def test_a_halted_vcpu_stops_at_once() -> None:
    """Its next request would come much later."""
    slow = SERVER["access"] | {"clients": 1, "network": 30 * MS}
    end = {"order": "process_exit", "at": 5 * MS}
    made, _ = run(shared(guest=SERVER | {"access": slow, "teardown": end}))
    assert made.kvms[0].vcpus[0].finished_ns < 6 * MS


@pytest.mark.parametrize("engine", ["explicit", "lazy"])
def test_a_guest_that_only_faults_gives_way_too(engine: str) -> None:
    access = {"pattern": "uniform", "touches": 4000, "think": 0}
    made = shared(hz=1000, guest={"memory": 1024 * MIB, "engine": engine, "access": access})
    computing = compute(made, 4 * MS)
    made.run()
    assert ran(computing) == 4 * MS
    assert max(end - begin for _, begin, end in computing.stretches) <= MS
    assert computing.stretches[-1].end_ns < 10 * MS


@pytest.mark.parametrize(("guest", "kind"), ENGINES)
def test_few_cpus_with_everything_at_once(guest: dict[str, Any], kind: type[Vcpu]) -> None:
    made, record = run(
        shared(
            2,
            hz=1000,
            guest=guest | {"vcpus": 3},
            ageing={"interval": 300 * US},
            contenders={
                "drop": {"kind": "madvise_dontneed", "guest": "vm0", "range": MIB, "rate": 300}
            },
            duration=30 * MS,
        )
    )
    assert record.summary["violations"] == 0
    assert record.summary["cpu_busy_ratio"] <= 1.001
    assert isinstance(made.sched, FairScheduler)
    for thread in made.sched.threads.values():
        assert thread.run_ns > 0
        assert thread.run_ns + thread.wait_ns <= 30.1 * MS


PRESSED: dict[str, Any] = {
    "guest": {
        "vcpus": 3,
        "memory": 12 * MIB,
        "access": {"pattern": "uniform", "think": 1000, "write_ratio": 0.5},
    },
    "duration": 20 * MS,
}
SHORT: dict[str, Any] = {"memory": {"size": 9 * MIB}, "swap": {"kind": "optane"}}


def test_reclaim_shares_cpus_too() -> None:
    """kswapd and who waits for swap give way and are given their turns."""
    own = world(host=SHORT, **PRESSED).run()
    fair = world(host=SHORT | {"scheduler": "fair"}, **PRESSED).run()
    assert fair.fingerprint == own.fingerprint
    made, record = run(world(host=SHORT | {"scheduler": "fair", "cpus": 2}, **PRESSED))
    assert record.summary["violations"] == 0
    assert record.summary["cpu_busy_ratio"] > 0.95
    assert isinstance(made.sched, FairScheduler)
    threads = {thread.task.name: thread for thread in made.sched.threads.values()}
    assert threads["kswapd"].run_ns > MS
    assert threads["kswapd"].switches > 3
    for thread in threads.values():
        assert thread.run_ns + thread.wait_ns <= 20.1 * MS
