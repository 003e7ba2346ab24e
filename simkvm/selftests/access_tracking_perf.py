"""``access_tracking_perf_test``: touches before and after the pages were aged.

Source: tools/testing/selftests/kvm/access_tracking_perf_test.c, v6.12; ageing through MGLRU as the
test does it since v6.15; ``age_while_populating`` is ``-p`` of message
20240529180510.2295118-1-jthoughton@google.com. vCPU threads and the main thread spin on flags.
"""

from __future__ import annotations

from collections.abc import Generator
from typing import TYPE_CHECKING, Any, ClassVar

from simpy import Event

from simkvm.guest.pause import Pause
from simkvm.guest.vcpu import Vcpu
from simkvm.kernel.aging import AgeingWalk
from simkvm.kernel.cpu import NEVER
from simkvm.kernel.kvm import Kvm
from simkvm.kernel.mglru import MAX_NR_GENS
from simkvm.scenario import selftests as scenario
from simkvm.selftests.main_thread import Thread, seconds
from simkvm.selftests.memstress import MemstressTest
from simkvm.selftests.page_idle import Marked, Marker
from simkvm.selftests.rendezvous import Wait

if TYPE_CHECKING:
    from simkvm.kernel.world import World

Steps = Generator[Event, Any, None]
ACCESS_MEMORY, MARK_IDLE = "access memory", "mark idle"


class TooManyIdle(Exception):  # noqa: N818 (what the test found)
    """The test fails: a tenth of the pages, or more, look idle although they were touched."""


class MarkIdle(Pause):
    """A vCPU thread marks its part of the memory idle; the first one all of it if they overlap."""

    def __init__(self, test: AccessTrackingPerf) -> None:
        self._test = test

    def spend(self, vcpu: Vcpu, t_ns: int) -> Generator[Event, Any, int]:
        """Page by page, in its own context."""
        test = self._test
        if test.spec.overlap and vcpu.index:
            return t_ns
        marker = Marker(test.kvm, vcpu.task, test.ioctl_ns)
        marked = yield from marker.mark(t_ns, test.host_pages(vcpu.index))
        vcpu.cpu.enter_user(marked.end_ns, NEVER)
        test.marked[vcpu.index] = marked
        return marked.end_ns


class AccessTrackingPerf(MemstressTest):
    """The test."""

    name: ClassVar[str] = "access_tracking_perf_test"
    spec: scenario.AccessTrackingPerf

    def __init__(self, world: World, spec: scenario.AccessTrackingPerf) -> None:
        super().__init__(world, spec)
        self.marked: dict[int, Marked] = {}
        self._work = ACCESS_MEMORY
        self._stop = False
        self._threads = self.flags(self.kvm)
        self._walk = AgeingWalk(self.kvm, self.task)
        self._read_ns = round(world.machine["lru_gen_read_ns"])
        self._generation = -1  #: in which the pages were found last

    def vcpu_thread(self, kvm: Kvm, index: int) -> Thread:
        """Wait for an iteration, do its work, say so."""
        wait, mark = Wait(self._threads), MarkIdle(self)
        yield wait
        while not self._stop:
            if self._work == MARK_IDLE:
                yield mark
            else:
                yield self.run_vcpu
                yield from self.guest_code(index)
                yield self.ucall
            yield wait

    def main(self) -> Steps:
        """Phase after phase."""
        if self.spec.lru_gen and not self.spec.age_while_populating:
            self.message("Using lru_gen for aging")
        self.describe_vm()
        self.create_threads(self.spec.vcpus)
        self.t_ns = yield from self._threads.all_arrived(self.t_ns)
        try:
            yield from self._benchmark() if self.spec.age_while_populating else self._phases()
        except TooManyIdle as failure:
            self.message(str(failure))
        self._stop = True
        self._threads.release(self.t_ns)
        yield from self.join(self.kvm)

    def _phases(self) -> Steps:
        self.message("")
        yield from self._access(True, "Populating memory")
        if self.spec.lru_gen:
            self.message("Initial aging pass (lru_gen)")
            yield from self._age()
            yield from self._access(True, "Re-populating memory")
            self._generation = self._find_generation()
        yield from self._access(True, "Writing to populated memory")
        yield from self._access(False, "Reading from populated memory")
        yield from self._mark_memory_idle()
        yield from self._access(True, "Writing to idle memory")
        yield from self._mark_memory_idle()
        yield from self._access(False, "Reading from idle memory")

    # -- iterations ---------------------------------------------------------------------------

    def _access(self, write: bool, description: str) -> Steps:
        self.write_percent = 100 if write else 0
        yield from self._iteration(ACCESS_MEMORY, description)

    def _iteration(self, work: str, description: str) -> Steps:
        """``run_iteration``: from the flag that starts it to the last vCPU that is done."""
        self._work = work
        begin = self.t_ns
        self._threads.release(begin)
        self.t_ns = yield from self._threads.all_arrived(begin)
        self.phase(description, begin, f"{description:<30}: {seconds(self.t_ns - begin)}")

    def _mark_memory_idle(self) -> Steps:
        if self.spec.lru_gen:
            yield from self._lru_gen_mark_memory_idle()
            return
        self.marked.clear()
        yield from self._iteration(MARK_IDLE, "Mark memory idle")
        for index, marked in sorted(self.marked.items()):
            if marked.still_idle >= marked.pages // 10:
                prefix = "" if self.spec.overlap else f"vCPU{index}: "
                self._too_many_idle(prefix, marked.still_idle, marked.pages)

    def _too_many_idle(self, prefix: str, idle: int, pages: int) -> None:
        said = f"{prefix}Too many pages still idle ({idle} out of {pages})"
        if self.spec.idle_pages == "fail":
            raise TooManyIdle(f"  {said}")
        self.message(f"WARNING: {said}, this will affect performance results.")

    # -- MGLRU --------------------------------------------------------------------------------

    def _age(self) -> Steps:
        """``lru_gen_do_aging``: debugfs says what the youngest generation is, then the command."""
        self.task.cpu.enter_kernel(self.t_ns)
        done = yield from self._walk.run(self.t_ns + self._read_ns)
        self.passes.append(done)
        self.t_ns = done.end_ns + self.task.cpu.take_stolen() + self.kvm.costs.switch_ns
        self.task.cpu.enter_user(self.t_ns, NEVER)
        self.in_user_space()

    def _lru_gen_mark_memory_idle(self) -> Steps:
        begin = self.t_ns
        yield from self._age()
        line = f"{'Mark memory idle (lru_gen)':<30}: {seconds(self.t_ns - begin)}"
        end = self.t_ns
        found = self._find_generation()
        if found <= self._generation:
            sizes = self.kvm.host.lru.sizes
            old = sizes[self._generation % MAX_NR_GENS]
            self._too_many_idle("", min(old, self._leaves), self._leaves)
        self.phase("Mark memory idle (lru_gen)", begin, line, end_ns=end)
        self._generation = found

    @property
    def _leaves(self) -> int:
        return self.kvm.host.lru.total

    def _find_generation(self) -> int:
        """``find_generation``: the one that holds nine tenths of the pages."""
        lru, pages = self.kvm.host.lru, self._leaves
        found = self._holding(pages * 9 // 10)
        if found >= 0:
            return found
        if self.spec.idle_pages == "fail":
            raise TooManyIdle(
                f"  Could not find a generation with 90% of guest memory ({pages * 9 // 10} pages)."
            )
        self.message(
            "WARNING: Couldn't find a generation with 90% of guest memory. "
            "Performance results may not be accurate."
        )
        found = self._holding(pages // 2)
        return found if found >= 0 else lru.max_seq

    def _holding(self, pages: int) -> int:
        lru = self.kvm.host.lru
        for sequence in range(lru.min_seq, lru.max_seq + 1):
            if lru.sizes[sequence % MAX_NR_GENS] >= pages:
                return sequence
        return -1

    def _benchmark(self) -> Steps:
        """``run_benchmark``: age over and over until every vCPU has populated its memory."""
        self.message("Running lru_gen benchmark...")
        begin = self.t_ns
        self.message("Populating memory (async)     ")
        self._threads.release(begin)
        while not self._threads.complete:
            yield from self._age()
        wall = max(self._threads.last_ns.values()) - begin
        self.phase(
            "vcpu wall time",
            begin,
            f"{'vcpu wall time':<30}: {seconds(wall)}",
            end_ns=begin + wall,
        )
        total, passes = self.t_ns - begin, len(self.passes)
        self.phase(
            "lru_gen avg pass duration",
            begin,
            f"{'lru_gen avg pass duration':<30}: {seconds(total // passes)}, "
            f"(passes:{passes}, total:{seconds(total)})",
        )
