"""Everything on this machine's NVIDIA GPU in one run: engines built, compared with the CPU engine, timed, beside torch.

    python benchmarks/gpu_acceptance.py [--minutes 8] [--work DIR]

Finds what is installed and says what is missing; a part that is missing, refuses the card or crashes is a row with its
reason. Models: the reference checkpoints (INTERNVL_EDGE_ORACLE, or shared/oracle beside the repository), those of the
demo, and random ones in the shapes of 1B and 2B, in 16 bits and in int4. Writes results/gpu-acceptance.json. Exit
status 1 without a GPU, or when no engine agrees with the CPU.
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
PACKAGES = {
    "tensorrt_rtx": "tensorrt-rtx-cu13",
    "tensorrt": "tensorrt",
    "onnxruntime": "onnxruntime-gpu",
    "torch": "torch",
    "transformers": "transformers",
    "cuda-bindings": "cuda-bindings",
}
ENGINES = ("tensorrt_rtx", "tensorrt", "onnxruntime")
COLUMNS = {
    "vision_cosine": "vision cos",
    "logits_cosine": "logits cos",
    "same_token": "same token",
    "vision_ms_per_tile": "ms/tile",
    "prefill_tokens_per_s": "prefill/s",
    "decode_tokens_per_s@300": "decode/s @300",
    "bandwidth_share@300": "share",
    "decode_tokens_per_s@2000": "@2000",
    "memory_mb": "MB",
}
# float16 or bfloat16 against float32 on the CPU; a wrong position, mask or weight is far below.
LOGITS_COSINE = 0.99


@dataclass(frozen=True)
class Model:
    """A checkpoint to make, and how its bundle is made from it."""

    name: str
    checkpoint: Path
    variant: str | None = None
    quantize: bool = False


def main() -> None:
    """Run all rows within the time, print the table, write the file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=8)
    parser.add_argument("--work", type=Path, help="folder for checkpoints and bundles [default: a temporary one]")
    arguments = parser.parse_args()
    installed = {name: found for name, package in PACKAGES.items() if (found := _version(package))}
    for name, package in PACKAGES.items():
        print(f"{name:14} {installed.get(name, f'missing ({package})')}", file=sys.stderr)
    gpu = find_gpu()
    print(f"{'GPU':14} {gpu['name']}", file=sys.stderr)
    if "compute_capability" not in gpu:
        sys.exit(f"no acceptance without a GPU: {gpu['name']}")
    work = arguments.work or Path(tempfile.mkdtemp(prefix="gpu-acceptance-"))
    work.mkdir(parents=True, exist_ok=True)
    deadline = time.monotonic() + 60 * arguments.minutes
    try:
        rows = list(run_all(work, [name for name in ENGINES if name in installed], deadline))
    finally:
        if arguments.work is None:
            shutil.rmtree(work, ignore_errors=True)
    print(write_results("gpu-acceptance", {"gpu": gpu, "installed": installed, "rows": rows}), file=sys.stderr)
    print_table(rows)
    agreed = [row for row in rows if row.get("finite") and row["logits_cosine"] >= LOGITS_COSINE]
    sys.exit(0 if agreed else "no engine agrees with the CPU engine")


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


def run_all(work: Path, engines: list[str], deadline: float) -> Iterator[dict[str, Any]]:
    """One row per model and engine, and the peer's; rows that come too late say so."""
    for model in models(work):
        row = {"model": model.name}
        try:
            checkpoint, bundle = make(model, work, deadline)
        except (subprocess.SubprocessError, OSError) as error:
            yield row | {"engine": "-", "refused": _reason(error)}
            continue
        for engine in engines:
            yield row | child("gpu_rows.py", engine, str(bundle), deadline=deadline, engine=engine)
        if model.variant and not model.quantize:
            yield row | child("gpu_peer.py", str(checkpoint), deadline=deadline, engine="torch, compiled")
        shutil.rmtree(bundle, ignore_errors=True)


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
    program = [sys.executable, "-c", "from internvl_edge.cli import main; main()"]
    if model.quantize:
        quantized = work / f"{checkpoint.name}-int4"
        scheme = ["--scheme", "w4a16-rtn", "--symmetric", "--lm-head", "int8"]
        _run([*program, "quantize", str(checkpoint), "-o", str(quantized), *scheme], deadline)
        checkpoint = quantized
    _run([*program, "export", str(checkpoint), "-o", str(bundle), "--dtype", "float16", "--force"], deadline)
    return checkpoint, bundle


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
        if "refused" in row:
            cells = [row["refused"].replace("|", "/"), *[""] * (len(COLUMNS) - 1)]
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
