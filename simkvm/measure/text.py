"""Text files of measurements, plain or gzipped, as numbered lines that errors can point to."""

from __future__ import annotations

import gzip
import io
import sys
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, Final, cast

from simkvm.scenario.errors import InputError, nearest

MOST_BYTES: Final = 1 << 20
"""A longer line is no line of a text that a tool printed."""

BINARIES: Final = (
    (b"\x17\x08\x44tracing", "a binary trace.dat; print it with: trace-cmd report -t -i FILE"),
    (
        b"PERFILE2",
        "a binary perf.data; print it with: perf lock contention -i FILE, or perf script",
    ),
    (
        b"2ELIFREP",
        "a binary perf.data; print it with: perf lock contention -i FILE, or perf script",
    ),
)


class Lines:
    """The lines of one text, each with its number; only one is held at a time."""

    def __init__(self, stream: BinaryIO, name: str) -> None:
        self.name = name
        self.number = 0
        self._stream = stream
        self._ahead: list[str] = []

    def __iter__(self) -> Iterator[str]:
        """Every line that is left, without its line end."""
        while True:
            line = self._ahead.pop(0) if self._ahead else self._read()
            if line is None:
                return
            self.number += 1
            yield line

    def peek(self, most: int) -> list[str]:
        """The next lines, up to ``most``, which stay in the stream."""
        while len(self._ahead) < most:
            line = self._read()
            if line is None:
                break
            self._ahead.append(line)
        return self._ahead[:most]

    def error(self, message: str, line: int | None = None) -> InputError:
        """An error at the line that was given last, or at ``line``."""
        return InputError(message, file=self.name, line=line or self.number or None)

    def _read(self) -> str | None:
        try:
            raw = self._stream.readline(MOST_BYTES)
        except gzip.BadGzipFile as error:
            raise InputError("not a gzip file", file=self.name) from error
        except (EOFError, zlib.error) as error:
            place = self.number + len(self._ahead) + 1
            raise self.error("incomplete gzip file", place) from error
        if not raw:
            return None
        place = self.number + len(self._ahead) + 1
        if b"\0" in raw or (len(raw) == MOST_BYTES and not raw.endswith(b"\n")):
            raise self.error("is not text", place)
        return raw.rstrip(b"\r\n").decode(errors="replace")


@contextmanager
def opened(path: str) -> Iterator[Lines]:
    """The text at ``path``; ``-`` is standard input, gzip is recognised by its first bytes.

    Raises InputError if there is no such file or if it is a binary recording, naming the command
    that turns that into text.
    """
    if path == "-":
        yield Lines(_unpacked(sys.stdin.buffer, "standard input"), "standard input")
        return
    file = Path(path)
    if file.is_dir():
        raise InputError("is a folder", file=path)
    if not file.is_file():
        around = [other.name for other in file.parent.glob("*")] if file.parent.is_dir() else []
        raise InputError("no such file", file=path, hint=nearest(file.name, around))
    with file.open("rb") as stream:
        yield Lines(_unpacked(stream, path), path)


def _unpacked(stream: BinaryIO, name: str) -> BinaryIO:
    """The stream, decompressed if need be, unless it begins like a binary recording."""
    buffered = cast(io.BufferedReader, stream)
    start = buffered.peek(16)
    if start.startswith(b"\x1f\x8b"):
        buffered = io.BufferedReader(gzip.GzipFile(fileobj=buffered))
        try:
            start = buffered.peek(16)
        except (EOFError, zlib.error, gzip.BadGzipFile) as error:
            raise InputError("incomplete gzip file", file=name, line=1) from error
    for magic, what in BINARIES:
        if start.startswith(magic):
            raise InputError(f"is {what}", file=name)
    return cast(BinaryIO, buffered)
