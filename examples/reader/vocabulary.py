"""The reader's tokens: single characters, and whole words only for what the prompt says over and over.

A model this small reads best character by character, so answers are not merged. The words of the questions and the
three role names would be half of every sequence as characters; they get merges, built letter by letter from the left.
Question words carry their leading space, which no text in the pictures combines with lower case, so pictures are not
affected. Writes the Qwen2 side of a checkpoint (byte-level BPE); internlm2_vocabulary.py writes the other. Knows no
model.
"""

from __future__ import annotations

import json
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers

from internvl_edge.calibration.synthetic.words import CHINESE_CHARACTERS

SYSTEM = "Read the picture."
ROLES = {"system": "ys", "user": "us", "assistant": "ss"}
"""Role names and the rare letter pair from which each one's merges grow."""

IMAGE_TOKENS = ["<img>", "</img>", "<IMG_CONTEXT>", "<quad>", "</quad>", "<ref>", "</ref>", "<box>", "</box>"]
QWEN2_TOKENS = [
    "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|object_ref_start|>", "<|object_ref_end|>", "<|box_start|>",
    "<|box_end|>", "<|quad_start|>", "<|quad_end|>", "<|vision_start|>", "<|vision_end|>", "<|vision_pad|>",
    "<|image_pad|>", "<|video_pad|>", "<tool_call>", "</tool_call>", "<|fim_prefix|>", "<|fim_middle|>",
    "<|fim_suffix|>", "<|fim_pad|>", "<|repo_name|>", "<|file_sep|>", *IMAGE_TOKENS,
]  # fmt: skip
QWEN2_PLAIN = frozenset(QWEN2_TOKENS[14:22])
"""Added tokens that are ordinary text when an answer is decoded."""
QWEN2_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def _listed(text: str) -> tuple[str, ...]:
    return tuple(text.split())


QUESTION_WORDS = _listed(
    """
    a all are bar black blue circle circles code colour costs date does green how is item line lot many meter most
    much name net number of picture purple red room say shapes shortest show sign size square squares star stars
    tallest text the there total triangle triangles value weight yellow
    """
)
"""Lower-case words that follow a space in the questions' own wording (not what they quote from a picture)."""

QUESTION_CHARACTERS = "牌子上写着什么？总计是多少最贵的钱有几个一共图形颜色没方圆三角星红绿蓝黄紫黑"


def chinese_characters() -> str:
    """Every Chinese character of the pictures and of the questions about them, punctuation included."""
    return "".join(sorted({*CHINESE_CHARACTERS, *QUESTION_CHARACTERS}))


def byte_letters() -> dict[int, str]:
    """The printable stand-in of each byte in byte-level BPE."""
    visible = [*range(33, 127), *range(161, 173), *range(174, 256)]
    table, extra = {b: chr(b) for b in visible}, 256
    for b in range(256):
        if b not in table:
            table[b], extra = chr(extra), extra + 1
    return table


def merge_chains() -> list[tuple[str, str]]:
    """Merges over plain characters (a space is written as a space) that build question words and role names."""
    merges: dict[tuple[str, str], None] = {}
    for role, seed in ROLES.items():
        left, right = role.index(seed), role.index(seed) + 2
        merges[seed[0], seed[1]] = None
        while left > 0:
            merges[role[left - 1], role[left:right]] = None
            left -= 1
        while right < len(role):
            merges[role[:right], role[right]] = None
            right += 1
    for word in QUESTION_WORDS:
        for end in range(1, len(word) + 1):
            merges[" " + word[: end - 1], word[end - 1]] = None
    return list(merges)


def qwen2_vocabulary() -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Token -> id (bytes first, then merged tokens in merge order) and the merges, in byte-level letters."""
    letters = byte_letters()

    def spelled(text: str) -> str:
        return "".join(letters[b] for b in text.encode())

    merges: dict[tuple[str, str], None] = {}
    for character in chinese_characters():
        first, second, third = (letters[b] for b in character.encode())
        merges[first, second] = None
        merges[first + second, third] = None
    for left, right in merge_chains():
        merges[spelled(left), spelled(right)] = None
    vocabulary = {letter: i for i, letter in enumerate(letters[b] for b in range(256))}
    for left, right in merges:
        vocabulary.setdefault(left + right, len(vocabulary))
    return vocabulary, list(merges)


def qwen2_tokenizer() -> Tokenizer:
    """The tokenizer used in training; the checkpoint's files describe the same one."""
    vocabulary, merges = qwen2_vocabulary()
    tokenizer = Tokenizer(models.BPE(vocabulary, merges))
    split = pre_tokenizers.Split(Regex(QWEN2_PATTERN), "isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(False, use_regex=False)])
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_tokens([AddedToken(token, special=token not in QWEN2_PLAIN) for token in QWEN2_TOKENS])
    return tokenizer


def write_qwen2(folder: Path) -> dict[str, int]:
    """vocab.json, merges.txt and the added tokens' files; returns the added tokens' ids."""
    vocabulary, merges = qwen2_vocabulary()
    added = {token: len(vocabulary) + i for i, token in enumerate(QWEN2_TOKENS)}
    special = [token for token in QWEN2_TOKENS if token not in QWEN2_PLAIN]
    (folder / "vocab.json").write_text(json.dumps(vocabulary, ensure_ascii=False), encoding="utf-8")
    lines = ["#version: 0.2", *(f"{left} {right}" for left, right in merges)]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    write_json(folder / "added_tokens.json", added)
    flags = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False}
    config = {
        "add_bos_token": False,
        "add_prefix_space": False,
        "added_tokens_decoder": {
            str(i): {"content": token, **flags, "special": token in special} for token, i in added.items()
        },
        "additional_special_tokens": special[1:],
        "bos_token": None,
        "clean_up_tokenization_spaces": False,
        "eos_token": "<|im_end|>",
        "errors": "replace",
        "model_max_length": 8192,
        "pad_token": "<|endoftext|>",
        "split_special_tokens": False,
        "tokenizer_class": "Qwen2Tokenizer",
        "unk_token": None,
    }
    write_json(folder / "tokenizer_config.json", config)
    names = {"additional_special_tokens": special[1:], "eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}
    write_json(folder / "special_tokens_map.json", names)
    return added


def write_json(path: Path, data: object) -> None:
    """Indented JSON in UTF-8."""
    path.write_text(json.dumps(data, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
