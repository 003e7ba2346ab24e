"""The types that the schema's fields are made of: quantities with units, frozen mappings.

A quantity is a number inside (bytes, nanoseconds, events per second) and exact text with a unit
outside. Text with a unit is accepted everywhere; when a file is read (validation context
``{"units": "required"}``) bare numbers are refused.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Annotated, NoReturn, Self, TypeVar

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PlainSerializer,
    ValidationInfo,
    WithJsonSchema,
)
from pydantic_core import PydanticCustomError

from simkvm import units
from simkvm.scenario.errors import InputError

STRICT = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)
K = TypeVar("K")
V = TypeVar("V")


class FrozenDict(dict[K, V]):
    """A dict that cannot be changed, hashes, compares and pickles; iterates in sorted key order.

    Sorted, because the order in which a file lists its guests must not decide who is created
    first: simultaneous events are ordered by creation.
    """

    def __init__(self, items: Mapping[K, V]) -> None:
        super().__init__(sorted(items.items(), key=lambda item: str(item[0])))

    def _refuse(self, *_: object, **__: object) -> NoReturn:
        raise TypeError("a scenario is frozen: build another one with model_copy(update=...)")

    __setitem__ = __delitem__ = update = setdefault = pop = popitem = clear = __ior__ = _refuse

    def __hash__(self) -> int:  # type: ignore[override]
        return hash(frozenset(self.items()))

    def __reduce__(self) -> tuple[type[Self], tuple[dict[K, V]]]:
        return type(self), (dict(self),)


def refuse(message: str, hint: str | None = None) -> PydanticCustomError:
    """The validation error that loading turns into an InputError with file, line and key."""
    return PydanticCustomError("simkvm", "{message}", {"message": message, "hint": hint})


def shown(value: object) -> str:
    """A value that is wrong, as messages quote it; mappings and lists by their kind."""
    if isinstance(value, dict):
        return "a mapping"
    if isinstance(value, list | tuple):
        return "a list"
    words = {None: "null", True: "true", False: "false"}
    return words[value] if value is None or isinstance(value, bool) else repr(value)


def _quantity(parse: Callable[[str], float], kind: str, example: str) -> BeforeValidator:
    def validate(value: object, info: ValidationInfo) -> object:
        if isinstance(value, str):
            return _parsed(parse, value)
        if (info.context or {}).get("units") != "required":
            return value
        if isinstance(value, int | float) and not isinstance(value, bool):
            return _parsed(parse, str(value))  # which says that there is no unit
        raise refuse(f"expects a {kind} such as '{example}', not {shown(value)}")

    return BeforeValidator(validate)


def _parsed(parse: Callable[[str], float], text: str) -> float:
    try:
        return parse(text)
    except InputError as error:
        raise refuse(error.message, error.hint) from None


def _text(pattern: str, example: str) -> WithJsonSchema:
    return WithJsonSchema({"type": "string", "pattern": pattern, "examples": [example]})


_DIGITS = r"^\s*[0-9]+(\.[0-9]+)?\s*"
_TIME = "(ns|us|\u00b5s|\u03bcs|ms|s|min|h)"

AnySize = Annotated[
    int,
    Field(ge=0, le=units.MOST),
    _quantity(units.parse_size, "size", "64 MiB"),
    PlainSerializer(units.exact_size, return_type=str, when_used="json"),
    _text(_DIGITS + r"([Bb]|[KkMmGgTt]([Ii][Bb]?)?)\s*$", "64 MiB"),
]
Duration = Annotated[
    int,
    Field(ge=0, le=units.MOST),
    _quantity(units.parse_duration, "duration", "250 us"),
    PlainSerializer(units.exact_duration, return_type=str, when_used="json"),
    _text(_DIGITS + _TIME + r"\s*$", "250 us"),
]
Rate = Annotated[
    float,
    Field(ge=units.LEAST_PER_S, le=units.MOST_PER_S),
    _quantity(units.parse_rate, "rate", "200 / s"),
    PlainSerializer(units.exact_rate, return_type=str, when_used="json"),
    _text(_DIGITS + r"/\s*" + _TIME + r"\s*$", "200 / s"),
]


def _above_zero(value: int) -> int:
    if value == 0:
        raise refuse("must be above zero")
    return value


Size = Annotated[AnySize, AfterValidator(_above_zero)]
Span = Annotated[Duration, AfterValidator(_above_zero)]
"""A duration above zero."""


class Model(BaseModel):
    """Frozen, without unknown keys, without conversions behind the user's back."""

    model_config = STRICT


def as_tuple(value: object) -> object:
    """A list as what the frozen models hold instead."""
    return tuple(value) if isinstance(value, list) else value


def _word(name: str) -> str:
    if not re.fullmatch(r"[A-Za-z][A-Za-z0-9_-]*", name):
        raise refuse(f"{name!r} is not a name: letters, digits, '-' and '_', a letter first")
    return name


Name = Annotated[str, AfterValidator(_word)]
"""The name of a guest or contender. No dots: they part the keys of ``--set`` and of axes."""
