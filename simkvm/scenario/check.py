"""Whether a scenario is possible: what no single key can tell.

A rule is a function that yields problems; `problems` runs them all. Rules compare numbers only,
nothing is read from files here.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from simkvm.kernel.bugs import BUGS
from simkvm.kernel.geometry import GEOMETRIES
from simkvm.scenario.access import Access, HotCold, Phases, Populate, Trace, Uniform, Zipf
from simkvm.scenario.contenders import (
    Compaction,
    Contender,
    DirtyLog,
    Khugepaged,
    Memslot,
    ThpSplit,
)
from simkvm.scenario.errors import Keys, Problem, nearest
from simkvm.scenario.groups import every_guest, meant, member_names, virtual_machines
from simkvm.scenario.kernel import KernelVariant
from simkvm.scenario.machine import Machine
from simkvm.scenario.memory import memory_problems
from simkvm.scenario.possible import kernel_problems
from simkvm.scenario.schema import BLOCK_BYTES, Guest, Scenario
from simkvm.scenario.selftest import Selftest
from simkvm.scenario.swap import swap_problems
from simkvm.scenario.workload_check import async_pf_problems, workload_problems
from simkvm.scenario.workloads import ENDLESS, Workload
from simkvm.units import KIB, exact_duration, exact_size


def problems(
    scenario: Scenario, machine: Machine, kernel: KernelVariant, traces: Mapping[str, Any]
) -> Iterator[Problem]:
    """Everything that makes `scenario` impossible on this machine and kernel.

    `traces` holds the header of every trace that the scenario replays, by its `file`.
    """
    yield from _host(scenario, machine, kernel)
    yield from _somebody(scenario)
    for name, guest in scenario.guests.items():
        keys = ("guests", name)
        yield from _sizes(guest, keys, machine)
        yield from _memslots(guest, keys)
        if guest.rmap_chain > 1 and kernel["mmu"] != "shadow":
            message = f"mmu {kernel['mmu']} of {kernel.name} has no reverse-map chains"
            yield Problem((*keys, "rmap_chain"), message)
        yield from _addresses(guest, keys)
        yield from _traces(guest, guest.access, (*keys, "access"), traces)
        if isinstance(guest.access, Workload):
            yield from workload_problems(scenario, guest, keys, machine)
        yield from _ends(guest.access, (*keys, "access"), scenario.duration)
        yield from _closing(guest, (*keys, "teardown"))
    yield from _names(scenario)
    if scenario.selftest is not None:
        found = list(_selftest(scenario, scenario.selftest.on(machine.arch), machine))
        yield from found
        if found:
            return
    guests = virtual_machines(scenario, machine)
    for name, contender in scenario.contenders.items():
        yield from _contender(scenario, guests, contender, ("contenders", name))
        yield from _sized(scenario, guests, name, kernel)
    yield from _swap(scenario, guests, machine)
    yield from memory_problems(scenario, guests)
    yield from _lazy(scenario, machine)
    yield from async_pf_problems(scenario)
    yield from _times(scenario)
    yield from _bugs(scenario)


def _swap(scenario: Scenario, guests: Mapping[str, Guest], machine: Machine) -> Iterator[Problem]:
    if scenario.host.swap is None:
        return
    pages = {name: guest.page_size for name, guest in guests.items()}
    found = list(swap_problems(scenario.host.swap, machine, pages))
    for key, message in found:
        yield Problem(("host", "swap", *([key] if key else [])), message)
    if scenario.host.memory is None and not found:
        message = "is never used by a host whose memory cannot run out: host.memory says its size"
        yield Problem(("host", "swap"), message)


def _lazy(scenario: Scenario, machine: Machine) -> Iterator[Problem]:
    """The lazy engine draws what independent touches did, and nothing else."""
    for name, guest in scenario.guests.items():
        if guest.engine != "lazy":
            continue
        key = ("guests", name, "engine")
        if not isinstance(guest.access, Uniform | Zipf | HotCold):
            message = f"lazy is for uniform, zipf and hot_cold touches, not {guest.access.pattern}"
            yield Problem(key, message, "explicit")
        elif guest.access.think + round(machine["page_touch_ns"]) == 0:
            yield Problem(key, "lazy needs touches that take time: think, or page_touch_ns")
        if not machine.hw_af:
            message = f"lazy needs a CPU that sets accessed flags, {machine.name} does not"
            yield Problem(key, message, "explicit")
        mine = {name, *member_names(name, guest.count)}
        for other, contender in scenario.contenders.items():
            needs = _needs_explicit(contender)
            if needs and mine & set(meant(scenario, contender.guest)):
                message = f"{other} {needs}, which lazy touches do not tell"
                yield Problem(key, message, "explicit")


def _needs_explicit(contender: Contender) -> str:
    """What ``contender`` does that only touches followed one by one allow."""
    if contender.dates_touches:
        return "asks when pages were touched last"
    if contender.logs:
        return "logs which pages are written to"
    return "changes the size of leaves" if contender.resizes else ""


def _bugs(scenario: Scenario) -> Iterator[Problem]:
    for index, name in enumerate(scenario.bugs):
        if name not in BUGS:
            hint = nearest(name, BUGS)
            known = "" if hint else f", expected one of {', '.join(BUGS)}"
            yield Problem(("bugs", index), f"no bug {name!r}{known}", hint)


def _closed_apart(guest: Guest) -> bool:
    return guest.teardown is not None and guest.teardown.order == "both"


def _closing(guest: Guest, keys: Keys) -> Iterator[Problem]:
    """The time of the second process that ends a VM needs a second process."""
    end = guest.teardown
    if end is not None and end.close_at is not None and end.order != "both":
        yield Problem((*keys, "close_at"), f"only order both has it, not {end.order}")


def _names(scenario: Scenario) -> Iterator[Problem]:
    """A numbered guest may not have the name of another."""
    owners: dict[str, str] = {}
    for name, guest in scenario.guests.items():
        for member in (name, *member_names(name, guest.count)):
            other = owners.setdefault(member, name)
            if other != name:
                message = f"{member} is also the name of a guest of {other}"
                yield Problem(("guests", name), message)
                break


def _host(scenario: Scenario, machine: Machine, kernel: KernelVariant) -> Iterator[Problem]:
    yield from kernel_problems(kernel, machine, scenario.expect)
    rcu = scenario.host.rcu
    if rcu.qlowmark > rcu.qhimark:
        message = f"{rcu.qlowmark} is above qhimark, {rcu.qhimark}"
        yield Problem(("host", "rcu", "qlowmark"), message)
    if machine.nodes > 1 and "c2c_remote_ns" not in machine:
        message = f"{machine.nodes} nodes of {machine.name} need a c2c_remote_ns between them"
        yield Problem(("machine",), f"{message}: {machine.not_applicable['c2c_remote_ns']}")
    if rcu.lazy and rcu.nocbs == "none" and scenario.host.nohz_full == "none":
        message = "needs an offloaded CPU: host.rcu.nocbs or host.nohz_full"
        yield Problem(("host", "rcu", "lazy"), message)
    if rcu.preemptible is False and scenario.host.preemptible:
        message = f"preemption {scenario.host.preemption} always has preemptible RCU"
        yield Problem(("host", "rcu", "preemptible"), message, "true")
    cpus = scenario.host.cpus or machine.cores
    if cpus > machine.cores:
        message = f"{cpus} CPUs are more than the {machine.cores} cores of {machine.name}"
        yield Problem(("host", "cpus"), message)
    if scenario.host.scheduler == "fair" and scenario.selftest is not None:
        message = "a selftest's threads have a CPU each"
        yield Problem(("host", "scheduler"), message, "none")
    elif scenario.guests and scenario.host.scheduler == "none":
        yield from _threads(scenario, cpus)


def _cpus(scenario: Scenario, machine: Machine) -> int:
    return scenario.host.cpus or machine.cores


def _somebody(scenario: Scenario) -> Iterator[Problem]:
    """Either guests or a selftest, and a selftest ends by itself."""
    if scenario.selftest is None and not scenario.guests:
        yield Problem(("guests",), "must not be empty, unless there is a selftest in their place")
    elif scenario.selftest is not None and scenario.guests:
        yield Problem(("selftest",), "makes its virtual machine itself: leave guests out")
    elif scenario.selftest is not None and scenario.duration is not None:
        yield Problem(("duration",), "a selftest runs to its own end: leave duration out")


def _selftest(scenario: Scenario, spec: Selftest, machine: Machine) -> Iterator[Problem]:
    """Whether the machine can run the test, and whether its virtual machines are possible."""
    cpus = _cpus(scenario, machine)
    found = [Problem(("selftest", key), text) for key, text in spec.complaints(machine.arch, cpus)]
    yield from found
    if found:
        return
    names = {
        "mapping": "backing_src" if hasattr(spec, "backing_src") else "hugepages",
        "memory": spec.memory_key,
        "page_size": "host_page_size",
        "folio": "backing_src",
    }
    vms = virtual_machines(scenario, machine)
    for guest in vms.values():
        inner = [*_sizes(guest, (), machine), *_fits(guest, ())]
        for problem in inner:
            key = names[str(problem.keys[0])]
            yield Problem(("selftest", key), problem.message, problem.hint)
        if inner:
            return
    vcpus = max(guest.vcpus for guest in vms.values())
    yield from _enough(scenario, vcpus, spec.threads(cpus), cpus, ("selftest", spec.vcpus_key))


def _threads(scenario: Scenario, cpus: int) -> Iterator[Problem]:
    """Each vCPU, the ageing thread and each contender has a CPU to itself."""
    vcpus = sum(guest.vcpus for guest in every_guest(scenario).values())
    guests = scenario.guests
    largest = max(guests, key=lambda name: guests[name].vcpus * guests[name].count)
    key = "vcpus" if guests[largest].count == 1 else "count"
    yield from _enough(scenario, vcpus, 0, cpus, ("guests", largest, key))


def _enough(
    scenario: Scenario, vcpus: int, others: int, cpus: int, keys: Keys
) -> Iterator[Problem]:
    parts = [
        (vcpus, "vCPU"),
        (others, "thread of the test"),
        (int(scenario.ageing is not None), "ageing thread"),
        (len(scenario.contenders), "contender"),
        (int(scenario.host.memory is not None), "kswapd"),
        (sum(map(_closed_apart, scenario.guests.values())), "process that drops a last reference"),
    ]
    needed = sum(count for count, _ in parts)
    if needed > cpus:
        what = " + ".join(f"{n} {_plural(word, n)}" for n, word in parts if n)
        yield Problem(keys, f"{what} need {needed} CPUs, the host has {cpus}")


def _plural(word: str, number: int) -> str:
    if number == 1:
        return word
    first, *rest = word.split(" ")
    return " ".join([f"{first}s", *rest]) if rest[:1] == ["of"] else f"{word}s"


def _sizes(guest: Guest, keys: Keys, machine: Machine) -> Iterator[Problem]:
    page, mapping, folio = guest.page_size, guest.mapping, guest.folio
    if machine.arch == "x86" and page != 4 * KIB:
        yield Problem((*keys, "page_size"), f"pages of {machine.name} (x86) are 4 KiB")
    leaves = (page, *BLOCK_BYTES[page])
    if mapping not in leaves:
        yield Problem(
            (*keys, "mapping"),
            f"{exact_size(mapping)} is no leaf size of a {exact_size(page)} granule: "
            + ", ".join(map(exact_size, leaves)),
        )
        return
    geometry = GEOMETRIES[machine.arch](page, guest.ipa_bits)
    if mapping > geometry.span_bytes(geometry.start_level):
        yield Problem(
            (*keys, "mapping"),
            f"with {guest.ipa_bits} address bits the root is at level {geometry.start_level}, "
            f"no entry maps {exact_size(mapping)}",
        )
        return
    yield from _folio(guest, keys)
    unit, name = max((page, "page_size"), (mapping, "mapping"), (folio, "folio"))
    memory = _memory_key(guest)
    for size in filter(None, (guest.memory, guest.memory_per_vcpu)):
        if size % page:
            yield _not_multiple((*keys, memory), size, page, "page_size")
        elif guest.memory_bytes % unit:
            yield _not_multiple((*keys, memory), guest.memory_bytes, unit, name)


def _folio(guest: Guest, keys: Keys) -> Iterator[Problem]:
    page, mapping, folio = guest.page_size, guest.mapping, guest.folio
    pages, rest = divmod(folio, page)
    keys = (*keys, "folio")
    if rest or pages & (pages - 1):
        message = f"{exact_size(folio)} is not a power-of-two multiple of page_size"
        yield Problem(keys, f"{message}, {exact_size(page)}")
    elif mapping > page and folio != mapping:
        message = f"{exact_size(folio)} folios cannot be mapped by {exact_size(mapping)} blocks"
        yield Problem(keys, message, exact_size(mapping))
    elif mapping == page and folio > BLOCK_BYTES[page][0]:
        # Transparent huge pages end at the size of one PMD (HPAGE_PMD_ORDER, huge_mm.h, v6.12).
        message = f"{exact_size(folio)} is above {exact_size(BLOCK_BYTES[page][0])}, the largest"
        yield Problem(keys, f"{message} folio that is mapped by pages")


def _memslots(guest: Guest, keys: Keys) -> Iterator[Problem]:
    """Slots are equal and, like the selftests' (memstress.c), leave nothing over."""
    unit, name = max((guest.page_size, "page_size"), (guest.mapping, "mapping"))
    size, rest = divmod(guest.memory_bytes, guest.memslots)
    if guest.memslots > 1 and (rest or size % unit):
        memory, each = exact_size(guest.memory_bytes), exact_size(unit)
        message = f"{memory} cannot be cut into {guest.memslots} slots that are equal multiples"
        yield Problem((*keys, "memslots"), f"{message} of {name}, {each}")


def _addresses(guest: Guest, keys: Keys) -> Iterator[Problem]:
    block = BLOCK_BYTES[guest.page_size][-1]
    if guest.ipa_base % block:
        key = (*keys, "ipa_base")
        yield _not_multiple(key, guest.ipa_base, block, "the largest block")
    yield from _fits(guest, keys)


def _fits(guest: Guest, keys: Keys) -> Iterator[Problem]:
    if guest.ipa_base + guest.memory_bytes > 1 << guest.ipa_bits:
        message = (
            f"{exact_size(guest.memory_bytes)} from {exact_size(guest.ipa_base)} on do not fit "
            f"into {guest.ipa_bits} address bits ({exact_size(1 << guest.ipa_bits)})"
        )
        yield Problem((*keys, _memory_key(guest)), message)


def _traces(
    guest: Guest, access: Access, keys: Keys, traces: Mapping[str, Any]
) -> Iterator[Problem]:
    if isinstance(access, Phases):
        for index, phase in enumerate(access.phases):
            yield from _traces(guest, phase, (*keys, "phases", index), traces)
    if not isinstance(access, Trace):
        return
    header = traces[access.file]
    if access.sha256 not in (None, header.sha256):
        yield Problem((*keys, "sha256"), f"the trace's digest is {header.sha256}")
    footprint = header.pages * header.page_size * guest.vcpus
    if header.page_size > guest.page_size:
        message = f"the trace has pages of {exact_size(header.page_size)}, larger than the guest's"
        yield Problem((*keys, "file"), f"{message} {exact_size(guest.page_size)}")
    elif footprint > guest.memory_bytes:
        message = (
            f"{guest.vcpus} x {exact_size(footprint // guest.vcpus)} for the trace exceed the "
            f"guest's {exact_size(guest.memory_bytes)} of memory"
        )
        yield Problem((*keys, "file"), message)


def _ends(access: Access, keys: Keys, duration: int | None) -> Iterator[Problem]:
    if isinstance(access, Phases):
        for index, phase in enumerate(access.phases[:-1]):
            for endless in _endless(phase, (*keys, "phases", index)):
                yield Problem(endless, "never ends, so the next phase is never reached")
    if duration is None:
        for endless in _endless(access, keys):
            yield Problem(endless, "is endless: that needs a duration")


def _endless(access: Access, keys: Keys) -> Iterator[Keys]:
    """The keys that make the pattern endless."""
    if isinstance(access, Phases):
        for index, phase in enumerate(access.phases):
            yield from _endless(phase, (*keys, "phases", index))
    if isinstance(access, Phases | Trace):
        if access.repeat is None:
            yield (*keys, "repeat")
    elif isinstance(access, Workload):
        key = ENDLESS.get(access.pattern)
        if key is not None and getattr(access, key) is None:
            yield (*keys, key)
    elif not isinstance(access, Populate) and access.touches is None:
        yield (*keys, "touches")


def _contender(
    scenario: Scenario, guests: Mapping[str, Guest], contender: Contender, keys: Keys
) -> Iterator[Problem]:
    found = meant(scenario, contender.guest)
    if not found:
        groups = scenario.guests or guests
        hint = nearest(contender.guest, [*groups, *guests])
        known = "" if hint else f", expected one of {', '.join(groups)}"
        yield Problem((*keys, "guest"), f"no guest {contender.guest!r}{known}", hint)
        return
    guest = guests[found[0]]
    for name, size in contender.sizes().items():
        if size % guest.page_size:
            yield _not_multiple((*keys, name), size, guest.page_size, "the guest's page_size")
        elif size > guest.memory_bytes:
            message = f"{exact_size(size)} is more than the guest's memory"
            yield Problem((*keys, name), f"{message}, {exact_size(guest.memory_bytes)}")
    if contender.pages_only and guest.mapping != guest.page_size:
        message = f"works on pages, {contender.guest} is mapped by {exact_size(guest.mapping)}"
        yield Problem((*keys, "kind"), message)
    if isinstance(contender, Memslot) and contender.slot >= guest.memslots:
        message = f"{contender.guest} has memslots 0 to {guest.memslots - 1}"
        yield Problem((*keys, "slot"), message)
    pages = guest.memory_bytes // guest.page_size
    if isinstance(contender, Compaction) and contender.pages > pages:
        yield Problem((*keys, "pages"), f"{contender.pages} is more than the guest has, {pages}")
    for name, message in contender.complaints():
        yield Problem((*keys, name), message)


def _sized(
    scenario: Scenario, guests: Mapping[str, Guest], name: str, kernel: KernelVariant
) -> Iterator[Problem]:
    """What contenders that log writes or change the size of pages need of guest and kernel."""
    contender, keys = scenario.contenders[name], ("contenders", name)
    found = set(meant(scenario, contender.guest))
    if not found:
        return
    guest = guests[min(found)]
    block = BLOCK_BYTES[guest.page_size][0]
    others = [
        (other, them)
        for other, them in scenario.contenders.items()
        if other != name and found & set(meant(scenario, them.guest))
    ]
    if isinstance(contender, DirtyLog):
        if scenario.selftest is not None and scenario.selftest.logs:
            message = f"{scenario.selftest.test} logs the writes of {contender.guest} itself"
            yield Problem((*keys, "guest"), message)
        yield from _dirty_log(contender, guest, keys, kernel)
        for other, them in others:
            if isinstance(them, DirtyLog) and other < name:
                message = f"{other} logs the writes of {contender.guest} already"
                yield Problem((*keys, "guest"), message)
    elif contender.resizes and guest.mapping > block:
        # mm/hugetlb.c: what is larger than a PMD is hugetlbfs's, neither collapsed nor split.
        message = f"{contender.guest} is mapped by {exact_size(guest.mapping)}"
        yield Problem((*keys, "guest"), f"{message}, which is no transparent huge page")
    elif isinstance(contender, ThpSplit) and guest.mapping == guest.page_size:
        if not any(isinstance(them, Khugepaged) for _, them in others):
            message = f"{contender.guest} has no huge page to split: it is mapped by pages"
            yield Problem((*keys, "guest"), f"{message}, and no khugepaged makes some")
    elif isinstance(contender, Khugepaged) and guest.memory_bytes < block:
        message = f"{contender.guest} is smaller than a huge page of {exact_size(block)}"
        yield Problem((*keys, "guest"), message)


def _dirty_log(log: DirtyLog, guest: Guest, keys: Keys, kernel: KernelVariant) -> Iterator[Problem]:
    unit = 64 * guest.page_size
    if log.clear_chunk is not None and log.clear_chunk % unit:
        # kvm_clear_dirty_log_protect(): first_page and num_pages come in words of the bitmap.
        yield _not_multiple((*keys, "clear_chunk"), log.clear_chunk, unit, "64 pages")
    chunk, sizes = log.eager_split_chunk, BLOCK_BYTES[guest.page_size]
    if chunk is None:
        return
    key = (*keys, "eager_split_chunk")
    if kernel["eager_split"] == "none":
        yield Problem(key, f"{kernel.name} cannot split eagerly (eager_split: none)")
    elif chunk not in sizes:
        allowed = ", ".join(map(exact_size, sizes))
        yield Problem(key, f"{exact_size(chunk)} is no block size of the granule: {allowed}")
    elif chunk < guest.mapping:
        message = f"{exact_size(chunk)} is less than the guest's blocks of"
        yield Problem(
            key, f"{message} {exact_size(guest.mapping)}: splitting those is not modelled"
        )


def _times(scenario: Scenario) -> Iterator[Problem]:
    """What starts when the run is over would be silently left out."""
    if scenario.duration is None:
        return
    starts: dict[Keys, int] = {
        ("contenders", name, "start"): contender.start
        for name, contender in scenario.contenders.items()
    }
    if scenario.ageing is not None:
        starts["ageing", "start"] = scenario.ageing.start
    for name, guest in scenario.guests.items():
        if guest.teardown is not None:
            starts["guests", name, "teardown", "at"] = guest.teardown.at
            if guest.teardown.close_at is not None:
                starts["guests", name, "teardown", "close_at"] = guest.teardown.close_at
    for keys, start in starts.items():
        if start >= scenario.duration:
            end = exact_duration(scenario.duration)
            yield Problem(keys, f"{exact_duration(start)} is too late: the run ends at {end}")


def _memory_key(guest: Guest) -> str:
    return "memory" if guest.memory is not None else "memory_per_vcpu"


def _not_multiple(keys: Keys, size: int, unit: int, name: str) -> Problem:
    return Problem(keys, f"{exact_size(size)} is not a multiple of {name}, {exact_size(unit)}")
