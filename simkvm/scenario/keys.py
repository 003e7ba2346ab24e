"""The schema as a tree of keys: what may stand where, and under which names.

Read off the models themselves, so that a new field needs no second entry anywhere.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, TypeGuard, Union, get_args, get_origin, get_type_hints

from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined
from typing_extensions import is_typeddict

from simkvm.scenario.errors import Keys


@dataclass(frozen=True)
class Shape:
    """What one key may hold; more than one of these for a union.

    ``branches``: mappings with fixed keys. ``tag``: the key that tells branches apart, if there is
    more than one. ``names``: the values of a mapping with free keys. ``items``: those of a list.
    ``scalar``: a single value or null.
    """

    branches: tuple[type, ...] = ()
    tag: str | None = None
    names: Any = None
    items: Any = None
    scalar: bool = False

    @property
    def sweepable(self) -> bool:
        """Whether a list here means one point for each of its values."""
        return self.items is None and self.names is None

    def branch(self, raw: object) -> type | None:
        """The branch that a raw mapping says it is, or None if it does not say."""
        if self.tag is None:
            return self.branches[0] if self.branches else None
        said = raw.get(self.tag) if isinstance(raw, Mapping) else None
        return next((b for b in self.branches if tag_value(b, self.tag) == said), None)

    def children(self, raw: object) -> dict[str, Key]:
        """The fixed keys below, of the branch that `raw` says it is, else of all branches."""
        branch = self.branch(raw)
        chosen = self.branches if branch is None else (branch,)
        return {name: key for b in reversed(chosen) for name, key in keys_of(b).items()}

    def child(self, raw: object, name: str | int) -> Any:
        """The annotation of one key or item below, or None if there is no such key."""
        if isinstance(name, int):
            return self.items
        if self.names is not None:
            return self.names
        key = self.children(raw).get(name)
        return None if key is None else key.annotation


@dataclass(frozen=True)
class Key:
    """One fixed key of a mapping."""

    name: str
    annotation: Any
    info: FieldInfo = field(compare=False)

    @property
    def required(self) -> bool:
        """Whether there is no default."""
        return self.info.default is PydanticUndefined and self.info.default_factory is None

    @property
    def shape(self) -> Shape:
        """What the key may hold."""
        return shape_of(self.annotation)


def keys_of(mapping: type) -> dict[str, Key]:
    """The keys of a model or typed dict, in order of definition."""
    if _is_model(mapping):
        infos = mapping.model_fields
        return {name: Key(name, info.annotation, info) for name, info in infos.items()}
    hints = get_type_hints(mapping, include_extras=True)
    return {name: Key(name, hint, FieldInfo.from_annotation(hint)) for name, hint in hints.items()}


def shape_of(annotation: Any) -> Shape:
    """What a value of this annotation may be."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return shape_of(arguments[0])
    if origin is Union or origin is UnionType:
        return _joined([shape_of(argument) for argument in arguments])
    if origin is dict:
        return Shape(names=arguments[1])
    if origin is tuple:
        return Shape(items=arguments[0])
    if _is_model(annotation) or is_typeddict(annotation):
        return Shape(branches=(annotation,))
    if origin is Literal or annotation in (str, int, float, bool, NoneType):
        return Shape(scalar=True)
    raise TypeError(f"the schema has no rule for {annotation!r}")


def shape_at(keys: Keys, raw: object, top: type) -> Shape | None:
    """What may stand at `keys` of a document `raw` of type `top`; None if there is no such key.

    Where `raw` does not say which branch of a union it means, any branch will do.
    """
    annotation: Any = top
    for name in keys:
        annotation = shape_of(annotation).child(raw, name)
        if annotation is None:
            return None
        raw = below(raw, name)
    return shape_of(annotation)


def below(raw: object, name: str | int) -> Any:
    """The value under one key or at one position of a list, None if there is none."""
    if isinstance(raw, dict):
        return raw.get(name)
    if isinstance(raw, list) and isinstance(name, int) and name < len(raw):
        return raw[name]
    return None


def tag_value(branch: type, tag: str) -> str:
    """The value of the tag that stands for this branch."""
    return str(get_args(keys_of(branch)[tag].annotation)[0])


def models(annotation: Any) -> Iterator[type]:
    """Every mapping type that `annotation` can hold, at any depth, each once."""
    yield from _models(annotation, set())


def _models(annotation: Any, seen: set[type]) -> Iterator[type]:
    shape = shape_of(annotation)
    for inner in (shape.names, shape.items):
        if inner is not None:
            yield from _models(inner, seen)
    for branch in shape.branches:
        if branch not in seen:
            seen.add(branch)
            yield branch
            for key in keys_of(branch).values():
                yield from _models(key.annotation, seen)


def _joined(shapes: list[Shape]) -> Shape:
    branches = tuple(branch for shape in shapes for branch in shape.branches)
    return Shape(
        branches=branches,
        tag=_tag(branches) if len(branches) > 1 else None,
        names=next((s.names for s in shapes if s.names is not None), None),
        items=next((s.items for s in shapes if s.items is not None), None),
        scalar=any(shape.scalar for shape in shapes),
    )


def _tag(branches: tuple[type, ...]) -> str:
    common = set.intersection(*(set(keys_of(branch)) for branch in branches))
    return next(
        name
        for name in keys_of(branches[0])
        if name in common
        and all(get_origin(keys_of(branch)[name].annotation) is Literal for branch in branches)
    )


def _is_model(annotation: Any) -> TypeGuard[type[BaseModel]]:
    return isinstance(annotation, type) and issubclass(annotation, BaseModel)
