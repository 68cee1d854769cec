"""The two limits of this machine that every measured speed stands beside: memory bandwidth and matrix products."""

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
    """Bytes/s that `threads` threads read from memory: dot products over arrays far larger than any cache."""
    data = np.ones(_STREAM_BYTES // 4, np.float32)
    parts = data[: len(data) // (threads * 16) * threads * 16].reshape(threads * 8, 2, -1)

    def read(part: np.ndarray) -> None:
        np.dot(part[0], part[1])

    with ThreadPoolExecutor(threads) as pool:
        seconds = best_of(lambda: list(pool.map(read, parts)))
    return parts.nbytes / seconds


def matrix_rate() -> float:
    """FLOP/s of a float32 matrix product of numpy's BLAS library, all its threads."""
    matrix = np.ones((_MATRIX, _MATRIX), np.float32)
    return 2 * _MATRIX**3 / best_of(lambda: matrix @ matrix)


def best_of(action: Callable[[], object]) -> float:
    """Seconds of the fastest of a few runs: a limit is what the machine can do undisturbed."""
    action()
    return min(timed(action) for _ in range(_ROUNDS))


def timed(action: Callable[[], object]) -> float:
    """Seconds that an action takes."""
    started = time.perf_counter()
    action()
    return time.perf_counter() - started


def median_and_spread(seconds: list[float]) -> tuple[float, float]:
    """The median, and half the distance between the fastest and the slowest as a share of it."""
    middle = statistics.median(seconds)
    return middle, (max(seconds) - min(seconds)) / 2 / middle
