"""The random checkpoints of the benchmarks have the published numbers, names and ids, and are whole or absent."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers
import torch
from safetensors import safe_open

from helpers.reference import Reference
from helpers.repository import REPOSITORY

BENCHMARKS = REPOSITORY / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

import checkpoint_variants as variants  # noqa: E402 - the folder of scripts is no package
import random_checkpoint  # noqa: E402

from internvl_edge.base.errors import EdgeError  # noqa: E402
from internvl_edge.checkpoint.reader import Checkpoint  # noqa: E402

# hidden, layers, heads, kv heads, head dim, intermediate, vocabulary, rms eps, model type, rope scaling
PUBLISHED = {
    "1B": (896, 24, 14, 2, 64, 4864, 151674, 1e-6, "qwen2", None),
    "2B": (2048, 24, 16, 8, 128, 8192, 92553, 1e-5, "internlm2", {"type": "dynamic", "factor": 2.0}),
    "4B": (2048, 36, 16, 2, 128, 11008, 151674, 1e-6, "qwen2", None),
    "8B": (4096, 32, 32, 8, 128, 14336, 92553, 1e-5, "internlm2", {"type": "dynamic", "factor": 2.0}),
    "3.5-1B": (1024, 28, 16, 8, 128, 3072, 151936, 1e-6, "qwen3", None),
    "3.5-8B": (4096, 36, 32, 8, 128, 12288, 151936, 1e-6, "qwen3", None),
}
IDS = {
    "1B": {"<|im_start|>": 151644, "<|im_end|>": 151645, "<img>": 151665, "</img>": 151666, "<IMG_CONTEXT>": 151667}
    | {"<|endoftext|>": 151643, "<box>": 151672, "</box>": 151673},
    "3.5-1B": {"<think>": 151667, "</think>": 151668, "<img>": 151669, "</img>": 151670, "<IMG_CONTEXT>": 151671},
    "8B": {"<|im_end|>": 92542, "<|im_start|>": 92543, "<img>": 92544, "</img>": 92545, "<IMG_CONTEXT>": 92546}
    | {"<s>": 1, "</s>": 2, "</box>": 92552},
}


def shrunken(name: str) -> variants.Variant:
    """A variant with its own kind and vocabulary of token names, but a few hundred kilobytes of weights."""
    variant = variants.VARIANTS[name]
    vision = replace(variant.vision, hidden_size=64, heads=4, intermediate_size=128, layers=2, image_size=56)
    variant = replace(variant, hidden_size=64, heads=4, kv_heads=2, intermediate_size=128, layers=2, vocab_size=512)
    wide_heads, padding = variant.wide_heads and 32, variant.padding and 2
    return replace(variant, vision=vision, wide_heads=wide_heads, padding=padding)


@pytest.mark.parametrize("name", PUBLISHED)
def test_configuration_has_the_published_numbers(name: str) -> None:
    config = variants.config(variants.VARIANTS[name])
    text, vision = config["llm_config"], config["vision_config"]
    keys = ["hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads"]
    head_dim = text.get("head_dim", text["hidden_size"] // text["num_attention_heads"])
    rest = ["intermediate_size", "vocab_size", "rms_norm_eps", "model_type", "rope_scaling"]
    assert (*(text[key] for key in keys), head_dim, *(text[key] for key in rest)) == PUBLISHED[name]
    assert (text["rope_theta"], text["max_position_embeddings"]) == (1e6, 40960 if "3.5" in name else 32768)
    keys = ["hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "image_size", "patch_size"]
    assert [vision[key] for key in keys] == [1024, 24, 16, 4096, 448, 14]
    assert (config["ps_version"], config["select_layer"], config["max_dynamic_patch"]) == ("v2", -1, 12)


def test_small_26b_keeps_the_kind_and_width_of_the_6b_tower() -> None:
    vision = variants.config(variants.VARIANTS["26B-small"])["vision_config"]
    assert (vision["hidden_size"], vision["num_attention_heads"], vision["intermediate_size"]) == (3200, 25, 12800)
    assert (vision["norm_type"], vision["qk_normalization"], vision["qkv_bias"]) == ("rms_norm", True, False)


@pytest.mark.parametrize("name", variants.VARIANTS)
def test_a_shrunken_variant_is_complete_and_finite(tmp_path: Path, name: str) -> None:
    random_checkpoint.write(shrunken(name), tmp_path / "out")
    Checkpoint(tmp_path / "out")  # strict: refuses missing, unexpected and misshapen tensors
    reference = Reference(tmp_path / "out")
    tiles = np.random.default_rng(0).integers(0, 256, (1, 56, 56, 3), dtype=np.uint8)
    image = [reference.image_token_id()] * 4
    logits = reference.logits([3, *image, 5, 8], tiles)
    assert torch.isfinite(logits).all()
    assert 0.3 < logits.std() < 3


def test_weights_have_the_scale_of_their_fan_in(tmp_path: Path) -> None:
    variant = shrunken("1B")
    random_checkpoint.write(variant, tmp_path / "out")
    with safe_open(tmp_path / "out" / "model.safetensors", "pt") as file:
        for tensor in variants.tensors(variant):
            values = file.get_tensor(tensor.name).float()
            assert values.shape == tensor.shape
            if tensor.constant is not None:
                torch.testing.assert_close(values, torch.full(tensor.shape, tensor.constant), rtol=4e-3, atol=0)
            elif tensor.elements >= 4096:
                assert 0.65 < values.std() / tensor.std < 1.5
                assert values.mean().abs() < 0.1 * tensor.std


def test_a_seed_decides_every_byte(tmp_path: Path) -> None:
    written = {}
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        random_checkpoint.write(shrunken("2B"), tmp_path / name, seed=seed)
        written[name] = (tmp_path / name / "model.safetensors").read_bytes()
    assert written["a"] == written["b"]
    assert written["a"] != written["c"]


def test_shards_respect_their_limit_and_the_index(tmp_path: Path) -> None:
    random_checkpoint.write(shrunken("8B"), tmp_path / "out", shard_bytes=200_000)
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    paths = sorted((tmp_path / "out").glob("*.safetensors"))
    found: dict[str, str] = {}
    for path in paths:
        with safe_open(path, "np") as file:
            found |= dict.fromkeys(file.keys(), path.name)
    assert len(paths) > 2
    assert max(path.stat().st_size for path in paths) < 210_000
    assert found == index["weight_map"]
    Checkpoint(tmp_path / "out")


@pytest.mark.parametrize("name", IDS)
def test_tokenizer_has_the_real_size_and_special_ids(name: str) -> None:
    files = variants.json_files(variants.VARIANTS[name])
    tokenizer = tokenizers.Tokenizer.from_str(json.dumps(files["tokenizer.json"]))
    assert tokenizer.get_vocab_size() == variants.VARIANTS[name].vocab_size - variants.VARIANTS[name].padding
    assert {token: tokenizer.token_to_id(token) for token in IDS[name]} == IDS[name]
    text = "<img><IMG_CONTEXT></img> 你好 🙂 é\n"
    ids = tokenizer.encode(text).ids
    start = [1] if name == "8B" else []
    assert ids[: len(start) + 3] == start + [IDS[name][token] for token in ("<img>", "<IMG_CONTEXT>", "</img>")]
    assert tokenizer.decode(ids) == " 你好 🙂 é\n"
    assert tokenizer.decode([40_000, 80_000]).strip()


def test_an_interrupted_run_leaves_nothing(tmp_path: Path) -> None:
    def interrupt(size: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        random_checkpoint.write(shrunken("1B"), tmp_path / "out", advance=interrupt)
    assert not list(tmp_path.iterdir())


def test_a_full_disk_is_refused_before_anything_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1000))
    with pytest.raises(EdgeError, match="free"):
        random_checkpoint.write(shrunken("1B"), tmp_path / "out")
    assert not list(tmp_path.iterdir())


def run_script(*arguments: str) -> subprocess.CompletedProcess[str]:
    script = [sys.executable, str(BENCHMARKS / "random_checkpoint.py"), *arguments]
    return subprocess.run(script, capture_output=True, text=True, check=False)


@pytest.mark.parametrize(("arguments", "named"), [(["9B", "out"], "9B"), (["1B"], "OUT"), (["1B", __file__], __file__)])
def test_a_user_mistake_is_one_line_and_status_2(arguments: list[str], named: str) -> None:
    done = run_script(*arguments)
    assert done.returncode == 2
    assert named in done.stderr
    assert len(done.stderr.splitlines()) == 1


@pytest.mark.slow
def test_the_command_writes_a_whole_checkpoint(tmp_path: Path) -> None:
    done = run_script("1B", str(tmp_path / "out"), "--layers", "1")
    assert done.returncode == 0, done.stderr
    config: dict[str, Any] = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["llm_config"]["num_hidden_layers"] == config["vision_config"]["num_hidden_layers"] == 1
    Checkpoint(tmp_path / "out")
