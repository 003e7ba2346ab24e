"""The TOML files that ship with the package: their names, their reading, references to them.

Machines and kernel variants are data. Both are named in a scenario either by name, or as
``{base: NAME, set: {KEY: VALUE}}``; both are checked here in the same words, so that an error
in either names the file and the key.
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterable, Mapping
from importlib import resources
from typing import Any, TypeVar

from simkvm.scenario.errors import InputError, nearest

T = TypeVar("T")

Reference = str | Mapping[str, Any]
"""A name, or a mapping with ``base`` and ``set``."""


def names(folder: str) -> list[str]:
    """Names of the files in ``folder`` ("machines" or "kernels"), sorted, without ``.toml``."""
    files = (entry.name for entry in resources.files("simkvm.scenario").joinpath(folder).iterdir())
    return sorted(name.removesuffix(".toml") for name in files if name.endswith(".toml"))


def text(folder: str, name: str) -> str:
    """Content of one shipped file."""
    entry = resources.files("simkvm.scenario").joinpath(folder, f"{name}.toml")
    return entry.read_text(encoding="utf-8")


def parse(content: str, file: str) -> dict[str, Any]:
    """Parse TOML. Raises `InputError` with file, line and column."""
    try:
        return tomllib.loads(content)
    except tomllib.TOMLDecodeError as error:
        # Before Python 3.14 the position is only in the text of the message.
        place = re.search(r" \(at line (\d+), column (\d+)\)$", str(error))
        raise InputError(
            str(error)[: place.start()] if place else str(error),
            file=file,
            line=int(place[1]) if place else None,
            column=int(place[2]) if place else None,
        ) from error


def split(ref: Reference, kind: str, shipped: Iterable[str]) -> tuple[str, dict[str, Any]]:
    """Split a reference into the base's name and the keys it sets.

    ``kind`` ("machine" or "kernel") is the scenario's key, named in errors. Raises `InputError`
    for a base that is not shipped and for any other key than ``base`` and ``set``.
    """
    if isinstance(ref, str):
        return known(ref, shipped, f"unknown {kind}", key=kind), {}
    if not isinstance(ref, Mapping):
        raise InputError(f"expected a name or a mapping, not {ref!r}", key=kind)
    for key in ref:
        known(key, ("base", "set"), "unknown key", key=f"{kind}.{key}")
    base, changes = ref.get("base"), ref.get("set")
    if not isinstance(base, str):
        raise InputError(f"expected the name of a {kind}, not {base!r}", key=f"{kind}.base")
    if not isinstance(changes, Mapping | None):
        raise InputError(f"expected a mapping, not {changes!r}", key=f"{kind}.set")
    return known(base, shipped, f"unknown {kind}", key=f"{kind}.base"), dict(changes or {})


def known(
    word: object,
    candidates: Iterable[str],
    complaint: str,
    *,
    key: str | None,
    file: str | None = None,
) -> str:
    """Return ``word`` if it is a candidate, else raise `InputError` with the nearest one."""
    pool = list(candidates)
    if isinstance(word, str) and word in pool:
        return word
    hint = nearest(str(word), pool)
    choice = "" if hint else f", expected one of {', '.join(pool)}"
    raise InputError(f"{complaint} {str(word)!r}{choice}", file=file, key=key, hint=hint)


class Table:
    """One TOML table under check: every taken value has its type, no key is left over."""

    def __init__(self, content: Mapping[str, Any], file: str, path: str = "") -> None:
        self.file = file
        self.path = path
        self._left = dict(content)

    def take(self, key: str, kind: type[T], default: T | None = None) -> T:
        """Take one value of type ``kind``; without a default the key is required."""
        if key not in self._left:
            if default is not None:
                return default
            raise self.error(key, "missing")
        value: object = self._left.pop(key)
        # bool is an int and an int is a number to Python; neither is a slip that helps here.
        if kind is float and type(value) is int:
            value = float(value)
        if type(value) is not kind:
            raise self.error(key, f"expected {kind.__name__}, not {value!r}")
        if isinstance(value, str) and not value.strip():
            raise self.error(key, "is empty")
        return value

    def take_choice(self, key: str, choices: Iterable[str]) -> str:
        """Take a string that is one of ``choices``."""
        value = self.take(key, str)
        return known(value, choices, "unknown value", key=self.path + key, file=self.file)

    def take_table(self, key: str) -> Table:
        """Take a table within this one."""
        return Table(self.take(key, dict), self.file, f"{self.path}{key}.")

    def remaining(self) -> list[str]:
        """Keys that have not been taken yet, in file order."""
        return list(self._left)

    def finish(self) -> None:
        """Raise `InputError` for a key that nobody took."""
        for key in self._left:
            raise self.error(key, "unknown key")

    def error(self, key: str, message: str) -> InputError:
        """Make an error about ``key``, with the file and the key's full path."""
        return InputError(message, file=self.file, key=self.path + key)
