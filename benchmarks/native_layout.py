"""The demo reader in the layout of transformers: the same tensors under the names that other programs read."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from internvl_edge.checkpoint.json_files import read_json
from internvl_edge.checkpoint.layouts import tensor_source
from internvl_edge.checkpoint.reader import Checkpoint
from internvl_edge.checkpoint.tensor_files import OutTensor, write_file
from internvl_edge.checkpoint.tokenizer_files import build_tokenizer
from internvl_edge.model.config import PIXEL_MEAN, PIXEL_STD, ModelConfig

# What the two layouts call the same number of a text model or of a tower.
_OTHER_LAYOUT = ("architectures", "model_type", "rope_theta", "rope_scaling", "torch_dtype", "use_flash_attn")


def write_native(source: Path, out: Path) -> None:
    """Write a checkpoint of the remote layout with a Qwen2 text model in the layout of transformers 5."""
    checkpoint = Checkpoint(source)
    out.mkdir(parents=True)
    write_file(out / "model.safetensors", list(_tensors(checkpoint)))
    tokenizer = build_tokenizer(source, checkpoint.config)
    (out / "tokenizer.json").write_bytes(tokenizer)
    ids = {token["content"]: token["id"] for token in json.loads(tokenizer)["added_tokens"]}
    config = read_json(source / "config.json")
    files = {
        "config.json": _config(config, checkpoint.config) | {"image_token_id": ids["<IMG_CONTEXT>"]},
        "generation_config.json": {"eos_token_id": config["llm_config"]["eos_token_id"]},
        "processor_config.json": _processor(checkpoint.config),
        "tokenizer_config.json": {
            "context_image_token": "<IMG_CONTEXT>",
            "end_image_token": "</img>",
            "eos_token": "<|im_end|>",
            "pad_token": "<|endoftext|>",
            "processor_class": "InternVLProcessor",
            "start_image_token": "<img>",
            "tokenizer_class": "PreTrainedTokenizerFast",
            "video_token": "<|video_pad|>",
        },
    }
    for name, values in files.items():
        (out / name).write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")


def _tensors(checkpoint: Checkpoint) -> Iterator[OutTensor]:
    native = replace(checkpoint.config, layout="native")
    for name in checkpoint.shapes:
        names = tensor_source(native, name).names
        for stored, part in zip(names, np.split(checkpoint.tensor(name), len(names)), strict=True):
            yield OutTensor.of(stored, np.ascontiguousarray(part))


def _config(remote: dict[str, Any], config: ModelConfig) -> dict[str, Any]:
    vision, text = (
        {name: value for name, value in remote[section].items() if name not in _OTHER_LAYOUT}
        for section in ("vision_config", "llm_config")
    )
    sides = {name: [getattr(config.vision, name)] * 2 for name in ("image_size", "patch_size")}
    return {
        "architectures": ["InternVLForConditionalGeneration"],
        "downsample_ratio": config.downsample_ratio,
        "dtype": remote["torch_dtype"],
        "image_seq_length": config.tokens_per_tile,
        "model_type": "internvl",
        "projector_hidden_act": "gelu",
        "text_config": text
        | {
            "model_type": config.decoder.architecture,
            "rope_parameters": {"rope_type": "default", "rope_theta": config.decoder.rope.theta},
        },
        "tie_word_embeddings": False,
        "vision_config": vision
        | sides
        | {
            "attention_bias": config.vision.qkv_bias,
            "model_type": "internvl_vision",
            "use_absolute_position_embeddings": True,
            "use_mask_token": False,
            "use_mean_pooling": True,
            "use_qk_norm": config.vision.qk_normalization,
        },
        "vision_feature_layer": config.select_layer,
        "vision_feature_select_strategy": "default",
    }


def _processor(config: ModelConfig) -> dict[str, Any]:
    size = {"height": config.vision.image_size, "width": config.vision.image_size}
    pixels = {"image_mean": list(PIXEL_MEAN), "image_std": list(PIXEL_STD), "resample": 3, "size": size}
    tiles = {"crop_to_patches": True, "min_patches": config.min_tiles, "max_patches": config.max_tiles}
    return {
        "image_processor": {"image_processor_type": "GotOcr2ImageProcessor", **pixels, **tiles},
        "image_seq_length": config.tokens_per_tile,
        "processor_class": "InternVLProcessor",
        "video_processor": {"video_processor_type": "InternVLVideoProcessor", **pixels},
    }
