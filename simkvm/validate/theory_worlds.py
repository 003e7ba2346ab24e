"""Whole simulated hosts for single rows, from a few words."""

from __future__ import annotations

from typing import Any

from simkvm.kernel.world import World
from simkvm.observe.record import Record
from simkvm.scenario.kernel import load_kernel
from simkvm.scenario.load import require_possible
from simkvm.scenario.machine import load_machine
from simkvm.scenario.schema import Scenario
from simkvm.units import NS_PER_MS

MS = NS_PER_MS


def world(guest: dict[str, Any], **keys: Any) -> World:
    """A host with one guest ``vm0`` of ``guest``'s keys; ``keys`` as in a scenario file."""
    given = {"machine": "ampere-altra-80c", "kernel": "linux-6.12", **keys}
    scenario = Scenario.model_validate({"name": "theory", "guests": {"vm0": guest}, **given})
    require_possible(scenario)
    return World(scenario, load_machine(scenario.machine), load_kernel(scenario.kernel))


def run(guest: dict[str, Any], **keys: Any) -> Record:
    """The record of that host."""
    return world(guest, **keys).run()
