"""GPTQModel's GPTQ on a Llama folder: run_gptqmodel.py MODEL TOKENS.npy OUT --group-size 64.

Needs the `gptqmodel` environment. OUT becomes a folder with the float32 weights that the integers stand for. Symmetric,
its default; `--asymmetric` lets it place zero points.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

os.environ.setdefault("GPTQMODEL_CPU_WORKERS", "3")  # with fewer cores it refuses to start its pools

import numpy as np
import torch
from gptqmodel import BACKEND, GPTQModel, QuantizeConfig
from safetensors.torch import load_file, save_file

# Rounding to 4 bits changes weights by about a tenth; zero points that are off by one, by a third.
LARGEST_ERROR = 0.25


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("model")
    parser.add_argument("tokens")
    parser.add_argument("out")
    parser.add_argument("--group-size", type=int, required=True)
    parser.add_argument("--asymmetric", action="store_true")
    options = parser.parse_args()
    tokens = np.load(options.tokens).tolist()
    config = QuantizeConfig(
        bits=4,
        group_size=options.group_size,
        sym=not options.asymmetric,
        device="cpu",
        offload_to_disk=False,
        format="gptq_v2",
    )
    model = GPTQModel.load(options.model, config, dtype=torch.float32, backend=BACKEND.TORCH)
    model.quantize([{"input_ids": ids, "attention_mask": [1] * len(ids)} for ids in tokens], batch_size=1)
    packed = {name: module for name, module in model.model.named_modules() if hasattr(module, "dequantize_weight")}
    state = load_file(Path(options.model) / "model.safetensors")  # not by transformers, which is patched by now
    for name, module in packed.items():
        weight = module.dequantize_weight().float().reshape(module.in_features, module.out_features).T
        error = float((weight - state[f"{name}.weight"]).norm() / weight.norm())
        if error > LARGEST_ERROR:
            raise SystemExit(f"{name} is {error:.0%} away from the original: read in the wrong format?")
        state[f"{name}.weight"] = weight
    print(f"{len(packed)} linears rounded")
    _save({name: value.detach().contiguous().clone() for name, value in state.items()}, options.out)


def _save(state: dict[str, torch.Tensor], out: str) -> None:
    Path(out).mkdir(parents=True)
    save_file(state, Path(out) / "model.safetensors")


if __name__ == "__main__":
    main()
