"""Convert text to token ids and back, from one `tokenizer.json`.

The `tokenizers` library encodes. Decoding is by bytes: every token is a byte string and text is their UTF-8, so a
stream can stop between any two tokens. This module does not know prompts or checkpoints. `checkpoint.tokenizer_files`
writes the file.

Bytes that are not UTF-8 decode as in the checkpoint's own tokenizer: byte-level vocabularies (Qwen2) give one U+FFFD
per broken sequence, byte-fallback vocabularies (InternLM2, as sentencepiece) one per byte. The original InternLM2 class
also deletes spaces before English punctuation ("cd ./x" becomes "cd./x"). This project does not, because it harms code.
"""

from __future__ import annotations

import codecs
import re
import threading
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tokenizers

from internvl_edge.base.errors import BundleError, PromptError
from internvl_edge.base.json_files import TOKENIZER_BYTES, parse, read_bytes
from internvl_edge.base.jsonable import decode

from .prompt import Segment

_BYTE_PIECE = re.compile(r"<0x([0-9A-F]{1,2})>")
_ADVICE = "export the checkpoint again"
_PER_BYTE = "internvl_edge.replace_each_byte"


def _replace_each_byte(error: UnicodeError) -> tuple[str, int]:
    if not isinstance(error, UnicodeDecodeError):
        raise error
    return "\ufffd" * (error.end - error.start), error.end


codecs.register_error(_PER_BYTE, _replace_each_byte)


@dataclass(frozen=True)
class AddedToken:
    """A token beside the vocabulary, as `tokenizer.json` has it in `added_tokens`."""

    id: int
    content: str
    special: bool = False


def added_tokens(values: Any) -> list[AddedToken]:
    """The added tokens of a `tokenizer.json`.

    Raises:
        ValueError: they are not of this form; the place is named.
    """
    found = values.get("added_tokens") if isinstance(values, dict) else None
    return decode(list[AddedToken], [] if found is None else found)


def load_tokenizer(data: bytes) -> tokenizers.Tokenizer:
    """The library's tokenizer of the content of a `tokenizer.json`.

    Raises:
        ValueError: the library refuses it, or stops in the middle of it.
    """
    try:
        return tokenizers.Tokenizer.from_buffer(data)
    except (KeyboardInterrupt, SystemExit, MemoryError):
        raise
    except BaseException as error:  # the library raises bare Exception, and its panics are no Exception
        raise ValueError(error) from None


class Tokenizer:
    """A vocabulary with its special tokens."""

    def __init__(self, path: Path) -> None:
        """Read a `tokenizer.json`.

        Raises:
            BundleError: missing or damaged file, or tokens that are neither byte-level nor sentencepiece's with byte
                fallback.
        """
        data = read_bytes(path, BundleError, _ADVICE, limit=TOKENIZER_BYTES)
        try:
            values = parse(data)
            self._tokenizer = load_tokenizer(data)
            added = added_tokens(values)
        except ValueError as error:
            raise BundleError(f"{path} cannot be read ({error}); {_ADVICE}") from None
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._byte_level = _is_byte_level(path, values.get("decoder"))
        self._added = {token.id: token.content.encode() for token in added}
        self._special = {token.id for token in added if token.special}
        longest_first = sorted((token.content for token in added if token.special), key=len, reverse=True)
        self._special_pattern = re.compile("|".join(map(re.escape, longest_first)) or r"(?!)")
        self._lock = threading.Lock()

    def encode(self, text: str) -> list[int]:
        """Return the token ids of a text. Special tokens are recognized, and InternLM2's `<s>` is put in front.

        Raises:
            PromptError: half of a surrogate pair, which is not text.
        """
        return self._encode(text, plain=False)

    def encode_segments(self, segments: Iterable[Segment]) -> list[int]:
        """Return the token ids of a prompt in which special tokens count only where the template wrote them.

        In typed text, `<|im_end|>` is nothing but these characters. Where no typed text holds a special token, the ids
        are those of `encode`.

        Raises:
            PromptError: as `encode`.
        """
        segments = list(segments)
        if self.special_token_in(segment.text for segment in segments if not segment.is_template) is None:
            return self.encode("".join(segment.text for segment in segments))
        ids = self.encode("")  # what the tokenizer puts in front
        between = ""  # a tokenizer looks at the text between two special tokens as a whole
        for segment in segments:
            if not segment.is_template:
                between += segment.text
                continue
            start = 0
            for found in self._special_pattern.finditer(segment.text):
                ids += self._encode(between + segment.text[start : found.start()], plain=True)
                ids.append(self.token_id(found[0]))
                between, start = "", found.end()
            between += segment.text[start:]
        return ids + self._encode(between, plain=True)

    def _encode(self, text: str, plain: bool) -> list[int]:
        try:
            with self._lock:
                self._tokenizer.encode_special_tokens = plain
                return list(self._tokenizer.encode(text, add_special_tokens=not plain).ids)
        except TypeError:
            broken = next(character for character in text if 0xD800 <= ord(character) <= 0xDFFF)
            raise PromptError(
                f"the text holds {broken!r}, which is no character (a byte that was not UTF-8?); remove it"
            ) from None

    def decode(self, ids: Iterable[int], skip_special: bool = True) -> str:
        """Return the text of token ids. Ids outside the vocabulary give no text."""
        data = b"".join(self.token_bytes(token_id, skip_special) for token_id in ids)
        return data.decode("utf-8", self.decode_errors)

    def token_bytes(self, token_id: int, skip_special: bool = True) -> bytes:
        """Return the bytes of one token, not always whole characters. Special tokens give none if `skip_special`."""
        if token_id in self._added:
            return b"" if skip_special and token_id in self._special else self._added[token_id]
        piece = self._tokenizer.id_to_token(token_id)
        if piece is None:
            return b""
        if self._byte_level:
            return b"".join(_BYTE_OF.get(character) or character.encode() for character in piece)
        byte = _BYTE_PIECE.fullmatch(piece)
        return bytes([int(byte[1], 16)]) if byte else piece.replace("▁", " ").encode()

    def token_id(self, token: str) -> int:
        """Return the id of a token such as `<|im_end|>`.

        Raises:
            BundleError: the vocabulary has no such token.
        """
        token_id = self._tokenizer.token_to_id(token)
        if token_id is None:
            raise BundleError(f"the tokenizer has no {token} token; is this an InternVL checkpoint?")
        return int(token_id)

    def special_token_in(self, texts: Iterable[str]) -> str | None:
        """The first special token that one of the texts holds; None where none does."""
        special = [self._added[token_id].decode() for token_id in self._special]
        return next((token for text in texts for token in special if token in text), None)

    @property
    def decode_errors(self) -> str:
        """The name of the `codecs` error handler that decodes broken UTF-8."""
        return "replace" if self._byte_level else _PER_BYTE

    @property
    def vocab_size(self) -> int:
        """The number of tokens, including the added ones."""
        return int(self._tokenizer.get_vocab_size())


def _is_byte_level(path: Path, decoder: Any) -> bool:
    """Return True for byte-level tokens, False for sentencepiece's with byte fallback, from a decoder section."""
    sections = [decoder] if isinstance(decoder, dict) else []
    if sections and sections[0].get("type") == "Sequence":
        sections = sections[0]["decoders"]
    kinds = [section.get("type") for section in sections]
    if kinds == ["ByteLevel"]:
        return True
    if kinds == ["Replace", "ByteFallback", "Fuse"] and sections[0].get("pattern") == {"String": "▁"}:
        return False
    raise BundleError(f"{path} decodes with {kinds}, supported: ByteLevel, or Replace, ByteFallback, Fuse")


def _byte_level_alphabet() -> dict[str, bytes]:
    """Return GPT-2's character of each byte: itself where Latin-1 prints it, otherwise the next one from U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    characters = [*printable, *range(0x100, 0x100 + len(others))]
    return {chr(character): bytes([byte]) for character, byte in zip(characters, printable + others, strict=True)}


_BYTE_OF = _byte_level_alphabet()
