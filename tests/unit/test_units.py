"""Are units read as kernel people write them, and printed as they read them?"""

from __future__ import annotations

import math

import pytest

from simkvm.scenario.errors import InputError
from simkvm.units import (
    MOST,
    exact_duration,
    exact_rate,
    exact_size,
    format_count,
    format_duration,
    format_rate,
    format_size,
    parse_duration,
    parse_rate,
    parse_size,
)


@pytest.mark.parametrize(
    ("text", "size_bytes"),
    [
        ("64 MiB", 64 << 20),
        ("64M", 64 << 20),
        ("64Mi", 64 << 20),
        (" 64  mib ", 64 << 20),
        ("4 KiB", 4096),
        ("4k", 4096),
        ("1.5 GiB", 3 << 29),
        ("2T", 2 << 40),
        ("512 B", 512),
        ("0 B", 0),
        (f"{MOST} B", MOST),
    ],
)
def test_sizes_are_binary(text: str, size_bytes: int) -> None:
    assert parse_size(text) == size_bytes


@pytest.mark.parametrize(
    ("text", "duration_ns"),
    [
        ("100 ns", 100),
        ("250 us", 250_000),
        ("250\u00b5s", 250_000),
        ("250 \u03bcs", 250_000),
        ("1.5 ms", 1_500_000),
        ("2 s", 2_000_000_000),
        ("1 min", 60_000_000_000),
        ("1 h", 3_600_000_000_000),
        ("0 s", 0),
        ("0.000000001 s", 1),
        ("10 us", 10_000),
        # Each of these is off by one nanosecond if a float is anywhere on the way.
        ("9007199.254740993 s", 9_007_199_254_740_993),
        ("9223372036.854775807 s", MOST),
    ],
)
def test_durations_are_exact(text: str, duration_ns: int) -> None:
    assert parse_duration(text) == duration_ns


@pytest.mark.parametrize(
    ("text", "per_s"),
    [("200 / s", 200.0), ("5/ms", 5000.0), ("30 / min", 0.5), ("0.1 / s", 0.1), ("1 / ns", 1e9)],
)
def test_rates_are_per_second(text: str, per_s: float) -> None:
    assert parse_rate(text) == per_s


@pytest.mark.parametrize(
    ("text", "fragment", "hint"),
    [
        ("64", "a size needs a unit, '64' has none: B, KiB (K, Ki)", None),
        ("0", "a size needs a unit", None),
        ("4 kB", "kB is ambiguous (1000 or 1024?)", "4 KiB"),
        ("64 MB", "MB is ambiguous", "64 MiB"),
        ("1.5GB", "GB is ambiguous", "1.5 GiB"),
        ("1 TB", "TB is ambiguous", "1 TiB"),
        ("3 pages", "'pages' is not a unit of size", None),
        ("1.0001 KiB", "'1.0001 KiB' is not a whole number of bytes", None),
        ("-4 KiB", "'-4 KiB' is negative", None),
        ("8388608 TiB", "is more than 2**63 - 1 bytes", None),
        ("1e3 KiB", "'1e3 KiB' is not a size", None),
        ("many", "'many' is not a size such as '64 MiB'", None),
        ("", "'' is not a size", None),
        ("4 KiB 2 B", "'4 KiB 2 B' is not a size", None),
        ("\u0664 KiB", "is not a size", None),
    ],
)
def test_wrong_sizes(text: str, fragment: str, hint: str | None) -> None:
    _refused(parse_size, text, fragment, hint)


@pytest.mark.parametrize(
    ("text", "fragment", "hint"),
    [
        ("250", "a duration needs a unit, '250' has none: ns, us, ms, s, min, h", None),
        ("5 m", "'m' is not a unit of time", "5 min"),
        ("5 sec", "'sec' is not a unit of time", "5 s"),
        ("5 fortnights", "'fortnights' is not a unit of time", None),
        ("1.5 ns", "'1.5 ns' is not a whole number of nanoseconds", None),
        ("-1 ms", "'-1 ms' is negative", None),
        ("300 M", "'M' is not a unit of time", "300 min"),
        ("2562048 h", "is more than 2**63 - 1 nanoseconds", None),
        ("9" * 41 + " s", "is not a duration", None),
    ],
)
def test_wrong_durations(text: str, fragment: str, hint: str | None) -> None:
    _refused(parse_duration, text, fragment, hint)


@pytest.mark.parametrize(
    ("text", "fragment", "hint"),
    [
        ("200", "'200' is not a rate such as '200 / s'", None),
        ("200 s", "'200 s' is not a rate", None),
        ("200 / sec", "'sec' is not a unit of time", "/ s"),
        ("0 / s", "is out of range", None),
        ("-1 / s", "is out of range", None),
        ("2 / ns", "is out of range", None),
    ],
)
def test_wrong_rates(text: str, fragment: str, hint: str | None) -> None:
    _refused(parse_rate, text, fragment, hint)


def _refused(parse: object, text: str, fragment: str, hint: str | None) -> None:
    assert callable(parse)
    with pytest.raises(InputError) as caught:
        parse(text)
    assert fragment in caught.value.message
    assert caught.value.hint == hint


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0 ns"),
        (999, "999 ns"),
        (1_234_567, "1.23 ms"),
        (12_345, "12.3 us"),
        (999_499, "999 us"),
        (999_999, "1 ms"),  # rounds up to the next unit, never "1000 us"
        (60_000_000_000, "1 min"),
        (90_000_000_000, "1.5 min"),
        (86_400_000_000_000, "24 h"),
        (0.5, "0.5 ns"),
        (-1_500, "-1.5 us"),
        (math.nan, "nan"),
        (math.inf, "inf"),
    ],
)
def test_durations_for_people(value: float, text: str) -> None:
    assert format_duration(value) == text


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0 B"),
        (64 << 20, "64 MiB"),
        (1023 << 10, "1023 KiB"),  # four digits before the point are not rounded away
        (1_234_567, "1.18 MiB"),
        (5 << 50, "5120 TiB"),
    ],
)
def test_sizes_for_people(value: int, text: str) -> None:
    assert format_size(value) == text


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0"), (512, "512"), (1234, "1.23 k"), (999_999, "1 M"), (2.5, "2.5"), (7e15, "7000 T")],
)
def test_counts_for_people(value: float, text: str) -> None:
    assert format_count(value) == text
    assert format_rate(value) == f"{text} / s"


def test_exact_text_uses_the_largest_unit_that_divides() -> None:
    assert [exact_size(n) for n in (0, 4096, 4097, 3 << 29)] == [
        "0 B",
        "4 KiB",
        "4097 B",
        "1536 MiB",
    ]
    assert [exact_duration(n) for n in (0, 1_500_000, 60_000_000_000)] == [
        "0 ns",
        "1500 us",
        "1 min",
    ]
    assert [exact_rate(r) for r in (200.0, 0.1, 1e-7)] == ["200 / s", "0.1 / s", "0.0000001 / s"]
