"""Whether a scenario is possible: what no single key can tell.

A rule is a function that yields problems; `problems` runs them all. Rules compare numbers only,
nothing is read from files here.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from simkvm.kernel.geometry import Geometry
from simkvm.scenario.access import Access, Phases, Populate, Trace
from simkvm.scenario.contenders import Contender
from simkvm.scenario.errors import Keys, Problem, nearest
from simkvm.scenario.fields import KIB
from simkvm.scenario.kernel import KernelVariant
from simkvm.scenario.machine import Machine
from simkvm.scenario.schema import BLOCK_BYTES, Guest, Scenario
from simkvm.scenario.selftest import Selftest
from simkvm.units import exact_duration, exact_size


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
        yield from _addresses(guest, keys)
        yield from _traces(guest, guest.access, (*keys, "access"), traces)
        yield from _ends(guest.access, (*keys, "access"), scenario.duration)
    vms: Mapping[str, Guest] = scenario.guests
    if scenario.selftest is not None:
        found = list(_selftest(scenario, scenario.selftest, machine))
        yield from found
        if found:
            return
        vms = scenario.vms(_cpus(scenario, machine))
    for name, contender in scenario.contenders.items():
        yield from _contender(vms, contender, ("contenders", name))
    yield from _times(scenario)


def _host(scenario: Scenario, machine: Machine, kernel: KernelVariant) -> Iterator[Problem]:
    if kernel.arch != machine.arch:
        message = f"{kernel.name} is a kernel for {kernel.arch}, {machine.name} is {machine.arch}"
        yield Problem(("kernel",), message)
    if kernel["ageing_call"] == "bitmap" and kernel["ageing_lock"] != "none":
        lock = kernel["ageing_lock"]
        message = f"ageing_call bitmap is lock-free, it does not go with ageing_lock {lock}"
        yield Problem(("kernel",), message)
    rcu = scenario.host.rcu
    if rcu.qlowmark > rcu.qhimark:
        message = f"{rcu.qlowmark} is above qhimark, {rcu.qhimark}"
        yield Problem(("host", "rcu", "qlowmark"), message)
    cpus = scenario.host.cpus or machine.cores
    if cpus > machine.cores:
        message = f"{cpus} CPUs are more than the {machine.cores} cores of {machine.name}"
        yield Problem(("host", "cpus"), message)
    if scenario.guests:
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
    vms = scenario.vms(cpus)
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
    vcpus = sum(guest.vcpus for guest in scenario.guests.values())
    largest = max(scenario.guests, key=lambda name: scenario.guests[name].vcpus)
    yield from _enough(scenario, vcpus, 0, cpus, ("guests", largest, "vcpus"))


def _enough(
    scenario: Scenario, vcpus: int, others: int, cpus: int, keys: Keys
) -> Iterator[Problem]:
    parts = [
        (vcpus, "vCPU"),
        (others, "thread of the test" if others == 1 else "threads of the test"),
        (int(scenario.ageing is not None), "ageing thread"),
        (len(scenario.contenders), "contender"),
    ]
    needed = sum(count for count, _ in parts)
    if needed > cpus:
        plural = ("vCPU", "contender")
        what = " + ".join(f"{n} {word}{'s' * (n > 1 and word in plural)}" for n, word in parts if n)
        yield Problem(keys, f"{what} need {needed} CPUs, the host has {cpus}")


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
    geometry = Geometry(page, guest.ipa_bits)
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
    elif not isinstance(access, Populate) and access.touches is None:
        yield (*keys, "touches")


def _contender(guests: Mapping[str, Guest], contender: Contender, keys: Keys) -> Iterator[Problem]:
    guest = guests.get(contender.guest)
    if guest is None:
        hint = nearest(contender.guest, guests)
        known = "" if hint else f", expected one of {', '.join(guests)}"
        yield Problem((*keys, "guest"), f"no guest {contender.guest!r}{known}", hint)
        return
    for name, size in contender.sizes().items():
        if size % guest.page_size:
            yield _not_multiple((*keys, name), size, guest.page_size, "the guest's page_size")
        elif size > guest.memory_bytes:
            message = f"{exact_size(size)} is more than the guest's memory"
            yield Problem((*keys, name), f"{message}, {exact_size(guest.memory_bytes)}")
    for name, message in contender.complaints():
        yield Problem((*keys, name), message)


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
    for keys, start in starts.items():
        if start >= scenario.duration:
            end = exact_duration(scenario.duration)
            yield Problem(keys, f"{exact_duration(start)} is too late: the run ends at {end}")


def _memory_key(guest: Guest) -> str:
    return "memory" if guest.memory is not None else "memory_per_vcpu"


def _not_multiple(keys: Keys, size: int, unit: int, name: str) -> Problem:
    return Problem(keys, f"{exact_size(size)} is not a multiple of {name}, {exact_size(unit)}")
