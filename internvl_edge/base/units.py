"""Numbers with units, for people."""

from __future__ import annotations


def size(count: float) -> str:
    """A number of bytes: "1.88 GB" (powers of ten, as disks count)."""
    for unit in ("B", "kB", "MB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.2f} GB"
