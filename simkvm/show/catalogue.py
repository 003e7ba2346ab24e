"""What ships, and what was imported: machines, kernel variants and traces in words and tables."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from rich.console import Group, RenderableType
from rich.text import Text

from simkvm.show.text import named_table
from simkvm.units import format_count, format_duration, format_size

if TYPE_CHECKING:
    from simkvm.guest.damon import Imported
    from simkvm.guest.trace import TraceHeader
    from simkvm.scenario.kernel import KernelVariant
    from simkvm.scenario.machine import Machine


def machine_report(machine: Machine) -> Group:
    """A machine and every cost: value, range, unit, basis and source."""
    flags = [name for name in ("hw_af", "tlbirange", "fwb") if getattr(machine, name)]
    nodes = "1 node" if machine.nodes == 1 else f"{machine.nodes} nodes"
    shape = f"{machine.arch}, {machine.cores} cores on {nodes}, {machine.ghz:g} GHz"
    rows = [row | {"range": f"{row['low']:g} .. {row['high']:g}"} for row in machine.table()]
    columns = {"name": None, "value": None, "range": None, "unit": None, "basis": None}
    return Group(
        Text(f"{machine.name}: {machine.title}", "bold"),
        Text(f"  {shape}, {', '.join(flags) or 'no hw_af, tlbirange or fwb'}"),
        Text(f"  basis: {_bases(machine)}\n"),
        named_table(rows, {**columns, "source": 60}),
    )


def _bases(machine: Machine) -> str:
    bases = "V read in the source, D derived, R recalled, E estimate"
    measured = any(parameter.basis == "M" for parameter in machine.parameters.values())
    return f"M measured on the host, {bases}" if measured else bases


def kernel_report(kernel: KernelVariant) -> Group:
    """A kernel variant and every policy: value, meaning and source."""
    kind = ", counterfactual" if kernel.counterfactual else ""
    return Group(
        Text(f"{kernel.name}: {kernel.title}", "bold"),
        Text(f"  {kernel.arch}{kind}\n"),
        named_table(kernel.table(), {"policy": None, "value": None, "meaning": 36, "source": 40}),
    )


def kernel_diff(rows: Sequence[Mapping[str, str]], a: str, b: str) -> RenderableType:
    """The policies in which two variants differ, as `simkvm.scenario.kernel.diff` finds them."""
    if not rows:
        return Text(f"{a} and {b} have the same policies")
    values = [{"policy": row["policy"], a: row["a"], b: row["b"]} for row in rows]
    sources = [
        {"policy": row["policy"], "kernel": name, "source": row[f"{side}_source"]}
        for row in rows
        for side, name in (("a", a), ("b", b))
    ]
    return Group(
        named_table(values, dict.fromkeys(["policy", a, b])),
        Text("\nWhere each was read", "bold"),
        named_table(sources, {"policy": None, "kernel": None, "source": 60}),
    )


def trace_report(header: TraceHeader, path: str) -> RenderableType:
    """What a recording became."""
    return Text(
        f"{path}: {format_count(header.touches)} touches ({format_count(header.writes)} writes) of "
        f"{format_count(header.touched_pages)} pages, {format_size(header.footprint_bytes)}; "
        f"{format_count(header.instructions)} instructions"
    )


def damon_report(imported: Imported, path: str) -> RenderableType:
    """What a recording of DAMON became, and what was assumed."""
    recording = imported.recording
    known = "" if recording.stated else " (assumed: the recording does not say)"
    lines = [
        f"  target {recording.target}: {len(recording.snapshots)} snapshots, "
        f"{format_duration(recording.duration_ns)}",
        f"  sampling interval {format_duration(recording.sample_ns)}{known}, "
        f"a page touched at most once in {format_duration(imported.resolution_ns)}",
    ]
    if imported.pauses_cut:
        lines.append(f"  {imported.pauses_cut} pauses were longer than a trace can say, and cut")
    return Group(trace_report(imported.header, path), *map(Text, lines))
