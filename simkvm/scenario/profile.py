"""Machine profiles in files of the user's own: the TOML of a shipped machine, at any path.

A scenario names one as ``machine: ./my-host.toml``, relative to its own folder; a name that ends in
``.toml`` is a path. Such a machine has to have every parameter that the shipped ones of its
architecture have, or a reason why not.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

from simkvm.scenario.errors import InputError, nearest
from simkvm.scenario.machine import (
    FLAGS,
    SHAPE,
    Machine,
    Parameter,
    check_same_parameters,
    parse_machine,
    shipped_machines,
)

SUFFIX = ".toml"


def is_path(name: object) -> bool:
    """Whether a machine's name is the path of a profile."""
    return isinstance(name, str) and name.endswith(SUFFIX)


def read_profile(path: str) -> Machine:
    """The machine in the file at ``path``. Raises InputError naming the file and the key."""
    file = Path(path)
    if not file.is_file():
        around = file.parent.glob(f"*{SUFFIX}") if file.parent.is_dir() else ()
        hint = nearest(file.name, sorted(other.name for other in around))
        raise InputError("no such machine profile", file=path, hint=hint)
    try:
        content = file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise InputError(f"is not UTF-8: {error.reason}", file=path) from error
    return _parsed(content, path)


@lru_cache(maxsize=8)  # a point asks several times; content, not the path, is what counts
def _parsed(content: str, path: str) -> Machine:
    machine = parse_machine(content, path)
    shipped = shipped_machines()
    known = {name for other in shipped.values() for name in other.parameters}
    for name in machine.parameters:
        if name not in known:
            key = f"parameters.{name}"
            raise InputError("no machine has it", file=path, key=key, hint=nearest(name, known))
    check_same_parameters(
        {**{f"machines/{name}.toml": other for name, other in shipped.items()}, path: machine}
    )
    return machine


def placed(document: dict[str, Any], folder: Path) -> dict[str, Any]:
    """The document of a scenario with the path of its profile, if it has one, made absolute."""
    reference = document.get("machine")
    if is_path(reference):
        return {**document, "machine": str(folder / str(reference))}
    if isinstance(reference, Mapping) and is_path(reference.get("base")):
        return {**document, "machine": {**reference, "base": str(folder / reference["base"])}}
    return document


def portable(reference: Any) -> Any:
    """A reference without the folder of a profile: what may be stored and passed on."""
    if is_path(reference):
        return Path(reference).name
    if isinstance(reference, Mapping) and is_path(reference.get("base")):
        return {**reference, "base": Path(reference["base"]).name}
    return reference


def stand_in(reference: Any, numbers: Mapping[str, Any]) -> Any:
    """A reference that needs no file: the shipped machine which has the most of ``numbers``.

    ``numbers`` is what a certificate keeps of a machine. Any other reference is returned as it is.
    """
    base = reference.get("base") if isinstance(reference, Mapping) else reference
    if not is_path(base):
        return reference
    alike = [one for one in shipped_machines().values() if one.arch == numbers["arch"]]
    wanted = set(numbers["parameters"].items())
    nearest_one = max(
        alike,
        key=lambda one: len(wanted & {(n, p.value) for n, p in one.parameters.items()}),
    )
    return {"base": nearest_one.name, "set": {}}


def to_toml(machine: Machine, head: str = "") -> str:
    """The machine as the text of a file that `read_profile` reads back unchanged.

    ``head`` is put before it, as comment lines.
    """
    lines = [f"# {line}".rstrip() for line in head.splitlines()]
    lines += ["" for _ in range(bool(lines))]
    for key in ("name", "title", "arch", *SHAPE, *FLAGS):
        lines.append(f"{key} = {_value(getattr(machine, key))}")
    for title, table in (
        ("sources", machine.sources),
        ("not_applicable", machine.not_applicable),
    ):
        lines += ["", f"[{title}]", *(f"{key} = {_value(text)}" for key, text in table.items())]
    for parameter in machine.parameters.values():
        lines += ["", *_parameter(parameter)]
    return "\n".join(lines) + "\n"


def _parameter(parameter: Parameter) -> list[str]:
    keys = ("value", "low", "high", "unit", "basis", "source")
    lines = [f"[parameters.{parameter.name}]"]
    lines += [f"{key} = {_value(getattr(parameter, key))}" for key in keys]
    if parameter.note:
        lines.append(f"note = {_value(parameter.note)}")
    return lines


def _value(value: str | float | bool) -> str:
    """A TOML value: a basic string of JSON's escapes, a boolean or a number."""
    if isinstance(value, str):
        # TOML knows JSON's escapes but not its surrogate pairs, and takes any text as it is.
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, float) and value.is_integer() and abs(value) < 2**53:
        return f"{int(value)}.0"
    return repr(value)
