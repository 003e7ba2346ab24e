"""What pydantic found, in words for the people who wrote the file."""

from __future__ import annotations

import re
from typing import Any

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from simkvm.scenario.errors import Keys, Problem, nearest
from simkvm.scenario.fields import shown
from simkvm.scenario.keys import below, shape_at
from simkvm.scenario.schema import Scenario

EXPECTED = {
    "int_type": "a whole number",
    "int_from_float": "a whole number",
    "float_type": "a number",
    "string_type": "text",
    "bool_type": "true or false",
    "model_type": "a mapping",
    "model_attributes_type": "a mapping",
    "dict_type": "a mapping",
    "tuple_type": "a list",
}
BOUNDS = {
    "greater_than_equal": ("at least", "ge"),
    "less_than_equal": ("at most", "le"),
    "greater_than": ("above", "gt"),
    "less_than": ("below", "lt"),
}
FIXED = {
    "missing": "is missing",
    "too_short": "must not be empty",
    "string_too_short": "must not be empty",
    "string_pattern_mismatch": "must be 64 hexadecimal digits",
    "finite_number": "must be finite",
}


def problems(error: ValidationError, raw: dict[str, Any]) -> list[Problem]:
    """Everything pydantic found in the document `raw` of one point."""
    errors = error.errors(include_url=False)
    # A default that could not be computed follows from another error of the same mapping.
    found = [(e, _problem(e, raw)) for e in errors if e["type"] != "default_factory_not_called"]
    # `acces` is one slip, although `acces` is unknown and `access` missing.
    meant = {
        (*problem.keys[:-1], problem.hint)
        for detail, problem in found
        if detail["type"] == "extra_forbidden"
    }
    return [p for detail, p in found if detail["type"] != "missing" or p.keys not in meant]


def _problem(error: ErrorDetails, raw: dict[str, Any]) -> Problem:
    keys = _keys(error["loc"], raw)
    kind, context, value = error["type"], error.get("ctx", {}), error["input"]
    if kind == "simkvm":
        return Problem(keys, context["message"], context["hint"])
    if kind == "extra_forbidden":
        return _unknown_key(keys, raw)
    if kind == "literal_error":
        return _not_one_of(keys, value, context["expected"])
    if kind in ("union_tag_invalid", "union_tag_not_found"):
        return _wrong_branch(keys, kind, context, value)
    return Problem(keys, _message(kind, context, value) or error["msg"])


def _message(kind: str, context: dict[str, Any], value: object) -> str | None:
    if kind in EXPECTED:
        return f"expects {EXPECTED[kind]}, not {shown(value)}"
    if kind in BOUNDS:
        words, name = BOUNDS[kind]
        return f"must be {words} {context[name]:g}, not {shown(value)}"
    return FIXED.get(kind)


def _unknown_key(keys: Keys, raw: dict[str, Any]) -> Problem:
    parent = raw
    for name in keys[:-1]:
        parent = below(parent, name)
    shape = shape_at(keys[:-1], raw, Scenario)
    assert shape is not None
    known = shape.children(parent)
    hint = nearest(str(keys[-1]), known)
    owner = f" of {shape.tag} {parent[shape.tag]}" if shape.tag else ""
    choice = "" if hint else f", expected one of {', '.join(known)}"
    return Problem(keys, f"unknown key{owner}{choice}", hint)


def _wrong_branch(keys: Keys, kind: str, context: dict[str, Any], value: object) -> Problem:
    tag = context["discriminator"].strip("'")
    if not isinstance(value, dict):
        return Problem(keys, f"expects a mapping with {tag}, not {shown(value)}")
    shape = shape_at(keys, {}, Scenario)
    assert shape is not None
    names = ", ".join(str(b.model_fields[tag].default) for b in shape.branches)  # type: ignore[attr-defined]
    if kind == "union_tag_not_found":
        return Problem((*keys, tag), f"is missing, expected one of {names}")
    return _not_one_of((*keys, tag), value[tag], names)


def _not_one_of(keys: Keys, value: object, expected: str) -> Problem:
    names = re.sub(" or ", ", ", expected).replace("'", "")
    hint = nearest(value, names.split(", ")) if isinstance(value, str) else None
    return Problem(keys, f"{shown(value)} is not one of {names}", hint)


def _keys(location: tuple[str | int, ...], raw: Any) -> Keys:
    """The keys in the document: pydantic's location without the names of union branches."""
    keys: list[str | int] = []
    arrived = True
    for part in location:
        is_tag = isinstance(raw, dict) and part in (raw.get("pattern"), raw.get("kind"))
        if part in ("<name>", "<change>", "[key]") or (arrived and is_tag):
            arrived = False
        elif isinstance(raw, dict | list):
            keys.append(part)
            raw = below(raw, part)
            arrived = True
    return tuple(keys)
