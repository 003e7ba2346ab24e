"""The machines behind published figures: a shipped profile each, its shape and what was fitted.

A constant that nobody published for a host can only come from measurements on it. Which rows it was
taken from stands beside it (``data/hosts.toml``), and those rows are called "fit" ever after.
"""

from __future__ import annotations

import tomllib
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import cache
from importlib import resources
from typing import Any


@dataclass(frozen=True)
class Fitted:
    """A machine constant, in the parameter's unit, and how it was found."""

    name: str
    value: float
    how: str


@dataclass(frozen=True)
class Host:
    """One host: ``shape`` is what the message says of it, ``fitted`` what its fit rows gave.

    ``shared`` are constants that the base has from measurements of the same message, and how.
    ``workload`` is what of the program that ran there was fitted to the same rows.
    """

    name: str
    title: str
    base: str
    rows: tuple[str, ...]
    fit: tuple[tuple[str, str, str], ...]
    shape: dict[str, float]
    fitted: tuple[Fitted, ...]
    shared: dict[str, str]
    workload: dict[str, Any]

    def machine(self, **scaled: float) -> dict[str, Any]:
        """As a scenario names it; ``scaled`` replaces what a smaller run has to shrink."""
        constants = {constant.name: constant.value for constant in self.fitted}
        return {"base": self.base, "set": {**self.shape, **constants, **scaled}}

    def fitted_to(self, id_: str, metric: str, arm: str) -> bool:
        """Whether a row is among those that constants were fitted to."""
        row = (id_, metric, arm)
        return any(all(map(fnmatchcase, row, pattern)) for pattern in self.fit)


def data(name: str) -> str:
    """The text of a file that ships beside this module."""
    return resources.files("simkvm.validate").joinpath("data", name).read_text(encoding="utf-8")


@cache
def hosts() -> tuple[Host, ...]:
    """All of them, in the order of the file."""
    return tuple(_host(name, table) for name, table in tomllib.loads(data("hosts.toml")).items())


def host_of(id_: str) -> Host:
    """The host of the row ``id_``. Raises KeyError for a row that none claims."""
    for host in hosts():
        if any(fnmatchcase(id_, pattern) for pattern in host.rows):
            return host
    raise KeyError(id_)


def _host(name: str, table: dict[str, Any]) -> Host:
    constants = tuple(Fitted(key, *entry) for key, entry in table.get("set", {}).items())
    return Host(
        name=name,
        title=table["title"],
        base=table["base"],
        rows=tuple(table["rows"]),
        fit=tuple((id_, metric, arm) for id_, metric, arm in table["fit"]),
        shape=table.get("shape", {}),
        fitted=constants,
        shared=table.get("shared", {}),
        workload={key: value for key, (value, _) in table.get("workload", {}).items()},
    )
