"""The key ``run`` of a sweep file: which of its points `simkvm run` makes, to be looked at first.

    run: {kernel: [linux-6.4, linux-6.4-yuzhao-v2], host.memory.size: 1 GiB}

Each entry names an axis of the sweep by its dotted key, and one or several of its values as the
file writes them; an axis that is not named keeps all of its values, and so does one that ``--set``
has changed. It is about the file, not about any scenario.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final

from simkvm.scenario.errors import InputError, Keys, Problem, nearest
from simkvm.scenario.expand import Axis, Scalar, spelled
from simkvm.scenario.override import COMMAND_LINE
from simkvm.units import measured_by

if TYPE_CHECKING:
    from simkvm.scenario.document import Document

KEY: Final = "run"
DESCRIPTION: Final = (
    "Which points of this sweep `simkvm run` makes: values of its axes, by dotted key. Without it "
    "only `simkvm sweep` runs the file."
)


def take_choice(document: Document) -> Any:
    """Take the key out of ``document``; returns what it says, None without it."""
    chosen = document.root.get(KEY)
    document.root = {key: value for key, value in document.root.items() if key != KEY}
    return chosen


def wanted(document: Document, chosen: Any, axes: Sequence[Axis]) -> Mapping[str, Sequence[Scalar]]:
    """The labels that ``chosen`` asks for, by axis. Raises InputError for what is no such thing."""
    by_name = {axis.name: axis for axis in axes}
    if not isinstance(chosen, dict) or not chosen:
        raise _error(document, (KEY,), "is a mapping from axes of the sweep to values")
    found: dict[str, list[Scalar]] = {}
    for name, values in chosen.items():
        if document.place(tuple(str(name).split("."))) == COMMAND_LINE:
            continue  # whoever runs it has chosen
        axis = by_name.get(str(name))
        if axis is None:
            known = ", ".join(by_name) or "there is none"
            hint = nearest(str(name), by_name)
            raise _error(document, (KEY, name), f"is no axis of this sweep: {known}", hint)
        labels = [axis.label(index) for index in range(len(axis.values))]
        found[axis.name] = [
            _label(document, (KEY, name), axis, labels, value)
            for value in (values if isinstance(values, list) else [values])
        ]
    return found


def _label(
    document: Document, keys: Keys, axis: Axis, labels: Sequence[Scalar], value: Any
) -> Scalar:
    for one, label in zip(axis.values, labels, strict=True):
        if value in (one, label):
            return label
    known = ", ".join(map(spelled, labels))
    try:
        hint = _nearest(spelled(value), [spelled(label) for label in labels])
    except InputError as error:  # a unit that is none
        raise _error(document, keys, error.message, error.hint) from None
    raise _error(document, keys, f"{spelled(value)} is no value of this axis: {known}", hint)


def _nearest(value: str, labels: Sequence[str]) -> str | None:
    """The label nearest by value where they are quantities, else by its letters."""
    parse = measured_by(labels[0])
    if parse is None or any(measured_by(label) is not parse for label in labels):
        return nearest(value, labels)
    wanted = parse(value)
    return min(labels, key=lambda label: abs(parse(label) - wanted))


def _error(document: Document, keys: Keys, message: str, hint: str | None = None) -> Exception:
    return document.place(keys).error(Problem(keys, message, hint))
