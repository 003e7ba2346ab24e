"""Does reading undo printing, without losing a nanosecond or a byte to a float?"""

from __future__ import annotations

from decimal import Decimal
from fractions import Fraction

from hypothesis import example, given
from hypothesis import strategies as st

from simkvm.units import (
    DURATION_NS,
    LEAST_PER_S,
    MOST,
    MOST_PER_S,
    SIZE_BYTES,
    exact_duration,
    exact_rate,
    exact_size,
    format_count,
    format_duration,
    format_size,
    parse_duration,
    parse_rate,
    parse_size,
)

AMOUNTS = st.integers(0, MOST) | st.integers(0, 2**24).map(lambda n: n * 4096)
RATES = st.floats(LEAST_PER_S, MOST_PER_S)


@given(AMOUNTS)
@example(2**53 + 1)
def test_a_size_survives_its_exact_text(size_bytes: int) -> None:
    assert parse_size(exact_size(size_bytes)) == size_bytes


@given(AMOUNTS)
@example(2**53 + 1)
def test_a_duration_survives_its_exact_text(duration_ns: int) -> None:
    assert parse_duration(exact_duration(duration_ns)) == duration_ns


@given(RATES)
def test_a_rate_survives_its_exact_text(per_s: float) -> None:
    assert parse_rate(exact_rate(per_s)) == per_s


@given(st.integers(0, 9_000_000), st.sampled_from(sorted(SIZE_BYTES)))
def test_a_size_is_its_number_times_its_unit(number: int, unit: str) -> None:
    if number * SIZE_BYTES[unit] <= MOST:
        assert parse_size(f"{number} {unit}") == number * SIZE_BYTES[unit]


@given(st.integers(0, MOST), st.sampled_from(sorted(DURATION_NS)))
def test_a_fraction_of_any_unit_is_exact(duration_ns: int, unit: str) -> None:
    value = Fraction(duration_ns, DURATION_NS[unit])
    text = _decimal(value)
    if text is not None:
        assert parse_duration(f"{text} {unit}") == duration_ns


@given(AMOUNTS)
def test_text_for_people_is_within_half_a_percent(amount: int) -> None:
    for text, units in (
        (format_size(amount), SIZE_BYTES),
        (format_duration(amount), DURATION_NS),
    ):
        number, unit = text.split()
        assert abs(float(number) * units[unit] - amount) <= amount * 0.005


@given(AMOUNTS)
def test_text_for_people_is_short_and_in_the_right_unit(amount: int) -> None:
    for text, units in ((format_size(amount), SIZE_BYTES), (format_duration(amount), DURATION_NS)):
        number, unit = text.split()
        larger = [n for n in units.values() if n > units[unit]]
        assert not larger or float(number) * units[unit] < larger[0]
        assert amount == 0 or float(number) >= 1
        if larger:
            assert len(number.replace(".", "")) <= 4


@given(st.integers(0, 10**15 - 1), st.integers(0, 10**15 - 1))
def test_larger_counts_never_read_smaller(one: int, other: int) -> None:
    one, other = sorted((one, other))
    assert _count(format_count(one)) <= _count(format_count(other))


def _count(text: str) -> Decimal:
    number, _, unit = text.partition(" ")
    return Decimal(number) * {"": 1, "k": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}[unit]


def _decimal(value: Fraction) -> str | None:
    """The fraction as decimal digits, or None if they do not end (minutes, hours)."""
    for digits in range(20):
        scaled = value * 10**digits
        if scaled.denominator == 1:
            text = str(scaled.numerator).rjust(digits + 1, "0")
            return f"{text[:-digits]}.{text[-digits:]}" if digits else text
    return None
