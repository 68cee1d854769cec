"""A copy of a remote-code checkpoint whose vision linears are int8 with int8 inputs, for sizes and build times alone.

    python benchmarks/int8_tower.py CHECKPOINT OUT

Weights are rounded to the nearest and input scales guessed: such a model's answers mean nothing. One-file safetensors.
"""

from __future__ import annotations

import json
import re
import shutil
import sys
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from internvl_edge.checkpoint.codecs import compressed_tensors
from internvl_edge.model.linear import W8A8, PackedLinear

LINEAR = re.compile(r"vision_model\.encoder\.layers\.\d+\.(attn\.(qkv|proj)|mlp\.fc[12])\.weight")
INPUT_SCALE = 0.05


def main() -> None:
    """Write the checkpoint."""
    if len(sys.argv) != 3 or not (Path(sys.argv[1]) / "model.safetensors").is_file():
        sys.exit(__doc__)
    source, target = Path(sys.argv[1]), Path(sys.argv[2])
    shutil.copytree(source, target, ignore=shutil.ignore_patterns("*.safetensors"))
    tensors: dict[str, torch.Tensor] = {}
    for name, tensor in load_file(source / "model.safetensors").items():
        if not LINEAR.fullmatch(name):
            tensors[name] = tensor
            continue
        packed = compressed_tensors.pack(rounded(tensor.float().numpy()))
        module = name.removesuffix("weight")
        tensors |= {module + last: torch.from_numpy(np.array(array)) for last, array in packed.items()}
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((source / "config.json").read_text(encoding="utf-8"))
    ignored = ["re:.*language_model.*", "re:.*mlp1.*"]
    config["quantization_config"] = compressed_tensors.configuration({W8A8: ["Linear"]}, ignored)
    (target / "config.json").write_text(json.dumps(config, indent=1), encoding="utf-8")


def rounded(weight: np.ndarray) -> PackedLinear:
    """One scale per output: its largest weight becomes 127."""
    scale = np.maximum(np.abs(weight).max(axis=1, keepdims=True), 1e-6).astype(np.float32) / 127
    values = np.rint(weight / scale).astype(np.int8)
    return PackedLinear(values, scale, None, 8, input_scale=INPUT_SCALE)


if __name__ == "__main__":
    main()
