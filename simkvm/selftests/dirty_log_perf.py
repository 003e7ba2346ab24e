"""``dirty_log_perf_test``: populate, switch dirty logging on, dirty and read it round by round.

Source: tools/testing/selftests/kvm/dirty_log_perf_test.c, v6.12. vCPU threads and the main thread
spin on flags; a round begins when the main thread raises the iteration.
"""

from __future__ import annotations

from collections.abc import Generator
from typing import TYPE_CHECKING, Any, ClassVar

from simpy import Event

from simkvm.kernel.kvm import Kvm
from simkvm.kernel.task import reach
from simkvm.scenario import selftests as scenario
from simkvm.selftests.dirty_logging import DirtyLogging
from simkvm.selftests.main_thread import Thread, seconds
from simkvm.selftests.memstress import MemstressTest
from simkvm.selftests.rendezvous import Wait

if TYPE_CHECKING:
    from simkvm.kernel.world import World

Steps = Generator[Event, Any, None]


class DirtyLogPerf(MemstressTest):
    """The test."""

    name: ClassVar[str] = "dirty_log_perf_test"
    spec: scenario.DirtyLogPerf

    def __init__(self, world: World, spec: scenario.DirtyLogPerf) -> None:
        super().__init__(world, spec, spec.random_seed)
        self._threads = self.flags(self.kvm)
        self._logging = DirtyLogging(self, self.kvm, spec.manual_protect)
        self._free_running = False
        self._quit = False

    def vcpu_thread(self, kvm: Kvm, index: int) -> Thread:
        """Run the guest once an iteration; all the time while logging is switched off (``-e``)."""
        wait = Wait(self._threads)
        yield wait
        while not self._quit:
            yield self.run_vcpu
            yield from self.guest_code(index)
            yield self.ucall
            if not self._free_running:
                yield wait

    def main(self) -> Steps:
        """The phases of ``run_test``."""
        spec, log = self.spec, self._logging
        self.message(f"Test iterations: {spec.iterations}")
        self.describe_vm()
        begin = self.t_ns
        self.create_threads(spec.vcpus)
        self.t_ns = yield from self._threads.all_arrived(self.t_ns)
        yield from self._let_vcpus_run()
        self._took("Populate memory", "Populate memory time: ", begin)
        begin = self.t_ns
        yield from log.enable()
        self._took("Enabling dirty logging", "Enabling dirty logging time: ", begin, end="\n")
        self.write_percent = spec.write_percent
        self.random_access = spec.random
        got, cleared = 0, 0
        for iteration in range(1, spec.iterations + 1):
            begin = self.t_ns
            yield from self._let_vcpus_run()
            self._took(
                "dirty memory", f"Iteration {iteration} dirty memory time: ", begin, iteration
            )
            begin = self.t_ns
            yield from log.get()
            got += self._took(
                "get dirty log", f"Iteration {iteration} get dirty log time: ", begin, iteration
            )
            if spec.manual_protect:
                begin = self.t_ns
                yield from log.clear()
                cleared += self._took(
                    "clear dirty log",
                    f"Iteration {iteration} clear dirty log time: ",
                    begin,
                    iteration,
                )
        yield from self._disable()
        self._total("Get", got)
        if spec.manual_protect:
            self._total("Clear", cleared)

    def _let_vcpus_run(self) -> Steps:
        """Raise the iteration and wait until every vCPU has completed it."""
        self._threads.release(self.t_ns)
        self.t_ns = yield from self._threads.all_arrived(self.t_ns)

    def _disable(self) -> Steps:
        """Switch logging off, with or without vCPUs running, and see the threads end."""
        begin = self.t_ns
        if self.spec.run_while_disabling:
            self._free_running = True
            self._threads.release(begin)
        yield from self._logging.disable()
        self._took("Disabling dirty logging", "Disabling dirty logging time: ", begin)
        self.t_ns = yield from reach(self.env, self.t_ns)
        self._quit = True
        self._threads.release(self.t_ns)
        yield from self.join(self.kvm)

    def _took(self, name: str, text: str, begin: int, iteration: int = 0, end: str = "") -> int:
        took = self.t_ns - begin
        self.phase(name, begin, f"{text}{seconds(took)}{end}", iteration)
        return took

    def _total(self, what: str, total: int) -> None:
        rounds = self.spec.iterations
        self.message(
            f"{what} dirty log over {rounds} iterations took {seconds(total)}. "
            f"(Avg {seconds(total // rounds)}/iteration)"
        )
