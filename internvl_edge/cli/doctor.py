"""`internvl-edge doctor`: check the installation, and show what this machine can run."""

from __future__ import annotations

import importlib.util
import platform
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import click

from internvl_edge.base.extras import install
from internvl_edge.base.machine import cores, cpu_features, memory, processor
from internvl_edge.base.units import size

from .output import print_json, print_table

_PACKAGES = (
    *("internvl-edge", "numpy", "pillow", "tokenizers", "onnxruntime", "onnxruntime-gpu"),
    *("onnx", "onnx-ir", "openvino", "torch", "tensorrt", "tensorrt-rtx-cu13", "cuda-bindings", "av"),
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


@click.command("doctor")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
@click.pass_context
def command(ctx: click.Context, as_json: bool) -> None:
    """Print package versions, ONNX Runtime providers, memory and CPU features, and the problems found.

    The exit status is 1 when there is a problem.
    """
    facts = {
        "python": platform.python_version(),
        "machine": f"{platform.system()} {platform.machine()}",
        "cpu": processor(),
        "cores": cores(),
        "cpu features": " ".join(_cpu_features()) or "unknown",
        "memory": _memory(),
    }
    packages = {name: found for name in _PACKAGES if (found := _version(name))}
    providers, problems = _onnxruntime()
    if as_json:
        print_json({**facts, "packages": packages, "onnxruntime providers": providers, "problems": problems})
    else:
        print_table([*facts.items(), *packages.items(), ("onnxruntime providers", ", ".join(providers) or "none")])
        for problem in problems:
            click.echo(f"problem: {problem}")
        click.echo("no problems found" if not problems else f"{len(problems)} problem(s) found")
    ctx.exit(1 if problems else 0)


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _onnxruntime() -> tuple[list[str], list[str]]:
    """Return the providers of ONNX Runtime, and the problems of the installation."""
    problems = []
    if _version("onnxruntime") and _version("onnxruntime-gpu"):
        problems.append("onnxruntime and onnxruntime-gpu overwrite each other; uninstall both, then install one")
    try:
        runtime: Any = importlib.import_module("onnxruntime")
        return list(runtime.get_available_providers()), problems
    except ImportError as error:
        if not _has_tensorrt():
            problems.append(f"onnxruntime cannot be imported ({error}); {install('cpu')}")
    except AttributeError:
        problems.append(
            "the onnxruntime folder is damaged; uninstall onnxruntime and onnxruntime-gpu, then install one"
        )
    return [], problems


def _has_tensorrt() -> bool:
    """Return whether bundles can run without ONNX Runtime.

    On JetPack 6, no release of ONNX Runtime for its Python can read the graphs, so TensorRT alone runs there.
    """
    return importlib.util.find_spec("tensorrt") is not None and _version("cuda-bindings") is not None


def _cpu_features() -> list[str]:
    return [flag for flag in _CPU_FLAGS if flag in cpu_features()]


def _memory() -> str:
    total, available = memory("MemTotal"), memory("MemAvailable")
    if total is None or available is None:
        return "unknown"
    return f"{size(total)}, {size(available)} available"
