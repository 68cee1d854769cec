"""Write tiny random checkpoints in every layout that the reader must know, for tests that cannot wait for a real model.

One table of canonical weights, drawn per tensor from (seed, name), is written under the names and in the packing of
each layout. The same seed therefore gives the same model as remote-code InternLM2 and as native Llama, or as native
with either key prefix. Sizes are parameters. The scales give logits a standard deviation of one to two, and every part
(layer scale, biases, q/k norms, rotary) has a visible effect on them. This module does not know internvl_edge.
"""

from __future__ import annotations

import json
import zlib
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from helpers import tiny_tokenizers
from helpers.tiny_config import Tiny, native_config, remote_config, side_files

Weights = dict[str, Tensor]

# The token tables are cut from this many rows, so that layouts with different vocabularies hold the same vectors.
TABLE_ROWS = 1024


def write_checkpoint(folder: str | Path, **choices: Any) -> Path:
    """Write a checkpoint with the given fields of `Tiny` into `folder` (made if absent) and return it."""
    tiny, folder = Tiny(**choices), Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    thinks = tiny.text == "qwen3"
    if tiny.layout != "remote":
        vocabulary = tiny_tokenizers.write_native(folder, thinks)
    elif tiny.text in ("qwen2", "qwen3"):
        vocabulary = tiny_tokenizers.write_qwen2(folder, thinks)
    else:
        vocabulary = tiny_tokenizers.write_internlm2(folder)
    config = (remote_config if tiny.layout == "remote" else native_config)(tiny, vocabulary)
    for name, content in ({"config.json": config | tiny.config} | side_files(tiny, vocabulary)).items():
        (folder / name).write_text(json.dumps(content, indent=2), encoding="utf-8")
    weights = _canonical_weights(tiny, vocabulary.size + tiny.padding_rows)
    named = _remote_names(tiny, weights) if tiny.layout == "remote" else _native_names(tiny, weights)
    _save(folder, tiny, named)
    return folder


# ---- weights ----


def _canonical_weights(tiny: Tiny, vocab_size: int) -> Weights:
    """Return the weights under remote-code names for tower and mlp1, Llama names for the text model.

    q, k, v are separate.
    """
    weights: Weights = {}

    def draw(name: str, *shape: int, std: float, mean: float = 0.0) -> None:
        generator = torch.Generator().manual_seed(zlib.crc32(f"{tiny.seed}/{name}".encode()))
        weights[name] = mean + std * torch.randn(shape, generator=generator)

    def linear(name: str, out: int, inp: int, gain: float = 1.1, bias: bool = False) -> None:
        draw(f"{name}.weight", out, inp, std=gain * inp**-0.5)
        if bias:
            draw(f"{name}.bias", out, std=0.25)

    def norm(name: str, width: int, bias: bool = False) -> None:
        draw(f"{name}.weight", width, std=0.25, mean=1.0)
        if bias:
            draw(f"{name}.bias", width, std=0.25)

    _draw_vision(tiny, draw, linear, norm)
    _draw_text(tiny, draw, linear, norm)
    for name in ("language_model.model.embed_tokens.weight", "language_model.lm_head.weight"):
        if name in weights:
            weights[name] = weights[name][:vocab_size]
    return weights


def _draw_vision(tiny: Tiny, draw: Any, linear: Any, norm: Any) -> None:
    width, patches = tiny.vision_hidden_size, (tiny.image_size // tiny.patch_size) ** 2
    large = tiny.vision == "6b"
    draw("vision_model.embeddings.class_embedding", 1, 1, width, std=0.4)
    draw("vision_model.embeddings.position_embedding", 1, 1 + patches, width, std=0.4)
    patch = "vision_model.embeddings.patch_embedding"
    draw(f"{patch}.weight", width, 3, tiny.patch_size, tiny.patch_size, std=1.5 / (3 * tiny.patch_size**2) ** 0.5)
    draw(f"{patch}.bias", width, std=0.25)
    for index in range(tiny.vision_num_hidden_layers):
        block = f"vision_model.encoder.layers.{index}"
        for part in "qkv":
            linear(f"{block}.attn.{part}", width, width, gain=1.7, bias=not large)
        if large:
            norm(f"{block}.attn.q_norm", width)
            norm(f"{block}.attn.k_norm", width)
        linear(f"{block}.attn.proj", width, width, bias=True)
        linear(f"{block}.mlp.fc1", tiny.vision_intermediate_size, width, bias=True)
        linear(f"{block}.mlp.fc2", width, tiny.vision_intermediate_size, bias=True)
        for part in "12":
            norm(f"{block}.norm{part}", width, bias=not large)
            draw(f"{block}.ls{part}", width, std=0.2, mean=0.6)
    merged = tiny.shuffle**2 * width
    norm("mlp1.0", merged, bias=True)
    linear("mlp1.1", tiny.hidden_size, merged, bias=True)
    linear("mlp1.3", tiny.hidden_size, tiny.hidden_size, gain=1.5, bias=True)


def _draw_text(tiny: Tiny, draw: Any, linear: Any, norm: Any) -> None:
    width, inner = tiny.hidden_size, tiny.intermediate_size
    qkv_bias, output_bias = tiny.text == "qwen2" or tiny.bias, tiny.text != "qwen2" and tiny.bias
    # A tied table is also the head, so it gets the head's scale.
    draw("language_model.model.embed_tokens.weight", TABLE_ROWS, width, std=1.6 * width**-0.5 if tiny.tie else 0.6)
    for index in range(tiny.num_hidden_layers):
        layer = f"language_model.model.layers.{index}"
        heads = {"q": tiny.num_attention_heads, "k": tiny.num_key_value_heads, "v": tiny.num_key_value_heads}
        for part, count in heads.items():
            gain = 1.1 if part == "v" else 1.7
            linear(f"{layer}.self_attn.{part}_proj", count * tiny.head_dim, width, gain=gain, bias=qkv_bias)
        if tiny.text == "qwen3":
            norm(f"{layer}.self_attn.q_norm", tiny.head_dim)
            norm(f"{layer}.self_attn.k_norm", tiny.head_dim)
        linear(f"{layer}.self_attn.o_proj", width, tiny.num_attention_heads * tiny.head_dim, bias=output_bias)
        linear(f"{layer}.mlp.gate_proj", inner, width)
        linear(f"{layer}.mlp.up_proj", inner, width)
        linear(f"{layer}.mlp.down_proj", width, inner)
        norm(f"{layer}.input_layernorm", width)
        norm(f"{layer}.post_attention_layernorm", width)
    norm("language_model.model.norm", width)
    if not tiny.tie:
        linear("language_model.lm_head", TABLE_ROWS, width, gain=1.6)


# ---- layouts ----

INTERNLM2_NAMES = {
    "embed_tokens": "tok_embeddings",
    "self_attn.o_proj": "attention.wo",
    "mlp.gate_proj": "feed_forward.w1",
    "mlp.up_proj": "feed_forward.w3",
    "mlp.down_proj": "feed_forward.w2",
    "input_layernorm": "attention_norm",
    "post_attention_layernorm": "ffn_norm",
    "lm_head": "output",
}
NATIVE_NAMES = {
    "embeddings.class_embedding": "embeddings.cls_token",
    "embeddings.position_embedding": "embeddings.position_embeddings",
    "embeddings.patch_embedding": "embeddings.patch_embeddings.projection",
    "encoder.layers.": "encoder.layer.",
    ".attn.q_norm": ".attention.q_norm",
    ".attn.k_norm": ".attention.k_norm",
    ".attn.q.": ".attention.q_proj.",
    ".attn.k.": ".attention.k_proj.",
    ".attn.v.": ".attention.v_proj.",
    ".attn.proj": ".attention.projection_layer",
    ".ls": ".lambda_",
    ".norm1": ".layernorm_before",
    ".norm2": ".layernorm_after",
    "vision_model.": "vision_tower.",
    "mlp1.0": "multi_modal_projector.layer_norm",
    "mlp1.1": "multi_modal_projector.linear_1",
    "mlp1.3": "multi_modal_projector.linear_2",
}


def _replaced(name: str, table: dict[str, str]) -> str:
    for old, new in table.items():
        name = name.replace(old, new)
    return name


def _remote_names(tiny: Tiny, weights: Weights) -> Weights:
    """Rename the weights: one `qkv` per vision block; for InternLM2 also one `wqkv` per layer.

    Rows of `wqkv` are [kv head: G queries, key, value].
    """
    named: Weights = {}
    for name, tensor in weights.items():
        if ".attn.q." in name:
            parts = [weights[name.replace(".attn.q.", f".attn.{part}.")] for part in "qkv"]
            named[name.replace(".attn.q.", ".attn.qkv.")] = torch.cat(parts)
        elif tiny.text == "internlm2" and ".q_proj." in name:
            parts = [weights[name.replace(".q_proj.", f".{part}_proj.")] for part in "qkv"]
            per_head = [part.reshape(tiny.num_key_value_heads, -1, *tensor.shape[1:]) for part in parts]
            packed = torch.cat(per_head, dim=1).flatten(0, 1)
            named[name.replace(".self_attn.q_proj.", ".attention.wqkv.")] = packed
        elif tiny.text == "internlm2" and name.startswith("language_model"):
            if ".k_proj." not in name and ".v_proj." not in name:
                named[_replaced(name, INTERNLM2_NAMES)] = tensor
        elif ".attn.k." not in name and ".attn.v." not in name:
            named[name] = tensor
    return named


def _native_names(tiny: Tiny, weights: Weights) -> Weights:
    """Rename the weights to native names, as saved or with the in-memory prefix."""
    named: Weights = {}
    for name, tensor in weights.items():
        new = name if name.startswith("language_model") else _replaced(name, NATIVE_NAMES)
        if tiny.layout == "native_prefixed":
            new = f"model.{new.replace('language_model.model.', 'language_model.')}"
            new = new.replace("model.language_model.lm_head", "lm_head")
        named[new] = tensor
    return named


def _save(folder: Path, tiny: Tiny, weights: Weights) -> None:
    """Write one file, or `tiny.shards` files of neighboring tensors and their index."""
    dtype = getattr(torch, tiny.dtype)
    names = list(weights)
    stem, suffix = ("model", ".safetensors") if tiny.file_format == "safetensors" else ("pytorch_model", ".bin")
    weight_map: dict[str, str] = {}
    for shard in range(tiny.shards):
        part = names[shard * len(names) // tiny.shards : (shard + 1) * len(names) // tiny.shards]
        tensors = {name: weights[name].to(dtype).contiguous() for name in part}
        file = f"{stem}{suffix}" if tiny.shards == 1 else f"{stem}-{shard + 1:05}-of-{tiny.shards:05}{suffix}"
        if suffix == ".safetensors":
            save_file(tensors, folder / file, metadata={"format": "pt"})
        else:
            torch.save(tensors, folder / file)
        weight_map |= dict.fromkeys(part, file)
    if tiny.shards > 1:
        total = sum(tensor.numel() * dtype.itemsize for tensor in weights.values())
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (folder / f"{stem}{suffix}.index.json").write_text(json.dumps(index, indent=2), encoding="utf-8")
