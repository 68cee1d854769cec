"""Ask the libraries of this machine what they can do, each in a process of its own.

A library that hangs, or that ends the process that loads it, is then one line of `doctor` and not its end.
"""

from __future__ import annotations

import csv
import importlib
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import internvl_edge
from internvl_edge.base.text import one_line

Answer = dict[str, Any]

SECONDS = 30
_DRIVER_SECONDS = 10
_MARK = "internvl-edge probe: "
_FIELDS = ("name", "driver_version", "memory.total", "memory.free", "compute_cap")


def probe(names: Iterable[str], seconds: float = SECONDS) -> dict[str, Answer]:
    """Return the answers of several probes, asked at the same time; a probe that fails answers {"error": why}."""
    names = list(names)
    with ThreadPoolExecutor(max_workers=len(names) or 1) as pool:
        return dict(zip(names, pool.map(lambda name: _ask(name, seconds), names), strict=True))


def nvidia_smi() -> tuple[list[Answer], str]:
    """Return the NVIDIA GPUs that the driver's own program lists, and why there are none, or ""."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return [], "nvidia-smi is not installed"
    command = [program, f"--query-gpu={','.join(_FIELDS)}", "--format=csv,noheader,nounits"]
    try:
        status, out, err = _run(command, _DRIVER_SECONDS)
    except subprocess.TimeoutExpired:
        return [], f"nvidia-smi gave no answer in {_DRIVER_SECONDS} s"
    except OSError as error:
        return [], f"nvidia-smi cannot be run ({error})"
    if status:
        return [], f"nvidia-smi: {one_line((out or err).strip() or _ending(status), 200)}"
    return [_gpu(row) for row in csv.reader(out.splitlines()) if len(row) == len(_FIELDS)], ""


def answer(name: str) -> None:
    """Print the answer of one probe, in the process that was started for it."""
    try:
        found = _PROBES[name]()
    except Exception as error:  # whatever a library raises is an answer
        found = {"error": one_line(f"{type(error).__name__}: {error}", 200)}
    print(_MARK + json.dumps(found), flush=True)


def _ask(name: str, seconds: float) -> Answer:
    root = str(Path(internvl_edge.__file__).parents[1])
    code = f"import sys; sys.path.insert(0, {root!r}); from internvl_edge.cli.probes import answer; answer({name!r})"
    try:
        status, out, _ = _run([sys.executable, "-c", code], seconds)
    except subprocess.TimeoutExpired:
        return {"error": f"no answer in {seconds:g} s"}
    for line in reversed(out.splitlines()):
        if line.startswith(_MARK):
            found: Answer = json.loads(line.removeprefix(_MARK))
            return found
    return {"error": f"it ended its process ({_ending(status)})"}


def _run(command: list[str], seconds: float) -> tuple[int, str, str]:
    """Run a program and return its exit status and what it wrote; raise TimeoutExpired where it hangs.

    A process that waits for a broken driver cannot be killed, so nothing waits for the death of one that hangs.
    """
    process = subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True
    )
    try:
        out, err = process.communicate(timeout=seconds)
    except BaseException:
        with suppress(OSError, AttributeError):  # Windows has no groups of processes
            os.killpg(process.pid, signal.SIGKILL)
        process.kill()
        with suppress(subprocess.TimeoutExpired):
            process.wait(1)
        raise
    return process.returncode, out.decode("utf-8", "replace"), err.decode("utf-8", "replace")


def _ending(status: int) -> str:
    if status >= 0:
        return f"exit status {status}"
    names = {int(number): number.name for number in signal.Signals}
    return names.get(-status, f"signal {-status}")


def _gpu(row: list[str]) -> Answer:
    name, driver, total, free, capability = (cell.strip() for cell in row)
    return {
        "name": name,
        "compute_capability": capability,
        "driver": driver,
        "memory": int(total) * 2**20 if total.isdecimal() else None,
        "free": int(free) * 2**20 if free.isdecimal() else None,
    }


def _onnxruntime() -> Answer:
    from internvl_edge.runtime.engines.onnxruntime import PROVIDERS

    runtime: Any = importlib.import_module("onnxruntime")
    if not hasattr(runtime, "get_available_providers"):
        return {"error": "its folder is damaged; uninstall onnxruntime and onnxruntime-gpu, then install one"}
    used = {provider: device for device, provider in PROVIDERS.items()}
    available = list(runtime.get_available_providers())
    states = {name: _session(runtime, name) if name in used else "not used by internvl-edge" for name in available}
    return {"version": runtime.__version__, "providers": states}


def _session(runtime: Any, provider: str) -> str:
    """Return "works" where a session starts with a provider, otherwise why not."""
    from internvl_edge.runtime.engines.device import obstacle_to_session

    reason = obstacle_to_session(runtime, provider)
    if reason is None:
        return "works"
    return one_line(f"does not start: {reason}", 200) if reason else "does not start here"


def _openvino() -> Answer:
    from internvl_edge.runtime.engines.openvino import OLDEST, is_available

    openvino: Any = importlib.import_module("openvino")
    if not is_available():
        return {"error": f"release {openvino.__version__} cannot read the graphs; {'.'.join(map(str, OLDEST))} can"}
    return {"version": str(openvino.__version__), "devices": list(openvino.Core().available_devices)}


def _tensorrt(module: str) -> Callable[[], Answer]:
    def ask() -> Answer:
        from internvl_edge.runtime.engines.tensorrt.flavour import load_flavour

        return {"version": load_flavour(module).version}

    return ask


def _cuda() -> Answer:
    runtime: Any = importlib.import_module("cuda.bindings.runtime")
    success = runtime.cudaError_t.cudaSuccess
    found: Answer = {"gpus": []}
    for key, function in (("runtime", "cudaRuntimeGetVersion"), ("driver", "cudaDriverGetVersion")):
        status, version = getattr(runtime, function)()
        if status == success and version:
            found[key] = f"{version // 1000}.{version % 1000 // 10}"
    status, count = runtime.cudaGetDeviceCount()
    if status != success:
        _, text = runtime.cudaGetErrorString(status)
        return found | {"error": text.decode() if isinstance(text, bytes) else str(text)}
    for index in range(count):
        _, properties = runtime.cudaGetDeviceProperties(index)
        runtime.cudaSetDevice(index)
        _, free, total = runtime.cudaMemGetInfo()
        name = properties.name.decode() if isinstance(properties.name, bytes) else str(properties.name)
        capability = f"{properties.major}.{properties.minor}"
        found["gpus"].append({"name": name, "compute_capability": capability, "memory": total, "free": free})
    return found


_PROBES: dict[str, Callable[[], Answer]] = {
    "onnxruntime": _onnxruntime,
    "openvino": _openvino,
    "tensorrt": _tensorrt("tensorrt"),
    "tensorrt_rtx": _tensorrt("tensorrt_rtx"),
    "cuda": _cuda,
}
# Probe -> the module that it needs; a probe without it is not asked.
_MODULES = {"cuda": "cuda.bindings"}


def present() -> list[str]:
    """Return the probes whose libraries are installed."""
    return [name for name in _PROBES if _is_installed(_MODULES.get(name, name))]


def _is_installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except (ImportError, ValueError):  # a package above it is missing or damaged
        return False
