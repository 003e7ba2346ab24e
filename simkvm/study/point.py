"""One point of a study: run it, and say in its birth certificate what exactly was run."""

from __future__ import annotations

import os
import platform
import subprocess
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from datetime import UTC, datetime
from functools import cache
from importlib import import_module, metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from simkvm.scenario.kernel import KernelVariant, load_kernel
from simkvm.scenario.load import MODEL_VERSION, identity, resolved
from simkvm.scenario.machine import FLAGS, Machine, Parameter, load_machine
from simkvm.scenario.profile import portable
from simkvm.scenario.recordings import Recordings, replays
from simkvm.study.store import SCHEMA_VERSION

if TYPE_CHECKING:
    from simkvm.observe.record import Record
    from simkvm.scenario.schema import Scenario

SIMULATE = "simkvm.kernel.world:simulate"
"""The simulation, by name: workers import it themselves, and importing a study does not."""

KEY_DIGITS = 32

LIBRARIES = ("simkvm", "simpy", "numpy", "pandas", "pyarrow", "pydantic")


def key_of(scenario: Scenario) -> str:
    """The name of a point in a store: the first 32 hex digits of the scenario's identity."""
    return identity(scenario)[:KEY_DIGITS]


def run_point(scenario: Scenario, simulate: str = SIMULATE) -> Record:
    """Simulate a scenario on its machine and kernel.

    `simulate` is "module:function", called with scenario, machine and kernel. Raises InputError for
    a machine or kernel that does not exist.
    """
    world = _named(simulate)
    return world(scenario, load_machine(scenario.machine), load_kernel(scenario.kernel))


def measure(
    scenario: Scenario, axes: Mapping[str, Any] | None = None, simulate: str = SIMULATE
) -> tuple[Record, dict[str, Any]]:
    """Simulate a scenario; its record and its birth certificate.

    The certificate also has `parameters_read`: which of the machine's parameters the run asked for.
    No other one can have a part in its result.
    """
    machine, asked = noting(load_machine(scenario.machine))
    started = time.perf_counter()
    record = _named(simulate)(scenario, machine, load_kernel(scenario.kernel))
    wall_s = time.perf_counter() - started
    born = certificate(scenario, record.fingerprint, wall_s, axes or {})
    return record, {**born, "parameters_read": sorted(asked)}


class _Noted(dict[str, Parameter]):
    """Parameters that note in `asked` which of them somebody looks up."""

    def __init__(self, parameters: Mapping[str, Parameter]) -> None:
        super().__init__(parameters)
        self.asked: set[str] = set()

    def __getitem__(self, name: str) -> Parameter:
        self.asked.add(name)
        return super().__getitem__(name)


def noting(machine: Machine) -> tuple[Machine, set[str]]:
    """The same machine, and a set that fills with the names of the parameters that it is asked
    for.
    """
    noted = _Noted(machine.parameters)
    return replace(machine, parameters=noted), noted.asked


def certificate(
    scenario: Scenario, fingerprint: str, wall_s: float, axes: Mapping[str, Any]
) -> dict[str, Any]:
    """Everything that is needed to run the point again and to know whether it came out the same.

    `scenario`, `machine` and `kernel` are the resolved parameters, with every number and policy, so
    that the point can be run again after the files of the package have changed. `git_commit` is
    null unless the package runs from its own git checkout, and `git_dirty` says whether its files
    differed from that commit. No path and no name of a host is in it.
    """
    return {
        "key": key_of(scenario),
        "model_version": MODEL_VERSION,
        "schema_version": SCHEMA_VERSION,
        "scenario": _portable(scenario),
        "machine": machine_numbers(load_machine(scenario.machine)),
        "kernel": kernel_policies(load_kernel(scenario.kernel)),
        "seed": scenario.seed,
        "replication": scenario.replication,
        "axes": dict(axes),
        "fingerprint": fingerprint,
        "versions": dict(_versions()),
        **_checkout(),
        "wall_s": round(wall_s, 6),
        "finished_utc": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def _portable(scenario: Scenario) -> dict[str, Any]:
    """Every key of the scenario, without folders: base names, and digests for its traces."""
    content = resolved(scenario)
    content["machine"] = portable(content["machine"])
    recordings = Recordings()
    for _, access in replays(content):
        access["sha256"] = access["sha256"] or recordings.header(access["file"]).sha256
        access["file"] = Path(access["file"]).name
    return content


def machine_numbers(machine: Machine) -> dict[str, Any]:
    """Shape, features and every cost of a machine, as numbers."""
    shape = {name: getattr(machine, name) for name in ("name", "arch", "cores", "nodes", "ghz")}
    flags = {name: getattr(machine, name) for name in FLAGS}
    parameters = {name: parameter.value for name, parameter in machine.parameters.items()}
    return {**shape, **flags, "parameters": parameters}


def kernel_policies(kernel: KernelVariant) -> dict[str, Any]:
    """Every policy of a kernel, as its value."""
    policies = {name: policy.value for name, policy in kernel.policies.items()}
    return {"name": kernel.name, "arch": kernel.arch, "policies": policies}


@cache
def _versions() -> tuple[tuple[str, str | None], ...]:
    return (("python", platform.python_version()), *((name, _version(name)) for name in LIBRARIES))


def _version(library: str) -> str | None:
    try:
        return metadata.version(library)
    except metadata.PackageNotFoundError:
        return None


@cache  # a subprocess a point would cost more than a small point does
def _checkout() -> Mapping[str, Any]:
    """Commit and state of the package's own checkout, not of one that it is installed into."""
    package = Path(__file__).parents[1]
    commit = _git(package, "rev-parse", "HEAD")
    tracked = _git(package, "ls-files", "--error-unmatch", "__init__.py")
    if commit is None or tracked is None:
        return {"git_commit": None, "git_dirty": None}
    changed = _git(package, "status", "--porcelain", "--", ".")
    return {"git_commit": commit, "git_dirty": changed != ""}


def _git(folder: Path, *arguments: str) -> str | None:
    """What git says, or None if it is not there or refuses."""
    # A hook's GIT_DIR would point git at another repository.
    environment = {name: value for name, value in os.environ.items() if name[:4] != "GIT_"}
    command = ["git", "-C", str(folder), *arguments]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()


def _named(name: str) -> Callable[[Scenario, Machine, KernelVariant], Record]:
    module, _, function = name.partition(":")
    return cast(
        "Callable[[Scenario, Machine, KernelVariant], Record]",
        getattr(import_module(module), function),
    )
