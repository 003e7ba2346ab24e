"""The one exception for wrong input: it knows the file, the line and the key."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from difflib import get_close_matches

Keys = tuple[str | int, ...]
"""The way to a value: keys of mappings and positions in lists."""


class InputError(Exception):
    """Something the user wrote is wrong: a file, a key, a value or a name.

    `str()` is the one line that the command line prints,
    ``FILE:LINE:COLUMN: key: message (did you mean 'x'?)``, leaving out what is unknown.
    Lines and columns count from 1, as compilers and editors do.
    """

    def __init__(
        self,
        message: str,
        *,
        file: str | None = None,
        line: int | None = None,
        column: int | None = None,
        key: str | None = None,
        hint: str | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.file = file
        self.line = line
        self.column = column
        self.key = key
        self.hint = hint

    def __str__(self) -> str:
        parts = (self._place(), self.key, self.message + self._question())
        return " ".join(": ".join(filter(None, parts)).splitlines())

    def _place(self) -> str:
        parts = [part for part in (self.file, self.line, self.column) if part is not None]
        return ":".join(map(str, parts))

    def _question(self) -> str:
        return f" (did you mean '{self.hint}'?)" if self.hint is not None else ""

    def __reduce__(self) -> tuple[object, ...]:
        # Exceptions pickle by their positional arguments; worker processes would lose the rest.
        return type(self), (self.message,), self.__dict__


@dataclass(frozen=True)
class Problem:
    """What is wrong with the value at `keys`, before anybody knows where that was written."""

    keys: Keys
    message: str
    hint: str | None = None

    @property
    def key(self) -> str | None:
        """The keys as people write them, ``guests.vm0.vcpus``."""
        return ".".join(map(str, self.keys)) or None


def nearest(word: str, candidates: Iterable[str]) -> str | None:
    """The candidate most like `word`, or None if none is like it; capitals do not matter.

    Of those that differ in numbers only (versions), it is the one with the nearest numbers.
    """
    by_lower = {candidate.lower(): candidate for candidate in candidates}
    wanted = _numbered(word.lower())
    numbered = [name for name in by_lower if _numbered(name)[0] == wanted[0] and wanted[1]]
    found = sorted(numbered, key=lambda name: _distance(_numbered(name)[1], wanted[1]))
    found = found or get_close_matches(word.lower(), by_lower, n=1)
    return by_lower[found[0]] if found else None


def _numbered(word: str) -> tuple[str, list[int]]:
    """The word without its numbers, and those."""
    return re.sub(r"[0-9]+", "#", word), [int(digits) for digits in re.findall(r"[0-9]+", word)]


def _distance(numbers: Sequence[int], wanted: Sequence[int]) -> list[int]:
    """Of versions, the first number that differs decides."""
    return [abs(one - other) for one, other in zip(numbers, wanted, strict=True)]
