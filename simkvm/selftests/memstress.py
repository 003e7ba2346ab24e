"""Guest code and memory layout of the tests around ``lib/memstress.c`` (v6.12).

The guest touches the first bytes of every page of its region, in order or at random, and writes
with a given probability. Both draws come from the test's own generator, a linear congruential one
that is seeded with the vCPU's number, so they are the same here as there.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from simkvm.guest.patterns import CHUNK_TOUCHES, Chunk
from simkvm.kernel.kvm import Kvm
from simkvm.scenario.selftests import Memstress
from simkvm.selftests.main_thread import MainThread

if TYPE_CHECKING:
    from simkvm.kernel.world import World

MULTIPLIER, MODULUS = 48271, (1 << 31) - 1  #: Park and Miller's, as ``guest_random_u32`` has them

Int64s = NDArray[np.int64]


class GuestRandom:
    """The generator of one vCPU: ``x * 48271 mod 2**31 - 1``."""

    def __init__(self, seed: int) -> None:
        self._state = seed
        self._powers = _powers()

    def draw(self, count: int) -> Int64s:
        """The next ``count`` numbers, at most twice a chunk's touches."""
        numbers: Int64s = self._state * self._powers[:count] % MODULUS
        self._state = int(numbers[-1])
        return numbers


@cache
def _powers() -> Int64s:
    """Powers of the multiplier, from the first on: they jump ahead in the sequence."""
    powers, power = np.empty(2 * CHUNK_TOUCHES, np.int64), 1
    for place in range(len(powers)):
        power = power * MULTIPLIER % MODULUS
        powers[place] = power
    return powers


class MemstressTest(MainThread):
    """A test whose guests run ``memstress_guest_code``.

    ``write_percent`` and ``random_access`` are what the main thread sets in the guest's memory.
    """

    def __init__(self, world: World, spec: Memstress, seed: int = 1) -> None:
        self.spec: Memstress = spec
        self.write_percent = 100
        self.random_access = False
        mode = spec.guest_mode
        self._guest_page = mode.page_size
        self.pages = (spec.memory if spec.overlap else spec.vcpu_memory) // mode.page_size
        self._random = [GuestRandom(seed + index) for index in range(spec.vcpus)]
        super().__init__(world)

    def region(self, index: int) -> tuple[int, int]:
        """First byte and bytes of what vCPU ``index`` touches."""
        size = self.pages * self._guest_page
        return (0 if self.spec.overlap else index * self.spec.vcpu_memory), size

    def host_pages(self, index: int) -> list[int]:
        """The host's page behind each guest page that vCPU ``index`` touches."""
        first, size = self.region(index)
        addresses = range(first, first + size, self._guest_page)
        return [address // self.spec.page_size for address in addresses]

    def guest_code(self, index: int) -> Iterator[Chunk]:
        """One iteration of vCPU ``index``: its whole region, then a ucall that is not in here."""
        first, _ = self.region(index)
        host_page, random = self.spec.page_size, self._random[index]
        for start in range(0, self.pages, CHUNK_TOUCHES):
            count = min(CHUNK_TOUCHES, self.pages - start)
            pages = np.arange(start, start + count, dtype=np.int64)
            # The coin is tossed for each page whatever the percentage, after the page if that is
            # drawn too.
            if self.random_access:
                drawn = random.draw(2 * count)
                pages, coins = drawn[::2] % self.pages, drawn[1::2]
            else:
                coins = random.draw(count)
            writes = coins % 100 < self.write_percent
            yield Chunk((first + pages * self._guest_page) // host_page, writes, 0)

    def describe_vm(self) -> None:
        """What ``memstress_create_vm`` prints."""
        self.message(f"Testing guest mode: {self.spec.guest_mode}")
        base = self.kvm.stage2.first_leaf * self.kvm.stage2.leaf_bytes
        end = base + self.spec.memory
        self.message(f"guest physical test memory: [{base:#x}, {end:#x})")


def leaf_range(kvm: Kvm, first_byte: int, size: int) -> tuple[int, int]:
    """Leaves that cover ``size`` bytes of guest memory at ``first_byte``."""
    leaf = kvm.stage2.leaf_bytes
    return first_byte // leaf, -(-(first_byte + size) // leaf)
