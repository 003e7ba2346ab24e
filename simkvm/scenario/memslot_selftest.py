"""``memslot_perf_test`` as a workload: its options and what they make of memory and memslots.

Source: tools/testing/selftests/kvm/memslot_perf_test.c, v6.12.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import ClassVar, Literal

from pydantic import Field

from simkvm.scenario.fields import Size, Span
from simkvm.scenario.selftest import GRANULES, Selftest, Vm
from simkvm.units import KIB, MIB, exact_size

SUBTESTS: tuple[str, ...] = (
    "map",
    "unmap",
    "unmap chunked",
    "move active area",
    "move inactive area",
    "RW",
)
EXTRA = 64 * KIB  #: ``MEM_EXTRA_SIZE``: where guest and host synchronise
WHOLE = 512 * MIB  #: ``MEM_TEST_SIZE``
MOVE_SIZE = 3 * 64 * KIB  #: ``MEM_TEST_MOVE_SIZE``
SUBTEST_MEMORY: Mapping[str, int] = {
    "map": 32 * MIB,
    "unmap": 128 * MIB,
    "unmap chunked": 128 * MIB,
}
MOST_MEMSLOTS = 32767  #: ``KVM_CAP_NR_MEMSLOTS`` on arm64 and x86


class MemslotPerf(Selftest):
    """Work on guest memory in many memslots: mapping, unmapping, moving, reading and writing."""

    vcpus_key: ClassVar[str] = "slots"
    memory_key: ClassVar[str] = "memory"

    test: Literal["memslot_perf_test"] = "memslot_perf_test"
    slots: int | None = Field(
        default=None,
        ge=2,
        description="Cap on the number of memslots, the reserved one included (-s); null is the "
        "test's -1, as many as KVM has.",
    )
    first: int = Field(
        default=0,
        ge=0,
        lt=len(SUBTESTS),
        description="First sub-test (-f): 0 map, 1 unmap, 2 unmap chunked, 3 move active area, "
        "4 move inactive area, 5 RW.",
    )
    last: int = Field(
        default=len(SUBTESTS) - 1, ge=0, lt=len(SUBTESTS), description="Last sub-test (-e)."
    )
    length: Span = Field(
        default=5_000_000_000, description="How long each run lasts (-l, there in whole seconds)."
    )
    runs: int = Field(default=1, ge=1, le=100, description="Runs of each sub-test (-r).")
    verify: bool = Field(
        default=False, description="Look whether the guest's writes have arrived (-d)."
    )
    verbose: bool = Field(default=False, description="Print more (-v).")
    disable_slot_zap_quirk: bool = Field(
        default=False,
        description="Zap only the leaves of the memslot that moves (-q, x86): without effect, as "
        "the model never zaps more, and arm64 does not either.",
    )
    memory: Size = Field(
        default=WHOLE,
        description="Memory of the sub-tests that use it all (MEM_TEST_SIZE, which the test does "
        "not let one choose); smaller to simulate faster. The other sub-tests' shrinks alike.",
    )

    @property
    def memslots(self) -> int:
        """Memslots that the test makes: slot 0 is reserved."""
        return min(self.slots or MOST_MEMSLOTS, MOST_MEMSLOTS) - 1

    def memory_of(self, subtest: str) -> int:
        """Test memory of a sub-test, without the extra pages."""
        return SUBTEST_MEMORY.get(subtest, WHOLE) * self.memory // WHOLE

    def pages_of(self, subtest: str) -> int:
        """Guest pages of a sub-test, the extra ones included."""
        return (self.memory_of(subtest) + EXTRA) // self.guest_mode.page_size

    def refused(self, subtest: str) -> str | None:
        """What the test prints about a sub-test that this many memslots make impossible."""
        guest_page, pages = self.guest_mode.page_size, self.pages_of(subtest)
        if not self._divides(pages, self.memslots):
            fitting = (n for n in range(self.memslots - 1, 1, -1) if self._divides(pages, n))
            most = next(fitting, -1) + 1
            if most:
                return f"Memslot count too high for this test, decrease the cap (max is {most})"
        elif subtest != "move active area" or self._moved(pages) * guest_page >= MOVE_SIZE // 2:
            return None
        return "Memslot count may be too high for this test, try adjusting the cap"

    def _divides(self, pages: int, memslots: int) -> bool:
        """``check_slot_pages``: every memslot has pages, and whole ones of the host."""
        parts = [part * self.guest_mode.page_size for part in divmod(pages, memslots)]
        return parts[0] > 0 and not any(part % self.page_size for part in parts)

    def _moved(self, pages: int) -> int:
        """Pages of the last memslot."""
        return pages // self.memslots + pages % self.memslots

    def chosen(self) -> list[tuple[str, int, str]]:
        """(sub-test, run, name of its virtual machine) in order, of those that are possible."""
        return [
            (subtest, run, "-".join([*subtest.split(), *([str(run + 1)] if run else [])]))
            for subtest in SUBTESTS[self.first : self.last + 1]
            if self.refused(subtest) is None
            for run in range(self.runs)
        ]

    def vms(self, cpus: int) -> Mapping[str, Vm]:
        """One a run, each with one vCPU, one after the other."""
        return {
            name: Vm(
                vcpus=1,
                memory=self.memory_of(subtest) + EXTRA,
                page_size=self.page_size,
                ipa_bits=self.guest_mode.pa_bits,
                base=256 * MIB,
                mapping=self.page_size,
                folio=self.page_size,
                memslots=self.memslots,
            )
            for subtest, _, name in self.chosen()
        }

    def complaints(self, arch: str, cpus: int) -> Iterator[tuple[str, str]]:
        """What ``check_memory_sizes`` and ``parse_args`` refuse, and a test without a sub-test."""
        yield from super().complaints(arch, cpus)
        if self.page_size not in GRANULES:
            return
        if self.first > self.last:
            yield "last", f"{self.last} is before first, {self.first}"
        elif self.memory % (16 * MIB) or self.memory > WHOLE:
            yield "memory", f"{exact_size(self.memory)} is not a multiple of 16 MiB up to 512 MiB"
        elif not self.chosen():
            yield "slots", f"no sub-test is possible: {self.refused(SUBTESTS[self.first])}"
        elif self.first <= 4 and self.last >= 3 and self._start_of_last() < MOVE_SIZE:
            yield "slots", "leaves no memory in front of the memslot that moves"

    def _start_of_last(self) -> int:
        pages = self.pages_of("move active area")
        return (self.memslots - 1) * (pages // self.memslots) * self.guest_mode.page_size
