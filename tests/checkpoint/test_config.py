"""Configurations of every published variant, read from what their files say; contradictions are named."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest

from helpers.tiny_config import Tiny, native_config, remote_config
from helpers.tiny_tokenizers import Vocabulary
from internvl_edge.base.errors import CheckpointError
from internvl_edge.checkpoint.config_reader import read_config
from internvl_edge.model.config import ModelConfig

VOCABULARY = Vocabulary(
    size=600, ids=dict.fromkeys(("<|endoftext|>", "<|im_end|>", "<s>", "</s>", "<IMG_CONTEXT>", "<|im_start|>"), 7)
)
# hidden, layers, heads, kv heads, intermediate, vocabulary, eps: facts of the published files.
LANGUAGE_MODELS = {
    "1B": ("qwen2", 896, 24, 14, 2, 4864, 151674, 1e-6),
    "2B": ("internlm2", 2048, 24, 16, 8, 8192, 92553, 1e-5),
    "4B": ("qwen2", 2048, 36, 16, 2, 11008, 151674, 1e-6),
    "8B": ("internlm2", 4096, 32, 32, 8, 14336, 92553, 1e-5),
    "26B": ("internlm2", 6144, 48, 48, 8, 16384, 92553, 1e-5),
    "38B": ("qwen2", 5120, 64, 40, 8, 27648, 151674, 1e-6),
    "78B": ("qwen2", 8192, 80, 64, 8, 29568, 151674, 1e-6),
}
LARGE = ("26B", "38B", "78B")


def read(values: dict[str, Any], folder: Path) -> ModelConfig:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(values), encoding="utf-8")
    return read_config(folder)


def published(variant: str) -> dict[str, Any]:
    text, hidden, layers, heads, kv_heads, intermediate, vocabulary, eps = LANGUAGE_MODELS[variant]
    values = remote_config(Tiny(text=text, vision="6b" if variant in LARGE else "300m"), VOCABULARY)
    values["force_image_size"] = values["vision_config"]["image_size"] = 448
    tower = (3200, 45, 25, 12800) if variant in LARGE else (1024, 24, 16, 4096)
    names = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")
    values["vision_config"] |= dict(zip(names, tower, strict=True))
    values["llm_config"] |= dict(zip(names, (hidden, layers, heads, intermediate), strict=True))
    values["llm_config"] |= {"num_key_value_heads": kv_heads, "vocab_size": vocabulary, "rms_norm_eps": eps}
    if text == "internlm2":
        values["llm_config"]["rope_scaling"] = {"type": "dynamic", "factor": 2.0}
    return values


@pytest.mark.parametrize("variant", LANGUAGE_MODELS)
def test_every_published_variant_is_read_from_its_file(tmp_path: Path, variant: str) -> None:
    text, hidden, layers, heads, kv_heads, intermediate, vocabulary, eps = LANGUAGE_MODELS[variant]
    config = read(published(variant), tmp_path)
    decoder, vision = config.decoder, config.vision
    assert (decoder.architecture, decoder.hidden_size, decoder.num_hidden_layers) == (text, hidden, layers)
    assert (decoder.num_attention_heads, decoder.num_key_value_heads) == (heads, kv_heads)
    assert decoder.head_dim * heads == hidden
    assert (decoder.intermediate_size, decoder.vocab_size, decoder.rms_norm_eps) == (intermediate, vocabulary, eps)
    assert decoder.qkv_bias == (text == "qwen2")
    assert decoder.rope.scaling == ("dynamic" if text == "internlm2" else "none")
    assert config.tokens_per_tile == 256
    assert (vision.qk_normalization, vision.norm_type) == (
        (True, "rms_norm") if variant in LARGE else (False, "layer_norm")
    )


def test_both_layouts_of_one_model_are_one_configuration(tmp_path: Path) -> None:
    remote = read(remote_config(Tiny(), VOCABULARY), tmp_path / "remote")
    for version in (4, 5):
        native = read(native_config(Tiny(layout="native", transformers=version), VOCABULARY), tmp_path / f"v{version}")
        assert native.decoder == remote.decoder
        assert native.vision == remote.vision
        assert native.tokens_per_tile == remote.tokens_per_tile


def test_native_ties_are_on_unless_the_file_says_otherwise(tmp_path: Path) -> None:
    values = native_config(Tiny(layout="native"), VOCABULARY)
    assert not read(values, tmp_path).decoder.tie_word_embeddings
    del values["tie_word_embeddings"], values["text_config"]["tie_word_embeddings"]
    assert read(values, tmp_path).decoder.tie_word_embeddings


MISTAKES: list[tuple[tuple[str, ...], Any, str]] = [
    (("model_type",), "llava", "model_type is 'llava'"),
    (("llm_config", "model_type"), "gemma", "llm_config.model_type is 'gemma'"),
    (("llm_config", "hidden_act"), "gelu", "llm_config.hidden_act"),
    (("llm_config", "hidden_size"), None, "llm_config.hidden_size is missing"),
    (("llm_config", "num_attention_heads"), "4", "llm_config.num_attention_heads is '4'"),
    (("llm_config", "num_key_value_heads"), 3, "num_attention_heads 4 is not a multiple"),
    (("llm_config", "use_sliding_window"), True, "use_sliding_window"),
    (("llm_config", "rope_scaling"), {"type": "yarn", "factor": 4}, "yarn"),
    (("llm_config", "rope_scaling"), {"type": "dynamic"}, "rope_scaling.factor is missing"),
    (("vision_config", "norm_type"), "group_norm", "vision_config.norm_type"),
    (("vision_config", "image_size"), 224, "force_image_size is 56 but vision_config.image_size is 224"),
    (("vision_config", "num_channels"), 4, "num_channels is 4"),
    (("vision_config",), None, "vision_config is missing"),
    (("force_image_size",), 57, "force_image_size is 57"),
    (("ps_version",), "v3", "ps_version is 'v3'"),
    (("downsample_ratio",), 0.4, "downsample_ratio 0.4"),
    (("downsample_ratio",), 3, "downsample_ratio 3 "),
    (("select_layer",), -9, "select_layer -9"),
    (("template",), "phi3-chat", "template is 'phi3-chat'"),
]


@pytest.mark.parametrize(("field", "value", "message"), MISTAKES, ids=[mistake[2] for mistake in MISTAKES])
def test_a_field_that_is_wrong_is_named(tmp_path: Path, field: tuple[str, ...], value: Any, message: str) -> None:
    values = copy.deepcopy(remote_config(Tiny(), VOCABULARY))
    parent = values
    for name in field[:-1]:
        parent = parent[name]
    if value is None:
        del parent[field[-1]]
    else:
        parent[field[-1]] = value
    with pytest.raises(CheckpointError) as raised:
        read(values, tmp_path)
    assert message in str(raised.value)
    assert "\n" not in str(raised.value)
