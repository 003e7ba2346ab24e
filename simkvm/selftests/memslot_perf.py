"""``memslot_perf_test``: a loop of the host against a guest, over memory in many memslots.

Source: tools/testing/selftests/kvm/memslot_perf_test.c, v6.12. Each run has a virtual machine of
its own with one vCPU. Guest and host meet at flags in the first memslot's memory, both spinning.
The sub-tests are in :mod:`simkvm.selftests.memslot_subtests`.
"""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from simpy import Event

from simkvm.kernel.kvm import Kvm
from simkvm.kernel.memslot import MemslotUpdate
from simkvm.scenario import memslot_selftest as scenario
from simkvm.selftests.main_thread import MainThread, Thread, seconds
from simkvm.selftests.memslot_subtests import SUBTESTS, Subtest
from simkvm.selftests.rendezvous import Rendezvous, Wait
from simkvm.units import NS_PER_S

if TYPE_CHECKING:
    from simkvm.kernel.world import World

Steps = Generator[Event, Any, None]


@dataclass
class Outcome:
    """Of one run: the set-up of memslots, the whole of the loop, and how often that went round."""

    slot_ns: int
    run_ns: int
    loops: int

    @property
    def each_ns(self) -> int:
        """An iteration of the loop."""
        return self.run_ns // self.loops


class MemslotPerf(MainThread):
    """The test."""

    name: ClassVar[str] = "memslot_perf_test"

    def __init__(self, world: World, spec: scenario.MemslotPerf) -> None:
        self.spec = spec
        self._created = {
            kvm.name: Rendezvous(world.env, 1, kvm.costs.line.transfer_ns) for kvm in world.kvms
        }
        super().__init__(world)
        self._kvms = {kvm.name: kvm for kvm in world.kvms}
        self._subtests: dict[str, Subtest] = {}
        for subtest, _, name in spec.chosen():
            made = SUBTESTS[subtest](self, self._kvms[name], subtest)
            self._subtests[name] = made

    def vcpu_thread(self, kvm: Kvm, index: int) -> Thread:
        """Started in its turn: a first ucall, then guest code that waits for the start flag."""
        yield Wait(self._created[kvm.name])
        subtest = self._subtests[kvm.name]
        yield self.run_vcpu
        yield self.ucall
        yield self.run_vcpu
        yield subtest.guest_waits
        yield from subtest.guest_code()
        yield self.ucall

    def main(self) -> Steps:
        """Sub-test after sub-test, run after run."""
        spec, best_slots = self.spec, None
        if spec.verbose:
            self.message(f"Allowed Number of memory slots: {spec.memslots + 1}")
        for place, subtest in enumerate(scenario.SUBTESTS[spec.first : spec.last + 1]):
            if place:
                self.message("")
            length = f"{spec.length / NS_PER_S:g}"
            self.message(
                f"Testing {subtest} performance with {spec.runs} runs, {length} seconds each"
            )
            refused = spec.refused(subtest)
            if refused is not None:
                self.message(refused)
                continue
            best: Outcome | None = None
            for name in [name for of, _, name in spec.chosen() if of == subtest]:
                outcome = yield from self._run(self._subtests[name])
                if not outcome.loops:
                    continue
                if best is None or outcome.each_ns < best.each_ns:
                    best = outcome
                whole = subtest not in scenario.SUBTEST_MEMORY
                if whole and (best_slots is None or outcome.slot_ns < best_slots):
                    best_slots = outcome.slot_ns
            if best is not None:
                self.message(
                    f"Best runtime result was {seconds(best.each_ns)} per iteration "
                    f"(with {best.loops} iterations)"
                )
        if best_slots is not None:
            self.message(f"Best slot setup time for the whole test area was {seconds(best_slots)}")

    def run(self) -> Steps:
        """Each run destroys its own virtual machine."""
        self.task.cpu.enter_user(0, 1 << 62)
        yield from self.main()
        self.task.cpu.sleep(self.t_ns)

    def _run(self, subtest: Subtest) -> Generator[Event, Any, Outcome]:
        """``test_execute`` and ``test_loop``."""
        name, number = subtest.name, subtest.kvm.name
        begin = self.t_ns
        yield from self._add_memslots(subtest)
        slot_ns = self.t_ns - begin
        self.phase(f"{name}: slot setup", begin)
        self.t_ns += subtest.clear_memory()
        if self.spec.verbose:
            self.message("Launching the test VM")
        self.create_threads(1)
        created = self._created[number]
        self.t_ns = yield from created.all_arrived(self.t_ns)
        created.release(self.t_ns)
        self.t_ns = yield from subtest.flags.all_arrived(self.t_ns)
        self.t_ns += subtest.kvm.costs.wakeup_ns  # the semaphore that the first ucall posted
        start = self.t_ns
        subtest.flags.release(start)
        loops, run_ns = 0, 0
        while run_ns < self.spec.length:
            begin = self.t_ns
            yield from subtest.loop()
            loops += 1
            self.phase(f"{name}: iteration", begin, iteration=loops)
            run_ns = self.t_ns - start
        yield from subtest.make_guest_exit()
        yield from self.join(subtest.kvm)
        outcome = Outcome(slot_ns, run_ns, loops)
        self.phase(
            f"{name}: all iterations",
            start,
            f"Test took {seconds(slot_ns)} for slot setup + {seconds(run_ns)} all iterations",
            end_ns=start + run_ns,
        )
        self.message(f"Done {loops} iterations, avg {seconds(outcome.each_ns)} each")
        yield from self.destroy(subtest.kvm)
        return outcome

    def _add_memslots(self, subtest: Subtest) -> Steps:
        """One call of KVM_SET_USER_MEMORY_REGION for each memslot."""
        if self.spec.verbose:
            each, rest = subtest.pages_per_slot, subtest.extra_pages
            self.message(
                f"Adding slots 1..{self.spec.memslots}, each slot with {each} pages + "
                f"{rest} extra pages last"
            )
        for number in range(self.spec.memslots):
            memslot = MemslotUpdate(subtest.kvm, self.task, number)
            yield from self.ioctl(memslot.create(self.t_ns + self.ioctl_ns))
