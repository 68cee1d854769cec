"""Print the SHA-256 of everything that calibrate, quantize and export make of some checkpoints, as JSON.

    python benchmarks/artifact_hashes.py CHECKPOINT... [--samples 8] [--only RECIPE ...] [--tiny DIR] [-o hashes.json]

For a change that claims to leave numbers alone: run it on both commits with the same CHECKPOINT folders and compare the
outputs (`diff`). Only the command line is used, through the `internvl_edge` that Python finds, so the same file runs on
both. Reports also contain times and versions, so only their figures are hashed, by name and in order, and
`quantization.json` without its run. Figures have six digits there: a sum in another order is no change. `--tiny` writes
tiny random checkpoints of every layout into DIR first and takes those as well (it needs `tests` on the path).
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

COMMAND = [sys.executable, "-c", "from internvl_edge.cli import main; main()"]
INT8_VISION = ["--vision", "int8", "--vision-cosine", "0.9999"]
# Every preset, every scheme, and every choice that takes another way through the quantizer.
RECIPES: dict[str, list[str]] = {
    "w4a16-awq": ["--scheme", "w4a16-awq", "--lm-head", "int8"],
    "w4a16-awq, AutoAWQ's format": ["--scheme", "w4a16-awq", "--group-size", "32"],
    "w4a16-awq, symmetric, not compensated": ["--symmetric", "--group-size", "32", "--no-compensate"],
    "w4a16-awq, int4 head": ["--group-size", "64", "--lm-head", "int4"],
    "w4a16-rtn": ["--scheme", "w4a16-rtn", "--group-size", "32", "--lm-head", "int4"],
    "w8a16": ["--scheme", "w8a16"],
    "w8a16, rounded": ["--scheme", "w8a16", "--no-compensate", "--lm-head", "int8"],
    "w8a16, rounded, int8 cache": ["--scheme", "w8a16", "--no-compensate", "--kv-cache", "int8"],
    "w8a8": ["--scheme", "w8a8", "--lm-head", "int8"],
    "w8a8, all": ["--scheme", "w8a8", "--max-kl", "0", "--calibrator", "minmax", "--no-smooth"],
    "5 bits": ["--symmetric", "--group-size", "64", "--target-bits", "5"],
    "limited divergence": ["--group-size", "64", "--max-kl", "0.05"],
    "exceptions": [
        *("--group-size", "32", "--layer", "layers.0.*=w8a16", "--layer", "*.down_proj=w4a16-awq-g64"),
        *("--layer", "layers.1.self_attn.*=w8a8", "--layer", "*.up_proj=fp"),
    ],
    "int8 vision": [*INT8_VISION, "--vision-float", "projector.fc2"],
    "int8 vision, w8a8": [*INT8_VISION, "--scheme", "w8a8", "--kv-cache", "int8"],
    "cpu": ["--recipe", "cpu"],
    "rtx": ["--recipe", "rtx"],
    "orin": ["--recipe", "orin"],
    "thor": ["--recipe", "thor"],
    "vllm": ["--recipe", "vllm"],
    "vllm, int8 vision": ["--recipe", "vllm", *INT8_VISION],
    "learned rounding": ["--group-size", "64", "--rounding", "learned"],
}
EXPORTED = ("w4a16-awq", "w8a16", "cpu", "rtx", "orin")
TINY: dict[str, dict[str, Any]] = {
    "tiny-qwen2": {},
    "tiny-internlm2": {"text": "internlm2", "bias": True, "shards": 2, "dtype": "float16"},
    "tiny-6b": {"vision": "6b", "text": "internlm2", "vision_hidden_size": 96, "vision_num_attention_heads": 6},
    "tiny-native": {"layout": "native_prefixed"},
}
# The tiny ones have 64 inputs, which groups of 128 do not divide.
TINY_GROUPS = ["--group-size", "32"]
# Files whose bytes are weights, graphs or tokenizers. Manifests and reports name versions, times and formats.
ARTIFACTS = (".onnx", ".data", ".bin", ".safetensors", ".npz", ".npy", ".f32", "tokenizer.json")
FIGURES = ("bits_per_weight", "error", "sqnr_db", "cosine", "part", "largest", "p9999", "typical", "clipped_at")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoints", nargs="*", type=Path, metavar="CHECKPOINT")
    parser.add_argument("--samples", type=int, default=8, help="Calibration samples.")
    parser.add_argument("--only", action="append", choices=RECIPES, help="Only this recipe; can be repeated.")
    parser.add_argument("--tiny", type=Path, metavar="DIR", help="Where to write tiny checkpoints of every layout.")
    parser.add_argument("--no-export", action="store_true", help="Leave out the bundles.")
    parser.add_argument("-o", "--output", type=Path)
    options = parser.parse_args()
    checkpoints = [path.resolve() for path in options.checkpoints]
    if options.tiny:
        from helpers.tiny import write_checkpoint

        tiny = ((options.tiny.resolve() / name, choices) for name, choices in TINY.items())
        checkpoints += [write_checkpoint(path, **choices) for path, choices in tiny]
    found = {}
    for checkpoint in checkpoints:
        groups = TINY_GROUPS if checkpoint.name in TINY else []
        for name, values in hashes(checkpoint, options.samples, groups, options.only, not options.no_export):
            found[f"{checkpoint.name}: {name}"] = values
            print(f"{checkpoint.name}: {name}", file=sys.stderr, flush=True)
    text = json.dumps(found, indent=1)
    print(text)
    if options.output:
        options.output.write_text(text + "\n", encoding="utf-8")


def hashes(
    checkpoint: Path, samples: int, groups: list[str], only: list[str] | None, exports: bool
) -> Iterator[tuple[str, dict[str, str]]]:
    data = ["--samples", str(samples), "--max-tiles", "1"]
    with tempfile.TemporaryDirectory() as name:
        scratch = Path(name)
        if exports and not only:
            yield "export float16", _export(checkpoint, scratch / "float16", "--dtype", "float16")
            yield (
                "export float32, int8 token table",
                _export(checkpoint, scratch / "float32", "--dtype", "float32", "--token-table", "int8"),
            )
        if not only:
            run("calibrate", str(checkpoint), "-o", str(scratch / "set"), *data)
            yield "calibrate", {n: v for n, v in files(scratch / "set").items() if n != "statistics.npz"}
        for recipe, options in RECIPES.items():
            if only and recipe not in only:
                continue
            made = scratch / "quantized"
            grouped = groups if "--group-size" not in options else []
            looks_at_data = recipe not in ("w4a16-rtn", "w8a16, rounded")
            run("quantize", str(checkpoint), "-o", str(made), *options, *grouped, *(data if looks_at_data else []))
            found = files(made) | {"config.json": sha256((made / "config.json").read_bytes())}
            found["figures of the report"] = figures(made / "report.json")
            found["quantization.json"] = record(made / "quantization.json")
            yield f"quantize {recipe}", found
            if exports and recipe in EXPORTED:
                prompts = ["--int8-prompts"] if recipe == "cpu" else []
                yield f"export {recipe}", _export(made, scratch / "bundle", *prompts)
            for folder in (made, scratch / "bundle"):
                shutil.rmtree(folder, ignore_errors=True)


def _export(checkpoint: Path, bundle: Path, *options: str) -> dict[str, str]:
    run("export", str(checkpoint), "-o", str(bundle), *options)
    return files(bundle)


def run(*arguments: str) -> None:
    done = subprocess.run([*COMMAND, *arguments], check=False, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    if done.returncode:
        sys.exit(f"{' '.join(arguments)}\n{done.stderr.decode()}")


def files(folder: Path) -> dict[str, str]:
    return {path.name: sha256(path.read_bytes()) for path in sorted(folder.iterdir()) if path.name.endswith(ARTIFACTS)}


def figures(report: Path) -> str:
    """SHA-256 of all figures of a report, whatever its sections are called."""
    return sha256(json.dumps(list(_leaves(json.loads(report.read_text(encoding="utf-8"))))).encode())


def record(path: Path) -> str:
    """SHA-256 of a record of a quantization without the run, and without the recipe, which can gain fields."""
    values = json.loads(path.read_text(encoding="utf-8"))
    kept = {name: values[name] for name in sorted(values) if name not in ("run", "recipe")}
    return sha256(json.dumps(_rounded(kept)).encode())


def _rounded(values: Any) -> Any:
    if isinstance(values, dict):
        return {name: _rounded(value) for name, value in values.items()}
    if isinstance(values, list):
        return [_rounded(value) for value in values]
    return float(f"{values:.6g}") if isinstance(values, float) else values


def _leaves(values: Any, name: str = "") -> Iterator[tuple[str, float]]:
    if isinstance(values, dict):
        for key, value in values.items():
            yield from _leaves(value, key)
    elif isinstance(values, list):
        for value in values:
            yield from _leaves(value, name)
    elif name in FIGURES and isinstance(values, (int, float)) and math.isfinite(values):
        yield name, _rounded(values)


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


if __name__ == "__main__":
    main()
