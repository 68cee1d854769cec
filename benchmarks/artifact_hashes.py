"""Print the SHA-256 of everything that export and quantize make of the demo checkpoint, as JSON.

    python benchmarks/artifact_hashes.py CHECKPOINT [--samples 8] [-o hashes.json]

For a change that claims to leave numbers alone: run it on both commits and compare the outputs. Only the command line
is used, through the `internvl_edge` that Python finds, so the same file runs on both. Reports also contain times and
versions, so only their figures are hashed, by name and in order.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

COMMAND = [sys.executable, "-c", "from internvl_edge.cli import main; main()"]
RECIPES: dict[str, list[str]] = {
    "w4a16-awq": ["--scheme", "w4a16-awq", "--lm-head", "int8"],
    "w8a16": ["--scheme", "w8a16"],
    "cpu": ["--recipe", "cpu"],
    "rtx": ["--recipe", "rtx"],
    "orin": ["--recipe", "orin"],
}
# Files whose bytes are weights, graphs or tokenizers. Manifests and reports name versions, times and formats.
ARTIFACTS = (".onnx", ".data", ".bin", ".safetensors", ".npz", "tokenizer.json")
FIGURES = ("bits_per_weight", "error", "sqnr_db", "cosine", "part", "largest", "p9999", "typical", "clipped_at")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--samples", type=int, default=8, help="Calibration samples.")
    parser.add_argument("-o", "--output", type=Path)
    options = parser.parse_args()
    text = json.dumps(hashes(options.checkpoint.resolve(), options.samples), indent=1)
    print(text)
    if options.output:
        options.output.write_text(text + "\n", encoding="utf-8")


def hashes(checkpoint: Path, samples: int) -> dict[str, dict[str, str]]:
    found = {}
    with tempfile.TemporaryDirectory() as name:
        scratch = Path(name)
        found["export float16"] = _export(checkpoint, scratch / "float16", "--dtype", "float16")
        found["export float32, int8 token table"] = _export(
            checkpoint, scratch / "float32", "--dtype", "float32", "--token-table", "int8"
        )
        for recipe, options in RECIPES.items():
            made = scratch / recipe
            data = ["--samples", str(samples), "--max-tiles", "1"]
            run("quantize", str(checkpoint), "-o", str(made), *options, *data)
            found[f"quantize {recipe}"] = files(made) | {"config.json": sha256((made / "config.json").read_bytes())}
            found[f"quantize {recipe}"]["figures of the report"] = figures(made / "report.json")
            prompts = ["--int8-prompts"] if recipe == "cpu" else []
            found[f"export {recipe}"] = _export(made, scratch / f"{recipe}-bundle", *prompts)
    return found


def _export(checkpoint: Path, bundle: Path, *options: str) -> dict[str, str]:
    run("export", str(checkpoint), "-o", str(bundle), *options)
    return files(bundle)


def run(*arguments: str) -> None:
    subprocess.run([*COMMAND, *arguments], check=True, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)


def files(folder: Path) -> dict[str, str]:
    return {path.name: sha256(path.read_bytes()) for path in sorted(folder.iterdir()) if path.name.endswith(ARTIFACTS)}


def figures(report: Path) -> str:
    """SHA-256 of all figures of a report, whatever its sections are called."""
    return sha256(json.dumps(list(_leaves(json.loads(report.read_text(encoding="utf-8"))))).encode())


def _leaves(values: Any, name: str = "") -> Iterator[tuple[str, float]]:
    if isinstance(values, dict):
        for key, value in values.items():
            yield from _leaves(value, key)
    elif isinstance(values, list):
        for value in values:
            yield from _leaves(value, name)
    elif name in FIGURES and isinstance(values, (int, float)) and math.isfinite(values):
        yield name, values


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


if __name__ == "__main__":
    main()
