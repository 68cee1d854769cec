"""Facts about this machine, as far as the system provides them: cores, processor, CPU features and memory."""

from __future__ import annotations

import os
import platform
import sys
from pathlib import Path

_VNNI = {"avx512_vnni", "avx_vnni", "avx_vnni_int8"}
_BFLOAT16 = {"avx512_bf16", "amx_bf16"}


def cores() -> int:
    """Return the number of CPU cores that this process may use, or of all cores where the system does not say."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def processor() -> str:
    """Return the name of the processor."""
    return _proc_field("cpuinfo", "model name", "Model") or platform.processor() or platform.machine() or "unknown"


def cpu_features() -> frozenset[str]:
    """Return the CPU features with their Linux names ("avx512_vnni", on Arm "asimddp"); empty on other systems."""
    return frozenset(_proc_field("cpuinfo", "flags", "Features").split())


def multiplies_int8_exactly() -> bool:
    """Return whether this CPU accumulates int8 products exactly. An x86 CPU needs VNNI for this; others always do it.

    Without VNNI, x86 adds two products in 16 bits, where large ones saturate. The result is False on x86 systems that
    do not provide the CPU features.
    """
    return platform.machine().lower() not in ("x86_64", "amd64") or bool(_VNNI & cpu_features())


def multiplies_bfloat16() -> bool:
    """Return whether this CPU multiplies bfloat16 matrices faster than float32 matrices (x86 only)."""
    return bool(_BFLOAT16 & cpu_features())


def multiplies_int8_tiles() -> bool:
    """Return whether this CPU has instructions for products of int8 matrices (AMX; x86 only)."""
    return "amx_int8" in cpu_features()


def memory(*fields: str) -> int | None:
    """Return the sum in bytes of /proc/meminfo fields ("MemTotal", "MemAvailable", "SwapFree"); None elsewhere."""
    found = [_proc_field("meminfo", field).split() for field in fields]
    return sum(1024 * int(value[0]) for value in found) if all(found) else None


def peak_memory() -> int:
    """Return the peak RSS of this process in bytes, or 0 where the system does not provide it."""
    try:
        import resource
    except ImportError:
        return 0
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def _proc_field(table: str, *names: str) -> str:
    """Return the value of the first of `names` in a table in /proc, or "" where there is none."""
    try:
        text = Path("/proc", table).read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
    for line in text.splitlines():
        name, _, value = line.partition(":")
        if name.strip() in names:
            return value.strip()
    return ""
