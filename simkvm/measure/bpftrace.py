"""What bpftrace prints of its maps: ``hist()``, ``lhist()``, ``count()``, ``stats()``, ``avg()``...

A histogram is a map's name and key, then its buckets: ``[1K, 2K)  count |@@@  |``, where K is 1024
(``hist``, powers of two; docs/language.adoc of bpftrace 0.21), or ``[100, 200)`` (``lhist``).
Quantiles are interpolated within a bucket, so those of ``hist`` are off by up to a third.

The name of a map says what is in it: ``@function_ns[kvm_age_gfn]``, ``@wait_ns[...]``,
``@hold_ns[age]``, ``@exit_ns``, ``@grace_period_ns``, ``@callback_ns`` in nanoseconds (``_us`` in
microseconds); any other histogram is a ``value``. What the maps' keys say becomes the row's key.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Final

from simkvm.measure.observation import WHAT, Observation
from simkvm.measure.text import Lines

TOOL: Final = "bpftrace"

MAP: Final = re.compile(r"@(?P<name>\w*)(?:\[(?P<key>.*)\])?:\s*(?P<value>.*?)\s*")
BOUND: Final = r"-?\d+[KMGTP]?|\.\.\."
BUCKET: Final = re.compile(
    rf"[\[(](?P<low>{BOUND})(?:,\s*(?P<high>{BOUND}))?[\])]\s+(?P<n>\d+)\s*\|[@ ]*\|\s*"
)
STATS: Final = re.compile(r"count (\d+), average (\d+), total (\d+)")
WHOLE: Final = re.compile(r"-?\d+")
REMARK: Final = re.compile(r"Attach(?:ing|ed) .*|Lost \d+ events|WARNING:.*|\^C.*|Tracing.*|\s*")
SUFFIXES: Final = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40, "P": 1 << 50}
UNITS: Final = {"_ns": 1, "_us": 1000, "_ms": 1_000_000}

Bucket = tuple[int, int, int]


def recognises(line: str) -> bool:
    """Whether a line can only be bpftrace's."""
    return line.startswith("@") and MAP.fullmatch(line) is not None


def parse(lines: Lines) -> Iterator[Observation]:
    """The observations, in file order. Raises InputError at a line that bpftrace does not print."""
    name = key = None
    buckets: list[Bucket] = []
    for line in lines:
        found, bucket = MAP.fullmatch(line), BUCKET.fullmatch(line)
        if bucket is not None and name is not None:
            buckets.append(_bucket(lines, bucket, buckets))
            continue
        if name is not None and buckets:
            yield _histogram(name, key or "", buckets)
            name, buckets = None, []
        if found is not None and found["value"]:
            yield from _scalar(lines, found["name"], found["key"] or "", found["value"])
        elif found is not None:
            name, key = found["name"], found["key"]
        elif not REMARK.fullmatch(line):
            raise lines.error(f"not a line of bpftrace: {line[:60]!r}")
    if name is not None and buckets:
        yield _histogram(name, key or "", buckets)


def _bucket(lines: Lines, match: re.Match[str], before: list[Bucket]) -> Bucket:
    low = 0 if match["low"] == "..." else _number(match["low"])
    high = match["high"]
    if match["low"].startswith("-"):
        raise lines.error("a negative bucket: a time is not negative")
    if high is None:
        top = low + 1
    elif high == "...":
        top = 2 * low  # nothing is known but that it is above
    else:
        top = _number(high)
    if top < low or (before and low < before[-1][0]):
        raise lines.error("buckets are not in order")
    return low, top, int(match["n"])


def _number(text: str) -> int:
    digits = text.rstrip("KMGTP")
    return int(digits) * SUFFIXES[text[len(digits) :]]


def _histogram(name: str, key: str, buckets: list[Bucket]) -> Observation:
    what, unit = _what(name)
    used = [bucket for bucket in buckets if bucket[2]]
    n = sum(bucket[2] for bucket in used)
    if not n:
        return Observation("count", _key(name, key, what), 0, tool=TOOL)
    p10, p50, p90, p99 = (unit * _quantile(used, q * n) for q in (0.1, 0.5, 0.9, 0.99))
    return Observation(
        what,
        _key(name, key, what),
        n,
        min_ns=unit * used[0][0],
        p10_ns=p10,
        p50_ns=p50,
        p90_ns=p90,
        p99_ns=p99,
        max_ns=unit * (used[-1][1] - 1),
        tool=TOOL,
        note="quantiles interpolated in buckets",
    )


def _quantile(buckets: list[Bucket], rank: float) -> float:
    seen = 0
    for low, high, n in buckets:
        if seen + n >= rank:
            return low + (high - 1 - low) * (rank - seen) / n
        seen += n
    return float(buckets[-1][1] - 1)


def _scalar(lines: Lines, name: str, key: str, value: str) -> Iterator[Observation]:
    what, unit = _what(name)
    stats = STATS.fullmatch(value)
    if stats is not None:
        n, mean, total = (int(number) for number in stats.groups())
        yield Observation(
            what, _key(name, key, what), n, mean_ns=mean * unit, sum_ns=total * unit, tool=TOOL
        )
    elif WHOLE.fullmatch(value):
        count = int(value)
        if count >= 0:  # of a map that is not a histogram nobody knows more than the number
            yield Observation("count", _key(name, key, "count"), count, tool=TOOL)
    elif not value.startswith(("(", "{", "[")) and not value[:1].isalpha():
        raise lines.error(f"not a value of bpftrace: {value[:60]!r}")


def _what(name: str) -> tuple[str, int]:
    """What a map holds by its name, and its unit in nanoseconds."""
    for suffix, unit in UNITS.items():
        if name.endswith(suffix) and name.removesuffix(suffix) in WHAT:
            return name.removesuffix(suffix), unit
    return "value", 1


def _key(name: str, key: str, what: str) -> str:
    """The row's key: the map's own, and its name too where that did not go into ``what``."""
    shown = ", ".join(part.strip().strip('"') for part in key.split(","))
    if what not in {"count", "value"}:
        return shown or "all"
    return f"@{name}[{shown}]" if shown else f"@{name}"
