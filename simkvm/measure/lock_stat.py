"""``/proc/lock_stat`` (CONFIG_LOCK_STAT): waits and holds of every lock class.

Twelve numbers a class and mode, times in microseconds with two digits
(Documentation/locking/lockstat.rst, v6.12; kernel/locking/lockdep_proc.c). A wait is that of a
contention, so its number is that of contentions. The file has no quantiles: only mean, least and
largest are known. Below a class stand the call sites that waited, and those that were waited for.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Final

from simkvm.measure.function_graph import nanoseconds
from simkvm.measure.observation import Observation
from simkvm.measure.text import Lines

TOOL: Final = "lock_stat"

HEAD: Final = "lock_stat version "
COLUMNS: Final = (
    *("con-bounces", "contentions"),
    *("waittime-min", "waittime-max", "waittime-total", "waittime-avg"),
    *("acq-bounces", "acquisitions"),
    *("holdtime-min", "holdtime-max", "holdtime-total", "holdtime-avg"),
)
CLASS: Final = re.compile(
    rf"\s*(?P<name>\S.*?):\s+(?P<numbers>\d+(?:\s+\d+(?:\.\d+)?){{{len(COLUMNS) - 1}}})\s*"
)
SITE: Final = re.compile(r"\s*(?P<name>\S.*?)\s+(?P<n>\d+)\s+\[<\S*>\]\s+(?P<site>\S.*?)\s*")
RULE: Final = re.compile(r"\s*[-.=]*\s*|\s*class name\s.*|\*WARNING\*.*")


def recognises(line: str) -> bool:
    """Whether a line can only be lock_stat's first."""
    return line.startswith(HEAD)


def parse(lines: Lines) -> Iterator[Observation]:
    """The observations. Raises InputError for another version and for a malformed line."""
    waited_for = previous_was_site = False
    for line in lines:
        if line.startswith(HEAD):
            if line.removeprefix(HEAD).strip() not in {"0.3", "0.4"}:
                raise lines.error(f"{line!r}: versions 0.3 and 0.4 are known")
            continue
        found, site = CLASS.fullmatch(line), SITE.fullmatch(line)
        if found is not None:
            waited_for = False
            yield from _of_class(found["name"], found["numbers"].split())
        elif site is not None:
            kind = "waited for at" if waited_for else "waited at"
            key = f"{site['name']} {kind} {site['site']}"
            yield Observation("count", key, int(site["n"]), tool=TOOL)
        elif RULE.fullmatch(line):
            # A dashed rule stands above each of the two lists of sites.
            waited_for = "-" in line and previous_was_site
        else:
            raise lines.error(f"not a line of lock_stat: {line.strip()[:60]!r}")
        previous_was_site = site is not None and found is None


def _of_class(name: str, numbers: list[str]) -> Iterator[Observation]:
    values = dict(zip(COLUMNS, numbers, strict=True))
    for what, prefix, number in (
        ("wait", "waittime", values["contentions"]),
        ("hold", "holdtime", values["acquisitions"]),
    ):
        n = int(number)
        if not n:
            continue
        least, most, total, mean = (
            nanoseconds(values[f"{prefix}-{part}"], 1000) for part in ("min", "max", "total", "avg")
        )
        yield Observation(
            what, name, n, min_ns=least, max_ns=most, mean_ns=mean, sum_ns=total, tool=TOOL
        )
    for bounces in ("con-bounces", "acq-bounces"):
        yield Observation("count", f"{name} {bounces}", int(values[bounces]), tool=TOOL)
