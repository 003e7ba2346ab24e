"""A YAML file as plain values, with the line and column of every key and item.

Only YAML 1.2's plain kinds get through: mappings with text keys, lists, text, numbers, true,
false and null. Duplicate keys, dates, tags and documents that contain themselves are refused.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from simkvm.scenario.errors import InputError, Keys, Problem, nearest

MOST_VALUES = 250_000
"""More than any sweep needs: a bound on what aliases of aliases can unfold to."""

SCALARS = (bool, int, float, str)


@dataclass(frozen=True)
class Place:
    """Where something was written. Lines and columns count from 1; None if there are none."""

    file: str
    line: int | None = None
    column: int | None = None

    @property
    def order(self) -> tuple[int, int]:
        """Sorts by position in the file; what was set on the command line comes last."""
        if self.line is None or self.column is None:
            return (1 << 62, 0)
        return (self.line, self.column)

    def error(self, problem: Problem) -> InputError:
        """The problem as an InputError that was written at this place."""
        return InputError(
            problem.message,
            file=self.file,
            line=self.line,
            column=self.column,
            key=problem.key,
            hint=problem.hint,
        )


@dataclass
class Document:
    """The values of one file, and where each was written."""

    root: dict[str, Any]
    places: dict[Keys, Place] = field(default_factory=dict)

    def place(self, keys: Keys) -> Place:
        """Where the value at `keys` was written, or else what surrounds it."""
        while keys not in self.places:
            keys = keys[:-1]
        return self.places[keys]

    def put(self, keys: Keys, place: Place) -> None:
        """Note that everything at and below `keys` was written at `place`."""
        for known in [known for known in self.places if known[: len(keys)] == keys]:
            del self.places[known]
        self.places[keys] = place


def read_document(path: str | Path) -> Document:
    """Read a file whose top level is a mapping.

    Raises InputError if the file is missing (with the nearest name in its folder), is a folder,
    cannot be read, is not UTF-8, is not YAML, or is not one mapping.
    """
    text = _read_text(Path(path), str(path))
    reader = _Reader(str(path))
    root = reader.read(text)
    if root is None:
        raise InputError("is empty: a scenario is a mapping of keys to values", file=str(path))
    if not isinstance(root, dict):
        kind = "a list" if isinstance(root, list) else "a single value"
        message = f"holds {kind}: a scenario is a mapping of keys to values"
        raise InputError(message, file=str(path), line=1)
    return Document(root, reader.places)


def parse_value(text: str, place: Place, keys: Keys) -> Any:
    """The value of one piece of YAML from elsewhere than a file.

    Raises InputError at `place` about the key `keys`.
    """
    try:
        return _Reader(place.file).read(text)
    except InputError as error:
        raise place.error(Problem(keys, error.message)) from error


def _read_text(path: Path, name: str) -> str:
    try:
        content = path.read_bytes()
    except IsADirectoryError:
        raise InputError("is a folder, not a scenario file", file=name) from None
    except FileNotFoundError:
        raise InputError("no such file", file=name, hint=_similar(path)) from None
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise InputError(f"cannot be read: {reason}", file=name) from error
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        message = f"is not UTF-8 text: byte 0x{content[error.start]:02x}"
        raise InputError(message, file=name, line=line) from None


def _similar(path: Path) -> str | None:
    if not path.parent.is_dir():
        return None
    near = nearest(path.name, sorted(entry.name for entry in path.parent.iterdir()))
    return near and str(path.with_name(near))


class _Reader:
    """Turns one text into a document; `file` is only for messages."""

    def __init__(self, file: str) -> None:
        self.file = file
        self.values = 0
        self.places: dict[Keys, Place] = {(): Place(file, 1, 1)}
        self.within: set[int] = set()

    def read(self, text: str) -> Any:
        return self._plain(self._parse(text), ())

    def _parse(self, text: str) -> Any:
        from ruamel.yaml import YAML
        from ruamel.yaml.constructor import DuplicateKeyError
        from ruamel.yaml.error import MarkedYAMLError
        from ruamel.yaml.reader import ReaderError

        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # reusing an anchor is legal, and nobody's fault
                return YAML().load(text)
        except DuplicateKeyError as error:
            key = error.problem.split('"')[1]
            raise self._marked(f"the key {key!r} is there twice", error.problem_mark) from None
        except MarkedYAMLError as error:
            problem = ", ".join(filter(None, (error.context, error.problem)))
            mark = error.problem_mark or error.context_mark
            raise self._marked(f"not YAML: {problem}", mark) from None
        except ReaderError as error:
            line = text.count("\n", 0, error.position) + 1
            message = f"not YAML: the character {error.character!r} is not allowed"
            raise InputError(message, file=self.file, line=line) from None
        except RecursionError:
            raise InputError("not YAML: nested too deeply", file=self.file) from None
        except Exception as error:  # values such as `!!int x` raise whatever the parser meets
            raise InputError(f"not YAML: {error}", file=self.file) from error

    def _marked(self, message: str, mark: Any) -> InputError:
        line, column = (mark.line + 1, mark.column + 1) if mark is not None else (None, None)
        return InputError(message, file=self.file, line=line, column=column)

    def _plain(self, value: Any, keys: Keys) -> Any:
        self.values += 1
        if id(value) in self.within or self.values > MOST_VALUES:
            raise self._refused(keys, "unfolds without end or to too many values")
        if isinstance(value, dict | list):
            self.within.add(id(value))
            plain = (
                self._mapping(value, keys) if isinstance(value, dict) else self._list(value, keys)
            )
            self.within.discard(id(value))
            return plain
        return self._scalar(value, keys)

    def _mapping(self, value: Any, keys: Keys) -> dict[str, Any]:
        plain = {}
        for key, item in value.items():
            if not isinstance(key, str):
                message = f"the key {key!r} is not text: quote it, or choose a word"
                raise self._refused(keys, message)
            within = (*keys, str(key))
            # A key that came by a merge (<<) has no position of its own.
            self.places[within] = self._place(value.lc.data or {}, key) or self.places[keys]
            plain[str(key)] = self._plain(item, within)
        return plain

    def _list(self, value: Any, keys: Keys) -> list[Any]:
        plain = []
        for index, item in enumerate(value):
            within = (*keys, index)
            self.places[within] = self._place(value.lc.data or {}, index) or self.places[keys]
            plain.append(self._plain(item, within))
        return plain

    def _place(self, positions: Any, key: object) -> Place | None:
        if key not in positions:
            return None
        line, column = positions[key][:2]
        return Place(self.file, line + 1, column + 1)

    def _scalar(self, value: Any, keys: Keys) -> Any:
        from ruamel.yaml.scalarbool import ScalarBoolean

        if value is None or isinstance(value, bool):
            return value
        if isinstance(value, ScalarBoolean):  # a bool with an anchor, which is an int to Python
            return bool(value)
        for kind in SCALARS[1:]:
            if isinstance(value, kind):
                return kind(value)
        message = "expects text, a number, true, false, null, a list or a mapping"
        raise self._refused(keys, f"{message}, not a {type(value).__name__}")

    def _refused(self, keys: Keys, message: str) -> InputError:
        return self.places[keys].error(Problem(keys, message))
