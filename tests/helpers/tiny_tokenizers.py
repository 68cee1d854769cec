"""Tokenizer files of a few hundred tokens in each of the published forms, with the peculiarities of the real ones.

Both vocabularies are made from the same words: every prefix of a word is a token, so the merges are the words read from
the left. The result is deterministic, and nothing is trained. The functions return the vocabulary size and the ids of
the special tokens. This module does not know weights.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

from sentencepiece import sentencepiece_model_pb2 as _pb

protobuf: Any = _pb  # its classes are made when it is imported, so a type checker cannot see them

TEXT = (
    "the of and image picture what is in this describe text total number page date name user assistant system "
    "Hello world def return print (self): 123 2024 你好 图像 文字 描述 书生 万象 InternVL"
)
WORDS = TEXT.split()
IMAGE_TOKENS = ["<img>", "</img>", "<IMG_CONTEXT>", "<quad>", "</quad>", "<ref>", "</ref>", "<box>", "</box>"]
QWEN2_SPECIAL = [
    *["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|object_ref_start|>", "<|object_ref_end|>", "<|box_start|>"],
    *["<|box_end|>", "<|quad_start|>", "<|quad_end|>", "<|vision_start|>", "<|vision_end|>", "<|vision_pad|>"],
    *["<|image_pad|>", "<|video_pad|>"],
]
QWEN2_PLAIN = [
    *["<tool_call>", "</tool_call>", "<|fim_prefix|>", "<|fim_middle|>", "<|fim_suffix|>", "<|fim_pad|>"],
    *["<|repo_name|>", "<|file_sep|>"],
]
QWEN3_PLAIN = ["<tool_response>", "</tool_response>", "<think>", "</think>"]
INTERNLM2_SPECIAL = [
    *["<|plugin|>", "<|interpreter|>", "<|action_end|>", "<|action_start|>", "<|im_end|>", "<|im_start|>"],
]
# Digits stand alone, as in the published Qwen2.5 tokenizer.
QWEN2_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


class Vocabulary(NamedTuple):
    """The number of ids, and the ids of the added tokens by their text."""

    size: int
    ids: dict[str, int]


def write_qwen2(folder: Path, thinks: bool = False) -> Vocabulary:
    """Write vocab.json, merges.txt and the added tokens: the files of a remote-code Qwen2 or (`thinks`) Qwen3."""
    vocab, merges = _byte_level_bpe()
    _write_json(folder / "vocab.json", vocab)
    lines = ["#version: 0.2", *(" ".join(pair) for pair in merges)]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    added = _numbered([*QWEN2_SPECIAL, *QWEN2_PLAIN, *(QWEN3_PLAIN if thinks else ()), *IMAGE_TOKENS], len(vocab))
    _write_json(folder / "added_tokens.json", added)
    special = [*QWEN2_SPECIAL[1:], *IMAGE_TOKENS]
    roles = {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}
    config = {
        "add_bos_token": False,
        "add_prefix_space": False,
        "added_tokens_decoder": _decoder(added),
        "additional_special_tokens": special,
        "bos_token": None,
        "clean_up_tokenization_spaces": False,
        "errors": "replace",
        "model_max_length": 8192,
        "split_special_tokens": False,
        "tokenizer_class": "Qwen2Tokenizer",
        "unk_token": None,
    }
    _write_json(folder / "tokenizer_config.json", config | roles)
    _write_json(folder / "special_tokens_map.json", {"additional_special_tokens": special} | roles)
    return Vocabulary(len(vocab) + len(added), added)


def write_native(folder: Path, thinks: bool = False) -> Vocabulary:
    """Write one tokenizer.json with the byte-level BPE of `write_qwen2`.

    The native layout has this for every text model.
    """
    vocab, merges = _byte_level_bpe()
    plain = [*QWEN2_PLAIN, *(QWEN3_PLAIN if thinks else ())]
    added = _numbered([*QWEN2_SPECIAL, *plain, *IMAGE_TOKENS, "<video>"], len(vocab))
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    split = {"type": "Split", "pattern": {"Regex": QWEN2_PATTERN}, "behavior": "Isolated", "invert": False}
    model: dict[str, Any] = {
        "type": "BPE",
        "dropout": None,
        "unk_token": None,
        "fuse_unk": False,
        "byte_fallback": False,
    }
    model |= {"continuing_subword_prefix": "", "end_of_word_suffix": "", "ignore_merges": False}
    model |= {"vocab": vocab, "merges": merges}
    tokenizer = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": int(i), **token} for i, token in _decoder(added).items()],
        "normalizer": {"type": "NFC"},
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, byte_level]},
        "post_processor": None,
        "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
        "model": model,
    }
    _write_json(folder / "tokenizer.json", tokenizer)
    config = {
        "add_prefix_space": False,
        "bos_token": None,
        "clean_up_tokenization_spaces": False,
        "context_image_token": "<IMG_CONTEXT>",
        "end_image_token": "</img>",
        "eos_token": "<|im_end|>",
        "extra_special_tokens": QWEN2_SPECIAL[1:] + IMAGE_TOKENS,
        "model_max_length": 8192,
        "pad_token": "<|endoftext|>",
        "processor_class": "InternVLProcessor",
        "start_image_token": "<img>",
        "tokenizer_class": "Qwen2Tokenizer",
        "unk_token": None,
        "video_token": "<video>",
    }
    _write_json(folder / "tokenizer_config.json", config)
    return Vocabulary(len(vocab) + len(added), added)


def write_internlm2(folder: Path) -> Vocabulary:
    """Write tokenizer.model (sentencepiece BPE, byte fallback) and the added tokens of a remote InternLM2 checkpoint.

    The file has the peculiarities of the real one: no dummy prefix, a NUL piece, `▁▁` and `——` with score 0, and
    `[UNUSED_TOKEN_n]` pieces whose ids tokenizer_config.json gives to `<|im_start|>` and similar tokens.
    added_tokens.json holds only the image tokens.
    """
    model = protobuf.ModelProto()
    model.trainer_spec.model_type = model.trainer_spec.BPE
    model.trainer_spec.byte_fallback = True
    model.normalizer_spec.name = "identity"
    model.normalizer_spec.add_dummy_prefix = False
    model.normalizer_spec.remove_extra_whitespaces = False
    kind = protobuf.ModelProto.SentencePiece
    model.pieces.add(piece="<unk>", score=0.0, type=kind.UNKNOWN)
    for piece in ("<s>", "</s>"):
        model.pieces.add(piece=piece, score=0.0, type=kind.CONTROL)
    for byte in range(256):
        model.pieces.add(piece=f"<0x{byte:02X}>", score=0.0, type=kind.BYTE)
    unused = [f"[UNUSED_TOKEN_{141 + index}]" for index in range(len(INTERNLM2_SPECIAL))]
    for piece in [*_sentencepieces(), *unused]:
        model.pieces.add(
            piece=piece, score=0.0 if piece in ("▁▁", "——") else -float(len(model.pieces)), type=kind.NORMAL
        )
    model.trainer_spec.vocab_size = len(model.pieces)
    (folder / "tokenizer.model").write_bytes(model.SerializeToString())
    named = _numbered(INTERNLM2_SPECIAL, len(model.pieces) - len(unused))
    added = _numbered(IMAGE_TOKENS, len(model.pieces))
    _write_json(folder / "added_tokens.json", added)
    special = [*reversed(INTERNLM2_SPECIAL), *IMAGE_TOKENS]
    roles = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "</s>", "unk_token": "<unk>"}
    config = {
        "added_tokens_decoder": _decoder({"<unk>": 0, "<s>": 1, "</s>": 2} | named | added),
        "additional_special_tokens": special,
        "auto_map": {"AutoTokenizer": ["tokenization_internlm2.InternLM2Tokenizer", None]},
        "clean_up_tokenization_spaces": False,
        "model_max_length": 8192,
        "tokenizer_class": "InternLM2Tokenizer",
    }
    _write_json(folder / "tokenizer_config.json", config | roles)
    _write_json(folder / "special_tokens_map.json", {"additional_special_tokens": special} | roles)
    return Vocabulary(len(model.pieces) + len(added), {"<s>": 1, "</s>": 2} | named | added)


def _byte_level_bpe() -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Return 256 byte characters, every prefix of every word with and without a leading space, and their merges."""
    letters = _byte_letters()
    tokens = {letters[byte]: None for byte in sorted(letters, key=lambda byte: letters[byte])}
    merges: dict[tuple[str, str], None] = {}
    for word in WORDS:
        for text in (word, f" {word}"):
            spelled = [letters[byte] for byte in text.encode()]
            for end in range(1, len(spelled)):
                pair = ("".join(spelled[:end]), spelled[end])
                if "".join(pair) not in tokens:
                    merges[pair] = tokens["".join(pair)] = None
    return _numbered(list(tokens), 0), list(merges)


def _byte_letters() -> dict[int, str]:
    """Return the printable character that byte-level BPE writes for each byte."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    return {byte: chr(byte) for byte in printable} | {byte: chr(256 + index) for index, byte in enumerate(others)}


def _sentencepieces() -> list[str]:
    """Return single characters, a NUL piece, and every prefix of every word with and without a leading space mark."""
    words = [text for word in WORDS for text in (word, f"▁{word}")]
    letters = dict.fromkeys(["▁", "\n", "\0", "—", *"".join(words)])
    prefixes = dict.fromkeys(word[:end] for word in words for end in range(2, len(word) + 1))
    return [*letters, "▁▁", "——", *prefixes]


def _numbered(tokens: list[str], first: int) -> dict[str, int]:
    return {token: first + index for index, token in enumerate(tokens)}


def _decoder(added: dict[str, int]) -> dict[str, dict[str, Any]]:
    """Return the `added_tokens_decoder` of tokenizer_config.json."""
    plain = QWEN2_PLAIN + QWEN3_PLAIN
    flags = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False}
    return {str(i): {"content": token, **flags, "special": token not in plain} for token, i in added.items()}


def _write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False), encoding="utf-8")
