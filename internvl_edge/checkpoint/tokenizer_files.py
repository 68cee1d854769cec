"""A checkpoint's tokenizer, whatever its files, becomes one `tokenizer.json`.

Knows the published file formats: `tokenizer.json`, Qwen2's `vocab.json` + `merges.txt`, and InternLM2's sentencepiece
`tokenizer.model`, whose conversion is proven on texts before it is used. Does not know prompts or the runtime.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import tokenizers

from internvl_edge.base.errors import CheckpointError
from internvl_edge.model.config import ModelConfig

from .json_files import read_json
from .sentencepiece_tokenizer import convert_sentencepiece, verify_conversion

REQUIRED_TOKENS = ("<|im_start|>", "<|im_end|>", "<img>", "</img>", "<IMG_CONTEXT>")
_SOURCES = ("tokenizer.model", "vocab.json", "tokenizer.json")
_FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")

# How Qwen2 cuts text into words before merging: contractions, letters, single digits, punctuation, line ends, spaces.
_QWEN2_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def build_tokenizer(checkpoint_dir: Path, config: ModelConfig) -> bytes:
    """The content of `tokenizer.json` for a checkpoint folder.

    The original code reads the slow tokenizers' files, so in its layout those come first; the native layout's own file
    is `tokenizer.json`.

    Raises:
        CheckpointError: no tokenizer files, damaged or unsupported ones; special tokens that are missing, contradictory
            or beyond the model's vocabulary; a sentencepiece conversion that differs on a text (named).
    """
    present = [name for name in _SOURCES if (checkpoint_dir / name).is_file()]
    if not present:
        raise CheckpointError(
            f"{checkpoint_dir} has no tokenizer; expected tokenizer.json, vocab.json with merges.txt or tokenizer.model"
        )
    source = present[-1] if config.layout == "native" else present[0]
    settings = read_json(checkpoint_dir / "tokenizer_config.json", default={})
    if source == "tokenizer.json":
        definition = read_json(checkpoint_dir / source)
    elif source == "vocab.json":
        definition = _qwen2_definition(checkpoint_dir, _added_tokens(checkpoint_dir, settings))
    else:
        added = _added_tokens(checkpoint_dir, settings)
        definition = convert_sentencepiece(checkpoint_dir / source, added, bos=settings.get("add_bos_token", True))
    text = json.dumps(definition, ensure_ascii=False, separators=(",", ":"))
    _check_special_tokens(checkpoint_dir / source, definition, text, config)
    if source == "tokenizer.model":
        verify_conversion(checkpoint_dir / source, definition, text)
    return text.encode()


def token_ids(tokenizer: bytes) -> tuple[int, tuple[int, ...]]:
    """Find the ids of `<IMG_CONTEXT>` and of what ends an answer, `<|im_end|>`, in a `tokenizer.json`."""
    ids = {token["content"]: int(token["id"]) for token in json.loads(tokenizer)["added_tokens"]}
    return ids["<IMG_CONTEXT>"], (ids["<|im_end|>"],)


def _added_tokens(folder: Path, settings: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The tokens beside the vocabulary, by id: those of `tokenizer_config.json`, completed from `added_tokens.json`."""
    tokens = {
        int(token_id): {"id": int(token_id), "content": str(token["content"])}
        | {flag: bool(token.get(flag, False)) for flag in _FLAGS}
        for token_id, token in settings.get("added_tokens_decoder", {}).items()
    }
    special = set()
    for value in read_json(folder / "special_tokens_map.json", default={}).values():
        for item in value if isinstance(value, list) else [value]:
            special.add(item["content"] if isinstance(item, dict) else item)
    for content, token_id in read_json(folder / "added_tokens.json", default={}).items():
        new = {"id": token_id, "content": content} | dict.fromkeys(_FLAGS, False) | {"special": content in special}
        if (known := tokens.setdefault(token_id, new))["content"] != content:
            raise CheckpointError(
                f"{folder}: id {token_id} is {content} in added_tokens.json but {known['content']} in "
                f"tokenizer_config.json; download both again"
            )
    return [tokens[token_id] for token_id in sorted(tokens)]


def _qwen2_definition(folder: Path, added: list[dict[str, Any]]) -> dict[str, Any]:
    """Qwen2's byte-level BPE: NFC, its word pattern, and the merges in order of rank."""
    try:
        lines = (folder / "merges.txt").read_text(encoding="utf-8").split("\n")
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{folder / 'merges.txt'} cannot be read ({error}); download it again") from None
    merges = [line.split() for line in lines if line.strip() and not line.startswith("#version")]
    if any(len(merge) != 2 for merge in merges):
        raise CheckpointError(f"{folder / 'merges.txt'} has a line that is no pair of tokens; download it again")
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False}
    words = {"type": "Split", "pattern": {"Regex": _QWEN2_WORDS}, "behavior": "Isolated", "invert": False}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": {"type": "NFC"},
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [words, byte_level]},
        "post_processor": byte_level,
        "decoder": byte_level,
        "model": {"type": "BPE", "vocab": read_json(folder / "vocab.json"), "merges": merges},
    }


def _check_special_tokens(path: Path, definition: dict[str, Any], text: str, config: ModelConfig) -> None:
    """The file loads, and every special token has the id that the model was trained with."""
    try:
        tokenizer = tokenizers.Tokenizer.from_str(text)
    except Exception as error:  # the library raises bare Exception
        raise CheckpointError(f"{path} is not a tokenizer ({error}); download it again") from None
    for token in definition.get("added_tokens", []):
        if tokenizer.token_to_id(token["content"]) != token["id"]:
            raise CheckpointError(
                f"{path}: {token['content']} should have id {token['id']} but gets "
                f"{tokenizer.token_to_id(token['content'])}; the vocabulary has gaps, download it again"
            )
    added = {token["content"]: token["id"] for token in definition.get("added_tokens", []) if token.get("special")}
    ids = {token: added.get(token) for token in REQUIRED_TOKENS}
    expected = read_json(path.parent / "config.json", default={}).get("image_token_id")
    if expected is not None and ids["<IMG_CONTEXT>"] != expected:
        raise CheckpointError(
            f"{path}: <IMG_CONTEXT> has id {ids['<IMG_CONTEXT>']} but config.json says image_token_id {expected}"
        )
    for token, token_id in ids.items():
        if token_id is None:
            raise CheckpointError(f"{path} has no special token {token}; is this an InternVL 2.5 checkpoint?")
        if token_id >= config.decoder.vocab_size:
            raise CheckpointError(
                f"{path}: {token} has id {token_id} but the model has {config.decoder.vocab_size} tokens; "
                f"are tokenizer and weights of the same checkpoint?"
            )
        if tokenizer.encode(token, add_special_tokens=False).ids != [token_id]:
            raise CheckpointError(f"{path}: {token} is not kept as one token; download it again")
