"""The simulated world: builds host, guests and actors from a scenario, and runs them."""

from __future__ import annotations

import zlib
from collections.abc import Generator, Iterator
from functools import partial
from itertools import count, cycle, islice
from pathlib import Path
from typing import Any

import numpy as np
from simpy import Environment, Event, Process

from simkvm import contenders, selftests
from simkvm.contenders.contender import Contender
from simkvm.guest import patterns, workloads
from simkvm.guest.lazy import Lazy
from simkvm.guest.software_af import vcpu_class
from simkvm.kernel import bugs
from simkvm.kernel.aging import AgeingThread
from simkvm.kernel.classic_lru import ClassicLruvec, RootLruvec
from simkvm.kernel.cpu import Cpu
from simkvm.kernel.dram import Dram
from simkvm.kernel.flusher import Flusher
from simkvm.kernel.kswapd import Kswapd
from simkvm.kernel.kvm import Kvm
from simkvm.kernel.listed import ANON, FILE, FolioLists
from simkvm.kernel.lru_gen_file import LruGenWriter
from simkvm.kernel.lru_walk import LRU_GEN_CORE
from simkvm.kernel.lrugen import ListedLruvec
from simkvm.kernel.mglru import Lruvec
from simkvm.kernel.oom_kill import OomKiller
from simkvm.kernel.page_alloc import HostPages, Watermarks
from simkvm.kernel.pgdat import Pgdat
from simkvm.kernel.rcu import Rcu, RcuConfig, RcuCosts
from simkvm.kernel.remote_flush import FLUSHES
from simkvm.kernel.sched import FairScheduler, OwnCpus
from simkvm.kernel.swap import SwapDevice
from simkvm.kernel.task import Task
from simkvm.kernel.teardown import Teardown
from simkvm.kernel.vmscan import Reclaimer
from simkvm.kernel.zap_roots import teardown_of
from simkvm.observe.record import Record
from simkvm.observe.recorder import SAMPLES, Recorder
from simkvm.observe.table_memory import TableMemory
from simkvm.scenario.errors import InputError
from simkvm.scenario.groups import meant, virtual_machines
from simkvm.scenario.kernel import KernelVariant
from simkvm.scenario.leaf_sizes import block_bytes, logs_writes, workers
from simkvm.scenario.machine import Machine
from simkvm.scenario.schema import Guest, Scenario
from simkvm.scenario.schema import Teardown as TeardownSpec
from simkvm.scenario.swap import Nvme
from simkvm.selftests.main_thread import MainThread
from simkvm.units import NS_PER_S

FIRST_SAMPLE_NS = 1_000_000


def simulate(scenario: Scenario, machine: Machine, kernel: KernelVariant) -> Record:
    """Run ``scenario`` on ``machine`` under ``kernel`` to its end."""
    return World(scenario, machine, kernel).run()


class World:
    """Everything that is alive in one run."""

    def __init__(self, scenario: Scenario, machine: Machine, kernel: KernelVariant) -> None:
        if machine.arch != kernel.arch:
            raise InputError(
                f"{kernel.name} is for {kernel.arch}, but {machine.name} is {machine.arch}"
            )
        self.scenario = scenario
        self.machine = machine
        self.kernel = kernel = bugs.with_bugs(kernel, scenario.bugs)
        self.env = Environment()
        if scenario.ties == "shuffle":
            self.env._eid = shuffled(self.stream("ties"))  # type: ignore[assignment]
        self.recorder = Recorder()
        self.memory = TableMemory()
        self.dram = Dram.of(machine)
        self.remote_flush = FLUSHES[kernel["remote_flush"]].of(machine)
        self.guests = virtual_machines(scenario, machine)
        self.cpus = self._cpus()
        self.rcu = self._rcu()
        self.teardowns: list[Teardown] = []
        self.sched = self._scheduler()
        self.pgdat = self._pgdat()
        shared = isinstance(self.sched, FairScheduler)
        self._free_cpus: Iterator[Cpu] = cycle(self.cpus) if shared else iter(self.cpus)
        self.kvms = [self._guest(name, guest) for name, guest in self.guests.items()]
        self._charge(self.guests)
        mapped = [kvm for kvm in self.kvms if self.guests[kvm.name].mapped]
        for kvm in mapped:
            kvm.prepare_to_map_all(self.guests[kvm.name].vcpus)
        for kvm in mapped:
            kvm.map_all()
        self.selftest: MainThread | None = None
        if scenario.selftest is None:
            for kvm in self.kvms:
                self._vcpus(kvm, self.guests[kvm.name])
            for kvm in mapped:
                for vcpu in kvm.vcpus:
                    vcpu.fault.fill_cache()
        else:
            self.selftest = selftests.build(self)
            self._free_cpus = self.selftest.spare_cpus
        self.ageing: AgeingThread | None = None
        if scenario.ageing is not None:
            task = Task("ageing", next(self._free_cpus))
            self.ageing = AgeingThread(self.kvms, task, scenario.ageing)
        by_name = {kvm.name: kvm for kvm in self.kvms}
        self.kswapd: Kswapd | None = None
        self.lru_gen: LruGenWriter | None = None
        self.flusher: Flusher | None = None
        if self.pgdat is not None:
            task = Task("kswapd", next(self._free_cpus), {})
            self.kswapd = Kswapd(self.pgdat, task, round(machine["wakeup_ns"]))
            self.pgdat.pages.reclaimer = partial(Reclaimer, self.pgdat)
            OomKiller(self.pgdat, self.kvms, self._process_exit, self.recorder)
            files = [kvm for kvm in self.kvms if self.pgdat.memory_of(kvm).file]
            if files:
                task = Task("flusher", next(self._free_cpus))
                self.flusher = Flusher(self.pgdat, files, task)
            if scenario.host.memory is not None and scenario.host.memory.commands:
                task = Task("lru_gen", next(self._free_cpus))
                writes = scenario.host.memory.commands
                self.lru_gen = LruGenWriter(self.pgdat, task, writes, self.recorder)
        self.contenders = [
            contender
            for name, spec in scenario.contenders.items()
            for contender in self._contender(
                name, spec, [by_name[guest] for guest in meant(scenario, spec.guest)]
            )
        ]
        self.teardowns += [
            end
            for name, guest in self.guests.items()
            if guest.teardown is not None
            for end in self._ends(by_name[name], guest.teardown)
        ]
        self._running = sum(len(kvm.vcpus) for kvm in self.kvms) + len(self.teardowns)
        self._over = Event(self.env)
        self._meet()
        bugs.put_back(self, scenario.bugs)

    @property
    def events(self) -> int:
        """SimPy events scheduled so far."""
        return next(self.env._eid) if self.scenario.ties == "fifo" else -1

    def stream(self, component: str) -> np.random.Generator:
        """The random stream of one component: no other one's draws shift it."""
        key = (self.scenario.replication, zlib.crc32(component.encode()))
        seeds = np.random.SeedSequence(self.scenario.seed, spawn_key=key)
        return np.random.Generator(np.random.Philox(seeds))

    # -- building -----------------------------------------------------------------------------

    def _cpus(self) -> list[Cpu]:
        host, machine = self.scenario.host, self.machine
        number = host.cpus or machine.cores
        vcpus = sum(guest.vcpus for guest in self.guests.values())
        if self.scenario.selftest is not None:  # its guests follow one another on the same CPUs
            vcpus = max(guest.vcpus for guest in self.guests.values())
        per_node = -(-machine.cores // machine.nodes)
        first = {"none": 0, "vcpus": vcpus, "all": number}  # vCPUs have the lowest numbers
        return [
            Cpu(n, n // per_node, n < first[host.nohz_full], n < first[host.rcu.nocbs])
            for n in range(number)
        ]

    def _rcu(self) -> Rcu:
        host, machine = self.scenario.host, self.machine
        config = RcuConfig(
            hz=host.hz,
            preemptible=host.preemptible_rcu,
            nr_cpu_ids=machine.cores,
            blimit=host.rcu.blimit,
            qhimark=host.rcu.qhimark,
            qlowmark=host.rcu.qlowmark,
            lazy=host.rcu.lazy,
        )
        costs = RcuCosts(
            call_rcu_ns=round(machine["call_rcu_ns"]),
            wakeup_ns=round(machine["wakeup_ns"]),
            context_switch_ns=round(machine["context_switch_ns"]),
            callback_invoke_ns=round(machine["callback_invoke_ns"]),
        )
        return Rcu(
            self.env,
            self.cpus,
            config,
            costs,
            on_grace_period=self._grace_period,
            on_batch=self.recorder.batch,
        )

    def _scheduler(self) -> OwnCpus | FairScheduler:
        if self.scenario.host.scheduler == "none":
            return OwnCpus()
        switch_ns = round(self.machine["context_switch_ns"])
        return FairScheduler(self.env, self.cpus, switch_ns, self.rcu.tick_after)

    def _meet(self) -> None:
        """Tell the scheduler of every thread; none has a CPU before it asks for one."""
        for kvm in self.kvms:
            for vcpu in kvm.vcpus:
                self.sched.add(vcpu.task, vcpu)
        for task in self._other_tasks():
            self.sched.add(task)

    def _other_tasks(self) -> Iterator[Task]:
        if self.ageing is not None:
            yield self.ageing.task
        if self.kswapd is not None:
            yield self.kswapd.task
        if self.lru_gen is not None:
            yield self.lru_gen.task
        if self.flusher is not None:
            yield self.flusher.task
        yield from (contender.task for contender in self.contenders)
        yield from (teardown.task for teardown in self.teardowns)

    def _grace_period(self, number: int, start_ns: int, end_ns: int, scans: int) -> None:
        self.recorder.grace_period(number, start_ns, end_ns, scans)
        for kvm in self.kvms:
            kvm.oracle.grace_period(start_ns, end_ns)

    def _guest(self, name: str, guest: Guest) -> Kvm:
        scenario = self.scenario
        theirs = workers(scenario, name)
        made = Kvm(
            name,
            guest,
            self.env,
            self.machine,
            self.kernel,
            self.rcu,
            self.remote_flush,
            self.memory,
            self.dram,
            break_lock=scenario.host.preemptible or self.kernel["lock_break"] == "build",
            block_bytes=block_bytes(guest, theirs),
            logged=logs_writes(theirs),
            pgdat=self.pgdat,
        )
        made.sched = self.sched
        return made

    def _pgdat(self) -> Pgdat | None:
        """The host's memory, if it can run out."""
        host = self.scenario.host
        if host.memory is None:
            return None
        page_bytes = next(iter(self.guests.values())).page_size
        total = host.memory.size // page_bytes
        marks = Watermarks.of(total, page_bytes, host.memory.min_free, host.memory.watermark_scale)
        swap = None
        if host.swap is not None:
            stream = self.stream("swap")
            swap = SwapDevice.of(self.env, host.swap, self.machine, stream, self.dram, page_bytes)
        drive = None
        if any(guest.backing == "file" for guest in self.guests.values()):
            spec = host.swap if host.swap is not None and host.swap.kind != "zram" else Nvme()
            stream = self.stream("file")
            drive = SwapDevice.of(self.env, spec, self.machine, stream, self.dram, page_bytes)
        return Pgdat(
            HostPages(self.env, total, page_bytes, marks),
            swap,
            self.sched,
            lru_gen=host.memory.lru_gen,
            swappiness=host.memory.swappiness,
            min_ttl_ns=host.memory.min_ttl,
            drive=drive,
            jiffy_ns=NS_PER_S // host.hz,
        )

    def _vcpus(self, kvm: Kvm, guest: Guest) -> None:
        name = kvm.name
        layout = self.stream(f"{name}/layout")
        if workloads.is_workload(guest.access):
            streams = [self.stream(f"{name}/vcpu{index}") for index in range(guest.vcpus)]
            workloads.join(kvm, guest, self._free_cpus, streams, layout, self.machine)
            return
        if guest.engine == "lazy":
            cpus = islice(self._free_cpus, guest.vcpus)
            engine = Lazy(kvm, guest.access, cpus, layout, self.stream(f"{name}/accesses"))
            kvm.accesses = engine
            kvm.vcpus += engine.vcpus
            return
        for index in range(guest.vcpus):
            chunks = patterns.build(
                guest.access,
                vcpu=index,
                vcpus=guest.vcpus,
                pages=kvm.pages,
                page_bytes=guest.page_size,
                rng=self.stream(f"{name}/vcpu{index}"),
                layout_rng=layout,
                base_dir=Path(),
                instruction_ns=1 / self.machine.ghz,
            )
            kvm.vcpus.append(vcpu_class(kvm)(kvm, index, next(self._free_cpus), chunks))

    def _charge(self, guests: dict[str, Guest]) -> None:
        """Put guests of one memcg on one lruvec."""
        if self.pgdat is not None:
            self._charge_listed(guests, self.pgdat)
            return
        lruvecs: dict[str, Lruvec] = {}
        for kvm in self.kvms:
            memcg = guests[kvm.name].memcg
            if memcg is not None:
                lruvecs.setdefault(memcg, kvm.host.lru.lruvec).add(kvm.host.lru)

    def _charge_listed(self, guests: dict[str, Guest], pgdat: Pgdat) -> None:
        """As :meth:`_charge`, where lruvecs have lists."""
        memcgs: dict[str, list[Kvm]] = {}  # the order of the first guest of each
        for kvm in self.kvms:
            memcgs.setdefault(guests[kvm.name].memcg or f"/{kvm.name}", []).append(kvm)
        two_step = self.kernel["promotion"] == "two_step"
        lruvecs: list[FolioLists] = []
        root = RootLruvec(pgdat.pages.page_bytes)
        for kvms in memcgs.values():
            shapes = [(kvm.leaves, FILE if pgdat.memory_of(kvm).file else ANON) for kvm in kvms]
            line, now = kvms[0].costs.line, lambda: int(self.env.now)
            if pgdat.lru_gen & LRU_GEN_CORE:
                lruvecs.append(ListedLruvec(shapes, two_step, line, now, pgdat.vmstat))
            else:
                lruvecs.append(ClassicLruvec(shapes, line, root, pgdat.vmstat))
            for kvm, lru in zip(kvms, lruvecs[-1].listed_guests, strict=True):
                kvm.host.lru = lru
                lru.pages = pgdat.memory_of(kvm)
            pgdat.kvms.append(kvms)
        pgdat.paths += [f"/{name.removeprefix('/')}" for name in memcgs]
        pgdat.charge(lruvecs, self.stream("memcg_lru"))

    def _contender(self, name: str, spec: Any, kvms: list[Kvm]) -> list[Contender]:
        """A thread: one contender, or one for each guest that it serves in turn."""
        task = Task(name, next(self._free_cpus))
        if len(kvms) == 1:
            return [contenders.build(kvms[0], task, self.stream(name), spec)]
        streams = [self.stream(f"{name}/{kvm.name}") for kvm in kvms]
        return contenders.build_in_turn(kvms, task, streams, spec)

    def _ends(self, kvm: Kvm, spec: TeardownSpec) -> Iterator[Teardown]:
        """The processes that end a VM: its owner, on the CPU of its first vCPU, or two of them."""
        end = teardown_of(self.kernel)
        task = Task(f"{kvm.name}/teardown", kvm.vcpus[0].cpu)
        if spec.order != "both":
            yield end(kvm, task, spec.order, spec.at)
            return
        other = Task(f"{kvm.name}/close", next(self._free_cpus))
        yield end(kvm, task, "process_exit", spec.at, last=False)
        yield end(kvm, other, "close_vm", spec.close_at or spec.at)

    def _process_exit(self, kvm: Kvm, t_ns: int) -> Generator[Event, Any, Any]:
        """The owner of a VM ends at ``t_ns``, unasked."""
        if self.selftest is not None:
            self.selftest.kill(t_ns)
        task = Task(f"{kvm.name}/exit", kvm.vcpus[0].cpu, on_cpu=False)
        return teardown_of(self.kernel)(kvm, task, "process_exit", t_ns).run()

    # -- running ------------------------------------------------------------------------------

    def run(self) -> Record:
        """Run to the end; returns the record."""
        env, duration = self.env, self.scenario.duration
        for kvm in self.kvms:
            for vcpu in kvm.vcpus:
                vcpu.process = self._until_done(vcpu.run())
        for teardown in self.teardowns:
            self._until_done(teardown.run())
        if self.selftest is not None:
            self._running += 1
            self._until_done(self.selftest.run())
        if self.ageing is not None:
            self._running += 1
            self._until_done(self.ageing.run(self._vcpus_run))
        if self.kswapd is not None:
            env.process(self.kswapd.run())
        if self.lru_gen is not None:
            env.process(self.lru_gen.run())
        if self.flusher is not None:
            env.process(self.flusher.run())
        for contender in self.contenders:
            env.process(contender.thread())
        env.process(self._samples())
        env.run(self._over if duration is None else duration)
        end_ns = duration if duration is not None else self._end_ns()
        for kvm in self.kvms:
            if kvm.tree_freed:
                kvm.oracle.finished(end_ns, kvm.waiting)
        return self.recorder.finish(self, end_ns)

    def _vcpus_run(self) -> bool:
        """Whether some vCPU still has something to do: if not, ageing ends with its pass."""
        return any(vcpu.finished_ns < 0 for kvm in self.kvms for vcpu in kvm.vcpus)

    def _until_done(self, steps: Generator[Event, Any, Any]) -> Process:
        """Start a process that the run has to wait for."""
        process = self.env.process(steps)
        assert process.callbacks is not None
        process.callbacks.append(self._one_done)
        return process

    def _one_done(self, _: Event) -> None:
        self._running -= 1
        if not self._running:
            self._over.succeed()

    def _end_ns(self) -> int:
        ends = [vcpu.finished_ns for kvm in self.kvms for vcpu in kvm.vcpus]
        passes = self.ageing.passes if self.ageing is not None else []
        return max([int(self.env.now), *ends, *(p.end_ns for p in passes[-1:])])

    def _samples(self) -> Generator[Event, Any, None]:
        """Samples at growing distances: their number does not depend on how long the run is."""
        step = FIRST_SAMPLE_NS
        if self.scenario.duration is not None:
            step = max(1, self.scenario.duration // SAMPLES)
        taken = 0
        while True:
            yield self.env.timeout(step)
            self.recorder.sample(self, int(self.env.now))
            self.recorder.absorb(self)
            taken += 1
            if taken == SAMPLES and self.scenario.duration is None:
                taken, step = SAMPLES // 2, 2 * step


def shuffled(rng: np.random.Generator) -> Iterator[int]:
    """Event numbers in an order that is drawn: who comes first among simultaneous events."""
    for number in count():
        yield (int(rng.integers(1 << 40)) << 40) + number
