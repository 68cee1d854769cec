"""Checkpoints as training programs leave them: what is a model is read, and what is none yet says how it becomes one.

The folders are written here with the files and names of InternVL's own scripts, ms-swift, LLaMA-Factory, DeepSpeed and
the Trainer of transformers; the weights are those of tiny checkpoints.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from helpers.reference import Reference
from helpers.tiny import write_checkpoint
from internvl_edge import InternVL, export_bundle, quantize_checkpoint
from internvl_edge.base.errors import CheckpointError
from internvl_edge.checkpoint.config_reader import read_config
from internvl_edge.checkpoint.reader import Checkpoint
from internvl_edge.recipe.recipe import Recipe

WEIGHTS = "model.safetensors"


def edit(folder: Path, name: str, change: Callable[[dict[str, Any]], Any]) -> None:
    values = json.loads((folder / name).read_text(encoding="utf-8"))
    change(values)
    (folder / name).write_text(json.dumps(values), encoding="utf-8")


def change_weights(folder: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    weights = load_file(folder / WEIGHTS)
    change(weights)
    save_file(weights, folder / WEIGHTS, {"format": "pt"})


def trained(folder: Path) -> Path:
    """What the Trainer and DeepSpeed put beside the weights of `checkpoint-500`. None of it may be read."""
    for name in ("optimizer.pt", "scheduler.pt", "rng_state_0.pth", "training_args.bin"):
        (folder / name).write_bytes(b"\x80 a pickle that must never be opened")
    (folder / "trainer_state.json").write_text('{"log_history": [{"loss": NaN}]}')
    (folder / "latest").write_text("global_step500")
    (folder / "zero_to_fp32.py").write_text("raise SystemExit")
    (folder / "global_step500").mkdir()
    (folder / "global_step500" / "mp_rank_00_model_states.pt").write_bytes(b"\x80")
    return folder


def merged_by_internvl(folder: Path) -> Path:
    """tools/merge_lora.py: the layout stays, and the configuration has what the training wrote into it."""
    write_checkpoint(folder, text="internlm2", template="internlm2-chat", shards=3)
    edit(folder, "config.json", lambda values: values.update(max_dynamic_patch=6, system_message="Read the form."))
    return trained(folder)


def merged_by_swift(folder: Path) -> Path:
    """swift export --merge_lora: args.json and the code beside the model; weights in float16 here."""
    write_checkpoint(folder, text="qwen3", head_dim=32, padding_rows=5, shards=2, dtype="float16")
    (folder / "args.json").write_text('{"model_type": "internvl3_5", "torch_dtype": "float16", "system": null}')
    (folder / "modeling_internvl_chat.py").write_text("raise SystemExit")
    return folder


def exported_by_llama_factory(folder: Path) -> Path:
    """llamafactory-cli export of a native model: transformers' names with their prefix, and a file for ollama."""
    write_checkpoint(
        folder, text="qwen3", head_dim=32, layout="native_prefixed", tie=True, transformers=4, dtype="float32"
    )
    (folder / "Modelfile").write_text("FROM .\n")
    return folder


@pytest.mark.parametrize("made", [merged_by_internvl, merged_by_swift, exported_by_llama_factory])
def test_a_merged_model_is_read_as_any_other(tmp_path: Path, made: Callable[[Path], Path]) -> None:
    folder = made(tmp_path / "checkpoint-500-merged")
    reference = Reference(folder)
    with InternVL.load(export_bundle(folder, tmp_path / "bundle", dtype="float32"), context=512, threads=1) as model:
        reply = model.chat("Hello world", max_new_tokens=8)
    assert (
        reply.output_ids == reference.generate(reply.prompt_ids, max_new_tokens=8, stop_ids=(reply.output_ids[-1],)).ids
    )
    quantize_checkpoint(folder, tmp_path / "small", Recipe("w4a16-rtn", group_size=32))
    assert Checkpoint(tmp_path / "small").schemes
    left = {path.name for path in (tmp_path / "small").iterdir()}
    assert not left & {"optimizer.pt", "training_args.bin", "rng_state_0.pth", "global_step500"}


def test_the_settings_of_a_fine_tune_are_those_of_its_file(tmp_path: Path) -> None:
    config = read_config(merged_by_internvl(tmp_path / "merged"))
    assert (config.max_tiles, config.system_message, config.template) == (6, "Read the form.", "internlm2-chat")


def test_added_tokens_have_rows_of_their_own(tmp_path: Path) -> None:
    """`resize_token_embeddings` and a new special token: both are part of the bundle."""
    folder = write_checkpoint(tmp_path / "resized", text="qwen3", padding_rows=0)
    rows = read_config(folder).decoder.vocab_size

    def grow(weights: dict[str, torch.Tensor]) -> None:
        for name in ("language_model.model.embed_tokens.weight", "language_model.lm_head.weight"):
            weights[name] = torch.cat([weights[name], weights[name][-1:]])

    change_weights(folder, grow)
    token = {"content": "<field>", "lstrip": False, "normalized": False, "rstrip": False, "single_word": False}
    with pytest.raises(CheckpointError, match=f"if the vocabulary was resized, vocab_size there should be {rows + 1}"):
        Checkpoint(folder)
    edit(folder, "config.json", lambda values: values["llm_config"].update(vocab_size=rows + 1))
    edit(folder, "added_tokens.json", lambda values: values.update({"<field>": rows}))
    edit(
        folder,
        "tokenizer_config.json",
        lambda values: values["added_tokens_decoder"].update({str(rows): token | {"special": True}}),
    )
    with InternVL.load(export_bundle(folder, tmp_path / "bundle"), context=512, threads=1) as model:
        reply = model.chat("Hello <field>", max_new_tokens=1)
        assert rows in reply.prompt_ids
        assert model.chat("Hello", max_new_tokens=1, logit_bias={rows: 100.0}).output_ids == [rows]


@pytest.mark.parametrize("name", ["v_head.summary.weight", "score.weight", "language_model.value_head.bias"])
def test_heads_of_other_tasks_are_named_and_refused(tmp_path: Path, name: str) -> None:
    folder = write_checkpoint(tmp_path / "rewards")
    change_weights(folder, lambda weights: weights.update({name: torch.zeros(1, 64)}))
    with pytest.raises(CheckpointError, match=f"{name} is of a head for rewards, values or classes") as raised:
        Checkpoint(folder)
    assert len(str(raised.value)) <= 400


def test_the_folder_of_a_run_names_its_last_checkpoint(tmp_path: Path) -> None:
    for step in (500, 1000, 90):
        trained(write_checkpoint(tmp_path / "run" / f"checkpoint-{step}"))
    with pytest.raises(
        CheckpointError, match=r"folder of a training run; give one of its checkpoints, such as .*-1000$"
    ):
        read_config(tmp_path / "run")


def test_weights_in_parts_say_how_they_are_put_together(tmp_path: Path) -> None:
    folder = trained(write_checkpoint(tmp_path / "deepspeed"))
    (folder / WEIGHTS).unlink()
    with pytest.raises(CheckpointError, match=r"run zero_to_fp32\.py of that folder with --safe_serialization"):
        Checkpoint(folder)
    shutil.rmtree(folder / "global_step500")
    (folder / "pytorch_model_fsdp_0").mkdir()
    (folder / "pytorch_model_fsdp_0" / "__0_0.distcp").write_bytes(b"")
    with pytest.raises(CheckpointError, match="merge it with `accelerate merge-weights`"):
        Checkpoint(folder)


def test_a_bin_file_of_tensors_is_read_and_one_with_code_is_not(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "bin", file_format="bin", shards=2, text="qwen3", head_dim=32)
    twin = write_checkpoint(tmp_path / "safetensors", text="qwen3", head_dim=32)
    name = "decoder.layers.0.self_attn.q_norm.weight"
    assert np.array_equal(Checkpoint(folder).tensor(name), Checkpoint(twin).tensor(name))
    whole = tmp_path / "code"
    shutil.copytree(twin, whole, ignore=shutil.ignore_patterns("*.safetensors"))
    torch.save({"weights": Recipe("w8a16")}, whole / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="cannot be read without running its code"):
        Checkpoint(whole)


def test_a_template_with_a_system_text_of_its_own_says_what_to_do(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "native", layout="native")
    (folder / "chat_template.jinja").write_text(
        "{% set system = 'Read.' %}{{ '<|im_start|>system\n' + system + '<|im_end|>\n' }}<IMG_CONTEXT>"
    )
    with pytest.raises(CheckpointError, match=r"give the text when you ask \(--system\)") as raised:
        export_bundle(folder, tmp_path / "bundle")
    assert len(str(raised.value)) <= 400
