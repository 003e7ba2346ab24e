"""The bench for single mechanisms, as the tests import it."""

from __future__ import annotations

from simpy import Environment

from simkvm.kernel.qrwlock import FAST
from simkvm.units import GIB, KIB, MIB
from simkvm.validate.traced.lab import Lab, Tally, account, scenario, world


def events(env: Environment) -> int:
    """SimPy events scheduled so far in ``env``; asking takes no number, as ``next`` would."""
    return int(repr(env._eid).removeprefix("count(").removesuffix(")"))


def fill_sparsely(lab: Lab, stride: int) -> None:
    """One page each ``stride`` bytes."""
    lab.fill(range(0, lab.kvm.leaves, stride // lab.kvm.stage2.leaf_bytes))


__all__ = [
    "FAST",
    "GIB",
    "KIB",
    "MIB",
    "Lab",
    "Tally",
    "account",
    "events",
    "fill_sparsely",
    "scenario",
    "world",
]
