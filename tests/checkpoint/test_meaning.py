"""Checkpoints that could mean two things, or another thing than is read, are refused with both named, or read right."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from helpers import tiny
from internvl_edge.base.errors import CheckpointError
from internvl_edge.checkpoint.config_reader import read_config
from internvl_edge.checkpoint.reader import Checkpoint
from internvl_edge.checkpoint.tokenizer_files import build_tokenizer

HEAD, TABLE = "language_model.lm_head.weight", "language_model.model.embed_tokens.weight"


def refusal(action: Callable[[], object]) -> str:
    with pytest.raises(CheckpointError) as raised:
        action()
    assert "\n" not in str(raised.value)
    return str(raised.value)


def rewrite(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    values = json.loads(path.read_text(encoding="utf-8"))
    change(values)
    path.write_text(json.dumps(values), encoding="utf-8")


def rename(folder: Path, change: Callable[[str], str]) -> None:
    tensors = {change(name): tensor for name, tensor in load_file(folder / "model.safetensors").items()}
    save_file(tensors, folder / "model.safetensors")


# Two sources of weights


@pytest.mark.parametrize("suffix", ["safetensors", "bin"])
def test_one_file_beside_an_index_is_an_error_that_names_both(tmp_path: Path, suffix: str) -> None:
    folder = tiny.write_checkpoint(tmp_path / "a", shards=2, file_format=suffix)
    single = {"safetensors": "model.safetensors", "bin": "pytorch_model.bin"}[suffix]
    other = tiny.write_checkpoint(tmp_path / "b", seed=1, file_format=suffix)
    shutil.copy(other / single, folder / single)
    message = refusal(lambda: Checkpoint(folder))
    assert f"two sources of weights, {single}.index.json and {single}" in message
    (folder / f"{single}.index.json").unlink()  # the shards are still there
    assert f"two sources of weights, {single} and " in refusal(lambda: Checkpoint(folder))
    for shard in folder.glob("*-of-*"):
        shard.unlink()
    Checkpoint(folder)


@pytest.mark.parametrize("shard", ["a" * 300, "\u56fe" * 100, "../x", ".", "", "\0"], ids=len)
def test_a_shard_that_cannot_be_a_file_is_one_line(tmp_path: Path, shard: str) -> None:
    folder = tiny.write_checkpoint(tmp_path / "a", shards=2)
    index = folder / "model.safetensors.index.json"
    rewrite(index, lambda values: values["weight_map"].update(more=shard))
    assert "names the shard" in refusal(lambda: Checkpoint(folder))


def test_shards_that_the_index_does_not_name_are_a_second_source(tmp_path: Path) -> None:
    folder = tiny.write_checkpoint(tmp_path / "a", shards=2)
    shutil.copy(folder / "model-00001-of-00002.safetensors", folder / "model-00001-of-00003.safetensors")
    assert "model-00001-of-00003.safetensors" in refusal(lambda: Checkpoint(folder))


def test_an_index_may_name_the_one_file_and_bin_may_lie_beside_safetensors(tmp_path: Path) -> None:
    folder = tiny.write_checkpoint(tmp_path / "a")
    names = load_file(folder / "model.safetensors")
    index = {"weight_map": dict.fromkeys(names, "model.safetensors")}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    other = tiny.write_checkpoint(tmp_path / "b", seed=1, file_format="bin")
    shutil.copy(other / "pytorch_model.bin", folder / "pytorch_model.bin")
    assert torch.equal(torch.from_numpy(Checkpoint(folder).tensor("decoder.norm.weight").astype("f4")),
                       names["language_model.model.norm.weight"].float())  # fmt: skip


@pytest.mark.parametrize(
    "index",
    ["[]", "{}", '{"weight_map": []}', '{"weight_map": {}}', '{"weight_map": {"a": 1}}', '{"weight_map": {"a": ""}}',
     '{"weight_map": {"a": ".."}}', '{"weight_map": {"a": "../x"}}', '{"weight_map": {"a": "\\u0000"}}',
     '{"weight_map": {"a": "b", "a": "c"}}', "NaN", "[" * 9000],
)  # fmt: skip
def test_a_damaged_index_is_one_line(tmp_path: Path, index: str) -> None:
    folder = tiny.write_checkpoint(tmp_path / "a")
    (folder / "model.safetensors.index.json").write_text(index)
    assert "model.safetensors.index.json" in refusal(lambda: Checkpoint(folder))


# Tiles


def test_without_dynamic_sizes_an_image_is_one_tile(tmp_path: Path) -> None:
    for choice, expected in ((True, (1, 12, True)), (False, (1, 1, False))):
        config = read_config(tiny.write_checkpoint(tmp_path / str(choice), config={"dynamic_image_size": choice}))
        assert (config.min_tiles, config.max_tiles, config.use_thumbnail) == expected


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"pad2square": True}, "pad2square is true"),
        ({"pad2square": 1}, "pad2square is 1, expected true or false"),
        ({"dynamic_image_size": None}, "dynamic_image_size is None"),
        ({"dynamic_image_size": "no"}, "dynamic_image_size is 'no'"),
        ({"min_dynamic_patch": 7, "max_dynamic_patch": 6}, "min_dynamic_patch is 7, more than max_dynamic_patch"),
        ({"max_dynamic_patch": 129}, "max_dynamic_patch is 129, expected a whole number from 1 to 128"),
        ({"max_dynamic_patch": 6.5}, "max_dynamic_patch is 6.5"),
        ({"system_message": 3}, "system_message is 3"),
        ({"select_layer": -1.5}, "select_layer is -1.5"),
        ({"select_layer": True}, "select_layer is True"),
        ({"select_layer": 10**9}, "select_layer 1000000000 lies outside"),
    ],
)
def test_settings_of_the_remote_layout_are_read_or_refused(
    tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    folder = tiny.write_checkpoint(tmp_path / "a", config=changes)
    assert message in refusal(lambda: read_config(folder))


@pytest.mark.parametrize("transformers", [4, 5])
def test_the_native_layout_reads_the_limits_of_its_image_processor(tmp_path: Path, transformers: int) -> None:
    folder = tiny.write_checkpoint(tmp_path / "a", layout="native", transformers=transformers)
    path = folder / ("processor_config.json" if transformers == 5 else "preprocessor_config.json")

    def limits(**changes: Any) -> tuple[int, int]:
        rewrite(path, lambda values: values.get("image_processor", values).update(changes))
        config = read_config(folder)
        return config.min_tiles, config.max_tiles

    assert limits() == (1, 12)
    assert limits(max_patches=1) == (1, 1)
    assert limits(min_patches=2, max_patches=6.0) == (2, 6)
    assert limits(min_patches=None, max_patches=None) == (1, 12)
    # InternVLProcessor passes True over the file's value, which published checkpoints have as false.
    assert limits(crop_to_patches=False, max_patches=4) == (1, 4)
    path.unlink()
    config = read_config(folder)
    assert (config.min_tiles, config.max_tiles) == (1, 12)


def test_the_nested_image_processor_wins_over_the_older_file(tmp_path: Path) -> None:
    folder = tiny.write_checkpoint(tmp_path / "a", layout="native")
    (folder / "preprocessor_config.json").write_text('{"max_patches": 3}')
    assert read_config(folder).max_tiles == 12
    (folder / "processor_config.json").write_text('{"processor_class": "InternVLProcessor"}')
    assert read_config(folder).max_tiles == 3


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"max_patches": 0}, "image_processor.max_patches is 0"),
        ({"max_patches": 1000}, "image_processor.max_patches is 1000"),
        ({"min_patches": 9, "max_patches": 8}, "image_processor.min_patches is 9, more than max_patches"),
        ({"crop_to_patches": "yes"}, "image_processor.crop_to_patches is 'yes'"),
        ({"image_mean": [0.48145466, 0.4578275, 0.40821073]}, "image_processor.image_mean is [0.48"),
        ({"image_std": 0.5}, "image_processor.image_std is 0.5"),
        ({"do_normalize": False}, "image_processor.do_normalize is False"),
        ({"resample": 2}, "image_processor.resample is 2"),
        ({"size": {"height": 448, "width": 448}}, "image_processor.size is"),
    ],
)
def test_an_image_processor_that_makes_other_tiles_is_refused(
    tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    folder = tiny.write_checkpoint(tmp_path / "a", layout="native")
    rewrite(folder / "processor_config.json", lambda values: values["image_processor"].update(changes))
    found = refusal(lambda: read_config(folder))
    assert found.startswith("processor_config.json: ")
    assert message in found


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"layer_types": ["full_attention", "sliding_attention"]}, "layer_types"),
        ({"rope_parameters": {"rope_theta": 1e6, "partial_rotary_factor": 0.5}}, "partial_rotary_factor is 0.5"),
        ({"rope_parameters": {"rope_theta": 1e6, "rope_type": "dynamic", "factor": 0.5}}, "factor is 0.5"),
        ({"rope_parameters": "default"}, "rope_parameters is 'default', expected an object"),
    ],
)
def test_attention_that_is_not_computed_is_refused(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    folder = tiny.write_checkpoint(tmp_path / "a", layout="native")
    rewrite(folder / "config.json", lambda values: values["text_config"].update(changes))
    assert message in refusal(lambda: read_config(folder))


# LoRA


@pytest.mark.parametrize("file", ["adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"])
@pytest.mark.parametrize("alone", [True, False])
def test_the_folder_of_an_adapter_says_merge_it_first(tmp_path: Path, file: str, alone: bool) -> None:
    folder = tmp_path / "a"
    if alone:
        folder.mkdir()
    else:
        tiny.write_checkpoint(folder)
    (folder / file).write_text("{}")
    message = refusal(lambda: Checkpoint(folder))
    assert f"LoRA adapter ({file})" in message
    assert "merge it first: merge_and_unload()" in message


@pytest.mark.parametrize(
    "change",
    [
        lambda name: name.replace("language_model.model", "language_model.base_model.model.model"),
        lambda name: f"base_model.model.{name}",
        lambda name: name.replace("q_proj.weight", "q_proj.base_layer.weight"),
        lambda name: name.replace("q_proj.weight", "q_proj.lora_A.default.weight"),
        lambda name: name.replace("q_proj.weight", "q_proj.lora_B.weight"),
        lambda name: name.replace("embed_tokens.weight", "embed_tokens.lora_embedding_A"),
        lambda name: name.replace("q_proj.weight", "q_proj.lora_magnitude_vector.default.weight"),
        lambda name: name.replace("lm_head.", "lm_head.modules_to_save.default."),
    ],
)
def test_names_of_an_adapter_say_merge_it_first(tmp_path: Path, change: Callable[[str], str]) -> None:
    folder = tiny.write_checkpoint(tmp_path / "a")
    rename(folder, change)
    message = refusal(lambda: Checkpoint(folder))
    assert "LoRA" in message
    assert "merge it first" in message


# Advice that helps


def test_a_head_that_is_not_stored_names_the_field(tmp_path: Path) -> None:
    folder = tiny.write_checkpoint(tmp_path / "a")
    tensors = load_file(folder / "model.safetensors")
    head = tensors.pop(HEAD)
    save_file(tensors, folder / "model.safetensors")
    message = refusal(lambda: Checkpoint(folder))
    assert f"tensor {HEAD} is missing" in message
    assert "tie_word_embeddings" in message
    assert f"store a copy of {TABLE} under this name" in message
    assert "download" not in message
    save_file(tensors | {HEAD: head}, folder / "model.safetensors")
    Checkpoint(folder)


def test_an_untied_native_head_that_is_not_stored_names_the_field(tmp_path: Path) -> None:
    folder = tiny.write_checkpoint(tmp_path / "a", layout="native")
    tensors = load_file(folder / "model.safetensors")
    del tensors[HEAD]
    save_file(tensors, folder / "model.safetensors")
    assert "tie_word_embeddings false" in refusal(lambda: Checkpoint(folder))


POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:" + "0" * 64 + "\nsize 123456\n"


@pytest.mark.parametrize(
    ("choices", "file"),
    [
        ({}, "model.safetensors"),
        ({"shards": 2}, "model-00002-of-00002.safetensors"),
        ({"shards": 2}, "model.safetensors.index.json"),
        ({"file_format": "bin"}, "pytorch_model.bin"),
        ({}, "config.json"),
        ({}, "vocab.json"),
        ({}, "merges.txt"),
        ({}, "tokenizer_config.json"),
        ({"text": "internlm2"}, "tokenizer.model"),
        ({"layout": "native"}, "tokenizer.json"),
        ({"layout": "native"}, "processor_config.json"),
    ],
)
def test_pointers_of_git_lfs_are_called_so(tmp_path: Path, choices: dict[str, Any], file: str) -> None:
    folder = tiny.write_checkpoint(tmp_path / "a", **choices)
    (folder / file).write_text(POINTER)
    message = refusal(lambda: build_tokenizer(folder, Checkpoint(folder).config))
    assert f"{folder / file} is a pointer of Git LFS" in message
    assert "git lfs pull" in message
