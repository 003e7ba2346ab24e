"""Sizes, durations and rates: the only place that reads or prints a unit.

Inside the simulator a size is an int in bytes, a duration an int in nanoseconds and a rate a
float per second. Reading is exact: ``1.5 ms`` is 1500000 ns, never 1499999.9. `format_*` print
for people (three significant digits); `exact_*` print what `parse_*` reads back unchanged.

Sizes are binary, as in the kernel's ``mem=4G`` and QEMU's ``-m 4G``. ``kB``, ``MB`` and ``GB``
are refused, because /proc/meminfo prints kB and means KiB while disks mean 1000.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from decimal import Decimal
from fractions import Fraction
from math import isfinite

from simkvm.scenario.errors import InputError

SIZE_BYTES: Mapping[str, int] = {
    "B": 1,
    "KiB": 1 << 10,
    "MiB": 1 << 20,
    "GiB": 1 << 30,
    "TiB": 1 << 40,
}
DURATION_NS: Mapping[str, int] = {
    "ns": 1,
    "us": 1_000,
    "ms": 1_000_000,
    "s": 1_000_000_000,
    "min": 60_000_000_000,
    "h": 3_600_000_000_000,
}
KIB, MIB, GIB = SIZE_BYTES["KiB"], SIZE_BYTES["MiB"], SIZE_BYTES["GiB"]
NS_PER_MS, NS_PER_S = DURATION_NS["ms"], DURATION_NS["s"]
COUNTS: Mapping[str, int] = {"": 1, "k": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}

MOST = 2**63 - 1
"""The largest size and duration: what a signed 64-bit array can hold."""
MOST_PER_S = 1e9
"""The largest rate: one an engine tick."""
LEAST_PER_S = 1e-9

SIZE_SPELLINGS = "B, KiB (K, Ki), MiB (M, Mi), GiB (G, Gi), TiB (T, Ti)"
DURATION_SPELLINGS = "ns, us, ms, s, min, h"
RATE_SPELLINGS = "/ s, / ms, / us, / min, / h"

# At most 40 digits a side: exact for every value in range, and no denial of service by digits.
_NUMBER = r"(-?)([0-9]{1,40}(?:\.[0-9]{1,40})?)"
_QUANTITY = re.compile(rf"\s*{_NUMBER}\s*([^\s0-9.]\S*)?\s*", re.ASCII)
_RATE = re.compile(rf"\s*{_NUMBER}\s*(?:/\s*(\S+))?\s*", re.ASCII)

_SIZE_ALIASES = {
    spelling.lower(): name
    for name in SIZE_BYTES
    for spelling in ({name} if name == "B" else {name, name[:2], name[0]})
}
_DECIMAL_SIZES = {"kb": "KiB", "mb": "MiB", "gb": "GiB", "tb": "TiB"}
_DURATION_ALIASES = {**{name: name for name in DURATION_NS}, "\u00b5s": "us", "\u03bcs": "us"}
_LONG_DURATIONS = {
    "m": "min",
    "sec": "s",
    "secs": "s",
    "second": "s",
    "seconds": "s",
    "msec": "ms",
    "usec": "us",
    "nsec": "ns",
    "mins": "min",
    "minute": "min",
    "minutes": "min",
    "hour": "h",
    "hours": "h",
}


def parse_size(text: str) -> int:
    """Bytes of ``64 MiB``, ``64M``, ``4 KiB``, ``1.5 GiB``...

    Raises InputError for a number without a unit, a decimal unit (kB, MB, GB), a negative size,
    one that is not a whole number of bytes, or one above 2**63 - 1 bytes.
    """
    sign, number, unit = _split(text, "size", "64 MiB")
    if unit is None:
        raise InputError(f"a size needs a unit, {text!r} has none: {SIZE_SPELLINGS}")
    if unit.lower() in _DECIMAL_SIZES:
        binary = _DECIMAL_SIZES[unit.lower()]
        raise InputError(
            f"{unit} is ambiguous (1000 or 1024?), sizes here are binary", hint=f"{number} {binary}"
        )
    name = _SIZE_ALIASES.get(unit.lower())
    if name is None:
        raise InputError(f"{unit!r} is not a unit of size: {SIZE_SPELLINGS}")
    return _whole(text, sign, Fraction(number) * SIZE_BYTES[name], "bytes")


def parse_duration(text: str) -> int:
    """Nanoseconds of ``250 us``, ``1.5 ms``, ``2 s``, ``1 min``, ``1 h``, ``100 ns``.

    Raises InputError for a number without a unit, an unknown unit, a negative duration, one that
    is not a whole number of nanoseconds, or one above 2**63 - 1 ns (292 years).
    """
    sign, number, unit = _split(text, "duration", "250 us")
    if unit is None:
        raise InputError(f"a duration needs a unit, {text!r} has none: {DURATION_SPELLINGS}")
    return _whole(text, sign, Fraction(number) * _unit_ns(number, unit), "nanoseconds")


def parse_rate(text: str) -> float:
    """Events per second of ``200 / s``, ``5 / ms``, ``0.5 / min``.

    Raises InputError for a missing or unknown unit of time, or a rate outside 1e-9 .. 1e9 a
    second (more than one a nanosecond cannot be told apart).
    """
    match = _RATE.fullmatch(text)
    if match is None or match[3] is None:
        raise InputError(f"{text!r} is not a rate such as '200 / s': {RATE_SPELLINGS}")
    sign, number, unit = match.groups()
    per_s = Fraction(number) * DURATION_NS["s"] / _unit_ns(None, unit)
    if sign or not LEAST_PER_S <= float(per_s) <= MOST_PER_S:
        raise InputError(f"{text!r} is out of range: a rate lies in 1e-9 .. 1e9 a second")
    return float(per_s)


def measured_by(text: str) -> Callable[[str], float] | None:
    """Which of the three reads `text`: `parse_rate`, `parse_duration` or `parse_size`; or none."""
    parsers: tuple[Callable[[str], float], ...] = (parse_rate, parse_duration, parse_size)
    for parse in parsers:
        try:
            parse(text)
        except InputError:
            continue
        return parse
    return None


def _split(text: str, what: str, example: str) -> tuple[str, str, str | None]:
    match = _QUANTITY.fullmatch(text)
    if match is None:
        raise InputError(f"{text!r} is not a {what} such as {example!r}")
    return match[1], match[2], match[3]


def _unit_ns(number: str | None, unit: str) -> int:
    name = _DURATION_ALIASES.get(unit)
    if name is None:
        meant = _LONG_DURATIONS.get(unit.lower())
        hint = None if meant is None else f"{number} {meant}" if number else f"/ {meant}"
        raise InputError(f"{unit!r} is not a unit of time: {DURATION_SPELLINGS}", hint=hint)
    return DURATION_NS[name]


def _whole(text: str, sign: str, value: Fraction, unit: str) -> int:
    if sign:
        raise InputError(f"{text!r} is negative")
    if value.denominator != 1:
        raise InputError(f"{text!r} is not a whole number of {unit}")
    if value > MOST:
        raise InputError(f"{text!r} is more than 2**63 - 1 {unit}")
    return int(value)


def exact_size(size_bytes: int) -> str:
    """The size in the largest unit that divides it: ``64 MiB``, ``1025 B``."""
    return _exact(size_bytes, SIZE_BYTES)


def exact_duration(duration_ns: int) -> str:
    """The duration in the largest unit that divides it: ``250 us``, ``1500001 ns``."""
    return _exact(duration_ns, DURATION_NS)


def exact_rate(per_s: float) -> str:
    """The rate with every digit of the float: ``200 / s``, ``0.0001 / s``."""
    digits = format(Decimal(repr(per_s)), "f")
    return f"{digits.removesuffix('.0')} / s"


def _exact(value: int, units: Mapping[str, int]) -> str:
    divisors = [name for name in units if value and value % units[name] == 0]
    name = divisors[-1] if divisors else next(iter(units))
    return f"{value // units[name]} {name}"


def format_size(size_bytes: float) -> str:
    """For people: ``64 MiB``, ``1.18 MiB``, ``1023 KiB``."""
    return _rounded(size_bytes, SIZE_BYTES)


def format_duration(duration_ns: float) -> str:
    """For people: ``1.23 ms``, ``64 ns``, ``2 min``."""
    return _rounded(duration_ns, DURATION_NS)


def format_count(count: float) -> str:
    """For people: ``512``, ``12.3 k``, ``1.23 M``; powers of 1000, since nothing is stored."""
    return _rounded(count, COUNTS)


def format_rate(per_s: float) -> str:
    """For people: ``200 / s``, ``1.23 M / s``."""
    return f"{format_count(per_s)} / s"


def _rounded(value: float, units: Mapping[str, int]) -> str:
    if not isfinite(value):
        return str(value)
    if value < 0:
        return "-" + _rounded(-value, units)
    names = list(units)
    digits = ""
    for name, larger in zip(names, [*names[1:], None], strict=True):
        digits = _three_digits(value / units[name])
        # Compare what will be printed: 999999 ns rounds to 1000 us and has to become 1 ms.
        if larger is None or float(digits) * units[name] < units[larger]:
            return f"{digits} {name}".rstrip()
    raise AssertionError("the largest unit takes everything")


def _three_digits(value: float) -> str:
    whole = len(str(int(value))) if value >= 1 else 1
    text = f"{value:.{max(0, 3 - whole)}f}" if value >= 0.01 else f"{value:.3g}"
    return text.rstrip("0").rstrip(".") if "." in text else text
