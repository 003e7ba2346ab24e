"""Machines: what every operation of the simulated host costs.

One TOML file a machine, in ``machines/``. Each number carries a range for sensitivity sweeps, a
unit, a basis and a source, and every number that the model uses is in the file: nothing is
derived from other numbers here.

The basis says how far to trust a number: ``V`` it was read in the source, ``D`` it follows by
arithmetic from what was read, ``R`` it is recalled from a known publication, ``E`` it is an
estimate and the source gives the reasoning. ``M``, in profiles of a user's own only: it was
measured on that host (`simkvm.measure.calibrate`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cache
from typing import Any, Final

from simkvm.scenario import shipped
from simkvm.scenario.errors import InputError, nearest
from simkvm.scenario.shipped import Reference, Table
from simkvm.units import MOST, parse_duration

UNITS: Final = {
    "_ns": "ns",
    "_ratio": "ratio",
    "_bytes_per_s": "bytes/s",
    "_entries": "entries",
    "_channels": "channels",
}
"""Unit by the suffix of a parameter's name."""

COUNTS: Final = ("entries", "channels")
"""Units of whole numbers."""

BASES: Final = ("V", "D", "R", "E", "M")
ARCHITECTURES: Final = ("arm64", "x86")
FLAGS: Final = ("hw_af", "tlbirange", "fwb")
SHAPE: Final = ("cores", "nodes", "ghz")
BETWEEN_NODES: Final = ("dram_remote_ns", "c2c_remote_ns")
"""Costs that a machine with one node lacks, and that a scenario which gives it more has to set."""


@dataclass(frozen=True)
class Parameter:
    """One cost: ``value`` in ``unit``, a plausible range, and where the number comes from."""

    name: str
    value: float
    low: float
    high: float
    unit: str
    basis: str
    source: str
    note: str = ""


@dataclass(frozen=True)
class Machine:
    """One host.

    ``hw_af``: the CPU sets the accessed flag (A bit on x86); ``tlbirange``: it has TLB
    invalidation by range; ``fwb``: stage 2 can force write-back, so mapping needs no cache
    cleaning. ``not_applicable`` maps parameters without meaning here to the reason;
    ``overrides`` holds what a scenario set, by name.
    """

    name: str
    title: str
    arch: str
    cores: int
    nodes: int
    ghz: float
    hw_af: bool
    tlbirange: bool
    fwb: bool
    parameters: dict[str, Parameter]
    sources: dict[str, str] = field(default_factory=dict)
    not_applicable: dict[str, str] = field(default_factory=dict)
    overrides: dict[str, float | int | bool] = field(default_factory=dict)

    def __getitem__(self, name: str) -> float:
        """Value of one parameter. Raises `InputError` if this machine does not have it."""
        if name not in self.parameters:
            raise self._missing(name, key=None)
        return self.parameters[name].value

    def __contains__(self, name: object) -> bool:
        return name in self.parameters

    def table(self) -> list[dict[str, str | float]]:
        """One row a parameter: name, value, low, high, unit, basis, source, note."""
        return [vars(parameter).copy() for parameter in self.parameters.values()]

    def _missing(self, name: str, key: str | None) -> InputError:
        if name in self.not_applicable:
            reason = self.not_applicable[name]
            return InputError(f"{name} does not apply to machine {self.name}: {reason}", key=key)
        settable = [*self.parameters, *FLAGS, *SHAPE]
        message = f"machine {self.name} has no parameter {name!r}"
        return InputError(message, key=key, hint=nearest(name, settable))


def machine_names() -> list[str]:
    """Names of the shipped machines, sorted."""
    return shipped.names("machines")


def load_machine(ref: Reference) -> Machine:
    """Load a machine, with the numbers that ``ref`` sets.

    ``ref`` is a name or ``{base: NAME, set: {PARAMETER: VALUE}}``; a name that ends in ``.toml`` is
    the path of a profile (`simkvm.scenario.profile`). A value is a number in the
    parameter's unit, or for a time a duration such as ``"60 ns"``. It may lie outside the
    parameter's range: that is what asking "what if" means. Cores, nodes, GHz and the flags can be
    set too, and the costs between nodes where the base has but one. Raises `InputError` for an
    unknown base or parameter and for an impossible value.
    """
    from simkvm.scenario import profile  # which parses machines, as this module does

    named = ref.get("base") if isinstance(ref, Mapping) else ref
    own = [str(named)] if profile.is_path(named) else []
    base, changes = shipped.split(ref, "machine", [*machine_names(), *own])
    if own:
        machine = _own(_profile(base, "machine" if isinstance(ref, str) else "machine.base"))
    else:
        machine = _own(shipped_machines()[base])
    for name in sorted(changes, key=BETWEEN_NODES.__contains__):  # after the nodes that need them
        machine = _override(machine, name, changes[name])
    return machine


def parse_machine(content: str, file: str) -> Machine:
    """Read one machine's TOML. Raises `InputError` naming ``file`` and the key."""
    table = Table(shipped.parse(content, file), file)
    machine = Machine(
        name=table.take("name", str),
        title=table.take("title", str),
        arch=table.take_choice("arch", ARCHITECTURES),
        cores=table.take("cores", int),
        nodes=table.take("nodes", int),
        ghz=table.take("ghz", float),
        hw_af=table.take("hw_af", bool),
        tlbirange=table.take("tlbirange", bool),
        fwb=table.take("fwb", bool),
        sources=_strings(table.take_table("sources")),
        not_applicable=_strings(table.take_table("not_applicable")),
        parameters=_parameters(table.take_table("parameters")),
    )
    table.finish()
    _check_shape(machine, table)
    return machine


def check_same_parameters(machines: Mapping[str, Machine]) -> None:
    """Raise `InputError` if a machine lacks a parameter that another has, without a reason.

    ``machines`` is by file. A reason given for a parameter that the machine does have, or that
    nobody has, is an error too.
    """
    everything = {name for machine in machines.values() for name in machine.parameters}
    for file, machine in machines.items():
        for name in sorted(everything - set(machine.parameters) - set(machine.not_applicable)):
            raise InputError("missing", file=file, key=f"parameters.{name}")
        for name in machine.not_applicable:
            if name in machine.parameters or name not in everything:
                raise InputError("idle reason", file=file, key=f"not_applicable.{name}")


@cache  # the files ship with the package and do not change under a run
def shipped_machines() -> dict[str, Machine]:
    """The shipped machines by name, which are not to be changed."""
    machines = {}
    for name in machine_names():
        file = f"machines/{name}.toml"
        machines[file] = parse_machine(shipped.text("machines", name), file)
        if machines[file].name != name:
            raise InputError(f"is not the file's name, {name!r}", file=file, key="name")
    check_same_parameters(machines)
    return {machine.name: machine for machine in machines.values()}


def _profile(path: str, key: str) -> Machine:
    from simkvm.scenario import profile

    try:
        return profile.read_profile(path)
    except InputError as error:
        # Two places are to be named: that in the profile goes into the message.
        raise InputError(str(error), key=key) from error


def _own(machine: Machine) -> Machine:
    """Give the caller its own tables: what one run does to them, no other run may feel."""
    return replace(
        machine,
        parameters=dict(machine.parameters),
        sources=dict(machine.sources),
        not_applicable=dict(machine.not_applicable),
        overrides={},
    )


def _strings(table: Table) -> dict[str, str]:
    return {key: table.take(key, str) for key in table.remaining()}


def _parameters(table: Table) -> dict[str, Parameter]:
    return {name: _parameter(name, table.take_table(name)) for name in table.remaining()}


def _parameter(name: str, table: Table) -> Parameter:
    parameter = Parameter(
        name=name,
        value=table.take("value", float),
        low=table.take("low", float),
        high=table.take("high", float),
        unit=table.take("unit", str),
        basis=table.take_choice("basis", BASES),
        source=table.take("source", str),
        note=table.take("note", str, default=""),
    )
    table.finish()
    if parameter.unit != _unit(name):
        raise table.error("unit", f"{parameter.unit!r} does not fit the name's suffix")
    if not parameter.low <= parameter.value <= parameter.high < math.inf:
        raise table.error("value", "is outside low to high")
    if _complaint(name, parameter.low):
        raise table.error("low", str(_complaint(name, parameter.low)))
    return parameter


def _unit(name: str) -> str | None:
    return next((unit for suffix, unit in UNITS.items() if name.endswith(suffix)), None)


def _check_shape(machine: Machine, table: Table) -> None:
    for key in ("cores", "nodes", "ghz"):
        if not 0 < getattr(machine, key) < math.inf:
            raise table.error(key, "must be positive")
    if machine.nodes > machine.cores:
        raise table.error("nodes", "is more than cores")
    for key in ("shape", *FLAGS):
        if key not in machine.sources:
            raise table.error(f"sources.{key}", "missing")


def _override(machine: Machine, name: str, value: Any) -> Machine:
    key = f"machine.set.{name}"
    if name in FLAGS:
        flag: dict[str, Any] = {name: _flag(machine, name, value, key)}
        changed = replace(machine, **flag)
    elif name == "cores":
        changed = replace(machine, cores=_cores(machine, value, key))
    elif name == "nodes":
        changed = replace(machine, nodes=_nodes(machine, value, key))
    elif name == "ghz":
        changed = replace(machine, ghz=_number(name, value, key))
    elif name in machine.parameters:
        new = _changed(machine.parameters[name], _number(name, value, key))
        changed = replace(machine, parameters={**machine.parameters, name: new})
    elif name in BETWEEN_NODES and machine.nodes > 1 and name in machine.not_applicable:
        changed = _between_nodes(machine, name, _number(name, value, key))
    else:
        raise machine._missing(name, key)
    set_to = changed[name] if name in changed else getattr(changed, name)
    return replace(changed, overrides={**machine.overrides, name: set_to})


def _changed(old: Parameter, value: float) -> Parameter:
    source = f"set by the scenario; the shipped value is {old.value:g} ({old.basis})"
    return replace(old, value=value, basis="E", source=source)


def _between_nodes(machine: Machine, name: str, value: float) -> Machine:
    """A cost that the base, with its one node, does not have."""
    reasons = dict(machine.not_applicable)
    source = f"set by the scenario; as shipped: {reasons.pop(name)}"
    new = Parameter(name, value, value, value, str(_unit(name)), "E", source)
    parameters = {**machine.parameters, name: new}
    return replace(machine, parameters=parameters, not_applicable=reasons)


def _flag(machine: Machine, name: str, value: Any, key: str) -> bool:
    if not isinstance(value, bool):
        raise InputError(f"expected true or false, not {value!r}", key=key)
    if value and name != "hw_af" and machine.arch != "arm64":
        message = f"{name} is an arm64 feature, {machine.name} is {machine.arch}"
        raise InputError(message, key=key)
    return value


def _nodes(machine: Machine, value: Any, key: str) -> int:
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= machine.cores:
        message = f"expected a whole number from 1 to the {machine.cores} cores, not {value!r}"
        raise InputError(message, key=key)
    return value


def _cores(machine: Machine, value: Any, key: str) -> int:
    if isinstance(value, float) and value.is_integer():
        value = int(value)  # numbers of a scenario file come as floats
    if not isinstance(value, int) or isinstance(value, bool) or value < machine.nodes:
        message = f"expected a whole number, at least one a node ({machine.nodes}), not {value!r}"
        raise InputError(message, key=key)
    return value


def _number(name: str, value: Any, key: str) -> float:
    if isinstance(value, str) and _unit(name) == "ns":
        value = _duration_ns(value, key)
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise InputError(f"expected a number, not {value!r}", key=key)
    complaint = _complaint(name, value)
    if complaint is not None:
        raise InputError(f"{complaint}, not {value!r}", key=key)
    return float(value)


def _duration_ns(text: str, key: str) -> int:
    try:
        return parse_duration(text)
    except InputError as error:
        error.key = key
        raise


def _complaint(name: str, value: float) -> str | None:
    """Say why ``value`` cannot be this parameter's, or None.

    A time may be nothing, which switches a cost off; what the model divides by may not.
    """
    if not -MOST <= value <= MOST:
        return "must be finite, and fit a signed 64-bit number"
    if _unit(name) in COUNTS and value != int(value):
        return "must be a whole number"
    may_be_zero = _unit(name) == "ns" or name == "tlbi_bystander_slowdown_ratio"
    if value < 0 or (value == 0 and not may_be_zero):
        return "must not be negative" if may_be_zero else "must be positive"
    return None
