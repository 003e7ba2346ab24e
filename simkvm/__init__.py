"""simkvm: a performance simulator of MGLRU page ageing over KVM guests.

    study = simkvm.load("scenario.yaml", set=["guests.vm0.vcpus=8"])
    result = simkvm.run(study)
    result.locks, result.plot_lock()

    results = simkvm.sweep("sweep.yaml", jobs=2)
    results.summary, results.plot_deferred()

Names are loaded when they are first used: importing the package imports nothing else.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from simkvm.api import (
        kernels,
        load,
        machines,
        open_result,
        open_results,
        run,
        sensitivity,
        sweep,
        verify,
        workloads,
    )
    from simkvm.scenario.errors import InputError
    from simkvm.scenario.schema import Scenario
    from simkvm.study.result import Result, Results

__all__ = [
    "InputError",
    "Result",
    "Results",
    "Scenario",
    "kernels",
    "load",
    "machines",
    "open_result",
    "open_results",
    "run",
    "sensitivity",
    "sweep",
    "verify",
    "workloads",
]

_HOME = {
    "InputError": "simkvm.scenario.errors",
    "Result": "simkvm.study.result",
    "Results": "simkvm.study.result",
    "Scenario": "simkvm.scenario.schema",
}


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOME.get(name, "simkvm.api")), name)


def __dir__() -> list[str]:
    return __all__
