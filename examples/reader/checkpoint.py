"""Writes the reader as a published checkpoint folder, in the Qwen2 or the InternLM2 layout.

Both hold the same network. Qwen2 has biases on q, k and v; InternLM2 has none, fuses q, k and v into `wqkv`, puts
`<s>` before every prompt and numbers its tokens differently: the rows of the token table and of the output head are
moved.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from internlm2_vocabulary import internlm2_row_sources, write_internlm2
from model import ReaderConfig
from pages import MAX_TILES
from safetensors.torch import load_file, save_file
from torch import Tensor
from vocabulary import SYSTEM, qwen2_vocabulary, write_qwen2

INTERNLM2_NAMES = {
    "self_attn.o_proj": "attention.wo",
    "mlp.gate_proj": "feed_forward.w1",
    "mlp.up_proj": "feed_forward.w3",
    "mlp.down_proj": "feed_forward.w2",
    "input_layernorm": "attention_norm",
    "post_attention_layernorm": "ffn_norm",
}


def fused_wqkv(q: Tensor, k: Tensor, v: Tensor, c: ReaderConfig) -> Tensor:
    """Rows per kv head: its query heads, its key, its value. [(heads + 2 kv_heads) * head_dim, hidden]."""
    group = c.heads // c.kv_heads
    parts = [
        q.view(c.kv_heads, group, c.head_dim, -1),
        k.view(c.kv_heads, 1, c.head_dim, -1),
        v.view(c.kv_heads, 1, c.head_dim, -1),
    ]
    return torch.cat(parts, 1).reshape((c.heads + 2 * c.kv_heads) * c.head_dim, -1)


def internlm2_weights(weights: dict[str, Tensor], c: ReaderConfig) -> dict[str, Tensor]:
    """The same weights under InternLM2's names, token rows in InternLM2's order."""
    rows = torch.tensor(internlm2_row_sources())
    out: dict[str, Tensor] = {}
    for name, tensor in weights.items():
        if name == "language_model.model.embed_tokens.weight":
            out["language_model.model.tok_embeddings.weight"] = tensor[rows]
        elif name == "language_model.lm_head.weight":
            out["language_model.output.weight"] = tensor[rows]
        elif name.endswith("self_attn.q_proj.weight"):
            stem = name.removesuffix("self_attn.q_proj.weight")
            k, v = (weights[f"{stem}self_attn.{p}_proj.weight"] for p in "kv")
            out[f"{stem}attention.wqkv.weight"] = fused_wqkv(tensor, k, v, c)
        elif "self_attn.k_proj" in name or "self_attn.v_proj" in name:
            continue
        else:
            for old, new in INTERNLM2_NAMES.items():
                if name.startswith("language_model.model.layers."):
                    name = name.replace(f".{old}.", f".{new}.")
            out[name] = tensor
    return out


def qwen2_weights(weights: dict[str, Tensor], c: ReaderConfig) -> dict[str, Tensor]:
    """The same weights, with zero biases where the network was trained without."""
    out = dict(weights)
    for layer in range(c.layers):
        for p in "qkv":
            stem = f"language_model.model.layers.{layer}.self_attn.{p}_proj."
            out.setdefault(stem + "bias", torch.zeros(len(weights[stem + "weight"])))
    return out


def starting_weights(folder: Path, c: ReaderConfig) -> dict[str, Tensor]:
    """Float32 weights of a Qwen2-layout checkpoint, for a network that may have more text layers and no biases.

    The outputs of the layers that the checkpoint lacks are zero, so that the network answers as the checkpoint does.
    """
    weights = {name: tensor.float() for name, tensor in load_file(folder / "model.safetensors").items()}
    for layer in range(c.layers):
        stem = f"language_model.model.layers.{layer}."
        if f"{stem}mlp.down_proj.weight" not in weights:
            weights[f"{stem}self_attn.o_proj.weight"] = torch.zeros(c.hidden_size, c.heads * c.head_dim)
            weights[f"{stem}mlp.down_proj.weight"] = torch.zeros(c.hidden_size, c.intermediate_size)
    return weights if c.qkv_bias else {name: w for name, w in weights.items() if "_proj.bias" not in name}


def _llm_config(c: ReaderConfig, layout: str, vocab_size: int, ids: dict[str, int]) -> dict[str, Any]:
    config: dict[str, Any] = {
        "hidden_act": "silu",
        "hidden_size": c.hidden_size,
        "initializer_range": 0.02,
        "intermediate_size": c.intermediate_size,
        "max_position_embeddings": 32768,
        "num_attention_heads": c.heads,
        "num_hidden_layers": c.layers,
        "num_key_value_heads": c.kv_heads,
        "rms_norm_eps": c.rms_norm_eps,
        "rope_theta": c.rope_theta,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "use_cache": True,
        "vocab_size": vocab_size,
    }
    if layout == "qwen2":
        own = {
            "architectures": ["Qwen2ForCausalLM"],
            "model_type": "qwen2",
            "attention_dropout": 0.0,
            "bos_token_id": ids["<|endoftext|>"],
            "eos_token_id": ids["<|im_end|>"],
            "rope_scaling": None,
            "sliding_window": None,
            "use_sliding_window": False,
        }
    else:
        own = {
            "architectures": ["InternLM2ForCausalLM"],
            "model_type": "internlm2",
            "bias": False,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "pad_token_id": 2,
            "rope_scaling": {"factor": 2.0, "type": "dynamic"},
        }
    return config | own


def _config(c: ReaderConfig, layout: str, vocab_size: int, ids: dict[str, int]) -> dict[str, Any]:
    return {
        "architectures": ["InternVLChatModel"],
        "downsample_ratio": 0.5,
        "dynamic_image_size": True,
        "force_image_size": c.image_size,
        "llm_config": _llm_config(c, layout, vocab_size, ids),
        "max_dynamic_patch": MAX_TILES,
        "min_dynamic_patch": 1,
        "model_type": "internvl_chat",
        "pad2square": False,
        "ps_version": "v2",
        "select_layer": -1,
        "system_message": SYSTEM,
        "template": "internvl2_5",
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "use_backbone_lora": 0,
        "use_llm_lora": 0,
        "use_thumbnail": True,
        "vision_config": {
            "architectures": ["InternVisionModel"],
            "attention_dropout": 0.0,
            "drop_path_rate": 0.0,
            "dropout": 0.0,
            "hidden_act": "gelu",
            "hidden_size": c.vision_hidden,
            "image_size": c.image_size,
            "initializer_factor": 1.0,
            "initializer_range": 0.02,
            "intermediate_size": c.vision_intermediate,
            "layer_norm_eps": 1e-06,
            "model_type": "intern_vit_6b",
            "norm_type": "layer_norm",
            "num_attention_heads": c.vision_heads,
            "num_channels": 3,
            "num_hidden_layers": c.vision_layers,
            "patch_size": c.patch_size,
            "qk_normalization": False,
            "qkv_bias": True,
            "torch_dtype": "bfloat16",
            "use_flash_attn": False,
        },
    }


def write_checkpoint(weights: dict[str, Tensor], c: ReaderConfig, layout: str, folder: Path) -> None:
    """config.json, model.safetensors (bfloat16) and the tokenizer files of one layout, qwen2 or internlm2."""
    folder.mkdir(parents=True, exist_ok=True)
    if layout == "qwen2":
        weights = qwen2_weights(weights, c)
        ids = write_qwen2(folder)
        vocab_size = len(qwen2_vocabulary()[0]) + len(ids)
        stops = [ids["<|im_end|>"], ids["<|endoftext|>"]]
    else:
        weights = internlm2_weights(weights, c)
        ids = write_internlm2(folder)
        vocab_size = len(weights["language_model.output.weight"])
        stops = [ids["<|im_end|>"], ids["<|im_start|>"]]
    tensors = {name: tensor.to(torch.bfloat16).contiguous() for name, tensor in sorted(weights.items())}
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    size = c.image_size
    preprocessing = {
        "crop_size": size,
        "do_center_crop": True,
        "do_normalize": True,
        "do_resize": True,
        "feature_extractor_type": "CLIPFeatureExtractor",
        "image_mean": [0.485, 0.456, 0.406],
        "image_std": [0.229, 0.224, 0.225],
        "resample": 3,
        "size": size,
    }
    files: dict[str, Any] = {
        "config.json": _config(c, layout, vocab_size, ids),
        "generation_config.json": {"_from_model_config": True, "eos_token_id": stops},
        "preprocessor_config.json": preprocessing,
    }
    for name, data in files.items():
        (folder / name).write_text(json.dumps(data, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
