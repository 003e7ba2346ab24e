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
    """A machine constant in the parameter's unit, or a key of a workload as a scenario spells it,
    and how it was found.
    """

    name: str
    value: Any
    how: str


@dataclass(frozen=True)
class Host:
    """One host: ``shape`` is what the message says of it, ``fitted`` what its fit rows gave.

    ``shared`` are constants that the base has from measurements of the same message, and how.
    ``assumed`` is what the message leaves open, and why it is as it is here.
    ``fitted_workload`` is what of the program that ran there was fitted to the same rows.
    """

    name: str
    title: str
    base: str
    rows: tuple[str, ...]
    fit: tuple[tuple[str, str, str], ...]
    shape: dict[str, float]
    fitted: tuple[Fitted, ...]
    shared: dict[str, str]
    assumed: tuple[str, ...]
    fitted_workload: tuple[Fitted, ...]

    @property
    def workload(self) -> dict[str, Any]:
        """Keys of the workload that were fitted."""
        return {fitted.name: fitted.value for fitted in self.fitted_workload}

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
    return Host(
        name=name,
        title=table["title"],
        base=table["base"],
        rows=tuple(table["rows"]),
        fit=tuple((id_, metric, arm) for id_, metric, arm in table["fit"]),
        shape=table.get("shape", {}),
        fitted=_fitted(table.get("set", {})),
        shared=table.get("shared", {}),
        assumed=tuple(table.get("assumed", ())),
        fitted_workload=_fitted(table.get("workload", {})),
    )


def _fitted(entries: dict[str, Any]) -> tuple[Fitted, ...]:
    return tuple(Fitted(name, *entry) for name, entry in entries.items())
