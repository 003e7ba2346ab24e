"""The host's memory, if it can run out, and what a scenario under memory pressure may hold."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from math import ceil
from typing import TYPE_CHECKING, Annotated, Final

from pydantic import BeforeValidator, Field

from simkvm.scenario.errors import Keys, Problem
from simkvm.scenario.fields import Duration, Model, Size, as_tuple
from simkvm.scenario.swap import Swap, Zram
from simkvm.units import exact_size

if TYPE_CHECKING:
    from simkvm.scenario.schema import Guest, Scenario

ZAPPING: Final = ("madvise_dontneed", "free_page_reporting", "balloon")
"""Contenders that only take memory back."""
SELFTESTS: Final = ("max_guest_memory_test", "access_tracking_perf_test")
CACHE_PAGES: Final = 40  #: of each vCPU for stage-2 tables (KVM_ARCH_NR_OBJS_PER_MEMORY_CACHE)


class LruGenWrite(Model):
    """A write to /sys/kernel/debug/lru_gen."""

    at: Duration = Field(description="Simulated time of the write.")
    write: str = Field(
        min_length=1,
        description="What is written: '+ memcg node max_seq [can_swap [force]]' ages, "
        "'- memcg node min_seq [swappiness [pages]]' evicts; memcgs count from 1, node is 0.",
    )


class Memory(Model):
    """The host's memory, if it can run out: then it reclaims, and swaps."""

    size: Size = Field(
        description="What guests, page tables and caches of the kernel share; the kernel itself "
        "and all that is not modelled lies outside."
    )
    min_free: Size | None = Field(
        default=None,
        description="Reserve below which an allocation reclaims by itself (vm.min_free_kbytes); "
        "null: what the kernel computes of the size, the root of 16 times the KiB.",
    )
    watermark_scale: int = Field(
        default=10,
        ge=1,
        le=3000,
        description="Distance between the watermarks, in ten-thousandths of the size "
        "(vm.watermark_scale_factor); a quarter of min_free at least.",
    )

    swappiness: int = Field(
        default=60,
        ge=0,
        le=200,
        description="How readily anonymous pages are evicted beside those of files "
        "(vm.swappiness); 0: not at all.",
    )
    lru_gen: int = Field(
        default=0xF,
        ge=0,
        le=0xF,
        description="Capabilities of the multi-gen LRU (/sys/kernel/mm/lru_gen/enabled), as far as "
        "the kernel has them: 0x1 the LRU itself, 0x2 walks of page tables, 0x4 accessed flags of "
        "upper entries, which address spaces of guests do without, 0x8 the batched calls of the "
        "2023 series in walks.",
    )
    min_ttl: Duration = Field(
        default=0,
        description="Age below which nothing is evicted: if all generations are younger, somebody "
        "is killed (/sys/kernel/mm/lru_gen/min_ttl_ms); 0: no matter.",
    )
    commands: Annotated[tuple[LruGenWrite, ...], BeforeValidator(as_tuple)] = Field(
        default=(), description="Writes to /sys/kernel/debug/lru_gen, in order of time."
    )


def memory_problems(scenario: Scenario, guests: Mapping[str, Guest]) -> Iterator[Problem]:
    """What cannot be on a host whose memory may run out; ``guests`` by their own names."""
    memory = scenario.host.memory
    if memory is None:
        for name, guest in scenario.guests.items():
            if guest.backing == "file":
                message = "needs a host whose memory can run out, host.memory"
                yield Problem(("guests", name, "backing"), message)
        return
    classic = not memory.lru_gen & 1
    if classic and memory.commands:
        message = "the multi-gen LRU is off (lru_gen): there is nothing to command"
        yield Problem(("host", "memory", "commands"), message)
    if classic and memory.min_ttl:
        message = "the multi-gen LRU is off (lru_gen): there are no ages of generations"
        yield Problem(("host", "memory", "min_ttl"), message)
    if classic and scenario.ageing is not None and scenario.ageing.method == "lru_gen":
        message = "lru_gen is off (host.memory.lru_gen)"
        yield Problem(("ageing", "method"), message)
    test = scenario.selftest
    if classic and test is not None and test.test == "access_tracking_perf_test":
        message = "ages by lru_gen, which is off (host.memory.lru_gen)"
        yield Problem(("selftest", "test"), message)
    files = {name for name, guest in scenario.guests.items() if guest.backing == "file"}
    for name, contender in scenario.contenders.items():
        if files and contender.guest in (None, *files):
            message = "takes anonymous memory back, not that of a file"
            yield Problem(("contenders", name, "guest"), message)
    yield from _guests(scenario, guests)
    for name, contender in scenario.contenders.items():
        if contender.kind not in ZAPPING:
            message = f"{contender.kind} under memory pressure is not modelled"
            yield Problem(("contenders", name, "kind"), f"{message}: {', '.join(ZAPPING)} are")
    if scenario.selftest is not None and scenario.selftest.test not in SELFTESTS:
        message = f"{scenario.selftest.test} under memory pressure is not modelled"
        yield Problem(("selftest", "test"), f"{message}: {', '.join(SELFTESTS)} are")
    yield from _room(scenario, memory, guests)


def _guests(scenario: Scenario, guests: Mapping[str, Guest]) -> Iterator[Problem]:
    place: Keys = ("guests",) if scenario.selftest is None else ("selftest",)
    pages = {guest.page_size for guest in guests.values()}
    if len(pages) > 1:
        said = " and ".join(map(exact_size, sorted(pages)))
        yield Problem(("host", "memory"), f"has pages of one size, guests have pages of {said}")
    for name, guest in (scenario.guests or guests).items():
        keys = (*place, name) if scenario.selftest is None else place
        if guest.mapping != guest.page_size or guest.folio != guest.page_size:
            key = "mapping" if guest.mapping != guest.page_size else "folio"
            message = f"reclaim takes single pages, not {exact_size(getattr(guest, key))}"
            yield Problem((*keys, key) if scenario.selftest is None else keys, message)
        if guest.backing == "file" and guest.mapped and scenario.selftest is None:
            message = "a file's pages are read when they are first used"
            yield Problem((*keys, "mapped"), message)
        if guest.teardown is not None:
            message = "the end of a VM under memory pressure is not modelled"
            yield Problem((*keys, "teardown"), message)


def _room(scenario: Scenario, memory: Memory, guests: Mapping[str, Guest]) -> Iterator[Problem]:
    """Whether the machine can begin at all, and what is mapped from the start has a place."""
    from simkvm.kernel.page_alloc import Watermarks

    page = next(iter(guests.values())).page_size
    total = memory.size // page
    if memory.size % page:
        message = f"{exact_size(memory.size)} is not a multiple of the guests' page_size"
        yield Problem(("host", "memory", "size"), f"{message}, {exact_size(page)}")
        return
    marks = Watermarks.of(total, page, memory.min_free, memory.watermark_scale)
    entries = page // 8
    fixed = sum(
        guest.vcpus * CACHE_PAGES + 2 * (guest.memory_pages // entries + 2) + 16
        for guest in guests.values()
    )
    if fixed + marks.high + 64 > total:
        least = exact_size((fixed + marks.high + 64) * page)
        message = f"page tables, memory caches and the high watermark alone take {least}"
        yield Problem(("host", "memory", "size"), message)
        return
    test = scenario.selftest
    fills = test is not None and test.fills
    mapped = sum(guest.memory_pages for guest in guests.values() if guest.mapped or fills)
    over = mapped + fixed + marks.high - total
    if over > 0:
        what = "guests that are mapped from the start exceed it"
        if test is not None:
            what = f"what {test.test} writes to beforehand exceeds it"
        yield from _swapped_from_the_start(scenario.host.swap, over, mapped, page, what)


def _swapped_from_the_start(
    swap: Swap | None, over: int, mapped: int, page: int, what: str
) -> Iterator[Problem]:
    """Whether ``over`` of the ``mapped`` pages have a place in swap; compressed ones need room."""
    stored = swap.stored if isinstance(swap, Zram) else 0.0
    out = ceil(over / (1 - stored)) if stored < 1 else mapped + 1
    message = f"{what} by {exact_size(over * page)}"
    if out > mapped:
        message = f"{message}, and compressed they have no room either"
        yield Problem(("host", "memory", "size"), message)
    elif swap is None or (swap.size is not None and swap.size < out * page):
        message = f"{message}: host.swap has to hold {exact_size(out * page)}"
        yield Problem(("host", "memory", "size"), message)
