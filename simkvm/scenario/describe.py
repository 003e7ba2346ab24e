"""The schema for people and for editors: what every key means, and a JSON Schema.

A key is written as in a file, with any word for a guest's or contender's name and any number for
a phase: ``guests.vm0.access.phases.0.touches``. The end of a key is enough if it says which.
"""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from pydantic import BaseModel

from simkvm.scenario import first
from simkvm.scenario.errors import InputError, nearest
from simkvm.scenario.expand import spelled
from simkvm.scenario.keys import Key, Shape, keys_of, models, shape_of, tag_value
from simkvm.scenario.schema import Scenario
from simkvm.units import exact_duration, exact_rate, exact_size

WIDTH = 88
TAGS = {
    "pattern": "Which pattern of access this is.",
    "kind": "Which contender this is.",
    "test": "Which selftest this is.",
}
TYPES = {
    "integer": "whole number",
    "number": "number",
    "boolean": "true or false",
    "string": "text",
    "null": "null",
}
BOUNDS = {"minimum": "at least", "exclusiveMinimum": "above", "maximum": "at most"}
QUANTITIES = {"64 MiB": "size", "250 us": "duration", "200 / s": "rate"}
EXACT: dict[str, Any] = {"size": exact_size, "duration": exact_duration, "rate": exact_rate}


@dataclass(frozen=True)
class Entry:
    """One key of the schema; a key that several patterns or kinds share is one entry.

    ``schema``: its part of the JSON Schema, without sweeps. ``owners``: the mappings it is in.
    """

    name: str
    key: Key
    schema: dict[str, Any]
    owners: tuple[type, ...]


def explain(key: str) -> str:
    """What a key means: description, type, range, default, whether it can be swept.

    Raises InputError for a key that the schema does not have, with the nearest one.
    """
    wanted = key.strip().split(".")
    if wanted == [first.KEY]:
        return f"{first.KEY}\n  {first.DESCRIPTION}"
    found = [entry for entry in _entries() if _matches(entry.name.split("."), wanted)]
    if not found and any(_matches(name.split(".")[: len(wanted)], wanted) for name in key_names()):
        return explain(".".join(wanted[:-1]))  # a free name: what may be under it
    if not found:
        known = key_names()
        hint = nearest(key, known) or nearest(wanted[-1], [name.split(".")[-1] for name in known])
        raise InputError("no such key", key=key, hint=hint)
    exact = [entry for entry in found if entry.name.count(".") + 1 == len(wanted)]
    return "\n\n".join(map(_text, exact or found))


def key_names() -> list[str]:
    """Every key of the schema, with NAME for a free name."""
    return list(dict.fromkeys(entry.name for entry in _entries()))


RUN: Mapping[str, Any] = {
    "description": first.DESCRIPTION,
    "type": "object",
    "minProperties": 1,
}
"""The one key of a file that is of no scenario."""


def json_schema() -> dict[str, Any]:
    """The JSON Schema (2020-12) of a scenario or sweep file, for editors.

    Where one value is expected and a list sweeps, the list is allowed too. It knows every key,
    type and range, but not what takes two keys or a machine to tell.
    """
    definitions = _definitions()
    for name, definition in definitions.items():
        _finish(definition, _branches()[name])
    top = definitions.pop(Scenario.__name__)
    top["properties"] = {**top["properties"], first.KEY: RUN}
    schema = {"$schema": "https://json-schema.org/draft/2020-12/schema", **top}
    return {**schema, "$defs": definitions}


def _finish(definition: dict[str, Any], branch: type) -> None:
    tag = _tag_of(branch)
    for name, key in keys_of(branch).items():
        found = definition["properties"][name]
        found.pop("title", None)
        inner = key.shape.names
        if name == tag:
            definition["properties"][name] = _tag_schema(branch, tag)
            definition.setdefault("required", []).insert(0, tag)
        elif key.shape.sweepable:
            definition["properties"][name] = _swept(found)
        elif inner is not None and shape_of(inner).sweepable:
            found["additionalProperties"] = _swept(found["additionalProperties"])


def _swept(one: dict[str, Any]) -> dict[str, Any]:
    about: dict[str, Any] = {w: one.pop(w) for w in ("description", "default") if w in one}
    if isinstance(about.get("default"), int) and (quantity := _quantity(one)):
        about["default"] = EXACT[quantity](about["default"])
    one.pop("discriminator", None)
    # Not oneOf: a file that sweeps the pattern fits more than one.
    found = one.pop("oneOf", None) or one.pop("anyOf", None) or [one]
    options = [inner for option in found for inner in option.get("oneOf", [option])]
    return {
        **about,
        "anyOf": [*options, {"type": "array", "items": {"anyOf": options}, "minItems": 1}],
    }


def _tag_schema(branch: type, tag: str) -> dict[str, Any]:
    names = [tag_value(other, tag) for other in _alternatives(branch)]
    options = [
        {"const": tag_value(branch, tag)},
        {"type": "array", "items": {"enum": names}, "minItems": 1},
    ]
    about = keys_of(branch)[tag].info.description or TAGS[tag]
    return {"description": about, "anyOf": options}


def _alternatives(branch: type) -> tuple[type, ...]:
    """The branches that may stand in the place of this one, itself among them."""
    inner = (key.shape for other in _branches().values() for key in keys_of(other).values())
    shapes = (shape if shape.names is None else shape_of(shape.names) for shape in inner)
    return next(shape.branches for shape in shapes if branch in shape.branches)


# --- keys and what is known of them ----------------------------------------------------------


def _branches() -> dict[str, type]:
    return {branch.__name__: branch for branch in models(Scenario)}


def _definitions() -> dict[str, dict[str, Any]]:
    schema = Scenario.model_json_schema()
    definitions: dict[str, dict[str, Any]] = schema.pop("$defs")
    return {**definitions, Scenario.__name__: schema}


def _entries() -> list[Entry]:
    definitions = _definitions()
    entries: dict[tuple[str, str | None], Entry] = {}
    for name, key, owner in _walk(Scenario, ""):
        schema = definitions[owner.__name__]["properties"][key.name]
        same = (name, key.info.description)
        old = entries.get(same, Entry(name, key, schema, ()))
        entries[same] = replace(old, owners=(*old.owners, owner))
    return list(entries.values())


def _walk(annotation: Any, prefix: str) -> Iterator[tuple[str, Key, type]]:
    for branch in shape_of(annotation).branches:
        for key in keys_of(branch).values():
            name = prefix + key.name
            yield name, key, branch
            shape = key.shape
            if shape.names is not None:
                yield from _walk(shape.names, f"{name}.NAME.")
            elif shape.items is None:  # a phase is an access like the one around it
                yield from _walk(key.annotation, f"{name}.")


def _matches(known: list[str], wanted: list[str]) -> bool:
    while "phases" in wanted[:-1]:  # guests.vm0.access.phases.0.think -> guests.vm0.access.think
        at = wanted.index("phases")
        wanted = [*wanted[:at], *wanted[at + 2 :]]
    tail = known[-len(wanted) :]
    return len(tail) == len(wanted) and all(
        one in ("NAME", other) for one, other in zip(tail, wanted, strict=True)
    )


# --- text ------------------------------------------------------------------------------------


def _text(entry: Entry) -> str:
    about = entry.key.info.description or TAGS.get(entry.key.name, "")
    lines = [entry.name, *_wrapped(about), *_wrapped(" ".join(_facts(entry)))]
    tag = _tag_of(entry.owners[0])
    if tag and tag != entry.key.name:
        lines += _wrapped(f"Of {tag}: {', '.join(tag_value(o, tag) for o in entry.owners)}.")
    return "\n".join([*lines, *_below(entry.key.shape)])


def _facts(entry: Entry) -> Iterator[str]:
    key, is_tag = entry.key, _tag_of(entry.owners[0]) == entry.key.name
    yield f"Type: {_type(entry)}."
    if key.required or is_tag:
        yield "Required."
    elif key.info.default_factory is None:
        yield f"Default: {_default(entry)}."
    if key.shape.sweepable:
        yield "A list sweeps it."


def _below(shape: Shape) -> Iterator[str]:
    """What can stand below a key, one line each."""
    inner = shape if shape.names is None else shape_of(shape.names)
    for branch in inner.branches:
        if inner.tag:
            about = (branch.__doc__ or "").split("\n")[0]
            yield _line(f"{inner.tag}: {tag_value(branch, inner.tag)}", about)
        else:
            yield from (_line(k.name, k.info.description or "") for k in keys_of(branch).values())


def _line(name: str, about: str) -> str:
    return "    " + textwrap.shorten(f"{name} - {about}", WIDTH, placeholder="...")


def _wrapped(text: str) -> list[str]:
    return textwrap.wrap(text, WIDTH, initial_indent="  ", subsequent_indent="  ")


def _tag_of(branch: type) -> str | None:
    """`pattern` for an access, `kind` for a contender, `test` for a selftest, else None."""
    return next((tag for tag in TAGS if tag in keys_of(branch)), None)


def _default(entry: Entry) -> str:
    default, quantity = entry.key.info.default, _quantity(entry.schema)
    if quantity is not None and default is not None:
        return str(EXACT[quantity](default))
    if isinstance(default, BaseModel):
        return "its own defaults"
    return spelled(default) or "empty"


def _type(entry: Entry) -> str:
    shape, schema = entry.key.shape, entry.schema
    if shape.names is not None:
        return "mapping by name"
    if shape.items is not None:
        return "list"
    options = schema.get("anyOf") or schema.get("oneOf") or [schema]
    words = ["mapping"] if shape.branches else []
    if entry.key.name in TAGS and shape.scalar:
        words.append(", ".join(tag_value(owner, entry.key.name) for owner in entry.owners))
    elif shape.scalar:
        words += [_scalar(one) for one in options if "$ref" not in one and "oneOf" not in one]
    return " or ".join(dict.fromkeys(words))


def _scalar(option: dict[str, Any]) -> str:
    quantity = _quantity(option)
    if quantity is not None:
        return f"{quantity} such as {option['examples'][0]}"
    if "enum" in option:
        return ", ".join(map(str, option["enum"]))
    word = TYPES[option["type"]]
    bounds = [f"{words} {option[bound]:g}" for bound, words in BOUNDS.items() if bound in option]
    return f"{word} ({', '.join(bounds)})" if bounds else word


def _quantity(schema: dict[str, Any]) -> str | None:
    options = schema.get("anyOf", [schema])
    examples = [option["examples"][0] for option in options if "examples" in option]
    return QUANTITIES.get(examples[0]) if examples else None
