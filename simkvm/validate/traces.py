"""What a traced kernel counted, each experiment done again with the model's parts."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Final

from simkvm.validate.row import TraceRow
from simkvm.validate.traced import record
from simkvm.validate.traced.labvm import LabVm
from simkvm.validate.traced.record import Run

PREEMPTION: Final = {"deb": "voluntary", "a": "full"}  #: by traced kernel

CPU_SHARING: Final = "Every vCPU, the ageing thread and every contender has a CPU of its own"
ABSTRACTIONS: Final[Mapping[str, str]] = {
    "locks-sparse/1/mmu_lock write": CPU_SHARING,
    "locks-sparse/3/mmu_lock write": CPU_SHARING,
}
"""By the id of a row, in words of docs/limits.md: what the model leaves out on purpose."""


def rows(kernel: str = "linux-6.12") -> Iterator[TraceRow]:
    """The rows, each as it is computed. ``kernel``: the variant that should count the same."""
    for run in record.runs():
        yield from counted(run, kernel)


def counted(run: Run, kernel: str = "linux-6.12", **keys: Any) -> Iterator[TraceRow]:
    """The rows of one run of commands. ``keys``: more of the scenario's."""
    host = {"preemption": PREEMPTION[run.kernel]}
    apart = "slotdel" in run.commands
    vm = LabVm(run.memory, run.vcpus, run.thp, apart, kernel=kernel, host=host, **keys)
    for number, command in enumerate(run.commands[: max(run.counts, default=-1) + 1]):
        simulated = vm.do(command)
        for what, measured in run.counts.get(number, {}).items():
            name = f"{run.name}/{number}/{what}"
            yield TraceRow(
                id=name,
                about=f"{command}: {what}",
                unit=_unit(what),
                measured=measured,
                simulated=simulated[what],
                source=f"{run.set}, {run.name}, command {number}",
                abstraction=ABSTRACTIONS.get(name, ""),
            )


def _unit(what: str) -> str:
    if what.startswith("mmu_lock"):
        return "acquisitions"
    return {"nr_sec_page_table_pages": "pages", "min_seq": "", "max_seq": ""}.get(what, "calls")
