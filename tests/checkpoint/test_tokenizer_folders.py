"""Which tokenizer a folder means where its files are of two ages; files that are no tokenizer; what ends an answer."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer

from helpers import tiny
from helpers.parsers import TokenizerFiles, outcomes
from internvl_edge.base.errors import CheckpointError
from internvl_edge.checkpoint.config_reader import read_config
from internvl_edge.checkpoint.tokenizer_files import build_tokenizer, end_tokens, token_ids


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A remote Qwen2 checkpoint whose embedding has room for added tokens."""
    folder = tiny.write_checkpoint(tmp_path / "checkpoint")
    rewrite(folder / "config.json", lambda values: values["llm_config"].update(vocab_size=1024))
    return folder


def rewrite(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    values = json.loads(path.read_text(encoding="utf-8"))
    change(values)
    path.write_text(json.dumps(values), encoding="utf-8")


def build(folder: Path) -> Tokenizer:
    return Tokenizer.from_buffer(build_tokenizer(folder, read_config(folder)))


def refusal(folder: Path) -> str:
    with pytest.raises(CheckpointError) as raised:
        build(folder)
    assert "\n" not in str(raised.value)
    assert len(str(raised.value)) <= 400
    return str(raised.value)


def write_fast(folder: Path, *more: str) -> int:
    """Write the tokenizer.json of a folder's slow files, with more tokens; returns the first new id."""
    values = json.loads(build_tokenizer(folder, read_config(folder)))
    first = max(token["id"] for token in values["added_tokens"]) + 1
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized", "special"), False)
    values["added_tokens"] += [{"id": first + index, "content": text, **flags} for index, text in enumerate(more)]
    (folder / "tokenizer.json").write_text(json.dumps(values), encoding="utf-8")
    return first


def saved_by_version_5(folder: Path, *more: str) -> int:
    """What transformers 5 leaves over a folder of version 4: tokenizer.json, tokenizer_config.json without a table."""
    first = write_fast(folder, *more)
    rewrite(folder / "tokenizer_config.json", lambda values: values.pop("added_tokens_decoder"))
    return first


# Two ages


@pytest.mark.parametrize("marked", [True, False])
def test_a_tokenizer_saved_by_version_5_over_an_older_folder_is_the_newer_one(folder: Path, marked: bool) -> None:
    first = saved_by_version_5(folder, "<loc0>", "<loc1>")
    if marked:
        rewrite(folder / "tokenizer_config.json", lambda values: values.update(backend="tokenizers"))
    assert build(folder).encode("a<loc1>").ids[-1] == first + 1


@pytest.mark.parametrize(
    "gone", [("added_tokens.json", "special_tokens_map.json"), ("vocab.json",), ("added_tokens.json", "vocab.json"),
             ("merges.txt",), ("vocab.json", "merges.txt", "added_tokens.json", "special_tokens_map.json")],
)  # fmt: skip
def test_what_is_left_of_the_older_files_does_not_matter(folder: Path, gone: tuple[str, ...]) -> None:
    first = saved_by_version_5(folder, "<loc0>")
    for name in gone:
        (folder / name).unlink()
    assert build(folder).encode("<loc0>").ids == [first]


def test_files_of_one_age_agree_and_the_slow_ones_are_read_as_by_the_original(folder: Path) -> None:
    expected = build_tokenizer(folder, read_config(folder))
    write_fast(folder)
    assert build_tokenizer(folder, read_config(folder)) == expected


def test_a_slow_tokenizer_saved_over_an_older_tokenizer_json_is_the_newer_one(folder: Path) -> None:
    first = write_fast(folder)
    token = {"content": "<loc0>", **dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized", "special"), False)}
    rewrite(folder / "tokenizer_config.json", lambda values: values["added_tokens_decoder"].update({str(first): token}))
    rewrite(folder / "added_tokens.json", lambda values: values.update({"<loc0>": first}))
    assert build(folder).encode("<loc0>").ids == [first]


def test_files_of_which_none_is_the_newer_are_both_named(folder: Path) -> None:
    first = write_fast(folder, "<loc0>")  # tokenizer_config.json still has its table of added tokens
    message = refusal(folder)
    assert "tokenizer.json and vocab.json" in message
    assert f"id {first}" in message


def test_sentencepiece_and_a_newer_tokenizer_json(tmp_path: Path) -> None:
    folder = tiny.write_checkpoint(tmp_path / "a", text="internlm2")
    rewrite(folder / "config.json", lambda values: values["llm_config"].update(vocab_size=1024))
    expected = build_tokenizer(folder, read_config(folder))
    write_fast(folder)
    assert build_tokenizer(folder, read_config(folder)) == expected
    (folder / "tokenizer.json").unlink()
    first = saved_by_version_5(folder, "<loc0>")
    assert build(folder).encode("<loc0>").ids[-1] == first


def test_an_added_token_of_sentencepiece_that_is_not_special_stands_for_itself(tmp_path: Path) -> None:
    folder = tiny.write_checkpoint(tmp_path / "a", text="internlm2")
    table = json.loads((folder / "tokenizer_config.json").read_text())["added_tokens_decoder"]
    last = max(table, key=int)
    rewrite(folder / "tokenizer_config.json", lambda values: values["added_tokens_decoder"][last].update(special=False))
    made = build(folder)
    assert made.decode([int(last)]) == table[last]["content"] == "</box>"


# The embedding


@pytest.mark.parametrize("choices", [{}, {"layout": "native"}, {"text": "internlm2"}])
def test_more_tokens_than_rows_are_refused(tmp_path: Path, choices: dict[str, Any]) -> None:
    folder = tiny.write_checkpoint(tmp_path / "a", **choices)
    rows = read_config(folder).decoder.vocab_size
    if choices.get("layout") == "native":
        (folder / "tokenizer.json").rename(folder / "old.json")
        values = json.loads((folder / "old.json").read_text())
        values["added_tokens"].append({**values["added_tokens"][-1], "id": rows, "content": "<loc0>"})
        (folder / "tokenizer.json").write_text(json.dumps(values))
    else:
        rewrite(folder / "added_tokens.json", lambda values: values.update({"<loc0>": rows}))
    message = refusal(folder)
    assert f"'<loc0>' has id {rows} but the embedding has {rows} rows" in message


# What ends an answer


@pytest.mark.parametrize(
    ("written", "expected"),
    [(5, (5,)), ([5, 7], (5, 7)), ([5, 5], (5,)), (None, ()), ([], ())],
)
def test_the_native_layout_ends_at_every_id_of_its_generation_config(
    tmp_path: Path, written: Any, expected: tuple[int, ...]
) -> None:
    folder = tiny.write_checkpoint(tmp_path / "a", layout="native")
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": written}))
    config = read_config(folder)
    tokenizer = build_tokenizer(folder, config)
    _, (end,) = token_ids(tokenizer)
    assert token_ids(tokenizer, end_tokens(folder, config))[1] == (end, *expected)


def test_without_a_generation_config_the_text_model_says_it(tmp_path: Path) -> None:
    folder = tiny.write_checkpoint(tmp_path / "a", layout="native")
    (folder / "generation_config.json").unlink()
    rewrite(folder / "config.json", lambda values: values["text_config"].update(eos_token_id=9))
    assert end_tokens(folder, read_config(folder)) == (9,)
    rewrite(folder / "config.json", lambda values: values["text_config"].pop("eos_token_id"))
    assert end_tokens(folder, read_config(folder)) == ()


def test_the_remote_layout_ends_as_the_original_at_one_id_alone(tmp_path: Path) -> None:
    folder = tiny.write_checkpoint(tmp_path / "a")
    assert len(json.loads((folder / "generation_config.json").read_text())["eos_token_id"]) == 2
    assert end_tokens(folder, read_config(folder)) == ()


@pytest.mark.parametrize("written", ["2", -1, 10**9, True, 2.0, {}, [[2]], ["<|im_end|>"], [None]])
def test_ends_that_are_no_tokens_are_refused(tmp_path: Path, written: Any) -> None:
    folder = tiny.write_checkpoint(tmp_path / "a", layout="native")
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": written}))
    with pytest.raises(CheckpointError, match=r"generation_config\.json: eos_token_id is .*, expected ids from 0"):
        end_tokens(folder, read_config(folder))


# Damage


def test_mutated_files_give_a_tokenizer_or_one_line() -> None:
    read = sum(line is None for _, _, line in outcomes(TokenizerFiles, 900))
    assert 90 < read < 800


def test_a_sentencepiece_model_whose_pieces_are_no_text_is_one_line(tmp_path: Path) -> None:
    folder = tiny.write_checkpoint(tmp_path / "checkpoint", text="internlm2")
    path = folder / "tokenizer.model"
    path.write_bytes(path.read_bytes().replace(b"<unk>", b"<un\xff>", 1))
    assert "piece 0 is not UTF-8" in refusal(folder)
