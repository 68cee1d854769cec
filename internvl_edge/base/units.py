"""Numbers with units, for printed output."""

from __future__ import annotations

import math


def size(count: float) -> str:
    """Return a number of bytes as text, such as "1.88 GB". Units are powers of ten."""
    for unit in ("B", "kB", "MB"):
        if count < 999.5:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.2f} GB"


def rounded(number: float, digits: int = 3) -> str:
    """Return a number with so many digits that count, never with an exponent: "0.0123", "84.3", "25,200"."""
    if not math.isfinite(number) or not number:
        return f"{number:g}"
    places = digits - 1 - math.floor(math.log10(abs(number)))
    return f"{round(number, places):,.{max(0, places)}f}"


def share(value: float) -> str:
    """Return a share from 0 to 1 in percent: "98.3 %"; exactly 0 and 1 without a digit after the point."""
    return f"{value:.0%}" if value in (0, 1) else f"{min(max(value, 0.001), 0.999):.1%}"


def short_time(seconds: float) -> str:
    """Return a short time with its unit: "<1 ms", "35 ms", "1.2 s", "12 s"."""
    if seconds < 0.001:
        return "<1 ms"
    return f"{rounded(1000 * seconds, 2)} ms" if seconds < 0.9995 else f"{rounded(seconds, 2)} s"


def duration(seconds: float) -> str:
    """Return seconds as text: "42 s", "3 min 20 s", "2 h 5 min"."""
    whole = round(seconds)
    if whole < 60:
        return f"{seconds:.3g} s" if seconds < 1 else f"{whole} s"
    return f"{whole // 60} min {whole % 60} s" if whole < 3600 else f"{whole // 3600} h {whole % 3600 // 60} min"
