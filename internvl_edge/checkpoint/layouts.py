"""The tensors that a model has, and their names in each checkpoint layout: tables, and the lookup in them.

Canonical names are those of the original vision tower below `vision.`, and of transformers' Qwen2 below `decoder.`:
`vision.layers.0.attn.qkv.weight`, `projector.fc1.bias`, `decoder.layers.0.self_attn.q_proj.weight`,
`decoder.lm_head.weight`. In the tables, `#` stands for the layer's number. `.weight` and `.bias` are appended
unchanged.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from internvl_edge.model.config import DecoderConfig, ModelConfig, VisionConfig


@dataclass(frozen=True)
class Source:
    """Where one canonical tensor is stored: as one tensor, as several joined along the rows, or as part of a fused one.

    `part` is "query", "key" or "value" of a fused `wqkv`, whose rows are [G query heads | 1 key | 1 value] per KV head.
    """

    names: tuple[str, ...]
    part: str | None = None


def _one(name: str, part: str | None = None) -> Source:
    return Source((name,), part)


_REMOTE_BLOCK = "vision_model.encoder.layers.#."
_REMOTE = {
    "vision.class_embedding": _one("vision_model.embeddings.class_embedding"),
    "vision.position_embedding": _one("vision_model.embeddings.position_embedding"),
    "vision.patch_embedding": _one("vision_model.embeddings.patch_embedding"),
    "projector.norm": _one("mlp1.0"),
    "projector.fc1": _one("mlp1.1"),
    "projector.fc2": _one("mlp1.3"),
    **{
        f"vision.layers.#.{name}": _one(_REMOTE_BLOCK + name)
        for name in (
            "attn.qkv attn.proj attn.q_norm attn.k_norm ls1 ls2 norm1 norm2 mlp.fc1 mlp.fc2".split()  # noqa: SIM905
        )
    },
}

_NATIVE_BLOCK = "vision_tower.encoder.layer.#."
_NATIVE = {
    "vision.class_embedding": _one("vision_tower.embeddings.cls_token"),
    "vision.position_embedding": _one("vision_tower.embeddings.position_embeddings"),
    "vision.patch_embedding": _one("vision_tower.embeddings.patch_embeddings.projection"),
    "projector.norm": _one("multi_modal_projector.layer_norm"),
    "projector.fc1": _one("multi_modal_projector.linear_1"),
    "projector.fc2": _one("multi_modal_projector.linear_2"),
    "vision.layers.#.attn.qkv": Source(tuple(f"{_NATIVE_BLOCK}attention.{x}_proj" for x in "qkv")),
    "vision.layers.#.attn.proj": _one(_NATIVE_BLOCK + "attention.projection_layer"),
    "vision.layers.#.attn.q_norm": _one(_NATIVE_BLOCK + "attention.q_norm"),
    "vision.layers.#.attn.k_norm": _one(_NATIVE_BLOCK + "attention.k_norm"),
    "vision.layers.#.ls1": _one(_NATIVE_BLOCK + "lambda_1"),
    "vision.layers.#.ls2": _one(_NATIVE_BLOCK + "lambda_2"),
    "vision.layers.#.norm1": _one(_NATIVE_BLOCK + "layernorm_before"),
    "vision.layers.#.norm2": _one(_NATIVE_BLOCK + "layernorm_after"),
    "vision.layers.#.mlp.fc1": _one(_NATIVE_BLOCK + "mlp.fc1"),
    "vision.layers.#.mlp.fc2": _one(_NATIVE_BLOCK + "mlp.fc2"),
}

_DECODER_LINEARS = tuple(
    [f"self_attn.{x}_proj" for x in ("q", "k", "v", "o")] + [f"mlp.{x}_proj" for x in ("gate", "up", "down")]
)
_LLAMA_BLOCK = "language_model.model.layers.#."
_LLAMA = {
    "decoder.embed_tokens": _one("language_model.model.embed_tokens"),
    "decoder.norm": _one("language_model.model.norm"),
    "decoder.lm_head": _one("language_model.lm_head"),
    **{
        f"decoder.layers.#.{name}": _one(_LLAMA_BLOCK + name)
        for name in (*_DECODER_LINEARS, "input_layernorm", "post_attention_layernorm")
    },
}
_QWEN3 = _LLAMA | {
    f"decoder.layers.#.self_attn.{part}_norm": _one(f"{_LLAMA_BLOCK}self_attn.{part}_norm") for part in "qk"
}
_INTERNLM2 = {
    "decoder.embed_tokens": _one("language_model.model.tok_embeddings"),
    "decoder.norm": _one("language_model.model.norm"),
    "decoder.lm_head": _one("language_model.output"),
    "decoder.layers.#.self_attn.q_proj": _one(_LLAMA_BLOCK + "attention.wqkv", "query"),
    "decoder.layers.#.self_attn.k_proj": _one(_LLAMA_BLOCK + "attention.wqkv", "key"),
    "decoder.layers.#.self_attn.v_proj": _one(_LLAMA_BLOCK + "attention.wqkv", "value"),
    "decoder.layers.#.self_attn.o_proj": _one(_LLAMA_BLOCK + "attention.wo"),
    "decoder.layers.#.mlp.gate_proj": _one(_LLAMA_BLOCK + "feed_forward.w1"),
    "decoder.layers.#.mlp.up_proj": _one(_LLAMA_BLOCK + "feed_forward.w3"),
    "decoder.layers.#.mlp.down_proj": _one(_LLAMA_BLOCK + "feed_forward.w2"),
    "decoder.layers.#.input_layernorm": _one(_LLAMA_BLOCK + "attention_norm"),
    "decoder.layers.#.post_attention_layernorm": _one(_LLAMA_BLOCK + "ffn_norm"),
}

_TOWERS = {"remote": _REMOTE, "native": _NATIVE}
_DECODERS = {
    ("remote", "qwen2"): _LLAMA,
    ("remote", "qwen3"): _QWEN3,
    ("remote", "llama"): _LLAMA,
    ("remote", "internlm2"): _INTERNLM2,
    ("native", "qwen2"): _LLAMA,
    ("native", "qwen3"): _QWEN3,
    ("native", "llama"): _LLAMA,
}

# transformers writes the native layout with or without its inner `model.`. Each entry is (written prefix, prefix in the
# tables above).
NATIVE_PREFIXES = (
    ("model.vision_tower.", "vision_tower."),
    ("model.multi_modal_projector.", "multi_modal_projector."),
    ("model.language_model.", "language_model.model."),
    ("lm_head.", "language_model.lm_head."),
)

# Buffers that old files hold and that no computation needs.
LEFTOVERS = re.compile(r"(\.rotary_emb\.inv_freq|\.rotary_emb\.(cos|sin)_cached|\.embeddings\.position_ids)$")


def supported(config: ModelConfig) -> bool:
    """Return whether this text model exists in this layout (InternLM2 does not exist natively)."""
    return (config.layout, config.decoder.architecture) in _DECODERS


def tensor_source(config: ModelConfig, name: str) -> Source:
    """Return where the canonical tensor `name` is stored in checkpoints of this configuration's layout."""
    module, dot, parameter = name.rpartition(".")
    if parameter not in ("weight", "bias"):
        module, dot, parameter = name, "", ""
    layer = re.search(r"(?<=\.layers\.)\d+", module)
    table = _TOWERS[config.layout] | _DECODERS[config.layout, config.decoder.architecture]
    source = table[re.sub(r"(?<=\.layers\.)\d+", "#", module)]
    names = tuple(stored.replace("#", layer[0] if layer else "") + dot + parameter for stored in source.names)
    return Source(names, source.part)


def without_prefix(config: ModelConfig, name: str) -> str:
    """Return the name in the layout's table for a stored name that may have one of transformers' prefixes."""
    for written, table in NATIVE_PREFIXES if config.layout == "native" else ():
        if name.startswith(written):
            return table + name.removeprefix(written)
    return name


def tensor_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Return the shape of every tensor of the model by canonical name. Linears are [out, in]."""
    return _vision_shapes(config.vision) | _projector_shapes(config) | _decoder_shapes(config.decoder)


def linear_names(config: ModelConfig, *parts: str) -> list[str]:
    """Return the canonical names of the linears of decoder, tower and projector, without blocks that are not used.

    Args:
        config: the model.
        parts: prefixes of names ("decoder.layers.", "vision."); none for all.
    """
    unused = range(config.vision_layers_used, config.vision.num_hidden_layers)
    left_out = ("decoder.embed_tokens.", *(f"vision.layers.{layer}." for layer in unused))
    return [
        name.removesuffix(".weight")
        for name, shape in tensor_shapes(config).items()
        if len(shape) == 2 and name.startswith(parts or "") and not name.startswith(left_out)
    ]


_Shapes = dict[str, tuple[int, ...]]


def _linear(name: str, out: int, inputs: int, bias: bool) -> _Shapes:
    shapes: _Shapes = {f"{name}.weight": (out, inputs)}
    return shapes | {f"{name}.bias": (out,)} if bias else shapes


def _norm(name: str, size: int, bias: bool) -> _Shapes:
    shapes: _Shapes = {f"{name}.weight": (size,)}
    return shapes | {f"{name}.bias": (size,)} if bias else shapes


def _vision_shapes(vision: VisionConfig) -> _Shapes:
    hidden, patch = vision.hidden_size, vision.patch_size
    shapes: _Shapes = {
        "vision.class_embedding": (1, 1, hidden),
        "vision.position_embedding": (1, vision.grid_size**2 + 1, hidden),
        "vision.patch_embedding.weight": (hidden, 3, patch, patch),
        "vision.patch_embedding.bias": (hidden,),
    }
    has_norm_bias = vision.norm_type == "layer_norm"
    for n in range(vision.num_hidden_layers):
        block = f"vision.layers.{n}."
        shapes |= _norm(block + "norm1", hidden, has_norm_bias) | _norm(block + "norm2", hidden, has_norm_bias)
        shapes |= _linear(block + "attn.qkv", 3 * hidden, hidden, vision.qkv_bias)
        shapes |= _linear(block + "attn.proj", hidden, hidden, bias=True)
        if vision.qk_normalization:
            shapes |= _norm(block + "attn.q_norm", hidden, bias=False) | _norm(
                block + "attn.k_norm", hidden, bias=False
            )
        shapes |= _linear(block + "mlp.fc1", vision.intermediate_size, hidden, bias=True)
        shapes |= _linear(block + "mlp.fc2", hidden, vision.intermediate_size, bias=True)
        shapes |= {block + "ls1": (hidden,), block + "ls2": (hidden,)}
    return shapes


def _projector_shapes(config: ModelConfig) -> _Shapes:
    hidden = config.decoder.hidden_size
    return (
        _norm("projector.norm", config.projector_input_size, bias=True)
        | _linear("projector.fc1", hidden, config.projector_input_size, bias=True)
        | _linear("projector.fc2", hidden, hidden, bias=True)
    )


def _decoder_shapes(decoder: DecoderConfig) -> _Shapes:
    hidden, intermediate = decoder.hidden_size, decoder.intermediate_size
    query = decoder.num_attention_heads * decoder.head_dim
    key_value = decoder.num_key_value_heads * decoder.head_dim
    shapes: _Shapes = {"decoder.embed_tokens.weight": (decoder.vocab_size, hidden)}
    for n in range(decoder.num_hidden_layers):
        block = f"decoder.layers.{n}."
        shapes |= _norm(block + "input_layernorm", hidden, bias=False)
        shapes |= _linear(block + "self_attn.q_proj", query, hidden, decoder.qkv_bias)
        shapes |= _linear(block + "self_attn.k_proj", key_value, hidden, decoder.qkv_bias)
        shapes |= _linear(block + "self_attn.v_proj", key_value, hidden, decoder.qkv_bias)
        if decoder.qk_norm:
            for part in "qk":
                shapes |= _norm(f"{block}self_attn.{part}_norm", decoder.head_dim, bias=False)
        shapes |= _linear(block + "self_attn.o_proj", hidden, query, decoder.output_bias)
        shapes |= _norm(block + "post_attention_layernorm", hidden, bias=False)
        shapes |= _linear(block + "mlp.gate_proj", intermediate, hidden, bias=False)
        shapes |= _linear(block + "mlp.up_proj", intermediate, hidden, bias=False)
        shapes |= _linear(block + "mlp.down_proj", hidden, intermediate, bias=False)
    return shapes | {"decoder.norm.weight": (hidden,), "decoder.lm_head.weight": (decoder.vocab_size, hidden)}
