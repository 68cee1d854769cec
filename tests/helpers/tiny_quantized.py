"""Quantized tiny checkpoints, each with a twin: the same folder with the float32 weights that its integers stand for.

The twin's weights come from the plain formula here, not from the code under test. A reference that runs on the twin can
therefore check readers and graphs of quantized checkpoints. Weights are rounded to nearest; quality does not matter
here.
"""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from internvl_edge.checkpoint.codecs import autoawq, compressed_tensors
from internvl_edge.model.linear import PackedLinear, Scheme

BODY = re.compile(r"language_model\.(model\.)?layers\..*(_proj|wqkv|wo|w1|w2|w3)\.weight$")
HEAD = re.compile(r"(language_model\.(lm_head|output)|^lm_head)\.weight$")
INT4 = Scheme(4, 32, symmetric=False)


@dataclass(frozen=True)
class Choices:
    """The choices of one quantized checkpoint.

    `body` and `head` None keep floats. `place` is the place of the configuration: "text", "top" or "both".
    """

    method: str = "awq"
    body: Scheme | None = INT4
    head: Scheme | None = None
    place: str = "text"
    listed: bool = True
    file_format: str = "safetensors"
    skewed: bool = False
    negative: bool = False


def write_quantized(source: Path, folder: Path, **choices: Any) -> tuple[Path, Path]:
    """Quantize the one-file safetensors checkpoint `source`. Return the quantized folder and its float32 twin."""
    made = Choices(**choices)
    quantized, twin = {}, {}
    for name, tensor in load_file(source / "model.safetensors").items():
        scheme = made.body if BODY.search(name) else made.head if HEAD.search(name) else None
        if scheme is None:
            quantized[name] = twin[name] = tensor
            continue
        linear = round_to_nearest(tensor.float().numpy(), scheme, made.skewed, made.negative)
        packed = autoawq.pack(linear) if made.method == "awq" else compressed_tensors.pack(linear, np.float16)
        module = name.removesuffix(".weight")
        quantized |= {f"{module}.{last}": torch.from_numpy(array.copy()) for last, array in packed.items()}
        twin[name] = torch.from_numpy(plain_weights(linear))
    config = json.loads((source / "config.json").read_text(encoding="utf-8"))
    folders = folder / "quantized", folder / "twin"
    for target, tensors in zip(folders, (quantized, twin), strict=True):
        shutil.copytree(source, target, ignore=shutil.ignore_patterns("*.safetensors"))
        save(target, tensors, made.file_format if target == folders[0] else "safetensors")
    (folders[0] / "config.json").write_text(json.dumps(with_quantization(config, made)), encoding="utf-8")
    return folders


def round_to_nearest(weight: np.ndarray, scheme: Scheme, skewed: bool = False, negative: bool = False) -> PackedLinear:
    """Round with min-max scales that are exact in float16. `skewed` first moves every weight to one side of zero.

    With `negative`, a symmetric scale has the sign that puts the largest weight on the side of the lowest integer.
    """
    out, inputs = weight.shape
    if skewed:
        weight = np.abs(weight) * np.sign(weight[:, :1] + 1e-9)
    groups = weight.reshape(out, -1, scheme.group_size or inputs)
    top = 2**scheme.bits - 1
    if scheme.symmetric:
        peak = np.maximum(np.abs(groups).max(-1), 1e-4)
        scale = (peak / (top // 2)).astype(np.float16).astype(np.float32)
        scale *= np.where(negative & (groups.max(-1) > -groups.min(-1)), -1, 1)
        values = np.clip(np.round(groups / scale[:, :, None]), -(top // 2) - 1, top // 2).astype(np.int8)
        return PackedLinear(values.reshape(out, inputs), scale, None, scheme.bits)
    low, high = np.minimum(groups.min(-1), 0), np.maximum(groups.max(-1), 0)
    scale = (np.maximum(high - low, 1e-4) / top).astype(np.float16).astype(np.float32)
    zeros = np.clip(np.round(-low / scale), 0, top).astype(np.uint8)
    values = np.clip(np.round(groups / scale[:, :, None]) + zeros[:, :, None], 0, top).astype(np.uint8)
    return PackedLinear(values.reshape(out, inputs), scale, zeros, scheme.bits)


def plain_weights(linear: PackedLinear) -> np.ndarray:
    """Compute (value - zero point) * scale, one element at a time in float64."""
    repeat = linear.values.shape[1] // linear.scale.shape[1]
    zeros = 0 if linear.zero_point is None else np.repeat(linear.zero_point, repeat, axis=1).astype(np.float64)
    weights = (linear.values.astype(np.float64) - zeros) * np.repeat(linear.scale, repeat, axis=1).astype(np.float64)
    return weights.astype(np.float32)


def with_quantization(config: dict[str, Any], made: Choices) -> dict[str, Any]:
    """Return config.json with `quantization_config` at the place that `made` asks for."""
    if made.method == "awq":
        assert made.body is not None
        described = autoawq.configuration(made.body.group_size or -1, ["vision_model", "mlp1", "lm_head"])
        if not made.listed:
            del described["modules_to_not_convert"]
    else:
        targets: dict[Scheme, list[str]] = {}
        for scheme, target in ((made.body, "Linear"), (made.head, "re:.*lm_head$")):
            if scheme is not None:
                targets.setdefault(scheme, []).append(target)
        ignored = ["re:.*vision.*", "re:.*mlp1.*", "re:.*multi_modal_projector.*"] if made.listed else []
        described = compressed_tensors.configuration(targets, ignored)
        if not made.listed:
            del described["ignore"]
    text = "llm_config" if "llm_config" in config else "text_config"
    if made.place in ("text", "both"):
        config = config | {text: config[text] | {"quantization_config": described}}
    if made.place in ("top", "both"):
        config = config | {"quantization_config": described}
    return config


def save(folder: Path, tensors: dict[str, torch.Tensor], file_format: str) -> None:
    tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
    if file_format == "safetensors":
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        return
    names = list(tensors)
    weight_map: dict[str, str] = {}
    for shard in range(2):
        file, part = f"pytorch_model-0000{shard + 1}-of-00002.bin", names[shard::2]
        torch.save({name: tensors[name] for name in part}, folder / file)
        weight_map |= dict.fromkeys(part, file)
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index), encoding="utf-8")
