"""The choices of one tiny checkpoint, and the JSON files that express them in each layout's format.

The keys are those of the published remote-code files, and of what transformers 4 and 5 save for the native layout. This
module does not know weights.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from helpers.tiny_tokenizers import Vocabulary

Json = dict[str, Any]

MEAN, STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]

# Keys that transformers wrote into every published `llm_config`. A strict reader must accept them.
PRETRAINED_DEFAULTS: dict[str, Any] = {
    **dict.fromkeys(
        ["bad_words_ids", "begin_suppress_tokens", "cross_attention_hidden_size", "decoder_start_token_id"], None
    ),
    **dict.fromkeys(["exponential_decay_length_penalty", "finetuning_task", "forced_bos_token_id"], None),
    **dict.fromkeys(["forced_eos_token_id", "prefix", "problem_type", "sep_token_id", "suppress_tokens"], None),
    **dict.fromkeys(["task_specific_params", "tokenizer_class"], None),
    **dict.fromkeys(["add_cross_attention", "do_sample", "early_stopping", "is_decoder", "is_encoder_decoder"], False),
    **dict.fromkeys(["output_attentions", "output_hidden_states", "output_scores", "remove_invalid_values"], False),
    **dict.fromkeys(["return_dict_in_generate", "tf_legacy_loss", "tie_encoder_decoder", "torchscript"], False),
    **dict.fromkeys(["return_dict", "use_bfloat16", "use_cache"], True),
    **dict.fromkeys(["chunk_size_feed_forward", "encoder_no_repeat_ngram_size", "min_length"], 0),
    **dict.fromkeys(["no_repeat_ngram_size"], 0),
    **dict.fromkeys(["num_beam_groups", "num_beams", "num_return_sequences"], 1),
    **dict.fromkeys(["length_penalty", "repetition_penalty", "temperature", "top_p", "typical_p"], 1.0),
    "diversity_penalty": 0.0,
    "id2label": {"0": "LABEL_0", "1": "LABEL_1"},
    "initializer_range": 0.02,
    "label2id": {"LABEL_0": 0, "LABEL_1": 1},
    "max_length": 20,
    "pruned_heads": {},
    "top_k": 50,
    "transformers_version": "4.37.2",
}


@dataclass(frozen=True)
class Tiny:
    """All choices of one tiny checkpoint; `write_checkpoint` takes them as keyword arguments.

    `text`: "qwen2", "qwen3", "internlm2" (remote only) or "llama" (native only, the native form of InternLM2).
    `layout`: "remote", "native" or "native_prefixed" (in-memory names with `model.` in front, top-level `lm_head`).
    `vision`: "300m" (layer_norm, qkv bias) or "6b" (rms_norm, q/k norm over all heads, no qkv bias).
    `rope_scaling`: as InternLM2 writes it, {"type": "dynamic"|"linear", "factor": number}.
    `head_dim`: 0 takes hidden_size / num_attention_heads; only Qwen3 and Llama can have another one.
    `rms_norm_eps`: 0 takes that of the published checkpoints.
    `template`: of a remote checkpoint. `padding_rows`: rows of table and head that no token has, as Qwen3 has.
    `bias`: InternLM2's config key (biases on wqkv and wo), the attention_bias of Llama and Qwen3.
    `transformers`: 5 or 4, the dialect of a native config (`rope_parameters`, `dtype` or `rope_theta`, `torch_dtype`).
    `config`: keys that replace or add to the top level of config.json, last of all.
    """

    text: str = "qwen2"
    layout: str = "remote"
    vision: str = "300m"
    select_layer: int = -1
    ps_version: str = "v2"
    image_size: int = 56
    patch_size: int = 14
    hidden_size: int = 64
    num_hidden_layers: int = 2
    num_attention_heads: int = 4
    num_key_value_heads: int = 2
    head_dim: int = 0
    intermediate_size: int = 128
    padding_rows: int = 0
    downsample_ratio: float = 0.5
    template: str = "internvl2_5"
    vision_hidden_size: int = 64
    vision_num_hidden_layers: int = 2
    vision_num_attention_heads: int = 4
    vision_intermediate_size: int = 128
    rms_norm_eps: float = 0.0
    max_position_embeddings: int = 2048
    rope_theta: float = 1e6
    rope_scaling: dict[str, Any] | None = None
    bias: bool = False
    tie: bool = False
    shards: int = 1
    file_format: str = "safetensors"
    dtype: str = "bfloat16"
    seed: int = 0
    transformers: int = 5
    config: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        native = self.layout in ("native", "native_prefixed")
        known: dict[str, tuple[Any, ...]] = {}
        known |= {"text": ("qwen2", "qwen3", "llama" if native else "internlm2"), "vision": ("300m", "6b")}
        known |= {"layout": ("remote", "native", "native_prefixed"), "file_format": ("safetensors", "bin")}
        known |= {
            "tie": (False, True) if native or self.text == "qwen3" else (False,),
            "ps_version": ("v2",) if native else ("v1", "v2"),
        }
        for name, choices in known.items():
            if getattr(self, name) not in choices:
                raise ValueError(f"{name}={getattr(self, name)!r} with layout={self.layout!r}: choose from {choices}")
        if not self.head_dim:
            object.__setattr__(self, "head_dim", self.hidden_size // self.num_attention_heads)
        if not self.rms_norm_eps:
            object.__setattr__(self, "rms_norm_eps", 1e-6 if self.text in ("qwen2", "qwen3") else 1e-5)

    @property
    def shuffle(self) -> int:
        """The number of patches that the pixel shuffle merges along each side."""
        return round(1 / self.downsample_ratio)

    @property
    def tokens_per_tile(self) -> int:
        """The number of image tokens of one tile."""
        return (self.image_size // self.patch_size // self.shuffle) ** 2


def remote_config(tiny: Tiny, vocabulary: Vocabulary) -> Json:
    """Return the config.json of a published `internvl_chat` folder."""
    return {
        "_commit_hash": None,
        "architectures": ["InternVLChatModel"],
        "auto_map": {
            "AutoConfig": "configuration_internvl_chat.InternVLChatConfig",
            "AutoModel": "modeling_internvl_chat.InternVLChatModel",
            "AutoModelForCausalLM": "modeling_internvl_chat.InternVLChatModel",
        },
        "downsample_ratio": tiny.downsample_ratio,
        "dynamic_image_size": True,
        "force_image_size": tiny.image_size,
        "llm_config": PRETRAINED_DEFAULTS | _text_numbers(tiny, vocabulary) | _remote_text(tiny, vocabulary),
        "max_dynamic_patch": 12,
        "min_dynamic_patch": 1,
        "model_type": "internvl_chat",
        "ps_version": tiny.ps_version,
        "select_layer": tiny.select_layer,
        "template": tiny.template,
        "tie_word_embeddings": False,
        "torch_dtype": tiny.dtype,
        "transformers_version": None,
        "use_backbone_lora": 0,
        "use_llm_lora": 0,
        "use_thumbnail": True,
        "vision_config": _vision_numbers(tiny)
        | {
            "architectures": ["InternVisionModel"],
            "drop_path_rate": 0.0,
            "dropout": 0.0,
            "image_size": tiny.image_size,
            "initializer_factor": 1.0,
            "model_type": "intern_vit_6b",
            "output_attentions": False,
            "output_hidden_states": False,
            "patch_size": tiny.patch_size,
            "qk_normalization": tiny.vision == "6b",
            "qkv_bias": tiny.vision != "6b",
            "return_dict": True,
            "torch_dtype": tiny.dtype,
            "transformers_version": "4.37.2",
            "use_bfloat16": True,
            "use_flash_attn": True,
        },
    }


def _remote_text(tiny: Tiny, vocabulary: Vocabulary) -> Json:
    common = {
        "attn_implementation": "flash_attention_2",
        "rope_scaling": tiny.rope_scaling,
        "rope_theta": tiny.rope_theta,
        "torch_dtype": tiny.dtype,
        "tie_word_embeddings": tiny.tie,
    }
    if tiny.text == "qwen3":
        return common | {
            "_name_or_path": "Qwen/Qwen3-0.6B",
            "architectures": ["Qwen3ForCausalLM"],
            "attention_bias": tiny.bias,
            "attention_dropout": 0.0,
            "bos_token_id": vocabulary.ids["<|endoftext|>"],
            "debug": False,
            "eos_token_id": vocabulary.ids["<|im_end|>"],
            "ep_size": 1,
            "head_dim": tiny.head_dim,
            "max_window_layers": tiny.num_hidden_layers,
            "micro_forward": False,
            "model_type": "qwen3",
            "skip_checkpoint": False,
            "sliding_window": None,
            "use_cache": False,
            "use_deepep": False,
            "use_sliding_window": False,
        }
    if tiny.text == "qwen2":
        return common | {
            "_attn_implementation_autoset": True,
            "_name_or_path": "Qwen/Qwen2.5-0.5B-Instruct",
            "architectures": ["Qwen2ForCausalLM"],
            "attention_dropout": 0.0,
            "bos_token_id": vocabulary.ids["<|endoftext|>"],
            "eos_token_id": vocabulary.ids["<|im_end|>"],
            "max_window_layers": 70,
            "model_type": "qwen2",
            "pad_token_id": None,
            "sliding_window": None,
            "use_sliding_window": False,
        }
    return common | {
        "_name_or_path": "internlm/internlm2_5-1_8b-chat",
        "architectures": ["InternLM2ForCausalLM"],
        "auto_map": {
            "AutoConfig": "configuration_internlm2.InternLM2Config",
            "AutoModel": "modeling_internlm2.InternLM2ForCausalLM",
            "AutoModelForCausalLM": "modeling_internlm2.InternLM2ForCausalLM",
            "AutoModelForSequenceClassification": "modeling_internlm2.InternLM2ForSequenceClassification",
        },
        "bias": tiny.bias,
        "bos_token_id": vocabulary.ids["<s>"],
        "eos_token_id": vocabulary.ids["</s>"],
        "model_type": "internlm2",
        "pad_token_id": vocabulary.ids["</s>"],
    }


def native_config(tiny: Tiny, vocabulary: Vocabulary) -> Json:
    """Return the config.json of an `internvl` folder as transformers 5 or 4 saves it."""
    dtype = "dtype" if tiny.transformers == 5 else "torch_dtype"
    return {
        "architectures": ["InternVLForConditionalGeneration"],
        "downsample_ratio": tiny.downsample_ratio,
        dtype: tiny.dtype,
        "image_seq_length": tiny.tokens_per_tile,
        "image_token_id": vocabulary.ids["<IMG_CONTEXT>"],
        "model_type": "internvl",
        "projector_hidden_act": "gelu",
        "text_config": _text_numbers(tiny, vocabulary) | _native_text(tiny, vocabulary),
        "tie_word_embeddings": tiny.tie,
        "transformers_version": "5.23.0" if tiny.transformers == 5 else "4.57.1",
        "vision_config": _vision_numbers(tiny)
        | {
            "attention_bias": tiny.vision != "6b",
            "hidden_dropout_prob": 0.0,
            "image_size": [tiny.image_size, tiny.image_size],
            "layer_scale_init_value": 0.1,
            "model_type": "internvl_vision",
            "patch_size": [tiny.patch_size, tiny.patch_size],
            "projection_dropout": 0.0,
            "use_absolute_position_embeddings": True,
            "use_mask_token": False,
            "use_mean_pooling": True,
            "use_qk_norm": tiny.vision == "6b",
        },
        "vision_feature_layer": tiny.select_layer,
        "vision_feature_select_strategy": "default",
    }


def _native_text(tiny: Tiny, vocabulary: Vocabulary) -> Json:
    scaling = tiny.rope_scaling
    rope = {"rope_type": scaling["type"], "factor": scaling["factor"]} if scaling else None
    text: Json = {
        "attention_dropout": 0.0,
        "bos_token_id": vocabulary.ids["<|endoftext|>"],
        "eos_token_id": vocabulary.ids["<|im_end|>"],
        "initializer_range": 0.02,
        "model_type": tiny.text,
        "pad_token_id": None,
        "tie_word_embeddings": tiny.tie,
        "use_cache": True,
    }
    if tiny.transformers == 5:
        text["rope_parameters"] = {"rope_theta": tiny.rope_theta} | (rope or {"rope_type": "default"})
    else:
        text |= {"rope_theta": tiny.rope_theta, "rope_scaling": rope, "torch_dtype": tiny.dtype}
    if tiny.text in ("qwen2", "qwen3"):
        own = {} if tiny.text == "qwen2" else {"attention_bias": tiny.bias, "head_dim": tiny.head_dim}
        layer_types = ["full_attention"] * tiny.num_hidden_layers
        window = {"max_window_layers": 28, "sliding_window": None, "use_sliding_window": False}
        return text | own | window | {"layer_types": layer_types}
    return text | {"attention_bias": tiny.bias, "head_dim": tiny.head_dim, "mlp_bias": False, "pretraining_tp": 1}


def _text_numbers(tiny: Tiny, vocabulary: Vocabulary) -> Json:
    return {
        "hidden_act": "silu",
        "hidden_size": tiny.hidden_size,
        "intermediate_size": tiny.intermediate_size,
        "max_position_embeddings": tiny.max_position_embeddings,
        "num_attention_heads": tiny.num_attention_heads,
        "num_hidden_layers": tiny.num_hidden_layers,
        "num_key_value_heads": tiny.num_key_value_heads,
        "rms_norm_eps": tiny.rms_norm_eps,
        "vocab_size": vocabulary.size + tiny.padding_rows,
    }


def _vision_numbers(tiny: Tiny) -> Json:
    return {
        "attention_dropout": 0.0,
        "hidden_act": "gelu",
        "hidden_size": tiny.vision_hidden_size,
        "initializer_range": 0.02,
        "intermediate_size": tiny.vision_intermediate_size,
        "layer_norm_eps": 1e-6,
        "norm_type": "rms_norm" if tiny.vision == "6b" else "layer_norm",
        "num_attention_heads": tiny.vision_num_attention_heads,
        "num_channels": 3,
        "num_hidden_layers": tiny.vision_num_hidden_layers,
    }


def side_files(tiny: Tiny, vocabulary: Vocabulary) -> dict[str, Json]:
    """generation_config.json and the image processor's file, under the name that the layout's transformers gives it."""
    ends = [vocabulary.ids["<|im_end|>"], vocabulary.ids["<|im_start|>"]]
    generation = {"_from_model_config": True, "eos_token_id": ends, "transformers_version": "4.37.2"}
    native = {
        "crop_to_patches": True,
        "do_normalize": True,
        "do_resize": True,
        "image_mean": MEAN,
        "image_processor_type": "GotOcr2ImageProcessor",
        "image_std": STD,
        "max_patches": 12,
        "min_patches": 1,
        "resample": 3,
        "size": {"height": tiny.image_size, "width": tiny.image_size},
    }
    remote = {
        "crop_size": tiny.image_size,
        "do_center_crop": True,
        "do_normalize": True,
        "do_resize": True,
        "feature_extractor_type": "CLIPFeatureExtractor",
        "image_mean": MEAN,
        "image_std": STD,
        "resample": 3,
        "size": tiny.image_size,
    }
    if tiny.layout == "remote":
        return {"generation_config.json": generation, "preprocessor_config.json": remote}
    if tiny.transformers == 4:
        return {"generation_config.json": generation, "preprocessor_config.json": native}
    processor = {"image_processor": native, "image_seq_length": tiny.tokens_per_tile}
    return {"generation_config.json": generation, "processor_config.json": processor}
