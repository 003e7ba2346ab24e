"""Whether a closed-loop workload fits its guest, its machine and its run."""

from __future__ import annotations

from collections.abc import Iterator

from simkvm.scenario.errors import Keys, Problem
from simkvm.scenario.machine import Machine
from simkvm.scenario.schema import Guest, Scenario
from simkvm.scenario.workloads import Chase, Interactive, Memcached, Sort, Workload
from simkvm.units import exact_duration, exact_size


def workload_problems(
    scenario: Scenario, guest: Guest, keys: Keys, machine: Machine
) -> Iterator[Problem]:
    """What is impossible about ``guest``, at ``keys``, which has a workload as its access."""
    access, below = guest.access, (*keys, "access")
    assert isinstance(access, Workload)
    if not machine.hw_af:
        message = f"{machine.name} has no hardware accessed flag (hw_af), which"
        yield Problem((*below, "pattern"), f"{message} vCPUs that serve {access.unit} need")
    if scenario.duration is not None and access.warmup >= scenario.duration:
        message = f"{exact_duration(access.warmup)} leaves nothing to measure: the run ends at"
        yield Problem((*below, "warmup"), f"{message} {exact_duration(scenario.duration)}")
    if isinstance(access, Memcached):
        yield from _memcached(access, guest, below)
    elif isinstance(access, Sort):
        yield from _sort(access, guest, below)
    elif isinstance(access, Interactive):
        yield from _interactive(access, guest, below)
    elif isinstance(access, Chase) and guest.vcpus > guest.memory_bytes // guest.page_size:
        yield Problem((*below, "pattern"), "there are more vCPUs than pages")


def async_pf_problems(scenario: Scenario) -> Iterator[Problem]:
    """Where async page faults mean nothing, or are not modelled."""
    for name, guest in scenario.guests.items():
        if not guest.async_pf:
            continue
        keys = ("guests", name, "async_pf")
        if not isinstance(guest.access, Workload):
            known = "memcached, sort, chase and interactive"
            message = f"is modelled for vCPUs that work off jobs ({known})"
            yield Problem(keys, f"{message}, not for {guest.access.pattern}", "false")
        if scenario.host.memory is None:
            message = "no page is ever read back where memory does not run out (host.memory)"
            yield Problem(keys, message, "false")
        elif scenario.host.swap is None and guest.backing == "anonymous":
            yield Problem(keys, "there is no swap to read pages from (host.swap)", "false")
        if scenario.host.scheduler != "none":
            message = "is modelled for vCPUs with a CPU each, not for host.scheduler"
            yield Problem(keys, f"{message} {scenario.host.scheduler}", "false")


def _memcached(access: Memcached, guest: Guest, keys: Keys) -> Iterator[Problem]:
    from simkvm.guest.memcached import touched_bytes  # brings numpy

    used = touched_bytes(access)
    if used > guest.memory_bytes:
        message = f"hash table and slabs of {access.keys} items take {exact_size(used)}, more than"
        yield Problem((*keys, "keys"), f"{message} the guest's {exact_size(guest.memory_bytes)}")
    if access.sd is not None and access.keys_drawn != "gaussian":
        yield Problem((*keys, "sd"), f"belongs to keys_drawn gaussian, not {access.keys_drawn}")


def _sort(access: Sort, guest: Guest, keys: Keys) -> Iterator[Problem]:
    page = guest.page_size
    for key in ("data", "block"):
        size = getattr(access, key)
        if size % page:
            message = f"{exact_size(size)} is not a multiple of page_size, {exact_size(page)}"
            yield Problem((*keys, key), message)
    if 2 * access.data > guest.memory_bytes:
        message = f"twice {exact_size(access.data)}, data and what a stage writes, is more than"
        yield Problem((*keys, "data"), f"{message} the guest's {exact_size(guest.memory_bytes)}")


def _interactive(access: Interactive, guest: Guest, keys: Keys) -> Iterator[Problem]:
    page = guest.page_size
    if access.tab_size % page:
        message = f"{exact_size(access.tab_size)} is not a multiple of page_size,"
        yield Problem((*keys, "tab_size"), f"{message} {exact_size(page)}")
    if access.tabs * access.tab_size > guest.memory_bytes:
        message = f"{access.tabs} x {exact_size(access.tab_size)} are more than the guest's"
        yield Problem((*keys, "tabs"), f"{message} {exact_size(guest.memory_bytes)} of memory")
