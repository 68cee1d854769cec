"""When, where, how long and in how much memory something was computed."""

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
    """How something was computed.

    Attributes:
        date: UTC, to the minute: "2026-11-23 17:05".
        seconds: wall time; of a continued run, its last part.
        peak_memory: largest resident memory of the process, bytes.
        machine: processor and cores.
        versions: package -> version.
    """

    date: str
    seconds: float
    peak_memory: int
    machine: str
    versions: dict[str, str]


def run_record(seconds: float) -> RunRecord:
    """The record of work that this process did, took `seconds`, and ends now."""
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
