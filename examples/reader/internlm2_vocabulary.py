"""The reader's tokens as InternLM2 writes them: a SentencePiece model with byte fallback, and added tokens.

Every piece has a token of the Qwen2 side with the same text, so texts are cut at the same places and the rows of a
token table can be moved from one numbering to the other. Knows no model.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from batches import BOS_STAND_IN
from sentencepiece import sentencepiece_model_pb2 as protobuf
from vocabulary import (
    IMAGE_TOKENS,
    QWEN2_TOKENS,
    byte_letters,
    chinese_characters,
    merge_chains,
    qwen2_vocabulary,
    write_json,
)

ROLE_TOKENS = ["<|plugin|>", "<|interpreter|>", "<|action_end|>", "<|action_start|>", "<|im_end|>", "<|im_start|>"]
"""Tokens that sit inside the SentencePiece vocabulary, as `[UNUSED_TOKEN_n]` pieces with another name."""

SPACE = "▁"


def _pieces() -> list[str]:
    """Ordinary pieces in merge order: printable ASCII, Chinese characters, then merged words; a space is `▁`."""
    single = [SPACE, *map(chr, range(33, 127)), *chinese_characters()]
    merged = dict.fromkeys((left + right).replace(" ", SPACE) for left, right in merge_chains())
    return [*single, *merged]


def internlm2_row_sources() -> list[int]:
    """For each InternLM2 token id, the Qwen2-side id of the same text (byte 0 where there is none)."""
    vocabulary, _ = qwen2_vocabulary()
    added = {token: len(vocabulary) + i for i, token in enumerate(QWEN2_TOKENS)}
    letters = byte_letters()

    def of_text(text: str) -> int:
        return vocabulary["".join(letters[b] for b in text.encode())]

    rows = [0, added[BOS_STAND_IN], 0]
    rows += [vocabulary[letters[b]] for b in range(256)]
    rows += [of_text(piece.replace(SPACE, " ")) for piece in _pieces()]
    rows += [added.get(token, 0) for token in ROLE_TOKENS]
    return rows + [added[token] for token in IMAGE_TOKENS]


def write_internlm2(folder: Path) -> dict[str, int]:
    """tokenizer.model, added_tokens.json, tokenizer_config.json, special_tokens_map.json; ids of the special tokens."""
    model: Any = protobuf.ModelProto()
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
    unused = [f"[UNUSED_TOKEN_{141 + i}]" for i in range(len(ROLE_TOKENS))]
    for rank, piece in enumerate([*_pieces(), *unused]):
        model.pieces.add(piece=piece, score=-float(rank), type=kind.NORMAL)
    model.trainer_spec.vocab_size = len(model.pieces)
    (folder / "tokenizer.model").write_bytes(model.SerializeToString())
    first = len(model.pieces) - len(ROLE_TOKENS)
    roles = {token: first + i for i, token in enumerate(ROLE_TOKENS)}
    images = {token: len(model.pieces) + i for i, token in enumerate(IMAGE_TOKENS)}
    _write_settings(folder, {"<unk>": 0, "<s>": 1, "</s>": 2} | roles | images)
    write_json(folder / "added_tokens.json", images)
    return {"<s>": 1, "</s>": 2} | roles | images


def _write_settings(folder: Path, tokens: dict[str, int]) -> None:
    flags = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False, "special": True}
    special = [*reversed(ROLE_TOKENS), *IMAGE_TOKENS]
    names = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "</s>", "unk_token": "<unk>"}
    config = {
        "added_tokens_decoder": {str(i): {"content": token} | flags for token, i in tokens.items()},
        "additional_special_tokens": special,
        "clean_up_tokenization_spaces": False,
        "model_max_length": 8192,
        "tokenizer_class": "InternLM2Tokenizer",
    }
    write_json(folder / "tokenizer_config.json", config | names)
    write_json(folder / "special_tokens_map.json", {"additional_special_tokens": special} | names)
