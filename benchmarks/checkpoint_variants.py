"""What published sizes of InternVL 2.5 and 3.5 are: their numbers, tensors by name and shape, and JSON files.

Facts for benchmarks, in the remote-code layout. Knows nothing about the values of weights beyond their scale, nor about
files; `random_checkpoint` writes them.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

# The residual stream of many random layers stays tame, far inside float16.
LAYER_SCALE = 0.1
IMAGE_TOKENS = ("<img>", "</img>", "<IMG_CONTEXT>", "<quad>", "</quad>", "<ref>", "</ref>", "<box>", "</box>")
QWEN2_TOKENS = (
    *("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|object_ref_start|>", "<|object_ref_end|>", "<|box_start|>"),
    *("<|box_end|>", "<|quad_start|>", "<|quad_end|>", "<|vision_start|>", "<|vision_end|>", "<|vision_pad|>"),
    *("<|image_pad|>", "<|video_pad|>", "<tool_call>", "</tool_call>", "<|fim_prefix|>", "<|fim_middle|>"),
    *("<|fim_suffix|>", "<|fim_pad|>", "<|repo_name|>", "<|file_sep|>"),
)
QWEN3_TOKENS = (*QWEN2_TOKENS, "<tool_response>", "</tool_response>", "<think>", "</think>")
INTERNLM2_TOKENS = (
    *("<|plugin|>", "<|interpreter|>", "<|action_end|>", "<|action_start|>", "<|im_end|>", "<|im_start|>"),
)


@dataclass(frozen=True)
class Vision:
    """An InternViT tower; the 6B kind has RMS norms, q/k norms over all heads and no qkv bias."""

    hidden_size: int = 1024
    layers: int = 24
    heads: int = 16
    intermediate_size: int = 4096
    image_size: int = 448
    patch_size: int = 14
    large: bool = False


@dataclass(frozen=True)
class Variant:
    """One published size, in the numbers of its configuration."""

    text: str
    base: str
    hidden_size: int
    layers: int
    heads: int
    kv_heads: int
    intermediate_size: int
    vocab_size: int
    vision: Vision = Vision()
    wide_heads: int | None = None
    padding: int = 0

    @property
    def head_dim(self) -> int:
        """Width of one attention head of the text model."""
        return self.wide_heads or self.hidden_size // self.heads

    @property
    def added_tokens(self) -> dict[str, int]:
        """Special tokens and their ids: the last ids of the vocabulary before its padding."""
        own = {"qwen2": QWEN2_TOKENS, "qwen3": QWEN3_TOKENS, "internlm2": INTERNLM2_TOKENS}[self.text]
        tokens = (*own, *IMAGE_TOKENS)
        return {token: self.vocab_size - self.padding - len(tokens) + index for index, token in enumerate(tokens)}


INTERNVIT_6B = Vision(hidden_size=3200, layers=45, heads=25, intermediate_size=12800, large=True)
VARIANTS = {
    "1B": Variant("qwen2", "Qwen/Qwen2.5-0.5B-Instruct", 896, 24, 14, 2, 4864, 151674),
    "2B": Variant("internlm2", "internlm/internlm2_5-1_8b-chat", 2048, 24, 16, 8, 8192, 92553),
    "4B": Variant("qwen2", "Qwen/Qwen2.5-3B-Instruct", 2048, 36, 16, 2, 11008, 151674),
    "8B": Variant("internlm2", "internlm/internlm2_5-7b-chat", 4096, 32, 32, 8, 14336, 92553),
    "3.5-1B": Variant("qwen3", "Qwen/Qwen3-0.6B", 1024, 28, 16, 8, 3072, 151936, wide_heads=128, padding=258),
    "3.5-2B": Variant("qwen3", "Qwen/Qwen3-1.7B", 2048, 28, 16, 8, 6144, 151936, wide_heads=128, padding=258),
    "3.5-4B": Variant("qwen3", "Qwen/Qwen3-4B", 2560, 36, 32, 8, 9728, 151936, wide_heads=128, padding=258),
    "3.5-8B": Variant("qwen3", "Qwen/Qwen3-8B", 4096, 36, 32, 8, 12288, 151936, wide_heads=128, padding=258),
    # The 26B's kind in few layers: the 6B tower at its real width, and the 2B's InternLM2.
    "26B-small": Variant(
        "internlm2", "internlm/internlm2_5-20b-chat", 2048, 4, 16, 8, 8192, 92553, replace(INTERNVIT_6B, layers=4)
    ),
}


class Tensor(NamedTuple):
    """One tensor to write: normal numbers of `std` (rounded to a power of two) where `constant` is None."""

    name: str
    shape: tuple[int, ...]
    std: float = 1.0
    constant: float | None = None

    @property
    def elements(self) -> int:
        """Number of values."""
        return math.prod(self.shape)


def tensors(variant: Variant) -> Iterator[Tensor]:
    """Every tensor of the variant under its published name."""
    yield from _vision_tensors(variant.vision)
    merged = 4 * variant.vision.hidden_size
    yield from _norm("mlp1.0", merged, bias=True)
    yield from _linear("mlp1.1", variant.hidden_size, merged, bias=True)
    yield from _linear("mlp1.3", variant.hidden_size, variant.hidden_size, bias=True)
    yield from (_internlm2_tensors if variant.text == "internlm2" else _qwen_tensors)(variant)


def _linear(name: str, out: int, inp: int, bias: bool = False) -> Iterator[Tensor]:
    yield Tensor(f"{name}.weight", (out, inp), std=inp**-0.5)
    if bias:
        yield Tensor(f"{name}.bias", (out,), std=0.125)


def _norm(name: str, width: int, bias: bool = False) -> Iterator[Tensor]:
    yield Tensor(f"{name}.weight", (width,), constant=1.0)
    if bias:
        yield Tensor(f"{name}.bias", (width,), std=0.125)


def _vision_tensors(vision: Vision) -> Iterator[Tensor]:
    width, patch = vision.hidden_size, vision.patch_size
    positions = 1 + (vision.image_size // patch) ** 2
    yield Tensor("vision_model.embeddings.class_embedding", (1, 1, width), std=0.5)
    yield Tensor("vision_model.embeddings.position_embedding", (1, positions, width), std=0.25)
    yield Tensor(
        "vision_model.embeddings.patch_embedding.weight", (width, 3, patch, patch), std=(3 * patch * patch) ** -0.5
    )
    yield Tensor("vision_model.embeddings.patch_embedding.bias", (width,), std=0.125)
    for index in range(vision.layers):
        block = f"vision_model.encoder.layers.{index}"
        yield from _linear(f"{block}.attn.qkv", 3 * width, width, bias=not vision.large)
        if vision.large:
            yield from _norm(f"{block}.attn.q_norm", width)
            yield from _norm(f"{block}.attn.k_norm", width)
        yield from _linear(f"{block}.attn.proj", width, width, bias=True)
        yield from _linear(f"{block}.mlp.fc1", vision.intermediate_size, width, bias=True)
        yield from _linear(f"{block}.mlp.fc2", width, vision.intermediate_size, bias=True)
        for part in "12":
            yield from _norm(f"{block}.norm{part}", width, bias=not vision.large)
            yield Tensor(f"{block}.ls{part}", (width,), constant=LAYER_SCALE)


def _qwen_tensors(variant: Variant) -> Iterator[Tensor]:
    """Qwen2 has biases on q, k and v, Qwen3 a norm over each head of q and k."""
    width, kv_width, q_width = (
        variant.hidden_size,
        variant.kv_heads * variant.head_dim,
        variant.heads * variant.head_dim,
    )
    bias = variant.text == "qwen2"
    yield Tensor("language_model.model.embed_tokens.weight", (variant.vocab_size, width), std=0.5)
    for index in range(variant.layers):
        layer = f"language_model.model.layers.{index}"
        yield from _linear(f"{layer}.self_attn.q_proj", q_width, width, bias=bias)
        yield from _linear(f"{layer}.self_attn.k_proj", kv_width, width, bias=bias)
        yield from _linear(f"{layer}.self_attn.v_proj", kv_width, width, bias=bias)
        if variant.text == "qwen3":
            yield from _norm(f"{layer}.self_attn.q_norm", variant.head_dim)
            yield from _norm(f"{layer}.self_attn.k_norm", variant.head_dim)
        yield from _linear(f"{layer}.self_attn.o_proj", width, q_width)
        yield from _linear(f"{layer}.mlp.gate_proj", variant.intermediate_size, width)
        yield from _linear(f"{layer}.mlp.up_proj", variant.intermediate_size, width)
        yield from _linear(f"{layer}.mlp.down_proj", width, variant.intermediate_size)
        yield from _norm(f"{layer}.input_layernorm", width)
        yield from _norm(f"{layer}.post_attention_layernorm", width)
    yield from _norm("language_model.model.norm", width)
    yield from _linear("language_model.lm_head", variant.vocab_size, width)


def _internlm2_tensors(variant: Variant) -> Iterator[Tensor]:
    width = variant.hidden_size
    yield Tensor("language_model.model.tok_embeddings.weight", (variant.vocab_size, width), std=0.5)
    for index in range(variant.layers):
        layer = f"language_model.model.layers.{index}"
        rows = (variant.heads + 2 * variant.kv_heads) * variant.head_dim
        yield from _linear(f"{layer}.attention.wqkv", rows, width)
        yield from _linear(f"{layer}.attention.wo", width, width)
        yield from _linear(f"{layer}.feed_forward.w1", variant.intermediate_size, width)
        yield from _linear(f"{layer}.feed_forward.w3", variant.intermediate_size, width)
        yield from _linear(f"{layer}.feed_forward.w2", width, variant.intermediate_size)
        yield from _norm(f"{layer}.attention_norm", width)
        yield from _norm(f"{layer}.ffn_norm", width)
    yield from _norm("language_model.model.norm", width)
    yield from _linear("language_model.output", variant.vocab_size, width)


def json_files(variant: Variant) -> dict[str, Any]:
    """Contents of every JSON file of the folder by file name, the index of shards apart."""
    added = variant.added_tokens
    vocab = base_vocabulary(variant)
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    named = ({"<unk>": 0, "<s>": 1, "</s>": 2} if variant.text == "internlm2" else {}) | added
    entries = [{"id": index, "content": token, **flags} for token, index in named.items()]
    decoder = {str(entry.pop("id")): entry for entry in [dict(entry) for entry in entries]}
    ends = [added["<|im_end|>"], added["<|im_start|>"]]
    files: dict[str, Any] = {
        "config.json": config(variant),
        "generation_config.json": {"_from_model_config": True, "eos_token_id": ends},
        "preprocessor_config.json": _image_processor(variant.vision),
        "tokenizer.json": _tokenizer(variant, vocab, entries),
        "tokenizer_config.json": _tokenizer_config(variant) | {"added_tokens_decoder": decoder},
        "added_tokens.json": {token: added[token] for token in IMAGE_TOKENS} if variant.text == "internlm2" else added,
    }
    if variant.text != "internlm2":
        files["vocab.json"] = vocab
    return files


def base_vocabulary(variant: Variant) -> dict[str, int]:
    """A byte-level vocabulary that fills all ids below the added tokens: the bytes, then words that no merge makes."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    bytes_ = [chr(byte) for byte in printable] + [chr(256 + index) for index in range(256 - len(printable))]
    tokens = [*(["<unk>", "<s>", "</s>"] if variant.text == "internlm2" else []), *bytes_]
    letters = "abcdefghijklmnopqrstuvwxyz"
    for index in range(min(variant.added_tokens.values()) - len(tokens)):
        word = "".join(letters[index // 26**place % 26] for place in (3, 2, 1, 0))
        tokens.append(f"\u0120{word}")  # the byte-level spelling of a leading space
    return {token: index for index, token in enumerate(tokens)}


def _tokenizer(variant: Variant, vocab: dict[str, int], added: list[dict[str, Any]]) -> dict[str, Any]:
    """tokenizer.json: text becomes single bytes, every id decodes to readable text; InternLM2 starts with `<s>`."""
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    start: dict[str, Any] = {
        "type": "TemplateProcessing",
        "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {"<s>": {"id": "<s>", "ids": [1], "tokens": ["<s>"]}},
    }
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": None,
        "pre_tokenizer": byte_level,
        "post_processor": start if variant.text == "internlm2" else None,
        "decoder": byte_level,
        "model": {"type": "BPE", "byte_fallback": False, "fuse_unk": False, "vocab": vocab, "merges": []},
    }


def _tokenizer_config(variant: Variant) -> dict[str, Any]:
    common = {"clean_up_tokenization_spaces": False, "model_max_length": 8192}
    if variant.text != "internlm2":
        roles = {"bos_token": None, "eos_token": "<|im_end|>", "pad_token": "<|endoftext|>", "unk_token": None}
        return common | roles | {"tokenizer_class": "Qwen2Tokenizer", "add_bos_token": False}
    roles = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "</s>", "unk_token": "<unk>"}
    return common | roles | {"tokenizer_class": "InternLM2Tokenizer"}


def _image_processor(vision: Vision) -> dict[str, Any]:
    size = {"crop_size": vision.image_size, "size": vision.image_size, "resample": 3}
    steps = {"do_center_crop": True, "do_normalize": True, "do_resize": True}
    mean = {"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]}
    return {"feature_extractor_type": "CLIPFeatureExtractor"} | steps | size | mean


def config(variant: Variant) -> dict[str, Any]:
    """config.json as published, without the keys that say nothing about the model."""
    return {
        "architectures": ["InternVLChatModel"],
        "auto_map": {
            "AutoConfig": "configuration_internvl_chat.InternVLChatConfig",
            "AutoModel": "modeling_internvl_chat.InternVLChatModel",
            "AutoModelForCausalLM": "modeling_internvl_chat.InternVLChatModel",
        },
        "downsample_ratio": 0.5,
        "dynamic_image_size": True,
        "force_image_size": variant.vision.image_size,
        "llm_config": _text_config(variant),
        "max_dynamic_patch": 12,
        "min_dynamic_patch": 1,
        "model_type": "internvl_chat",
        "pad2square": False,
        "ps_version": "v2",
        "select_layer": -1,
        "template": "internvl2_5",
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "use_backbone_lora": 0,
        "use_llm_lora": 0,
        "use_thumbnail": True,
        "vision_config": _vision_config(variant.vision),
    }


def _text_config(variant: Variant) -> dict[str, Any]:
    common = {
        "_name_or_path": variant.base,
        "hidden_act": "silu",
        "hidden_size": variant.hidden_size,
        "intermediate_size": variant.intermediate_size,
        "max_position_embeddings": 32768,
        "num_attention_heads": variant.heads,
        "num_hidden_layers": variant.layers,
        "num_key_value_heads": variant.kv_heads,
        "rope_theta": 1000000.0,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "vocab_size": variant.vocab_size,
    }
    if variant.text == "qwen3":
        own = {"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "attention_bias": False}
        ids = {"bos_token_id": 151643, "eos_token_id": 151645, "head_dim": variant.head_dim, "rms_norm_eps": 1e-6}
        window = {"sliding_window": None, "use_sliding_window": False}
        return common | own | ids | window | {"max_position_embeddings": 40960, "rope_scaling": None}
    if variant.text == "qwen2":
        ids = {"bos_token_id": 151643, "eos_token_id": 151645}
        window = {"sliding_window": None, "use_sliding_window": False}
        kind = {
            "architectures": ["Qwen2ForCausalLM"],
            "model_type": "qwen2",
            "rms_norm_eps": 1e-6,
            "rope_scaling": None,
        }
        return common | ids | window | kind
    ids = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2}
    rope = {"rope_scaling": {"factor": 2.0, "type": "dynamic"}}
    kind = {"architectures": ["InternLM2ForCausalLM"], "model_type": "internlm2", "rms_norm_eps": 1e-5, "bias": False}
    return common | ids | rope | kind


def _vision_config(vision: Vision) -> dict[str, Any]:
    return {
        "architectures": ["InternVisionModel"],
        "attention_dropout": 0.0,
        "drop_path_rate": 0.0,
        "dropout": 0.0,
        "hidden_act": "gelu",
        "hidden_size": vision.hidden_size,
        "image_size": vision.image_size,
        "intermediate_size": vision.intermediate_size,
        "layer_norm_eps": 1e-6,
        "model_type": "intern_vit_6b",
        "norm_type": "rms_norm" if vision.large else "layer_norm",
        "num_attention_heads": vision.heads,
        "num_channels": 3,
        "num_hidden_layers": vision.layers,
        "patch_size": vision.patch_size,
        "qk_normalization": vision.large,
        "qkv_bias": not vision.large,
        "torch_dtype": "bfloat16",
        "use_flash_attn": True,
    }
