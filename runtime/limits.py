"""Measure the two limits of this machine that speeds are compared with: memory bandwidth and matrix products."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np

_STREAM_BYTES = 512 << 20
_MATRIX = 2048
_ROUNDS = 5


def read_bandwidth(threads: int) -> float:
    """Return the bytes/s that `threads` threads read from memory, from dot products of arrays larger than any cache."""
    data = np.ones(_STREAM_BYTES // 4, np.float32)
    parts = data[: len(data) // (threads * 16) * threads * 16].reshape(threads * 8, 2, -1)

    def read(part: np.ndarray) -> None:
        np.dot(part[0], part[1])

    with ThreadPoolExecutor(threads) as pool:
        seconds = best_of(lambda: list(pool.map(read, parts)))
    return parts.nbytes / seconds


def matrix_rate() -> float:
    """Return the FLOP/s of a float32 matrix product in numpy's BLAS library with all its threads."""
    matrix = np.ones((_MATRIX, _MATRIX), np.float32)
    return 2 * _MATRIX**3 / best_of(lambda: matrix @ matrix)


def best_of(action: Callable[[], object]) -> float:
    """Return the seconds of the fastest of a few runs, because a limit is what the machine does without disturbance."""
    action()
    return min(timed(action) for _ in range(_ROUNDS))


def timed(action: Callable[[], object]) -> float:
    """Return the seconds that an action takes."""
    started = time.perf_counter()
    action()
    return time.perf_counter() - started


def median_and_spread(seconds: list[float]) -> tuple[float, float]:
    """Return the median, and half the distance between the fastest and the slowest run as a share of the median."""
    middle = statistics.median(seconds)
    return middle, (max(seconds) - min(seconds)) / 2 / middle
