"""What this machine can do at best: the two limits that every speed is measured against."""

from __future__ import annotations

import os
import platform
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

_STREAM_BYTES = 512 << 20
_MATRIX = 2048
_ROUNDS = 5
_VNNI = {"avx512_vnni", "avx_vnni", "avx_vnni_int8"}
_BFLOAT16 = {"avx512_bf16", "amx_bf16"}


def cores() -> int:
    """CPU cores this process may use; where the system does not say, all of them."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def multiplies_int8_exactly() -> bool:
    """Whether this CPU adds up products of bytes without loss: x86 needs VNNI for it, others always do.

    Without it, two products are added in 16 bits, where large ones saturate. False where the CPU cannot be asked.
    """
    return not _is_x86() or bool(_VNNI & _flags())


def multiplies_bfloat16() -> bool:
    """Whether this CPU multiplies bfloat16 matrices faster than float32 ones (x86 only)."""
    return bool(_BFLOAT16 & _flags())


def _is_x86() -> bool:
    return platform.machine().lower() in ("x86_64", "amd64")


def _flags() -> set[str]:
    """What Linux says an x86 CPU can do; empty elsewhere."""
    path = Path("/proc/cpuinfo")
    text = path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""
    return set(next((line for line in text.splitlines() if line.startswith("flags")), "").split())


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
