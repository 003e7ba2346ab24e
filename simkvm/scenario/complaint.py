"""What pydantic found, in words for the people who wrote the file."""

from __future__ import annotations

import re
from typing import Any

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from simkvm.scenario.errors import Keys, Problem, nearest
from simkvm.scenario.fields import shown
from simkvm.scenario.keys import below, shape_at, tag_value
from simkvm.scenario.schema import Scenario

EXPECTED = {
    "int_type": "a whole number",
    "int_from_float": "a whole number",
    "float_type": "a number",
    "string_type": "text",
    "bool_type": "true or false",
    "model_type": "a mapping",
    "dict_type": "a mapping",
    "tuple_type": "a list",
}
BOUNDS = {
    "greater_than_equal": ("at least", "ge"),
    "less_than_equal": ("at most", "le"),
    "greater_than": ("above", "gt"),
    "less_than": ("below", "lt"),
}
TAGS = ("pattern", "kind", "test")
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
    found = [(e, _problem(e, raw)) for e in errors if not _follows(e)]
    # `acces` is one slip, although `acces` is unknown and `access` missing.
    meant = {
        (*problem.keys[:-1], problem.hint)
        for detail, problem in found
        if detail["type"] == "extra_forbidden"
    }
    return [p for detail, p in found if detail["type"] != "missing" or p.keys not in meant]


def _follows(error: ErrorDetails) -> bool:
    """Whether the error is only the consequence of another one of the same mapping or list."""
    kind = error["type"]
    return kind == "default_factory_not_called" or (kind == "too_short" and bool(error["input"]))


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
        return _wrong_branch(keys, context, value)
    if kind == "model_attributes_type":
        return _no_branch(keys, value)
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


def _wrong_branch(keys: Keys, context: dict[str, Any], value: Any) -> Problem:
    tag = context["discriminator"].strip("'")
    names = ", ".join(_tags(keys, tag))
    if tag not in value:
        return Problem((*keys, tag), f"is missing, expected one of {names}")
    return _not_one_of((*keys, tag), value[tag], names)


def _no_branch(keys: Keys, value: object) -> Problem:
    shape = shape_at(keys, {}, Scenario)
    assert shape is not None
    assert shape.tag is not None
    hint = f"{{{shape.tag}: {value}}}" if value in _tags(keys, shape.tag) else None
    return Problem(keys, f"expects a mapping with {shape.tag}, not {shown(value)}", hint)


def _tags(keys: Keys, tag: str) -> list[str]:
    shape = shape_at(keys, {}, Scenario)
    assert shape is not None
    return [tag_value(branch, tag) for branch in shape.branches]


def _not_one_of(keys: Keys, value: object, expected: str) -> Problem:
    names = re.sub(" or ", ", ", expected).replace("'", "")
    hint = nearest(value, names.split(", ")) if isinstance(value, str) else None
    return Problem(keys, f"{shown(value)} is not one of {names}", hint)


def _keys(location: tuple[str | int, ...], raw: Any) -> Keys:
    """The keys in the document: pydantic's location without the names of union branches."""
    keys: list[str | int] = []
    arrived = True
    for part in location:
        is_tag = isinstance(raw, dict) and part in [raw.get(tag) for tag in TAGS]
        if part in ("<name>", "<change>", "[key]") or (arrived and is_tag):
            arrived = False
        elif isinstance(raw, dict | list):
            keys.append(part)
            raw = below(raw, part)
            arrived = True
    return tuple(keys)
