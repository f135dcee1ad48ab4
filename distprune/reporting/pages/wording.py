"""Numbers as people read them: three digits, and the unit that fits."""

from __future__ import annotations

COUNTS = {1e12: "T", 1e9: "B", 1e6: "M", 1e3: "K"}
BYTES = {1e12: "TB", 1e9: "GB", 1e6: "MB", 1e3: "kB"}


def short_count(number: int) -> str:
    """Such as 70.6 B."""
    return scaled(number, COUNTS, "")


def short_bytes(number: int) -> str:
    """Such as 141 GB; powers of ten, as disks are sold."""
    return scaled(number, BYTES, "bytes")


def scaled(number: float, units: dict[float, str], plain: str) -> str:
    # A number that rounds to a thousand of one unit is one of the next.
    size, unit = next(((size, unit) for size, unit in units.items() if number >= 0.9995 * size), (1, plain))
    return f"{three_digits(number / size)} {unit}".rstrip()


def three_digits(number: float) -> str:
    """Such as 1,240, 12.3, 1.23 and 0.00123."""
    if number == 0:
        return "0"
    if abs(number) >= 100:
        return f"{number:,.0f}"
    if abs(number) >= 1e-4:
        return f"{float(f'{number:.3g}')}".removesuffix(".0")
    return f"{number:.2e}"


def duration(seconds: float) -> str:
    """Such as 3.2 s, 12 min 5 s and 3 h 12 min."""
    if seconds < 60:
        return f"{three_digits(seconds)} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest} s"
    return f"{minutes // 60} h {minutes % 60} min"


def percent(share: float) -> str:
    """Such as 29.9%."""
    return f"{share:.1%}"
