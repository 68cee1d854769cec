"""Everything on this machine's NVIDIA GPU in one run: engines built, compared with the CPU engine, timed, beside torch.

    python benchmarks/gpu_acceptance.py [--minutes 8] [--work DIR] [--stage NAME]... [--model TEXT]

The stages, which can also be run one by one (benchmarks/README.md lists what each needs):

    cuda          the engine's CUDA half with a stand-in for TensorRT (gpu_cuda.py)
    tensorrt      engines of each installed TensorRT: built, compared, timed (gpu_rows.py)
    graphs        the graphs for TensorRT in torch, in bfloat16 and float16: compared
    onnxruntime   ONNX Runtime with CUDA on a float16 bundle: compared, timed
    torch         the peer: transformers' decoder in torch, compiled (gpu_peer.py)

Without --stage, all run but one: `graphs` takes the place of `tensorrt` on a card that no installed TensorRT knows.
Finds what is installed and says what is missing; a part that is missing, refuses the card or crashes is a row with its
reason. Models: the reference checkpoints (INTERNVL_EDGE_ORACLE, or shared/oracle beside the repository), those of the
demo, and random ones in the shapes of 1B and 2B, in 16 bits and in int4. Writes results/gpu-acceptance.json. Exit
status 1 without a GPU, where something disagrees with the CPU, or where nothing was compared.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from record import write_results

from internvl_edge.base.errors import EngineError
from internvl_edge.demo import CHECKPOINT
from internvl_edge.runtime.engines.tensorrt.cuda import Cuda

HERE = Path(__file__).resolve().parent
PROGRAM = [sys.executable, "-c", "from internvl_edge.cli import main; main()"]
PACKAGES = {
    "tensorrt_rtx": "tensorrt-rtx-cu13",
    "tensorrt": "tensorrt",
    "onnxruntime": "onnxruntime-gpu",
    "torch": "torch",
    "transformers": "transformers",
    "cuda-bindings": "cuda-bindings",
}
STAGES = ("cuda", "tensorrt", "graphs", "onnxruntime", "torch")
FLAVOURS = ("tensorrt_rtx", "tensorrt")
# Compute capabilities for which TensorRT for RTX 1.7 has kernels: its ComputeCapability enumeration.
RTX_CARDS = (75, 80, 86, 89, 120, 121)
GRAPHS = ("torch-bfloat16", "torch-float16", "torch-bfloat16-decomposed")
COLUMNS = {
    "verdict": "verdict",
    "vision_cosine": "vision cos",
    "logits_cosine": "logits cos",
    "logits_cosine@long": "@1500",
    "greedy_same": "same answer",
    "vision_ms_per_tile": "ms/tile",
    "prefill_tokens_per_s": "prefill/s",
    "decode_tokens_per_s@300": "decode/s @300",
    "bandwidth_share@300": "share",
    "decode_tokens_per_s@2000": "@2000",
    "memory_mb": "MB",
}


@dataclass(frozen=True)
class Model:
    """A checkpoint to make, and how its bundle is made from it."""

    name: str
    checkpoint: Path
    variant: str | None = None
    quantize: bool = False


def main() -> None:
    """Run the stages within the time, print the table, write the file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=8)
    parser.add_argument("--work", type=Path, help="folder for checkpoints and bundles [default: a temporary one]")
    parser.add_argument("--stage", action="append", choices=STAGES, help="run this stage (repeatable)")
    parser.add_argument("--model", default="", help="run models with this text in their names, such as demo or 1B")
    arguments = parser.parse_args()
    installed = {name: found for name, package in PACKAGES.items() if (found := _version(package))}
    for name, package in PACKAGES.items():
        print(f"{name:14} {installed.get(name, f'missing ({package})')}", file=sys.stderr)
    gpu = find_gpu()
    print(f"{'GPU':14} {gpu['name']}", file=sys.stderr)
    if "compute_capability" not in gpu:
        sys.exit(f"no acceptance without a GPU: {gpu['name']}")
    flavours = [name for name in FLAVOURS if name in installed]
    stages = arguments.stage or default_stages(flavours, gpu["compute_capability"])
    print(f"{'stages':14} {', '.join(stages)}", file=sys.stderr)
    work = arguments.work or Path(tempfile.mkdtemp(prefix="gpu-acceptance-"))
    work.mkdir(parents=True, exist_ok=True)
    deadline = time.monotonic() + 60 * arguments.minutes
    try:
        rows = list(run_all(work, stages, flavours, deadline, arguments.model))
    finally:
        if arguments.work is None:
            shutil.rmtree(work, ignore_errors=True)
    values = {"gpu": gpu, "installed": installed, "stages": stages, "rows": rows}
    print(write_results("gpu-acceptance", values), file=sys.stderr)
    print_table(rows)
    sys.exit(status(rows))


def default_stages(flavours: list[str], capability: int) -> list[str]:
    """The stages for a card: its graphs are computed in torch where no installed TensorRT can build engines for it."""
    builds = "tensorrt" in flavours or ("tensorrt_rtx" in flavours and capability in RTX_CARDS)
    return [stage for stage in STAGES if stage != ("graphs" if builds else "tensorrt")]


def status(rows: list[dict[str, Any]]) -> int | str:
    """The exit status: 0 where something was compared and all of it agrees."""
    wrong = [row for row in rows if "wrong" in row or row.get("verdict", "agrees") != "agrees"]
    if wrong:
        return "; ".join(f"{row['model']}, {row['engine']}: {row.get('wrong') or row['verdict']}" for row in wrong)[
            :400
        ]
    return 0 if any("verdict" in row or "checks" in row for row in rows) else "nothing was compared with the CPU engine"


def find_gpu() -> dict[str, Any]:
    """Name, driver and memory of the present GPU, or why there is none."""
    try:
        cuda = Cuda()
    except EngineError as error:
        return {"name": str(error)}
    found: dict[str, Any] = {"name": "an NVIDIA GPU", "compute_capability": cuda.compute_capability()}
    query = ["nvidia-smi", "--query-gpu=name,driver_version,memory.total", "--format=csv,noheader"]
    try:
        lines = subprocess.run(query, capture_output=True, text=True, check=True).stdout.splitlines()
        found["name"] = lines[0]
    except (OSError, subprocess.CalledProcessError, IndexError):
        pass  # a Jetson has no nvidia-smi of this kind
    return found


def run_all(
    work: Path, stages: list[str], flavours: list[str], deadline: float, only: str = ""
) -> Iterator[dict[str, Any]]:
    """One row per model and engine, and the peer's; rows that come too late say so."""
    if "cuda" in stages:
        yield {"model": "-"} | child("gpu_cuda.py", deadline=deadline, engine="CUDA with a stand-in")
    if not {"tensorrt", "graphs", "onnxruntime", "torch"} & set(stages):
        return
    for model in models(work):
        if only not in model.name:
            continue
        row = {"model": model.name}
        try:
            checkpoint, bundle = make(model, work, deadline)
        except (subprocess.SubprocessError, OSError) as error:
            yield row | {"engine": "-", "refused": _reason(error)}
            continue
        for engine in [*(flavours if "tensorrt" in stages else []), *(GRAPHS if "graphs" in stages else [])]:
            yield row | child("gpu_rows.py", engine, str(bundle), deadline=deadline, engine=engine)
        if "onnxruntime" in stages:
            yield row | on_cuda(checkpoint, bundle, work, deadline)
        if "torch" in stages and model.variant and not model.quantize:
            yield row | child("gpu_peer.py", str(checkpoint), deadline=deadline, engine="torch, compiled")
        shutil.rmtree(bundle, ignore_errors=True)


def on_cuda(checkpoint: Path, bundle: Path, work: Path, deadline: float) -> dict[str, Any]:
    """The row of ONNX Runtime with CUDA, which takes a bundle of its own that computes in float16."""
    half = work / "bundle-float16"
    try:
        export(checkpoint, half, deadline, "--activations", "float16", "--dialect", "onnxruntime")
    except (subprocess.SubprocessError, OSError) as error:
        return {"engine": "onnxruntime", "refused": _reason(error)}
    row = child("gpu_rows.py", "onnxruntime", str(half), str(bundle), deadline=deadline, engine="onnxruntime")
    shutil.rmtree(half, ignore_errors=True)
    return row


def models(work: Path) -> list[Model]:
    """The reference checkpoints that are here, the demo models, then random ones; the most telling first."""
    oracle = Path(os.environ.get("INTERNVL_EDGE_ORACLE", HERE.parent.parent / "shared" / "oracle"))
    folders = sorted(path.parent for path in oracle.glob("*/config.json")) if oracle.is_dir() else []
    return [
        *(Model(folder.name, folder) for folder in folders),
        Model("demo, qwen2", CHECKPOINT),
        Model("demo, internlm2", HERE.parent / "examples" / "reader" / "internlm2"),
        Model("random 1B, 16 bits", work / "1B", "1B"),
        Model("random 1B, int4", work / "1B", "1B", quantize=True),
        Model("random 2B, 16 bits", work / "2B", "2B"),
        Model("random 2B, int4", work / "2B", "2B", quantize=True),
    ]


def make(model: Model, work: Path, deadline: float) -> tuple[Path, Path]:
    """The model's checkpoint and bundle; weights are stored as float16, which every engine reads."""
    checkpoint, bundle = model.checkpoint, work / "bundle"
    if model.variant and not checkpoint.exists():
        _run([sys.executable, str(HERE / "random_checkpoint.py"), model.variant, str(checkpoint)], deadline)
    if model.quantize:
        quantized = work / f"{checkpoint.name}-int4"
        scheme = ["--scheme", "w4a16-rtn", "--symmetric", "--lm-head", "int8"]
        _run([*PROGRAM, "quantize", str(checkpoint), "-o", str(quantized), *scheme], deadline)
        checkpoint = quantized
    export(checkpoint, bundle, deadline)
    return checkpoint, bundle


def export(checkpoint: Path, bundle: Path, deadline: float, *options: str) -> None:
    """Export a bundle with weights stored as float16."""
    command = [*PROGRAM, "export", str(checkpoint), "-o", str(bundle), "--dtype", "float16", "--force", *options]
    _run(command, deadline)


def child(script: str, *arguments: str, deadline: float, engine: str) -> dict[str, Any]:
    """A row from a process of its own, whatever becomes of it."""
    try:
        printed = _run([sys.executable, str(HERE / script), *arguments], deadline).splitlines()
        row: dict[str, Any] = json.loads(printed[-1])
    except (subprocess.SubprocessError, OSError, ValueError, IndexError) as error:
        row = {"engine": engine, "refused": _reason(error)}
    print(json.dumps(row), file=sys.stderr, flush=True)
    return row


def print_table(rows: list[dict[str, Any]]) -> None:
    """Markdown, for docs/performance.md."""
    print(f"| model | engine | {' | '.join(COLUMNS.values())} |")
    print("|---|---|" + "---|" * len(COLUMNS))
    for row in rows:
        cells = [str(row.get(name, "")) for name in COLUMNS]
        if reason := row.get("refused") or row.get("wrong"):
            cells = [reason.replace("|", "/"), *[""] * (len(COLUMNS) - 1)]
        print(f"| {row['model']} | {row['engine']} | {' | '.join(cells)} |")


def _run(command: list[str], deadline: float) -> str:
    left = deadline - time.monotonic()
    if left <= 0:
        raise subprocess.TimeoutExpired(command, 0)
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=left).stdout


def _reason(error: Exception) -> str:
    if isinstance(error, subprocess.TimeoutExpired):
        return "not finished within the time; give --minutes"
    if isinstance(error, subprocess.CalledProcessError):
        lines = (error.stderr or "").strip().splitlines()
        return f"exit status {error.returncode}: {lines[-1][:200] if lines else 'no message'}"
    return " ".join(str(error).split())[:200]


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


if __name__ == "__main__":
    main()
