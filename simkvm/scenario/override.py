"""Values set from outside the file: ``--set guests.vm0.vcpus=8``.

The value is YAML, so lists sweep as they do in a file. Below a machine or kernel that the file
only names, a setting turns the name into a change of it (``kernel.set.table_free=inline``); below
a value that the file sweeps, it changes each of the swept values.
"""

from __future__ import annotations

from typing import Any

from simkvm.scenario.document import Document, Place, parse_value
from simkvm.scenario.errors import InputError, Keys, Problem, nearest
from simkvm.scenario.keys import Shape, below, shape_of
from simkvm.scenario.schema import Scenario

COMMAND_LINE = Place("--set")


def apply_setting(document: Document, setting: str) -> None:
    """Change `document` as ``KEY=VALUE`` says.

    Raises InputError (file ``--set``, no line) if that is not the form, the key is not in the
    schema, or it names a guest or contender that the file does not have.
    """
    key, equals, text = setting.partition("=")
    names = key.strip().split(".")
    if not equals or not all(names):
        raise InputError(f"{setting!r} is not of the form KEY=VALUE", file=COMMAND_LINE.file)
    value = parse_value(text, COMMAND_LINE, tuple(names))
    _Setting(document, names, value).apply()


class _Setting:
    """One setting on its way down the document."""

    def __init__(self, document: Document, names: list[str], value: Any) -> None:
        self.document = document
        self.names = names
        self.value = value
        self.places: list[Keys] = []

    def apply(self) -> None:
        self.document.root = self._changed(self.document.root, Scenario, 0, ())
        for keys in self.places:
            self.document.put(keys, COMMAND_LINE)

    def _changed(self, raw: Any, annotation: Any, depth: int, keys: Keys) -> Any:
        """What `raw` becomes; `keys` lead to it in the document, `depth` names were used up."""
        if depth == len(self.names):
            self.places.append(keys)
            return self.value
        shape = shape_of(annotation)
        if isinstance(raw, list) and shape.items is None:
            return [
                self._changed(item, annotation, depth, (*keys, index))
                for index, item in enumerate(raw)
            ]
        raw = self._container(raw, shape, depth)
        name = self._name(raw, shape, depth)
        inner = self._changed(below(raw, name), shape.child(None, name), depth + 1, (*keys, name))
        if isinstance(raw, list):
            return [inner if index == name else item for index, item in enumerate(raw)]
        return {**raw, name: inner}

    def _container(self, raw: Any, shape: Shape, depth: int) -> Any:
        if isinstance(raw, dict | list):
            return raw
        if raw is None and (shape.branches or shape.names is not None):
            return {}
        if isinstance(raw, str) and "base" in shape.children(None):
            return {"base": raw}
        raise self._error(depth, "has no keys below it")

    def _name(self, raw: Any, shape: Shape, depth: int) -> str | int:
        name = self.names[depth]
        if shape.items is not None:
            if not (isinstance(raw, list) and name.isdecimal() and int(name) < len(raw)):
                raise self._error(depth + 1, "is not a position in this list: they count from 0")
            return int(name)
        if shape.names is not None:
            # A whole new guest or contender may be set, a key of one that is not there may not.
            if depth + 1 < len(self.names) and name not in raw:
                hint = nearest(name, raw)
                raise self._error(depth + 1, "is not in the file", hint)
        elif name not in shape.children(None):
            raise self._unknown(shape, depth)
        return name

    def _unknown(self, shape: Shape, depth: int) -> InputError:
        known = shape.children(None)
        hint = nearest(self.names[depth], known)
        message = "unknown key" if hint else f"unknown key, expected one of {', '.join(known)}"
        return self._error(depth + 1, message, hint)

    def _error(self, depth: int, message: str, hint: str | None = None) -> InputError:
        return COMMAND_LINE.error(Problem(tuple(self.names[:depth]), message, hint))
