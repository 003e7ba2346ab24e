"""Plain text for a terminal, a pipe, a log or a mail: ASCII, as wide as it has to be."""

from __future__ import annotations

import io
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from rich.box import Box
from rich.console import Console, Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

NOTHING = "-"
SIMPLE = Box("    \n    \n -- \n    \n    \n    \n    \n    \n", ascii=True)

Row = Sequence[str]


def render(*parts: RenderableType, colour: bool = False) -> str:
    """The text of renderables, with ANSI colours if asked for, and without blanks at line ends."""
    console = Console(
        file=io.StringIO(),
        width=1_000,
        force_terminal=colour,
        color_system="standard" if colour else None,
        highlight=False,
        markup=False,
        emoji=False,
    )
    with console.capture() as capture:
        console.print(*parts, sep="\n")
    return "\n".join(line.rstrip() for line in capture.get().splitlines())


def titled_table(title: str, headers: Row, rows: Iterable[Row], left: int = 1) -> RenderableType:
    """A table with `left` columns of text; the others are numbers."""
    padding = (0, 1, 0, 0)
    table = Table(box=SIMPLE, show_edge=False, pad_edge=False, padding=padding, header_style="")
    for i, header in enumerate(headers):
        justify = "left" if i < left else "right"
        table.add_column(header, justify=justify, no_wrap=True, vertical="bottom")  # type: ignore[arg-type]
    for row in rows:
        table.add_row(*row)
    return Group(Text(title, "bold"), Padding(table, (0, 0, 1, 2), expand=False))


def named_table(
    rows: Iterable[Mapping[str, Any]], columns: Mapping[str, int | None]
) -> RenderableType:
    """Rows under the keys of `columns`; each value is the width to wrap at, None for nowhere.

    Only blanks are wrapped at: an address or a path stays whole, so that it can be copied.
    """
    table = Table(box=SIMPLE, show_edge=False, pad_edge=False, padding=(0, 1, 0, 0))
    for name in columns:
        table.add_column(name, no_wrap=True, header_style="")
    for row in rows:
        table.add_row(*(Text(wrapped(row.get(name, ""), width)) for name, width in columns.items()))
    return table


def wrapped(value: object, width: int | None) -> str:
    """A value in lines of at most `width`, unless a word is longer; blanks are where it breaks."""
    text = plain(value)
    if width is None:
        return text
    lines = textwrap.wrap(text, width, break_long_words=False, break_on_hyphens=False)
    return "\n".join(lines)


def plain(value: object) -> str:
    """A value as it was written; "-" for None."""
    if value is None:
        return NOTHING
    return f"{value:g}" if isinstance(value, float) else str(value)
