"""InternVL3.5, InternVL3 and InternVL2: their published configurations, the sizes of their models, and refusals.

The numbers are those of the published files, of the makers' tables, and (3.5) of Qwen3's own files.
"""

from __future__ import annotations

import copy
import json
from math import prod
from pathlib import Path
from typing import Any

import pytest

from helpers.tiny import write_checkpoint
from helpers.tiny_config import Tiny, native_config, remote_config
from helpers.tiny_tokenizers import Vocabulary
from internvl_edge.base.errors import CheckpointError
from internvl_edge.checkpoint.config_reader import read_config
from internvl_edge.checkpoint.layouts import tensor_shapes
from internvl_edge.checkpoint.reader import Checkpoint
from internvl_edge.model.config import ModelConfig
from internvl_edge.model.context import trained_context
from internvl_edge.model.description import describe, family
from internvl_edge.model.template import template_for

VOCABULARY = Vocabulary(
    size=600, ids=dict.fromkeys(("<|endoftext|>", "<|im_end|>", "<s>", "</s>", "<IMG_CONTEXT>", "<|im_start|>"), 7)
)
TOWER_300M = {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "intermediate_size": 4096}
TOWER_6B = {"hidden_size": 3200, "num_hidden_layers": 45, "num_attention_heads": 25, "intermediate_size": 12800}
# hidden, layers, heads, kv heads, intermediate; heads are 128 wide in all of them.
QWEN3 = {
    "1B": (1024, 28, 16, 8, 3072),
    "2B": (2048, 28, 16, 8, 6144),
    "4B": (2560, 36, 32, 8, 9728),
    "8B": (4096, 36, 32, 8, 12288),
    "14B": (5120, 40, 40, 8, 17408),
    "38B": (5120, 64, 64, 8, 25600),
}
# Billions of parameters of the language models and of the towers, as the makers' table of 3.5 rounds them.
BILLIONS = {"1B": 0.8, "2B": 2.0, "4B": 4.4, "8B": 8.2, "14B": 14.8, "38B": 32.8}
QWEN2_5 = {
    "1B": (896, 24, 14, 2, 4864),
    "2B": (1536, 28, 12, 2, 8960),
    "8B": (3584, 28, 28, 4, 18944),
    "14B": (5120, 48, 40, 8, 13824),
    "38B": (5120, 64, 40, 8, 27648),
    "78B": (8192, 80, 64, 8, 29568),
}
INTERNVL2 = {
    "1B": ("qwen2", (896, 24, 14, 2, 4864), 151655, "Hermes-2"),
    "2B": ("internlm2", (2048, 24, 16, 8, 8192), 92553, "internlm2-chat"),
    "8B": ("internlm2", (4096, 32, 32, 8, 14336), 92553, "internlm2-chat"),
}
# What InternVL3's vision_config says about a mixture of experts that it does not use.
NO_EXPERTS = {
    "capacity_factor": 1.2,
    "eval_capacity_factor": 1.4,
    "laux_allreduce": "all_nodes",
    "moe_coeff_ratio": 0.5,
    "moe_intermediate_size": 768,
    "moe_output_scale": 4.0,
    "noisy_gate_policy": "RSample_before",
    "num_experts": 8,
    "num_routed_experts": 4,
    "num_shared_experts": 4,
    "shared_expert_intermediate_size": 3072,
    "use_moe": False,
    "use_residual": True,
    "use_rts": False,
    "use_weighted_residual": False,
}
Numbers = tuple[int, int, int, int, int]


def read(values: dict[str, Any], folder: Path) -> ModelConfig:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(values), encoding="utf-8")
    return read_config(folder)


def with_sizes(values: dict[str, Any], section: str, numbers: Numbers, large: bool) -> dict[str, Any]:
    names = ("hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "intermediate_size")
    values[section] |= dict(zip(names, numbers, strict=True))
    values["vision_config"] |= TOWER_6B if large else TOWER_300M
    size: Any = 448 if section == "llm_config" else [448, 448]
    values["vision_config"]["image_size"] = size
    if section == "llm_config":
        values["force_image_size"] = size
    return values


def internvl3_5(size: str) -> dict[str, Any]:
    """The file of the 8B, with the sizes of another model in it."""
    values = remote_config(Tiny(text="qwen3", vision="6b" if size == "38B" else "300m"), VOCABULARY)
    with_sizes(values, "llm_config", QWEN3[size], size == "38B")
    values["llm_config"] |= {"head_dim": 128, "max_position_embeddings": 40960, "vocab_size": 151936}
    del values["llm_config"]["tie_word_embeddings"]
    values["vision_config"] |= {"use_fa3": False, "drop_path_rate": 0.1}
    return values | {"eos_token_id": 151645, "pad_token_id": 151643, "pad2square": False}


def internvl3(size: str) -> dict[str, Any]:
    large = size in ("38B", "78B")
    values = with_sizes(
        remote_config(Tiny(vision="6b" if large else "300m"), VOCABULARY), "llm_config", QWEN2_5[size], large
    )
    values["llm_config"] |= {
        "max_position_embeddings": 32768,
        "moe_config": None,
        "rope_scaling": {"factor": 2.0, "rope_type": "dynamic", "type": "dynamic"},
        "vocab_size": 151674,
    }
    values["vision_config"] |= NO_EXPERTS
    return values | {"system_message": None, "image_fold": None, "hidden_size": QWEN2_5[size][0], "pad2square": False}


def internvl2(size: str) -> dict[str, Any]:
    text, numbers, vocabulary, template = INTERNVL2[size]
    values = with_sizes(remote_config(Tiny(text=text, template=template), VOCABULARY), "llm_config", numbers, False)
    values["llm_config"] |= {"max_position_embeddings": 32768, "vocab_size": vocabulary}
    if text == "internlm2":
        values["llm_config"]["rope_scaling"] = {"factor": 2.0, "type": "dynamic"}
    else:
        values["llm_config"] |= {"sliding_window": 32768, "use_sliding_window": False}
        del values["llm_config"]["rope_scaling"]
    del values["tie_word_embeddings"]
    return values


def parameters(config: ModelConfig, *parts: str) -> int:
    return sum(prod(shape) for name, shape in tensor_shapes(config).items() if name.startswith(parts or ("",)))


@pytest.mark.parametrize("size", QWEN3)
def test_internvl3_5_is_read_from_its_file(tmp_path: Path, size: str) -> None:
    config = read(internvl3_5(size), tmp_path)
    decoder = config.decoder
    assert (decoder.hidden_size, decoder.num_hidden_layers, decoder.num_attention_heads) == QWEN3[size][:3]
    assert (decoder.num_key_value_heads, decoder.intermediate_size) == QWEN3[size][3:]
    assert (decoder.head_dim, decoder.qk_norm, decoder.qkv_bias, decoder.output_bias) == (128, True, False, False)
    assert (decoder.rope.theta, decoder.rope.scaling, trained_context(decoder)) == (1e6, "none", 40960)
    assert not decoder.tie_word_embeddings
    assert family(config) == "InternVL3.5"
    assert round(parameters(config, "decoder.") / 1e9, 1) == BILLIONS[size]
    shapes = tensor_shapes(config)
    assert shapes["decoder.layers.0.self_attn.q_norm.weight"] == (128,)
    assert shapes["decoder.layers.0.self_attn.q_proj.weight"] == (
        128 * decoder.num_attention_heads,
        decoder.hidden_size,
    )


def test_sizes_are_those_of_the_published_weights(tmp_path: Path) -> None:
    """Parameters of InternVL3_5-1B-HF, and the bytes of InternVL3_5-8B in bfloat16: only untied heads give them."""
    assert parameters(read(internvl3_5("1B"), tmp_path)) == 1_060_897_792
    assert 2 * parameters(read(internvl3_5("8B"), tmp_path)) == 17_056_636_928


@pytest.mark.parametrize("size", QWEN2_5)
def test_internvl3_is_read_from_its_file(tmp_path: Path, size: str) -> None:
    config = read(internvl3(size), tmp_path)
    assert (config.decoder.rope.scaling, config.decoder.rope.factor) == ("dynamic", 2.0)
    assert (config.decoder.qkv_bias, config.decoder.qk_norm, config.decoder.vocab_size) == (True, False, 151674)
    assert config.vision.qk_normalization == (size in ("38B", "78B"))
    assert (config.template, config.system_message) == ("internvl2_5", None)
    assert family(config) == "InternVL3"


@pytest.mark.parametrize("size", INTERNVL2)
def test_internvl2_is_read_from_its_file(tmp_path: Path, size: str) -> None:
    text, numbers, vocabulary, template = INTERNVL2[size]
    config = read(internvl2(size), tmp_path)
    assert (config.decoder.architecture, config.decoder.vocab_size, config.template) == (text, vocabulary, template)
    assert config.decoder.num_key_value_heads == numbers[3]
    assert config.decoder.rope.scaling == ("dynamic" if text == "internlm2" else "none")
    assert family(config) == "InternVL2"


def test_turns_of_internvl2_end_without_a_line_end() -> None:
    hermes, internlm2 = template_for("Hermes-2"), template_for("internlm2-chat")
    assert hermes.turn_end == internlm2.turn_end == "<|im_end|>"
    assert template_for("internvl2_5").turn_end == "<|im_end|>\n"
    assert hermes.system == internlm2.system != template_for("internvl2_5").system
    assert hermes.system is not None
    assert hermes.system.startswith("你是由上海人工智能实验室联合商汤科技")


@pytest.mark.parametrize("version", [4, 5])
def test_both_layouts_of_qwen3_are_one_configuration(tmp_path: Path, version: int) -> None:
    remote = read(remote_config(Tiny(text="qwen3", head_dim=32), VOCABULARY), tmp_path / "remote")
    tiny = Tiny(text="qwen3", head_dim=32, layout="native", transformers=version)
    native = read(native_config(tiny, VOCABULARY), tmp_path / "native")
    assert native.decoder == remote.decoder
    assert native.vision == remote.vision
    assert family(native) == family(remote) == "InternVL3.5"


@pytest.mark.parametrize("layout", ["remote", "native"])
def test_a_qwen3_head_is_tied_where_its_file_says_so(tmp_path: Path, layout: str) -> None:
    folder = write_checkpoint(tmp_path / "tied", text="qwen3", layout=layout, tie=True)
    tied = Checkpoint(folder)
    assert tied.config.decoder.tie_word_embeddings
    table = tied.tensor("decoder.embed_tokens.weight")
    assert (tied.tensor("decoder.lm_head.weight") == table).all()
    values = json.loads((folder / "config.json").read_text())
    values["llm_config" if layout == "remote" else "text_config"]["tie_word_embeddings"] = False
    values["tie_word_embeddings"] = False
    (folder / "config.json").write_text(json.dumps(values))
    with pytest.raises(CheckpointError, match="tie_word_embeddings false, so a head of its own is needed"):
        Checkpoint(folder)


def test_heads_before_internvl3_5_are_never_tied(tmp_path: Path) -> None:
    values = remote_config(Tiny(), VOCABULARY)
    values["llm_config"]["tie_word_embeddings"] = True
    assert not read(values, tmp_path).decoder.tie_word_embeddings


REFUSED: list[tuple[str, tuple[str, ...], Any, str]] = [
    ("3.5", ("llm_config", "model_type"), "qwen3_moe", "a mixture of experts (InternVL3.5-30B-A3B and 241B-A28B)"),
    ("3.5", ("llm_config", "model_type"), "gpt_oss", "GPT-OSS"),
    ("2", ("llm_config", "model_type"), "phi3", "Phi-3 (InternVL2-4B)"),
    ("3", ("llm_config", "model_type"), "internlm3", "InternLM3"),
    ("3.5", ("llm_config", "rope_scaling"), {"rope_type": "yarn", "factor": 4.0}, "'yarn', which is not supported"),
    ("3.5", ("llm_config", "head_dim"), None, "llm_config.head_dim is missing"),
    ("3.5", ("flash_mode",), True, "InternVL3.5-Flash"),
    ("3.5", ("flash_relative_threshold",), 0.1, "InternVL3.5-Flash"),
    ("3.5", ("model_type",), "internvl_flash", "InternVL3.5-Flash"),
    ("3", ("llm_config", "moe_config"), {"num_experts": 8}, "mixture of experts is not supported"),
    ("3", ("vision_config", "use_moe"), True, "mixture of experts is not supported"),
    ("3.5", ("llm_config", "use_sliding_window"), True, "use_sliding_window"),
]


@pytest.mark.parametrize(("made", "field", "value", "message"), REFUSED, ids=[row[3] for row in REFUSED])
def test_what_is_not_supported_is_refused_by_name(
    tmp_path: Path, made: str, field: tuple[str, ...], value: Any, message: str
) -> None:
    values = copy.deepcopy({"3.5": internvl3_5, "3": internvl3, "2": internvl2}[made]("1B"))
    parent = values
    for name in field[:-1]:
        parent = parent[name]
    parent[field[-1]] = value
    with pytest.raises(CheckpointError) as raised:
        read(values, tmp_path)
    assert message in str(raised.value)
    assert "\n" not in str(raised.value)
    assert len(str(raised.value)) <= 400


def test_the_family_is_the_first_row_of_a_description(tmp_path: Path) -> None:
    found = {}
    for text, template in (("qwen2", "internvl2_5"), ("internlm2", "internvl2_5"), ("internlm2", "internlm2-chat")):
        config = read(remote_config(Tiny(text=text, template=template), VOCABULARY), tmp_path)
        found[text, template] = dict(describe(config, "float32"))["family"]
    assert list(found.values()) == ["InternVL2.5", "InternVL2.5", "InternVL2"]
