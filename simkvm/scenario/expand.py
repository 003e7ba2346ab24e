"""Sweeps: a list where the schema wants one value stands for one point a value.

Several lists give the cartesian product, in file order, the first axis slowest.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from simkvm.scenario.document import Document
from simkvm.scenario.errors import InputError, Keys, Problem
from simkvm.scenario.keys import Shape, shape_of
from simkvm.scenario.profile import portable
from simkvm.scenario.schema import Scenario

MOST_POINTS = 100_000
Scalar = str | int | float | bool | None
Choice = Mapping[Keys, int]
"""Which of its values a point takes, by the keys of the axis."""


@dataclass(frozen=True)
class Axis:
    """One swept key and its values, in file order."""

    keys: Keys
    values: tuple[Any, ...]

    @property
    def name(self) -> str:
        """The dotted key, ``guests.vm0.vcpus``."""
        return ".".join(map(str, self.keys))

    def label(self, index: int) -> Scalar:
        """A value as written; a mapping or list as one line of YAML.

        Of mappings, what they all have in common is left out, but for the base of a change.
        """
        value = self.values[index]
        if all(isinstance(one, dict) for one in self.values):
            kept = {k: v for k, v in value.items() if k == "base" or not self._common(k)}
            return spelled(kept or value)
        return spelled(value) if isinstance(value, dict | list) else value

    def _common(self, key: Any) -> bool:
        first = self.values[0]
        return all(key in one and one[key] == first.get(key) for one in self.values)


def find_axes(document: Document) -> tuple[Axis, ...]:
    """Every swept key of the document, in file order.

    Raises InputError for an empty list, a value that is there twice, a sweep inside a swept
    value, or more than `MOST_POINTS` points in all.
    """
    axes = tuple(_axes(document, document.root, Scenario, (), within=None))
    points = math.prod(len(axis.values) for axis in axes)
    if points > MOST_POINTS:
        longest = max(axes, key=lambda axis: len(axis.values))
        message = f"the sweep has {points} points, more than {MOST_POINTS}"
        raise document.place(longest.keys).error(Problem(longest.keys, message))
    return axes


def _axes(
    document: Document, raw: Any, annotation: Any, keys: Keys, within: Keys | None
) -> Iterator[Axis]:
    shape = shape_of(annotation)
    if isinstance(raw, list) and shape.sweepable:
        if within is not None:
            raise _refused(document, keys, "is a sweep inside a swept value: sweep one of the two")
        yield _axis(document, raw, keys)
        for index, item in enumerate(raw):
            # Nothing is yielded here: a list inside a swept value is an error.
            yield from _axes(document, item, annotation, (*keys, index), within=keys)
        return
    for name, item in _entries(raw, shape):
        inner = shape.child(raw, name)
        if inner is not None:
            yield from _axes(document, item, inner, (*keys, name), within)


def _entries(raw: Any, shape: Shape) -> Iterator[tuple[str | int, Any]]:
    if isinstance(raw, dict):
        yield from raw.items()
    elif isinstance(raw, list) and shape.items is not None:
        yield from enumerate(raw)


def _axis(document: Document, values: list[Any], keys: Keys) -> Axis:
    if not values:
        raise _refused(document, keys, "is an empty list: a sweep needs at least one value")
    seen = set()
    for index, value in enumerate(values):
        # Results keep a profile's name and not its folder. 1 and true are equal to Python, but not
        # to a reader of the file.
        kept = spelled(portable(value) if keys == ("machine",) else value)
        known = (type(value), kept)
        if known in seen:
            alike = "" if kept == spelled(value) else f": results would call both {kept}"
            raise _refused(document, (*keys, index), f"{spelled(value)} is there twice{alike}")
        seen.add(known)
    return Axis(keys, tuple(values))


def _refused(document: Document, keys: Keys, message: str) -> InputError:
    return document.place(keys).error(Problem(keys, message))


def product(axes: Sequence[Axis]) -> Iterator[Choice]:
    """The choice of every point, the first axis slowest."""
    keys = [axis.keys for axis in axes]
    for indices in itertools.product(*(range(len(axis.values)) for axis in axes)):
        yield dict(zip(keys, indices, strict=True))


def star(axes: Sequence[Axis]) -> Iterator[Choice]:
    """Choices in which every value of every axis occurs, as few as possible."""
    first = {axis.keys: 0 for axis in axes}
    yield first
    for axis in axes:
        for index in range(1, len(axis.values)):
            yield {**first, axis.keys: index}


def point(root: dict[str, Any], axes: Sequence[Axis], choice: Choice) -> dict[str, Any]:
    """The document of one point; it shares with `root` what no axis touches."""
    for axis in axes:
        root = _replaced(root, axis.keys, axis.values[choice[axis.keys]])
    return root


def _replaced(node: Any, keys: Keys, value: Any) -> Any:
    if not keys:
        return value
    node = node.copy()
    node[keys[0]] = _replaced(node[keys[0]], keys[1:], value)
    return node


def source(keys: Keys, choice: Choice) -> Keys:
    """The keys in the file of what stands at `keys` in one point."""
    for length in range(len(keys) + 1):
        if keys[:length] in choice:
            return (*keys[:length], choice[keys[:length]], *keys[length:])
    return keys


def spelled(value: Any) -> str:
    """The value as one line of YAML."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key}: {spelled(item)}" for key, item in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(spelled, value)) + "]"
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return str(value)
