"""Convert a checkpoint's tokenizer files of any kind to one `tokenizer.json`.

This module knows the published file formats: `tokenizer.json`, Qwen2's `vocab.json` + `merges.txt`, and InternLM2's
sentencepiece `tokenizer.model`. The conversion of the latter is verified on texts before it is used. This module does
not know prompts or the runtime.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from internvl_edge.base.errors import CheckpointError
from internvl_edge.base.json_files import TOKENIZER_BYTES, read_bytes
from internvl_edge.base.text import shown
from internvl_edge.model.config import ModelConfig
from internvl_edge.model.limits import LARGEST
from internvl_edge.model.tokenizer import added_tokens, load_tokenizer

from .json_files import read_json, refuse_pointer
from .sentencepiece_tokenizer import convert_sentencepiece, verify_conversion

REQUIRED_TOKENS = ("<|im_start|>", "<|im_end|>", "<img>", "</img>", "<IMG_CONTEXT>")
_FAST, _MERGES = "tokenizer.json", "merges.txt"
_SOURCES = ("tokenizer.model", "vocab.json", _FAST)
_TOKEN_ID = re.compile(r"[0-9]{1,9}")
_FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")

# The pattern by which Qwen2 splits text into words before merging: contractions, letters, single digits, punctuation,
# line ends, spaces.
_QWEN2_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def build_tokenizer(checkpoint_dir: Path, config: ModelConfig) -> bytes:
    """Return the content of `tokenizer.json` for a checkpoint folder.

    The original code reads the slow tokenizers' files, so the remote layout uses those first. The native layout's own
    file is `tokenizer.json`.

    Raises:
        CheckpointError: no tokenizer files, damaged or unsupported ones, or files of two ages; special tokens that are
            missing or contradictory; tokens beyond the model's vocabulary; a sentencepiece conversion that differs on a
            text (named).
    """
    present = [name for name in _SOURCES if (checkpoint_dir / name).is_file()]
    if not present:
        raise CheckpointError(
            f"{checkpoint_dir} has no tokenizer; expected tokenizer.json, vocab.json with merges.txt or tokenizer.model"
        )
    source, definition = _read_source(checkpoint_dir, present, config)
    text = json.dumps(definition, ensure_ascii=False, separators=(",", ":"))
    _check_special_tokens(checkpoint_dir / source, definition, text, config)
    if source == "tokenizer.model":
        verify_conversion(checkpoint_dir / source, definition, text)
    return text.encode()


def token_ids(tokenizer: bytes, ends: Iterable[int] = ()) -> tuple[int, tuple[int, ...]]:
    """Find the id of `<IMG_CONTEXT>` and the ids that end an answer in the content of a `tokenizer.json`.

    Args:
        tokenizer: what `build_tokenizer` returned.
        ends: ids that end an answer beside `<|im_end|>`; see `end_tokens`.
    """
    ids = {token["content"]: int(token["id"]) for token in json.loads(tokenizer)["added_tokens"]}
    return ids["<IMG_CONTEXT>"], tuple(dict.fromkeys((ids["<|im_end|>"], *ends)))


def end_tokens(checkpoint_dir: Path, config: ModelConfig) -> tuple[int, ...]:
    """The ids with which `generate` ends an answer in the native layout, beside `<|im_end|>`.

    transformers takes `eos_token_id` of `generation_config.json`, one id or a list, and that of the text model where
    there is no such file. In the remote layout the original's `chat` passes `<|im_end|>` alone, whatever files say.

    Raises:
        CheckpointError: something else than ids of the vocabulary.
    """
    if config.layout != "native":
        return ()
    name = "generation_config.json"
    if (checkpoint_dir / name).exists():
        found = read_json(checkpoint_dir / name).get("eos_token_id")
    else:
        name = "config.json: text_config"
        text = read_json(checkpoint_dir / "config.json", default={}).get("text_config")
        found = text.get("eos_token_id") if isinstance(text, dict) else None
    ids = found if isinstance(found, list) else [] if found is None else [found]
    for token in ids:
        if type(token) is not int or not 0 <= token < config.decoder.vocab_size:
            raise CheckpointError(
                f"{checkpoint_dir}: {name}: eos_token_id is {shown(found)}, expected ids from 0 to "
                f"{config.decoder.vocab_size - 1}"
            )
    return tuple(ids)


def _read_source(folder: Path, present: list[str], config: ModelConfig) -> tuple[str, dict[str, Any]]:
    """The file that holds the tokenizer, and what it says.

    Where files of the slow tokenizer and a `tokenizer.json` disagree, one of them is older than the other. Version 5 of
    transformers writes `tokenizer.json` alone and leaves the others as they were; its `tokenizer_config.json` has no
    `added_tokens_decoder`, with which version 4 completes the files of the slow tokenizer.
    """
    settings = read_json(folder / "tokenizer_config.json", default={}, limit=TOKENIZER_BYTES)
    fast = read_json(folder / _FAST, limit=TOKENIZER_BYTES) if _FAST in present else None
    slow_files = [name for name in present if name != _FAST]
    if fast is not None and not _is_whole(folder, slow_files):
        slow_files = []
    if fast is not None and (not slow_files or config.layout == "native"):
        return _FAST, fast
    slow = _slow_definition(folder, slow_files[0], settings)
    if fast is None:
        return slow_files[0], slow
    try:
        older, newer = _differences(slow, fast, added_alone=slow_files[0] == "tokenizer.model")
    except ValueError as error:
        raise CheckpointError(f"{folder / _FAST} is not a tokenizer ({error}); download it again") from None
    if not older and not newer:
        return slow_files[0], slow
    if settings.get("backend") == "tokenizers" or (not older and not settings.get("added_tokens_decoder")):
        return _FAST, fast
    if not newer and settings.get("added_tokens_decoder"):
        return slow_files[0], slow
    token_id = min(older | newer)
    raise CheckpointError(
        f"{folder}: {_FAST} and {slow_files[0]} with its added tokens are of different ages (they disagree about id "
        f"{token_id}); keep the files of the newer tokenizer, remove the others"
    )


def _is_whole(folder: Path, slow_files: list[str]) -> bool:
    return bool(slow_files) and (slow_files[0] != "vocab.json" or (folder / _MERGES).is_file())


def _differences(slow: dict[str, Any], fast: dict[str, Any], *, added_alone: bool) -> tuple[set[int], set[int]]:
    """Ids that only the slow tokenizer's files have or have otherwise, and ids that only `tokenizer.json` has.

    Args:
        slow, fast: contents of a `tokenizer.json`.
        added_alone: compare added tokens alone, as a converted vocabulary names some pieces otherwise.
    """
    ours, theirs = _by_id(slow), _by_id(fast)
    own = {token.id for token in added_tokens(slow)} if added_alone else ours.keys()
    ids = own | ({token.id for token in added_tokens(fast)} if added_alone else theirs.keys())
    differing = {token_id for token_id in ids if ours.get(token_id) != theirs.get(token_id)}
    only_fast = differing - own
    return differing - only_fast, only_fast


def _by_id(definition: dict[str, Any]) -> dict[int, str]:
    model = definition.get("model")
    vocab = model.get("vocab") if isinstance(model, dict) else None
    pieces = vocab.items() if isinstance(vocab, dict) else ()
    found = {token_id: piece for piece, token_id in pieces if isinstance(token_id, int)}
    return found | {token.id: token.content for token in added_tokens(definition)}


def _slow_definition(folder: Path, source: str, settings: Mapping[str, Any]) -> dict[str, Any]:
    added = _added_tokens(folder, settings)
    if source == "vocab.json":
        return _qwen2_definition(folder, added)
    bos = settings.get("add_bos_token")
    if not isinstance(bos, bool | None):
        raise CheckpointError(f"{folder}: tokenizer_config.json: add_bos_token is {shown(bos)}, expected true or false")
    return convert_sentencepiece(folder / source, added, bos=bos is not False)


def _added_tokens(folder: Path, settings: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The tokens beside the vocabulary, by id: those of `tokenizer_config.json`, completed from `added_tokens.json`."""
    tokens = _decoder_table(folder, settings)
    special = _special_contents(folder)
    for content, token_id in read_json(folder / "added_tokens.json", default={}, limit=TOKENIZER_BYTES).items():
        if type(token_id) is not int or not 0 <= token_id < LARGEST["vocab_size"]:
            raise CheckpointError(
                f"{folder}: added_tokens.json: {shown(content)} is {shown(token_id)}, expected the id of a token"
            )
        new = {"id": token_id, "content": content} | dict.fromkeys(_FLAGS, False) | {"special": content in special}
        if (known := tokens.setdefault(token_id, new))["content"] != content:
            raise CheckpointError(
                f"{folder}: id {token_id} is {content} in added_tokens.json but {known['content']} in "
                f"tokenizer_config.json; download both again"
            )
    return [tokens[token_id] for token_id in sorted(tokens)]


def _decoder_table(folder: Path, settings: Mapping[str, Any]) -> dict[int, dict[str, Any]]:
    """`added_tokens_decoder` of tokenizer_config.json: id -> token."""
    where = f"{folder}: tokenizer_config.json: added_tokens_decoder"
    table = settings.get("added_tokens_decoder")
    if not isinstance(table, dict | None):
        raise CheckpointError(f"{where} is {shown(table)}, expected an object")
    tokens = {}
    for key, token in (table or {}).items():
        if not _TOKEN_ID.fullmatch(key) or int(key) >= LARGEST["vocab_size"]:
            raise CheckpointError(f"{where}: {shown(key)} is not the id of a token")
        flags = {flag: token.get(flag, False) for flag in _FLAGS} if isinstance(token, dict) else {}
        if not flags or not isinstance(token.get("content"), str) or not all(type(on) is bool for on in flags.values()):
            raise CheckpointError(f"{where}.{key} is {shown(token)}, expected a token with its content and flags")
        tokens[int(key)] = {"id": int(key), "content": token["content"]} | flags
    return tokens


def _special_contents(folder: Path) -> set[str]:
    """The tokens that special_tokens_map.json gives a role, as texts or objects, alone or in lists."""
    special = set()
    for role, value in read_json(folder / "special_tokens_map.json", default={}, limit=TOKENIZER_BYTES).items():
        for item in value if isinstance(value, list) else [] if value is None else [value]:
            content = item.get("content") if isinstance(item, dict) else item
            if not isinstance(content, str):
                raise CheckpointError(
                    f"{folder}: special_tokens_map.json: {shown(role)} is {shown(value)}, expected tokens"
                )
            special.add(content)
    return special


def _qwen2_definition(folder: Path, added: list[dict[str, Any]]) -> dict[str, Any]:
    """Qwen2's byte-level BPE: NFC, its word pattern, and the merges in order of rank."""
    path = folder / _MERGES
    refuse_pointer(path)
    data = read_bytes(path, CheckpointError, "download it again", limit=TOKENIZER_BYTES)
    try:
        lines = data.decode("utf-8").replace("\r\n", "\n").split("\n")
    except UnicodeDecodeError as error:
        raise CheckpointError(f"{path} cannot be read ({error}); download it again") from None
    merges = [line.split() for line in lines if line.strip() and not line.startswith("#version")]
    if any(len(merge) != 2 for merge in merges):
        raise CheckpointError(f"{path} has a line that is no pair of tokens; download it again")
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
        "model": {"type": "BPE", "vocab": read_json(folder / "vocab.json", limit=TOKENIZER_BYTES), "merges": merges},
    }


def _check_special_tokens(path: Path, definition: dict[str, Any], text: str, config: ModelConfig) -> None:
    """The file loads, every special token has the id that the model was trained with, and every token has a row."""
    try:
        tokenizer = load_tokenizer(text.encode())
        added = added_tokens(definition)
        largest, largest_id = max(tokenizer.get_vocab().items(), key=lambda item: item[1], default=("", -1))
    except ValueError as error:
        raise CheckpointError(f"{path} is not a tokenizer ({error}); download it again") from None
    for token in added:
        if tokenizer.token_to_id(token.content) != token.id:
            raise CheckpointError(
                f"{path}: {token.content} should have id {token.id} but gets {tokenizer.token_to_id(token.content)}; "
                "the vocabulary has gaps, download it again"
            )
    special = {token.content: token.id for token in added if token.special}
    ids = {token: special.get(token) for token in REQUIRED_TOKENS}
    expected = read_json(path.parent / "config.json", default={}).get("image_token_id")
    if expected is not None and ids["<IMG_CONTEXT>"] != expected:
        raise CheckpointError(
            f"{path}: <IMG_CONTEXT> has id {ids['<IMG_CONTEXT>']} but config.json says image_token_id {shown(expected)}"
        )
    rows = config.decoder.vocab_size
    for name, token_id in ids.items():
        if token_id is None:
            raise CheckpointError(f"{path} has no special token {name}; is this an InternVL checkpoint?")
        if token_id >= rows:
            raise CheckpointError(
                f"{path}: {name} has id {token_id} but the model has {rows} tokens; "
                f"are tokenizer and weights of the same checkpoint?"
            )
        if tokenizer.encode(name, add_special_tokens=False).ids != [token_id]:
            raise CheckpointError(f"{path}: {name} is not kept as one token; download it again")
    if largest_id >= rows:
        raise CheckpointError(
            f"{path}: the token {shown(largest)} has id {largest_id} but the embedding has {rows} rows; resize the "
            "embedding (resize_token_embeddings) and train the new rows, or leave the added tokens out"
        )
