"""What this machine is: cores, processor, instructions and memory, as far as the system says."""

from __future__ import annotations

import os
import platform
import sys
from pathlib import Path

_VNNI = {"avx512_vnni", "avx_vnni", "avx_vnni_int8"}
_BFLOAT16 = {"avx512_bf16", "amx_bf16"}


def cores() -> int:
    """CPU cores this process may use; where the system does not say, all of them."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def processor() -> str:
    """The processor's name."""
    return _proc_field("cpuinfo", "model name", "Model") or platform.processor() or platform.machine() or "unknown"


def cpu_features() -> frozenset[str]:
    """Instructions of the CPU as Linux names them ("avx512_vnni", on Arm "asimddp"); empty on other systems."""
    return frozenset(_proc_field("cpuinfo", "flags", "Features").split())


def multiplies_int8_exactly() -> bool:
    """Whether this CPU adds up products of bytes without loss: x86 needs VNNI for it, others always do.

    Without it, two products are added in 16 bits, where large ones saturate. False where the CPU cannot be asked.
    """
    return platform.machine().lower() not in ("x86_64", "amd64") or bool(_VNNI & cpu_features())


def multiplies_bfloat16() -> bool:
    """Whether this CPU multiplies bfloat16 matrices faster than float32 ones (x86 only)."""
    return bool(_BFLOAT16 & cpu_features())


def memory(*fields: str) -> int | None:
    """Bytes of fields of Linux's memory table together ("MemTotal", "MemAvailable", "SwapFree"); None elsewhere."""
    found = [_proc_field("meminfo", field).split() for field in fields]
    return sum(1024 * int(value[0]) for value in found) if all(found) else None


def peak_memory() -> int:
    """Bytes of this process's largest resident memory, 0 where the system does not say."""
    try:
        import resource
    except ImportError:
        return 0
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def _proc_field(table: str, *names: str) -> str:
    """The first `name : value` of a table in /proc, "" where there is none."""
    try:
        text = Path("/proc", table).read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
    for line in text.splitlines():
        name, _, value = line.partition(":")
        if name.strip() in names:
            return value.strip()
    return ""
