"""What every benchmark shares: facts about the machine, memory of a child process, and the JSON file of results."""

from __future__ import annotations

import json
import math
import os
import platform
import subprocess
import tempfile
import time
from dataclasses import dataclass
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).resolve().parent / "results"
_PACKAGES = ("internvl-edge", "numpy", "onnx", "onnx-ir", "onnxruntime", "tokenizers", "torch")


@dataclass(frozen=True)
class Run:
    """One child process: seconds of wall and CPU time, peak bytes of memory, what it printed, whether it was killed."""

    wall_s: float
    cpu_s: float
    peak_rss: int
    peak_anonymous: int
    stdout: str
    stopped: bool = False


def run_measured(command: list[str], interval_s: float = 0.02, limit_s: float = math.inf) -> Run:
    """Run a command and sample its resident memory, all of it and the anonymous part (not backed by files).

    After `limit_s` seconds it is killed.

    Raises:
        RuntimeError: the command failed; its standard error is in the message.
    """
    started = time.perf_counter()
    before = os.times()
    # Into files: nobody empties a pipe while memory is sampled, and a full one would stop the program.
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as errors:
        process = subprocess.Popen(command, stdout=out, stderr=errors)
        peaks, stopped = {"VmHWM": 0, "RssAnon": 0}, False
        while process.poll() is None:
            if time.perf_counter() - started > limit_s:
                process.kill()
                process.wait()
                stopped = True
                break
            for name, size in _memory(process.pid).items():
                peaks[name] = max(peaks[name], size)
            time.sleep(interval_s)
        out.seek(0)
        errors.seek(0)
        stdout, stderr = out.read(), errors.read()
    after = os.times()
    if process.returncode and not stopped:
        raise RuntimeError(f"{' '.join(command)} failed: {stderr.strip()}")
    cpu = after.children_user - before.children_user + after.children_system - before.children_system
    return Run(time.perf_counter() - started, cpu, peaks["VmHWM"], peaks["RssAnon"], stdout, stopped)


def write_results(name: str, values: dict[str, Any]) -> Path:
    """Write `results/NAME.json`: the figures with date, machine, versions and commit."""
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.json"
    path.write_text(json.dumps(_context() | values, indent=2) + "\n", encoding="utf-8")
    return path


def _memory(pid: int) -> dict[str, int]:
    try:
        lines = Path(f"/proc/{pid}/status").read_text(encoding="ascii").splitlines()
    except OSError:
        return {}
    fields = dict(line.split(":", 1) for line in lines if ":" in line)
    return {name: int(fields[name].split()[0]) * 1024 for name in ("VmHWM", "RssAnon") if name in fields}


def _context() -> dict[str, Any]:
    cpu = next((x for x in Path("/proc/cpuinfo").read_text().splitlines() if x.startswith("model name")), ": unknown")
    flags = set(next((x for x in Path("/proc/cpuinfo").read_text().splitlines() if x.startswith("flags")), "").split())
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False).stdout
    return {
        "date": datetime.now(timezone.utc).date().isoformat(),
        "commit": commit.strip() or None,
        "machine": {
            "cpu": cpu.split(":", 1)[1].strip(),
            "cores": len(os.sched_getaffinity(0)),
            "features": sorted(flags & {"avx2", "avx512f", "avx512_vnni", "avx512_bf16", "amx_bf16", "amx_int8"}),
            "memory": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
            "system": platform.platform(),
        },
        "load_average": os.getloadavg()[0],
        "versions": {name: found for name in _PACKAGES if (found := _version(name))},
    }


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
