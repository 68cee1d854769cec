"""Ids and texts are those of the checkpoints' own tokenizers, from whatever files a checkpoint has."""

from __future__ import annotations

import dataclasses
import functools
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from internvl_edge.base.errors import BundleError, CheckpointError
from internvl_edge.checkpoint import sentencepiece_tokenizer
from internvl_edge.checkpoint.config_reader import read_config
from internvl_edge.checkpoint.tokenizer_files import build_tokenizer, token_ids
from internvl_edge.model.config import ModelConfig
from internvl_edge.model.prompt import build_prompt
from internvl_edge.model.template import template_for
from internvl_edge.model.tokenizer import Tokenizer

INTERNLM2, QWEN2, NATIVE = "internvl2_5-internlm2-tiny", "internvl2_5-qwen2-tiny", "internvl-hf-qwen2-tiny"
Load = Callable[[str], Tokenizer]


@pytest.fixture(scope="session")
def exported(oracle: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The exported `tokenizer.json` of a reference checkpoint, made once."""
    folder = tmp_path_factory.mktemp("tokenizers")

    def export(name: str) -> Path:
        path = folder / f"{name}.json"
        if not path.exists():
            checkpoint = oracle / name / "checkpoint"
            path.write_bytes(build_tokenizer(checkpoint, read_config(checkpoint)))
        return path

    return export


@pytest.fixture(scope="session")
def load(exported: Callable[[str], Path]) -> Load:
    """The same, opened as the runtime does."""
    return functools.cache(lambda name: Tokenizer(exported(name)))


def goldens(oracle: Path, name: str) -> dict[str, Any]:
    values: dict[str, Any] = json.loads((oracle / "tokenizer_goldens.json").read_text())[f"public/{name}"]
    return values


# Against the originals


@pytest.mark.parametrize("name", [INTERNLM2, QWEN2])
def test_ids_and_texts_are_the_originals(oracle: Path, load: Load, name: str) -> None:
    tokenizer, expected = load(name), goldens(oracle, name)
    assert tokenizer.vocab_size == expected["len"]
    assert tokenizer.encode(expected["template_prompt_Hi"]) == expected["template_prompt_Hi_ids"]
    for token, token_id in expected["special"].items():
        assert tokenizer.token_id(token) == token_id
    for row in expected["rows"]:
        assert tokenizer.encode(row["text"]) == row["ids"]
        assert tokenizer.decode(row["ids"]) == row["decoded_skip_special"]


@pytest.mark.parametrize(("name", "start"), [(INTERNLM2, "<s>"), (QWEN2, "")])
def test_decoding_with_special_tokens_gives_the_text_back(oracle: Path, load: Load, name: str, start: str) -> None:
    """Stricter than the original InternLM2 class, which puts spaces of its own around special tokens."""
    for row in goldens(oracle, name)["rows"]:
        composed = row["decoded"] if name == QWEN2 else start + row["text"]
        assert load(name).decode(row["ids"], skip_special=False) == composed


@pytest.mark.parametrize("name", [INTERNLM2, QWEN2])
def test_replies_of_the_goldens_decode_to_their_text(oracle: Path, load: Load, name: str) -> None:
    for case in json.loads((oracle / name / "golden.json").read_text())["cases"]:
        replies = case["expected"]["response"]
        replies = [replies] if isinstance(replies, str) else replies
        for ids, reply in zip(case["expected"]["output_ids"], replies, strict=True):
            assert load(name).decode(ids).strip() == reply


@pytest.mark.parametrize("name", [INTERNLM2, QWEN2, NATIVE])
def test_prompts_have_the_originals_number_of_tokens(oracle: Path, load: Load, name: str) -> None:
    """Image items are written as marks; the native goldens' tiles are read off the compared total."""
    template = template_for("internvl_native" if name == NATIVE else "internvl2_5")
    native_tiles = {"multi": [1, 4], "tiled": [4], "text_only": []}
    for case in json.loads((oracle / name / "golden.json").read_text())["cases"]:
        if case.get("kind") == "batch_chat" or case["id"] == "system_history":
            continue
        question = case["question"] if name != NATIVE else case["messages"][-1]["content"][-1]["text"]
        tiles = native_tiles.get(case["id"], [1]) if name == NATIVE else case["expected"]["tiles_per_image"] or []
        if case.get("pass_num_patches_list") is None and len(tiles) > 1 and name != NATIVE:
            tiles = [sum(tiles)]
        history = [(asked, answer) for asked, answer in case.get("history") or []]
        prompt = build_prompt(template, question, tiles, tokens_per_tile=256, history=history)
        ids = load(name).encode(prompt)
        assert len(ids) == case["expected"]["n_prompt_tokens"], case["id"]
        assert ids.count(load(name).token_id("<IMG_CONTEXT>")) == 256 * sum(tiles)


def test_ids_by_role(oracle: Path, exported: Callable[[str], Path]) -> None:
    for name in (INTERNLM2, QWEN2):
        special = goldens(oracle, name)["special"]
        assert token_ids(exported(name).read_bytes()) == (special["<IMG_CONTEXT>"], (special["<|im_end|>"],))
    assert token_ids(exported(NATIVE).read_bytes()) == (4280, (4258,))


# Bytes


def test_broken_characters_decode_like_sentencepiece_and_like_python(oracle: Path, load: Load) -> None:
    import sentencepiece

    processor = sentencepiece.SentencePieceProcessor(str(oracle / INTERNLM2 / "checkpoint" / "tokenizer.model"))
    first_byte = processor.piece_to_id("<0x00>")
    internlm2, qwen2 = load(INTERNLM2), load(QWEN2)
    broken = (
        b"\xf0\x9f\x98\x80\xf0\x9f",
        b"\xff\xfe",
        b"a\xe4\xbdb",
        b"\xed\xa0\x80",
        b"\xc0\x80",
        b"\x80\xf0\x9f\x98",
    )
    for data in broken:
        ids = [first_byte + byte for byte in data]
        assert internlm2.decode(ids) == processor.decode(ids)
        by_bytes = {qwen2.token_bytes(token_id): token_id for token_id in range(256)}
        assert qwen2.decode(by_bytes[bytes([byte])] for byte in data) == data.decode(errors="replace")


def test_null_character_is_its_byte_and_its_unused_piece_still_decodes(load: Load) -> None:
    tokenizer = load(INTERNLM2)
    assert tokenizer.encode("a\0b") == [1, 264, 3, 260]
    assert tokenizer.decode([264, 3, 260]) == "a\0b"
    assert tokenizer.decode([354]) == "\0"


def test_ids_outside_the_vocabulary_are_nothing(oracle: Path, load: Load) -> None:
    hello, world = next(row["ids"] for row in goldens(oracle, QWEN2)["rows"] if row["text"] == "Hello world")
    assert load(QWEN2).decode([hello, 10**6, world]) == "Hello world"


def test_missing_token_is_named(load: Load) -> None:
    with pytest.raises(BundleError, match="<video>"):
        load(QWEN2).token_id("<video>")


def test_null_and_placeholder_names_in_a_text_are_not_special_tokens(oracle: Path, load: Load) -> None:
    ids = load(INTERNLM2).encode("<0x0> [UNUSED_TOKEN_146] <0x41>")
    assert not {354, goldens(oracle, INTERNLM2)["special"]["<|im_start|>"], 68} & set(ids)
    assert load(INTERNLM2).decode(ids) == "<0x0> [UNUSED_TOKEN_146] <0x41>"


# Conversion and its proof


def test_converted_tokenizer_that_differs_fails_the_export(oracle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = oracle / INTERNLM2 / "checkpoint"
    merges = sentencepiece_tokenizer._merges
    monkeypatch.setattr(sentencepiece_tokenizer, "_merges", lambda *arguments: merges(*arguments)[::-1])
    with pytest.raises(CheckpointError, match=r"'Hello, world! How are you today\?' becomes .* sentencepiece says"):
        build_tokenizer(folder, read_config(folder))


def test_decoding_that_differs_fails_the_export(oracle: Path) -> None:
    path = oracle / INTERNLM2 / "checkpoint" / "tokenizer.model"
    definition = sentencepiece_tokenizer.convert_sentencepiece(path, [], bos=False)
    definition["decoder"]["decoders"][0]["content"] = "_"
    with pytest.raises(CheckpointError, match="comes back as 'Hello,_world!"):
        sentencepiece_tokenizer.verify_conversion(path, definition, json.dumps(definition))


@pytest.mark.parametrize("field", ["add_dummy_prefix", "remove_extra_whitespaces", "byte_fallback"])
def test_other_kinds_of_sentencepiece_are_refused(oracle: Path, tmp_path: Path, field: str) -> None:
    from sentencepiece import sentencepiece_model_pb2

    model = sentencepiece_model_pb2.ModelProto()  # type: ignore[attr-defined]
    model.ParseFromString((oracle / INTERNLM2 / "checkpoint" / "tokenizer.model").read_bytes())
    section = model.trainer_spec if field == "byte_fallback" else model.normalizer_spec
    setattr(section, field, not getattr(section, field))
    (tmp_path / "tokenizer.model").write_bytes(model.SerializeToString())
    with pytest.raises(CheckpointError, match=field):
        sentencepiece_tokenizer.convert_sentencepiece(tmp_path / "tokenizer.model", [], bos=True)


# Checkpoint folders that are wrong


@pytest.fixture
def native(oracle: Path, tmp_path: Path) -> tuple[Path, ModelConfig]:
    """A copy of the native checkpoint's small files, to be damaged."""
    source = oracle / NATIVE / "checkpoint"
    for file in source.glob("*.json"):
        shutil.copyfile(file, tmp_path / file.name)
    return tmp_path, read_config(source)


def rewrite(path: Path, change: Callable[[Any], None]) -> None:
    values = json.loads(path.read_text())
    change(values)
    path.write_text(json.dumps(values))


def refusal(folder: Path, config: ModelConfig) -> str:
    with pytest.raises(CheckpointError) as caught:
        build_tokenizer(folder, config)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_folder_without_tokenizer_is_refused(native: tuple[Path, ModelConfig]) -> None:
    folder, config = native
    (folder / "tokenizer.json").unlink()
    assert "has no tokenizer" in refusal(folder, config)


@pytest.mark.parametrize("content", ["", "{", "[]", '{"added_tokens": []}'])
def test_damaged_tokenizer_json_is_refused(native: tuple[Path, ModelConfig], content: str) -> None:
    folder, config = native
    (folder / "tokenizer.json").write_text(content)
    assert "tokenizer.json" in refusal(folder, config)


def test_image_token_must_be_there_be_special_and_have_the_configured_id(native: tuple[Path, ModelConfig]) -> None:
    folder, config = native
    rewrite(folder / "config.json", lambda values: values.update(image_token_id=7))
    assert "image_token_id 7" in refusal(folder, config)
    (folder / "config.json").unlink()

    def plain(values: Any) -> None:
        for token in values["added_tokens"]:
            token["special"] = token["content"] != "<IMG_CONTEXT>"

    rewrite(folder / "tokenizer.json", plain)
    assert "no special token <IMG_CONTEXT>" in refusal(folder, config)


def test_tokenizer_of_a_larger_vocabulary_is_refused(native: tuple[Path, ModelConfig]) -> None:
    folder, config = native
    small = dataclasses.replace(config, decoder=dataclasses.replace(config.decoder, vocab_size=4000))
    assert "but the model has 4000 tokens" in refusal(folder, small)


def test_damaged_vocabulary_files_are_refused(oracle: Path, tmp_path: Path) -> None:
    source = oracle / QWEN2 / "checkpoint"
    config = read_config(source)
    for file in ("added_tokens.json", "tokenizer_config.json", "special_tokens_map.json", "vocab.json"):
        shutil.copyfile(source / file, tmp_path / file)
    assert "merges.txt cannot be read" in refusal(tmp_path, config)
    (tmp_path / "merges.txt").write_text("#version: 0.2\na b c\n")
    assert "no pair of tokens" in refusal(tmp_path, config)
    shutil.copyfile(source / "merges.txt", tmp_path / "merges.txt")
    rewrite(tmp_path / "vocab.json", lambda values: values.pop("!"))
    assert "is not a tokenizer" in refusal(tmp_path, config)
    image = goldens(oracle, QWEN2)["special"]["<IMG_CONTEXT>"]
    rewrite(tmp_path / "added_tokens.json", lambda values: values.update({"<other>": image}))
    assert f"id {image} is <other>" in refusal(tmp_path, config)


def test_older_checkpoints_without_a_decoder_table_give_the_same_tokenizer(
    oracle: Path, exported: Callable[[str], Path], tmp_path: Path
) -> None:
    """Before transformers 4.34, `added_tokens.json` and `special_tokens_map.json` were the only tables."""
    source = oracle / QWEN2 / "checkpoint"
    for file in ("added_tokens.json", "special_tokens_map.json", "vocab.json", "merges.txt"):
        shutil.copyfile(source / file, tmp_path / file)
    assert build_tokenizer(tmp_path, read_config(source)) == exported(QWEN2).read_bytes()


def test_damaged_sentencepiece_model_is_refused(oracle: Path, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.model").write_bytes(b"\xff" * 100)
    assert "not a sentencepiece model" in refusal(tmp_path, read_config(oracle / INTERNLM2 / "checkpoint"))


@pytest.mark.parametrize("content", [None, "{", '{"model": 1}'])
def test_damaged_bundle_tokenizer_is_refused(tmp_path: Path, content: str | None) -> None:
    path = tmp_path / "tokenizer.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(BundleError, match=r"tokenizer\.json cannot be read .* export the checkpoint again"):
        Tokenizer(path)


def test_tokenizer_of_another_kind_is_refused(native: tuple[Path, ModelConfig]) -> None:
    path = native[0] / "tokenizer.json"
    rewrite(path, lambda values: values.update(decoder={"type": "WordPiece", "prefix": "##", "cleanup": True}))
    with pytest.raises(BundleError, match="WordPiece"):
        Tokenizer(path)
