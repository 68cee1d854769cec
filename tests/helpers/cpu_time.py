"""Bounds of CPU time, which other programs on the machine do not change."""

from __future__ import annotations

import gc
import time
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def cpu_time_below(seconds: float) -> Iterator[None]:
    """Check that a block takes less CPU time; what other tests left is not collected meanwhile."""
    gc.disable()
    started = time.process_time()
    try:
        yield
    finally:
        gc.enable()
    took = time.process_time() - started
    assert took < seconds, f"it took {took:.2f} s, expected less than {seconds} s"
