"""Numbers with units, for printed output."""

from __future__ import annotations


def size(count: float) -> str:
    """Return a number of bytes as text, such as "1.88 GB". Units are powers of ten."""
    for unit in ("B", "kB", "MB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.2f} GB"
