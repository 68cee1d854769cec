"""`internvl-edge doctor [BUNDLE]`: check the installation, show what this machine can run, and what it would take."""

from __future__ import annotations

import os
import platform
import shutil
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import click

from internvl_edge.base.errors import EngineError
from internvl_edge.base.extras import install
from internvl_edge.base.machine import cores, cpu_features, memory, multiplies_bfloat16, processor
from internvl_edge.base.units import size
from internvl_edge.base.user_folders import cache_folder

from .output import Row, print_json, print_table
from .probes import Answer, nvidia_smi, present, probe

_PACKAGES = (
    *("internvl-edge", "numpy", "pillow", "tokenizers", "onnxruntime", "onnxruntime-gpu", "onnx", "onnx-ir"),
    *("openvino", "torch", "tensorrt", "tensorrt-rtx-cu13", "cuda-bindings", "av", "huggingface-hub"),
    *("nvidia-cudnn-cu12", "nvidia-cudnn-cu13", "nvidia-cublas", "nvidia-cublas-cu12"),
)
# CPU instructions that the int8, bf16 and int4 kernels of the CPU engines use.
_CPU_FLAGS = (
    "avx2",
    "avx_vnni",
    "avx512f",
    "avx512_vnni",
    "avx512_bf16",
    "amx_bf16",
    "amx_int8",
    "asimd",
    "asimddp",
    "i8mm",
    "sve",
)
_KINDS = {
    "AMX": ("amx_bf16", "amx_int8"),
    "AVX512-BF16": ("avx512_bf16",),
    "VNNI": ("avx512_vnni", "avx_vnni"),
    "Arm dot product": ("asimddp",),
    "Arm int8 matrices": ("i8mm",),
}
_BOARD = (Path("/proc/device-tree/model"), Path("/etc/nv_tegra_release"))
_CPU = "CPUExecutionProvider"
# Extras whose only use is a GPU, by a package that no other extra brings.
_GPU_PACKAGES = {"tensorrt-rtx-cu13": "rtx", "onnxruntime-gpu": "gpu"}


@click.command("doctor")
@click.argument("bundle", required=False, type=click.Path(path_type=Path))
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
@click.pass_context
def command(ctx: click.Context, bundle: Path | None, as_json: bool) -> None:
    """Print what this machine has (CPU, GPU, driver, memory, disk, libraries), and the problems found.

    With BUNDLE, also print its TensorRT engines and what --device auto and --engine auto take for it here. The exit
    status is 1 when there is a problem.
    """
    chosen = _bundle_facts(bundle) if bundle else {}
    packages = {name: found for name in _PACKAGES if (found := _version(name))}
    answers = probe(present())
    gpus, no_gpu = _gpus(answers.get("cuda", {}))
    facts: dict[str, Any] = {
        "python": platform.python_version(),
        "machine": f"{platform.system()} {platform.machine()}",
        "board": _board(),
        "cpu": processor(),
        "cores": cores(),
        "cpu features": [flag for flag in _CPU_FLAGS if flag in cpu_features()],
        "cpu kind": _cpu_kind(),
        "memory": {"total": memory("MemTotal"), "available": memory("MemAvailable")},
        "disk": _disk(),
        "gpus": gpus,
        "no gpu": no_gpu if not gpus else None,
        "packages": packages,
        "onnxruntime providers": answers.get("onnxruntime", {}).get("providers", {}),
        "native attention": _native(),
        "libraries": answers,
        **chosen,
    }
    facts["problems"] = _problems(facts, packages, answers)
    if as_json:
        print_json(facts)
    else:
        print_table(_rows(facts))
        for problem in facts["problems"]:
            click.echo(f"problem: {problem}")
        count = len(facts["problems"])
        click.echo(f"{count} problem(s) found" if count else "no problems found")
    ctx.exit(1 if facts["problems"] else 0)


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _board() -> str | None:
    """Return the model and the system release of a Jetson, as its system names them."""
    found = []
    for path in _BOARD:
        try:
            text = path.read_text(encoding="utf-8", errors="replace")
        except OSError:
            continue
        found.append(text.replace("\0", "").strip().splitlines()[0][:100] if text.strip("\0 \n") else "")
    return ", ".join(filter(None, found)) or None


def _cpu_kind() -> str:
    found = [kind for kind, flags in _KINDS.items() if cpu_features() & set(flags)]
    said = ", ".join(found) or "none of AMX, AVX512-BF16 and VNNI"
    return f"{said}; {'bfloat16 products are fast' if multiplies_bfloat16() else 'no fast bfloat16 products'}"


def _disk() -> dict[str, Any]:
    """Return the cache folder, whether it can be written, and the free bytes of its disk and of the present one."""
    cache = cache_folder()
    found: dict[str, Any] = {"cache": str(cache) if cache else None, "writable": False, "free for the cache": None}
    if cache:
        there = next(folder for folder in (cache, *cache.absolute().parents) if folder.exists())
        found["writable"] = there.is_dir() and os.access(there, os.W_OK | os.X_OK)
        found["free for the cache"] = _free(there)
    return found | {"free here": _free(Path())}


def _native() -> str:
    """Return the level of the compiled attention operators and their file, or why there are none."""
    from internvl_edge.runtime.native.build import NativeError
    from internvl_edge.runtime.native.choice import find_library, level

    try:
        library = find_library(builds=False)
        return f"{level(library)} ({library})"
    except NativeError as error:
        return f"none ({error})"


def _free(folder: Path) -> int | None:
    try:
        return shutil.disk_usage(folder).free
    except OSError:
        return None


def _gpus(cuda: Answer) -> tuple[list[Answer], str]:
    """Return the NVIDIA GPUs that the driver or CUDA find, and why there are none, or ""."""
    listed, reason = nvidia_smi()
    found = listed or cuda.get("gpus", [])
    if found:
        return found, ""
    return [], "; ".join(filter(None, (reason, f"CUDA: {cuda['error']}" if "error" in cuda else "")))


def _problems(facts: dict[str, Any], packages: dict[str, str], answers: dict[str, Answer]) -> list[str]:
    problems = []
    if "onnxruntime" in packages and "onnxruntime-gpu" in packages:
        problems.append("onnxruntime and onnxruntime-gpu overwrite each other; uninstall both, then install one")
    without_gpu = f"no NVIDIA GPU was found ({facts['no gpu']})"
    runs = [name for name in ("tensorrt", "tensorrt_rtx") if "error" not in answers.get(name, {"error": ""})]
    runs_tensorrt = bool(runs and facts["gpus"] and "error" not in answers.get("cuda", {"error": ""}))
    runs_cpu = facts["onnxruntime providers"].get(_CPU) == "works"
    if not runs_cpu and not runs_tensorrt:
        why = answers.get("onnxruntime", {}).get("error") or facts["onnxruntime providers"].get(_CPU)
        problems.append(f"no bundle can run here: onnxruntime {why or 'is not installed'}; {install('cpu')}")
    problems += [
        f"{library} cannot be used: {found['error']}"
        for library, found in answers.items()
        if "error" in found and library not in ("cuda", "onnxruntime")
    ]
    problems += [
        f"[{extra}] is installed, but {without_gpu}; engines can be built, and bundles run on the CPU"
        for package, extra in _GPU_PACKAGES.items()
        if package in packages and not facts["gpus"]
    ]
    if "tensorrt" in answers and not facts["gpus"]:
        problems.append(f"tensorrt is installed, but {without_gpu}")
    if facts["gpus"]:
        if "error" in answers.get("cuda", {}):
            problems.append(f"CUDA cannot use the GPU: {answers['cuda']['error']}; update the driver")
        problems += [
            f"{provider} of onnxruntime {state}; it needs a driver, CUDA and cuDNN that fit"
            for provider, state in facts["onnxruntime providers"].items()
            if state.startswith("does not start")
        ]
    if not facts["disk"]["writable"]:
        cache = facts["disk"]["cache"] or "there is no home"
        problems.append(
            f"the cache folder cannot be written ({cache}), so bundles are verified at every start; "
            "set XDG_CACHE_HOME to a folder that can"
        )
    return problems


def _bundle_facts(folder: Path) -> dict[str, Any]:
    """Return the engines of a bundle and what "auto" takes for it, both with reasons."""
    from internvl_edge.bundle.bundle import Bundle
    from internvl_edge.runtime.engines.choice import choose
    from internvl_edge.runtime.engines.device import choose_device
    from internvl_edge.runtime.engines.tensorrt.record import EngineRecord, engine_folders, graph_inputs
    from internvl_edge.runtime.native.choice import choose_attention

    opened = Bundle.open(folder)
    engines = {}
    for path in engine_folders(opened):
        try:
            record = EngineRecord.read(path)
        except EngineError as error:
            engines[path.name] = str(error)
            continue
        capabilities = ", ".join(f"{sm / 10:.1f}" for sm in record.compute_capabilities)
        stale = "" if record.inputs == graph_inputs(opened) else "; built from other files, build it again"
        engines[path.name] = f"{record.flavour} {record.version}, compute capability {capabilities}{stale}"
    try:
        device = str(choose_device(opened))
    except EngineError as error:
        device = f"none ({error})"
    attention = str(choose_attention(opened.manifest, builds=False))
    taken = {"--device auto": device, "--engine auto": str(choose(opened.manifest)), "attention": attention}
    return {"bundle": str(folder), "engines": engines, "auto": taken}


def _rows(facts: dict[str, Any]) -> list[Row]:
    """Lay the facts out for reading."""
    disk, total = facts["disk"], facts["memory"]
    rows: list[Row] = [(name, facts[name]) for name in ("python", "machine", "board", "cpu", "cores") if facts[name]]
    rows += [
        ("cpu features", " ".join(facts["cpu features"]) or "unknown"),
        ("cpu kind", facts["cpu kind"]),
        ("memory", f"{_size(total['total'])}, {_size(total['available'])} available"),
        ("disk", f"{_size(disk['free here'])} free here, {_size(disk['free for the cache'])} for the cache"),
        ("cache folder", (disk["cache"] or "none") + ("" if disk["writable"] else ", cannot be written")),
    ]
    rows += [("gpu", _gpu(gpu)) for gpu in facts["gpus"]] or [("gpu", f"none ({facts['no gpu']})")]
    rows += list(facts["packages"].items())
    providers = facts["onnxruntime providers"]
    rows.append(("onnxruntime providers", ", ".join(f"{name}: {state}" for name, state in providers.items()) or "none"))
    rows.append(("native attention", facts["native attention"]))
    rows += [
        (f"{name} library", _library(found)) for name, found in facts["libraries"].items() if name != "onnxruntime"
    ]
    if "bundle" in facts:
        rows.append(("bundle", facts["bundle"]))
        rows += [(f"engines {name}", text) for name, text in facts["engines"].items()] or [("engines", "none")]
        rows += list(facts["auto"].items())
    return rows


def _library(found: Answer) -> str:
    versions = [f"{name} {found[name]}" for name in ("runtime", "driver") if name in found]
    parts = [found.get("version", ""), *versions, ", ".join(found.get("devices", [])), found.get("error", "")]
    return "; ".join(filter(None, parts))


def _gpu(gpu: Answer) -> str:
    driver = f", driver {gpu['driver']}" if gpu.get("driver") else ""
    capability = f"compute capability {gpu['compute_capability']}"
    return f"{gpu['name']}, {capability}, {_size(gpu['memory'])}, {_size(gpu['free'])} free{driver}"


def _size(count: int | None) -> str:
    return "unknown" if count is None else size(count)
