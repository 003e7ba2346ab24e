"""Does a stored point come out again? Its birth certificate is run, and the two are compared."""

from __future__ import annotations

import copy
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from glob import escape
from pathlib import Path
from typing import Any

from simkvm.scenario.errors import InputError
from simkvm.scenario.kernel import load_kernel
from simkvm.scenario.load import MODEL_VERSION, require_possible
from simkvm.scenario.machine import FLAGS, SHAPE, load_machine
from simkvm.scenario.profile import stand_in
from simkvm.scenario.recordings import Recordings, replays
from simkvm.scenario.schema import Scenario
from simkvm.study.point import SIMULATE, kernel_policies, machine_numbers, run_point
from simkvm.study.store import plain, read_document

Folder = str | os.PathLike[str]


@dataclass(frozen=True)
class Difference:
    """One thing that did not come out again; None where there is nothing of that name."""

    name: str
    stored: Any
    found: Any


def verify(
    result_folder: Folder, traces: Sequence[Folder] = (".",), simulate: str = SIMULATE
) -> list[Difference]:
    """Run a stored point again from its certificate, and say what came out otherwise.

    Compared are the model's version, the fingerprint, the violations and every figure of the
    summary; an empty list means that the point was reproduced. Machine and kernel are those of the
    certificate, whatever the package's files say by now. A trace is looked for anywhere under the
    folders `traces`, by its base name and digest.

    Raises Damaged if the folder is no whole point, and InputError if a trace is not found or the
    machine or kernel is not what it was and cannot be made so.
    """
    document = read_document(Path(result_folder))
    certificate = document["certificate"]
    record = run_point(certified(certificate, traces), simulate)
    stored = {
        "model_version": certificate["model_version"],
        "fingerprint": certificate["fingerprint"],
        "violations": document["violations"],
        **document["summary"],
    }
    found = {
        "model_version": MODEL_VERSION,
        "fingerprint": record.fingerprint,
        "violations": plain(record.violations),
        **plain(record.summary),
    }
    names = (name for name in {**stored, **found} if stored.get(name) != found.get(name))
    return [Difference(name, stored.get(name), found.get(name)) for name in names]


def certified(certificate: Mapping[str, Any], traces: Sequence[Folder] = (".",)) -> Scenario:
    """The scenario that a certificate stands for, ready to run. Raises InputError as `verify`."""
    content = copy.deepcopy(certificate["scenario"])
    content["machine"] = _machine(content["machine"], certificate["machine"])
    content["kernel"] = _kernel(content["kernel"], certificate["kernel"])
    for _, access in replays(content):
        access["file"] = str(_trace(access["file"], access["sha256"], traces))
    scenario = Scenario.model_validate(content)
    require_possible(scenario)
    return scenario


def _machine(reference: Any, wanted: Mapping[str, Any]) -> Any:
    """A reference that gives the wanted numbers: the same one, unless the shipped file changed.

    A profile of the user's own need not be there any more.
    """
    reference = stand_in(reference, wanted)
    today = machine_numbers(load_machine(reference))
    changes = _changes({name: wanted[name] for name in (*FLAGS, *SHAPE)}, today)
    changes |= _changes(wanted["parameters"], today["parameters"])
    return _changed(reference, changes)


def _kernel(reference: Any, wanted: Mapping[str, Any]) -> Any:
    today = kernel_policies(load_kernel(reference))
    return _changed(reference, _changes(wanted["policies"], today["policies"]))


def _changes(wanted: Mapping[str, Any], today: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in wanted.items() if value != today.get(name)}


def _changed(reference: Any, changes: Mapping[str, Any]) -> Any:
    if not changes:
        return reference
    if isinstance(reference, str):
        return {"base": reference, "set": dict(changes)}
    return {"base": reference["base"], "set": {**reference["set"], **changes}}


def _trace(name: str, digest: str, folders: Sequence[Folder]) -> Path:
    recordings = Recordings()
    for path in _called(name, folders):
        try:
            header = recordings.header(str(path))
        except InputError:
            continue  # something else of that name
        if header.sha256 == digest:
            return path
    places = ", ".join(map(str, folders))
    raise InputError(f"no trace {name} with digest {digest[:12]}... under {places}")


def _called(name: str, folders: Sequence[Folder]) -> Iterator[Path]:
    for folder in folders:
        yield from sorted(Path(folder).rglob(escape(Path(name).name)))
