"""The trace files that a document of a scenario refers to.

Works on documents (mappings as read from YAML, or as `resolved` gives them), because a frozen
scenario is to hold the absolute path and the digest from the start.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from simkvm.scenario.errors import InputError, Keys, Problem

if TYPE_CHECKING:
    from simkvm.guest.trace import TraceHeader


def replays(document: dict[str, Any]) -> Iterator[tuple[Keys, dict[str, Any]]]:
    """Every access of the document that replays a trace, with its keys."""
    guests = document.get("guests")
    for name, guest in guests.items() if isinstance(guests, dict) else ():
        if isinstance(guest, dict):
            yield from _replays(guest.get("access"), ("guests", name, "access"))


def _replays(access: object, keys: Keys) -> Iterator[tuple[Keys, dict[str, Any]]]:
    if not isinstance(access, dict):
        return
    if access.get("pattern") == "trace" and isinstance(access.get("file"), str):
        yield keys, access
    phases = access.get("phases")
    for index, phase in enumerate(phases if isinstance(phases, list) else ()):
        yield from _replays(phase, (*keys, "phases", index))


class Recordings:
    """The headers of traces, each file read once; relative names start at `folder`."""

    def __init__(self, folder: Path = Path()) -> None:
        self.folder = folder
        self.headers: dict[str, TraceHeader] = {}

    def header(self, file: str) -> TraceHeader:
        """The header of one trace. Raises InputError as `simkvm.guest.trace.read_header`."""
        from simkvm.guest.trace import read_header  # brings numpy: only if a trace is replayed

        if file not in self.headers:
            self.headers[file] = read_header(file)
        return self.headers[file]

    def placed(self, document: dict[str, Any]) -> tuple[dict[str, Any], list[Problem]]:
        """The document with absolute paths and digests, and what is wrong with the traces."""
        problems: list[Problem] = []
        if any(replays(document)):
            document = copy.deepcopy(document)
        for keys, access in replays(document):
            written = access["file"]
            file = str(self.folder / written)
            try:
                header = self.header(file)
            except InputError as error:
                hint = error.hint and str(Path(written).with_name(error.hint))
                problems.append(Problem((*keys, "file"), error.message, hint))
            else:
                access["file"] = file
                if access.get("sha256") is None:
                    access["sha256"] = header.sha256
        return document, problems
