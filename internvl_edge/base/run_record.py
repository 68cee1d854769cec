"""The record of a computation: its date, its machine, its time, its memory and its package versions."""

from __future__ import annotations

import os
import platform
from dataclasses import dataclass
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version

from .machine import peak_memory, processor

_PACKAGES = ("internvl-edge", "numpy", "onnxruntime", "tensorrt-rtx-cu13", "tokenizers", "torch")


@dataclass(frozen=True)
class RunRecord:
    """The record of one computation.

    Attributes:
        date: UTC, to the minute: "2026-11-23 17:05".
        seconds: wall time; for a resumed run, that of its last part.
        peak_memory: peak RSS of the process, in bytes.
        machine: processor and number of cores.
        versions: package -> version.
    """

    date: str
    seconds: float
    peak_memory: int
    machine: str
    versions: dict[str, str]


def run_record(seconds: float) -> RunRecord:
    """Return the record of work in this process that took `seconds` and ends now."""
    found = {name: installed for name in _PACKAGES if (installed := _version(name))}
    return RunRecord(
        date=f"{datetime.now(timezone.utc):%Y-%m-%d %H:%M}",
        seconds=round(seconds, 1),
        peak_memory=peak_memory(),
        machine=f"{processor()}, {os.cpu_count()} cores",
        versions={"python": platform.python_version()} | found,
    )


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return ""
