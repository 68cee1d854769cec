"""Convert InternLM2's sentencepiece model to a `tokenizer.json`, and verify the result against sentencepiece.

This module knows byte-pair sentencepiece models with byte fallback. Method: sentencepiece merges those neighbors that
form the piece with the best score. The merges are therefore all splits of every piece into two pieces, ranked by the
score of the whole piece.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import tokenizers

from internvl_edge.base.errors import CheckpointError
from internvl_edge.base.json_files import TOKENIZER_BYTES, read_bytes
from internvl_edge.base.text import shown

from .json_files import refuse_pointer
from .tokenizer_samples import SAMPLES

# sentencepiece's piece types
_NORMAL, _UNKNOWN, _CONTROL, _UNUSED, _BYTE = 1, 2, 3, 5, 6
_EXPECTED = {
    "model_type": ("trainer_spec", 2),  # byte-pair encoding
    "byte_fallback": ("trainer_spec", True),
    "add_dummy_prefix": ("normalizer_spec", False),
    "remove_extra_whitespaces": ("normalizer_spec", False),
    "escape_whitespaces": ("normalizer_spec", True),
    "precompiled_charsmap": ("normalizer_spec", b""),
}
# sentencepiece never uses a piece that is a NUL and writes the byte instead. The piece keeps its id here, under a name
# that no text reaches (no merge forms it) and that the runtime still reads as a byte.
_NUL, _NUL_NAME = "\0", "<0x0>"


def convert_sentencepiece(path: Path, added: list[dict[str, Any]], bos: bool) -> dict[str, Any]:
    """Return the `tokenizer.json` values of a `tokenizer.model`, including the `added` tokens.

    `bos` puts `<s>` in front.

    Raises:
        CheckpointError: damaged file, or an unsupported kind of model.
    """
    model = _read_model(path)
    pieces = [piece.piece for piece in model.pieces]
    for token in added:
        if token["id"] < len(pieces):
            pieces[token["id"]] = token["content"]  # placeholders in the vocabulary that became special tokens
    bos_id = model.trainer_spec.bos_id
    for role, token_id in (("bos_id", bos_id), ("unk_id", model.trainer_spec.unk_id)):
        if not 0 <= token_id < len(pieces):
            raise CheckpointError(f"{path}: trainer_spec.{role} is {token_id}, which is no piece; download it again")
    vocab = {piece: index for index, piece in enumerate(pieces)}
    if len(vocab) != len(pieces):
        raise CheckpointError(f"{path} has the same piece twice; download it again")
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": {"type": "Replace", "pattern": {"String": " "}, "content": "▁"},
        "pre_tokenizer": None,
        "post_processor": _begin_with(pieces[bos_id], bos_id) if bos else None,
        "decoder": {
            "type": "Sequence",
            "decoders": [
                {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
                {"type": "ByteFallback"},
                {"type": "Fuse"},
            ],
        },
        "model": {
            "type": "BPE",
            "unk_token": pieces[model.trainer_spec.unk_id],
            "fuse_unk": True,
            "byte_fallback": True,
            "vocab": vocab,
            "merges": _merges(model, {token["id"] for token in added}),
        },
    }


def _read_model(path: Path) -> Any:
    from sentencepiece import sentencepiece_model_pb2

    refuse_pointer(path)
    data = read_bytes(path, CheckpointError, "download it again", limit=TOKENIZER_BYTES)
    model = sentencepiece_model_pb2.ModelProto()  # type: ignore[attr-defined]  # protobuf makes it at import
    try:
        model.ParseFromString(data)
    except Exception as error:  # protobuf's DecodeError lives in different places in different versions
        raise CheckpointError(f"{path} is not a sentencepiece model ({error}); download it again") from None
    for name, (section, expected) in _EXPECTED.items():
        if (found := getattr(getattr(model, section), name)) != expected:
            raise CheckpointError(f"{path}: {section}.{name} is {found!r}, supported: {expected!r} (InternLM2)")
    for index, piece in enumerate(model.pieces):
        if not isinstance(piece.piece, str):  # protobuf gives bytes where a text is not UTF-8
            raise CheckpointError(f"{path}: piece {index} is not UTF-8; download it again")
        if piece.piece == _NUL:
            piece.piece, piece.type = _NUL_NAME, _UNUSED
        elif piece.type not in (_NORMAL, _UNKNOWN, _CONTROL, _BYTE):
            raise CheckpointError(f"{path}: piece {piece.piece!r} is of the unsupported type {piece.type}")
    return model


def _begin_with(token: str, token_id: int) -> dict[str, Any]:
    """Return the post-processor that puts one token in front of a text."""
    first = {"SpecialToken": {"id": token, "type_id": 0}}
    return {
        "type": "TemplateProcessing",
        "single": [first, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [first, {"Sequence": {"id": "A", "type_id": 0}}, first, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {token: {"id": token, "ids": [token_id], "tokens": [token]}},
    }


def _merges(model: Any, taken: set[int]) -> list[tuple[str, str]]:
    """Return every split of a piece into two pieces, best score of the whole first. `taken` ids are special tokens."""
    scores = {
        piece.piece: piece.score
        for index, piece in enumerate(model.pieces)
        if piece.type == _NORMAL and index not in taken
    }
    splits = [
        (-score, cut, piece)
        for piece, score in scores.items()
        for cut in range(1, len(piece))
        if piece[:cut] in scores and piece[cut:] in scores
    ]
    return [(piece[:cut], piece[cut:]) for _, cut, piece in sorted(splits, key=lambda split: split[:2])]


def verify_conversion(path: Path, definition: dict[str, Any], text: str) -> None:
    """Compare ids and decoded text with sentencepiece itself, on the samples and on every piece as its own text.

    The reference is the checkpoint's slow tokenizer: it cuts out special tokens first, and sentencepiece encodes the
    rest.

    Raises:
        CheckpointError: the first text that differs.
    """
    import sentencepiece

    model = _read_model(path)
    try:
        processor = sentencepiece.SentencePieceProcessor(model_proto=model.SerializeToString())
    except Exception as error:  # RuntimeError and others, by version
        raise CheckpointError(f"{path} is not a sentencepiece model ({error}); download it again") from None
    converted = tokenizers.Tokenizer.from_str(text)
    added = {token["content"]: token["id"] for token in definition["added_tokens"]}
    special = {token["id"] for token in definition["added_tokens"] if token["special"]}
    plain = {token_id: content for content, token_id in added.items() if token_id not in special}
    cut = re.compile("|".join(sorted(map(re.escape, added), key=len, reverse=True)) or r"(?!)")
    start = [model.trainer_spec.bos_id] if definition["post_processor"] else []
    texts = [*SAMPLES, *(piece.piece.replace("▁", " ") for piece in model.pieces if piece.type == _NORMAL)]
    for sample in texts:
        found = converted.encode(sample).ids
        ids, end = list(start), 0
        for match in cut.finditer(sample):
            ids += [*processor.encode(sample[end : match.start()]), added[match[0]]]
            end = match.end()
        ids += processor.encode(sample[end:])
        if found != ids:
            raise CheckpointError(f"{path}: {sample!r} becomes {shown(found)}, sentencepiece says {shown(ids)}")
        back = converted.decode(found)
        expected = _decoded(processor, [token_id for token_id in ids if token_id not in special], plain)
        if back != expected:
            raise CheckpointError(
                f"{path}: {sample!r} comes back as {shown(back)}, sentencepiece says {shown(expected)}"
            )


def _decoded(processor: Any, ids: list[int], plain: dict[int, str]) -> str:
    """What sentencepiece makes of ids; it does not know the added tokens, `plain`, which stand for themselves."""
    runs: list[list[int]] = [[]]
    texts = []
    for token_id in ids:
        if token_id in plain:
            texts.append(plain[token_id])
            runs.append([])
        else:
            runs[-1].append(token_id)
    decoded = [str(processor.decode(run)) if run else "" for run in runs]
    return "".join(part for pair in zip(decoded, [*texts, ""], strict=True) for part in pair)
