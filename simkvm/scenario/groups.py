"""Which virtual machines a scenario has: a guest with a ``count`` is a group of identical ones.

Everything below the scenario (the world, its record, its reports) knows single guests by their own
names; only what a user writes or reads speaks of groups.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from simkvm.scenario.machine import Machine
    from simkvm.scenario.schema import Guest, Scenario


def member_names(name: str, count: int) -> list[str]:
    """Names of ``count`` guests: ``name`` itself for one, else numbered from 0.

    Numbers have as many digits as the last one needs, so that names sort as numbers do.
    """
    if count == 1:
        return [name]
    digits = len(str(count - 1))
    return [f"{name}{number:0{digits}}" for number in range(count)]


def every_guest(scenario: Scenario) -> dict[str, Guest]:
    """Each virtual machine by its own name, in the order of groups and numbers."""
    return {
        member: guest
        for name, guest in scenario.guests.items()
        for member in member_names(name, guest.count)
    }


def virtual_machines(scenario: Scenario, machine: Machine) -> dict[str, Guest]:
    """As :func:`every_guest`, or those that a selftest makes on ``machine``."""
    if scenario.selftest is None:
        return every_guest(scenario)
    return dict(scenario.made_by_selftest(scenario.host.cpus or machine.cores, machine.arch))


def meant(scenario: Scenario, reference: str) -> list[str]:
    """The guests that ``reference`` names: all of a group, or one by its own name; else none."""
    if reference in scenario.guests:
        return member_names(reference, scenario.guests[reference].count)
    if scenario.selftest is not None:  # their names are the same on every machine
        return [reference] if reference in scenario.selftest.vms(1) else []
    return [reference] if reference in every_guest(scenario) else []
