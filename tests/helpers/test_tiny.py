"""Check the tiny checkpoints: all layouts hold the same model, all parts affect its logits, and the tokenizers work."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sentencepiece
import tokenizers
import torch
from safetensors import safe_open

from helpers.reference import Reference
from helpers.tiny import write_checkpoint

IDS = [5, 9, 260, 31, 7, 300, 12, 44, 260, 3]
KINDS: dict[str, dict[str, Any]] = {
    "qwen2": {},
    "internlm2": {"text": "internlm2"},
    "internlm2 bias": {"text": "internlm2", "bias": True},
    "native": {"layout": "native"},
    "native llama": {"layout": "native", "text": "llama"},
    "native tied": {"layout": "native_prefixed", "tie": True},
    "6b": {"vision": "6b", "text": "internlm2", "vision_hidden_size": 96, "vision_num_attention_heads": 6},
    "6b native": {"vision": "6b", "layout": "native", "transformers": 4},
    "wide": {"hidden_size": 128, "intermediate_size": 256, "num_attention_heads": 8, "vision_num_hidden_layers": 3},
}


def random_tiles(count: int, size: int = 56) -> np.ndarray:
    return np.random.default_rng(1).integers(0, 256, (count, size, size, 3), dtype=np.uint8)


def image_prompt(reference: Reference, tiles: int, tokens_per_tile: int = 4) -> list[int]:
    image_token = reference.image_token_id()
    return [*IDS[:4], *[image_token] * (tiles * tokens_per_tile), *IDS[4:]]


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_runs_with_sensible_scales(tmp_path: Path, kind: str) -> None:
    reference = Reference(write_checkpoint(tmp_path, **KINDS[kind]))
    features = reference.extract_feature(random_tiles(2))
    logits = reference.logits(image_prompt(reference, 2), random_tiles(2))
    assert features.shape[:2] == (2, 4)
    assert 0.5 < features.std() < 2
    assert 0.9 < logits.std() < 2.2


SAME: list[tuple[dict[str, Any], dict[str, Any]]] = [
    ({}, {"layout": "native"}),
    ({}, {"layout": "native_prefixed", "transformers": 4}),
    ({}, {"shards": 3}),
    ({}, {"file_format": "bin", "shards": 2}),
    ({"vision": "6b"}, {"vision": "6b", "layout": "native"}),
    ({"text": "internlm2"}, {"text": "llama", "layout": "native"}),
    ({"text": "internlm2", "bias": True}, {"text": "llama", "bias": True, "layout": "native_prefixed"}),
    *[
        (
            {"text": "internlm2", "max_position_embeddings": 8, "rope_scaling": scaling},
            {"text": "llama", "layout": "native", "transformers": version}
            | {"max_position_embeddings": 8, "rope_scaling": scaling},
        )
        for version in (4, 5)
        for scaling in ({"type": "dynamic", "factor": 2.0}, {"type": "linear", "factor": 4.0})
    ],
]


@pytest.mark.parametrize(("first", "second"), SAME)
def test_the_same_seed_is_the_same_model_in_another_layout(
    tmp_path: Path, first: dict[str, Any], second: dict[str, Any]
) -> None:
    a, b = (Reference(write_checkpoint(tmp_path / name, **kind)) for name, kind in (("a", first), ("b", second)))
    torch.testing.assert_close(a.extract_feature(random_tiles(2)), b.extract_feature(random_tiles(2)))
    steps_a, steps_b = (model.generate(IDS, forced=[4, 8, 15]).step_logits for model in (a, b))
    common = min(steps_a.shape[1], steps_b.shape[1])
    torch.testing.assert_close(steps_a[:, :common], steps_b[:, :common])


def test_another_seed_is_another_model(tmp_path: Path) -> None:
    a, b = (Reference(write_checkpoint(tmp_path / str(seed), seed=seed)) for seed in (0, 1))
    assert (a.logits(IDS) - b.logits(IDS)).abs().max() > 1


def test_shards_and_their_index_agree(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, shards=3)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    found: dict[str, str] = {}
    size = 0
    for path in sorted(tmp_path.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            found |= dict.fromkeys(file.keys(), path.name)
            size += sum(file.get_tensor(name).nbytes for name in file.keys())  # noqa: SIM118 - no dict
    assert len(set(found.values())) == 3
    assert found == index["weight_map"]
    assert size == index["metadata"]["total_size"]


def test_select_layer_counts_back_from_the_last_block(tmp_path: Path) -> None:
    whole = Reference(write_checkpoint(tmp_path / "whole", vision_num_hidden_layers=3))
    earlier = Reference(write_checkpoint(tmp_path / "earlier", vision_num_hidden_layers=3, select_layer=-2))
    whole.numbers.vision_layers = 2
    torch.testing.assert_close(whole.extract_feature(random_tiles(1)), earlier.extract_feature(random_tiles(1)))


def test_pixel_shuffle_v1_is_v2_with_rows_and_columns_of_tokens_exchanged(tmp_path: Path) -> None:
    v1, v2 = (Reference(write_checkpoint(tmp_path / version, ps_version=version)) for version in ("v1", "v2"))
    a, b = (model.extract_feature(random_tiles(2)).reshape(2, 2, 2, -1) for model in (v1, v2))
    torch.testing.assert_close(a.transpose(1, 2), b)
    assert (a - b).abs().max() > 0.1


DYNAMIC = {"text": "internlm2", "max_position_embeddings": 12, "rope_scaling": {"type": "dynamic", "factor": 2.0}}


def test_dynamic_ntk_starts_past_the_maximum_and_keeps_cached_rotations(tmp_path: Path) -> None:
    scaled = Reference(write_checkpoint(tmp_path / "scaled", **DYNAMIC))
    plain = Reference(write_checkpoint(tmp_path / "plain", **DYNAMIC | {"rope_scaling": None}))
    new = [4, 8, 15, 16, 23]
    steps, unscaled = (model.generate(IDS, forced=new).step_logits for model in (scaled, plain))
    # 10 prompt tokens: the third step is the first that sees 13 positions.
    torch.testing.assert_close(steps[:3], unscaled[:3])
    assert ((steps[3:] - unscaled[3:]).abs().amax(-1) > 1e-3).all()
    uncached = torch.stack([scaled.logits(IDS + new[:count])[-1] for count in range(5)])
    torch.testing.assert_close(steps[:3], uncached[:3])
    assert ((steps[3:] - uncached[3:]).abs().amax(-1) > 1e-3).all()


def test_a_long_request_leaves_nothing_behind(tmp_path: Path) -> None:
    reference = Reference(write_checkpoint(tmp_path, **DYNAMIC))
    fresh = reference.generate(IDS, max_new_tokens=6)
    reference.generate(IDS * 4, max_new_tokens=2)
    again = reference.generate(IDS, max_new_tokens=6)
    assert torch.equal(fresh.step_logits, again.step_logits)


def test_cached_decoding_equals_one_forward_without_scaling(tmp_path: Path) -> None:
    reference = Reference(write_checkpoint(tmp_path))
    prompt = image_prompt(reference, 2)
    made = reference.generate(prompt, random_tiles(2), max_new_tokens=5)
    logits = reference.logits(prompt + made.ids[:-1], random_tiles(2))
    torch.testing.assert_close(made.step_logits, logits[len(prompt) - 1 :], rtol=1e-4, atol=1e-5)


def test_qwen2_files_make_a_working_tokenizer(tmp_path: Path) -> None:
    write_checkpoint(tmp_path)
    model = tokenizers.models.BPE.from_file(str(tmp_path / "vocab.json"), str(tmp_path / "merges.txt"))
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    text = "Hello world, the picture 你好 🙂\n"
    ids = tokenizer.encode(text).ids
    assert tokenizer.decode(ids) == text
    assert len(ids) < len(text.encode()) * 2 / 3
    added = json.loads((tmp_path / "added_tokens.json").read_text())
    config = json.loads((tmp_path / "config.json").read_text())
    assert sorted(added.values()) == list(range(tokenizer.get_vocab_size(), config["llm_config"]["vocab_size"]))


def test_native_tokenizer_json_knows_the_image_token(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, layout="native")
    tokenizer = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    config = json.loads((tmp_path / "config.json").read_text())
    assert tokenizer.encode("<IMG_CONTEXT>").ids == [config["image_token_id"]]
    assert tokenizer.get_vocab_size() == config["text_config"]["vocab_size"]
    assert tokenizer.decode(tokenizer.encode(" the total é\n").ids) == " the total é\n"


def test_internlm2_sentencepiece_model_has_the_quirks_of_the_real_one(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, text="internlm2")
    model = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "tokenizer.model"))
    text = "  Hello world\n 你好 🙂 the total"
    ids = model.encode(text)
    assert model.decode(ids) == text
    assert any(model.is_byte(i) for i in ids)
    assert model.encode("Hello")[0] != model.encode(" Hello")[0]
    assert "\0" in [model.id_to_piece(i) for i in range(len(model))]
    added = json.loads((tmp_path / "added_tokens.json").read_text())
    decoder = json.loads((tmp_path / "tokenizer_config.json").read_text())["added_tokens_decoder"]
    named = {entry["content"]: int(i) for i, entry in decoder.items()}
    assert model.id_to_piece(named["<|im_end|>"]) == "[UNUSED_TOKEN_145]"
    assert min(added.values()) == len(model)
    assert model.encode("the")[0] == model.piece_to_id("the")


def test_a_combination_that_does_not_exist_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="llama"):
        write_checkpoint(tmp_path, text="llama")
