"""The manifest: what a bundle says of itself, as typed data in `manifest.json`.

Written in format 2. Format 1, which told some of it in sentences, is still read; see `format_1` and docs/formats.md.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from internvl_edge.base.errors import BundleError, EdgeError
from internvl_edge.base.files import replace_text
from internvl_edge.base.folders import restore
from internvl_edge.base.jsonable import decode, dumps, encode
from internvl_edge.checkpoint.layouts import linear_names
from internvl_edge.model.components import Component
from internvl_edge.model.config import ModelConfig
from internvl_edge.model.linear import Scheme
from internvl_edge.model.template import PromptTemplate

from .format_1 import upgrade
from .gate import parse_condition
from .names import MANIFEST
from .quality import Quality

FORMAT_VERSION = 2
# The manifest's digest of itself. It finds damage; nothing is signed.
DIGEST = "sha256"


@dataclass(frozen=True)
class FileEntry:
    """One file: its size and the SHA-256 of its content, in hexadecimal digits."""

    bytes: int
    sha256: str


@dataclass(frozen=True)
class SpecialTokens:
    """Token ids with a role: `image` is the placeholder of image tokens, each of `stop` ends an answer."""

    image: int
    stop: tuple[int, ...]


@dataclass(frozen=True)
class DecoderQuantization:
    """What is known of a quantized decoder beside the scheme of each linear.

    Attributes:
        method: of the checkpoint: "awq" or "compressed-tensors".
        bits_per_weight: over all linears of the decoder, with scales and zero points.
        weight_error: root mean square of what the standard dialect's weights miss of the checkpoint's, relative to
            these, on up to 256 outputs of each linear with float inputs.
    """

    method: str
    bits_per_weight: float
    weight_error: float


@dataclass(frozen=True)
class Manifest:
    """What a bundle says of itself.

    Attributes:
        producer: name and version of the program that made it.
        source: the checkpoint's folder name, for people.
        model: the configuration the graphs were built from.
        template: how a conversation is written.
        tokens: ids by role.
        dtype: how float weights are stored: "float32", "float16" or "bfloat16".
        activations: what the graphs compute in.
        kv_cache: "int8", or None for a cache in `activations`.
        token_table: "int8", or one of the types of `dtype`.
        linears: how each quantized linear is rounded, by canonical name ("decoder.layers.0.mlp.up_proj"); all others
            are floats.
        components: the size of each part of the model.
        quantization: more about a quantized decoder; None for one of floats.
        files: by name.
        quality: what evaluation found; None where nobody has looked.
    """

    producer: str
    source: str
    model: ModelConfig
    template: PromptTemplate
    tokens: SpecialTokens
    dtype: str
    activations: str
    token_table: str
    files: dict[str, FileEntry]
    kv_cache: str | None = None
    linears: dict[str, Scheme] = field(default_factory=dict)
    components: tuple[Component, ...] = ()
    quantization: DecoderQuantization | None = None
    quality: Quality | None = None

    @property
    def fingerprint(self) -> str:
        """One SHA-256 for the names and contents of all files: what figures about a bundle are tied to."""
        digests = sorted((name, entry.sha256) for name, entry in self.files.items())
        return hashlib.sha256(json.dumps(digests).encode()).hexdigest()

    @property
    def is_quantized(self) -> bool:
        """Whether anything has fewer bits than a float."""
        return bool(self.linears) or "int8" in (self.kv_cache, self.token_table)

    @property
    def rounds_inputs(self) -> bool:
        """Whether any linear takes int8 inputs, whose products are added up in integers."""
        return any(scheme.static_inputs for scheme in self.linears.values())

    def schemes(self, part: str) -> dict[str, Scheme]:
        """The quantized linears whose names begin with `part`: "decoder.layers.", "vision."."""
        return {name: scheme for name, scheme in self.linears.items() if name.startswith(part)}

    def floats(self, *parts: str) -> list[str]:
        """The linears whose names begin with one of `parts` and that keep their floats."""
        return [name for name in linear_names(self.model, *parts) if name not in self.linears]

    def write(self, folder: Path) -> None:
        """Write `manifest.json`, the file that makes a folder a bundle; one that is there is replaced in one step."""
        values = encode(self)
        replace_text(
            folder / MANIFEST, dumps({"format_version": FORMAT_VERSION, DIGEST: manifest_digest(values), **values})
        )

    @staticmethod
    def read(folder: Path) -> Manifest:
        """Raises BundleError when there is no manifest, or one this version cannot read."""
        path = folder / MANIFEST
        if not is_bundle(folder):
            raise BundleError(
                f"{folder} is not a bundle: no {MANIFEST} in it; make one with internvl-edge export CHECKPOINT -o DIR"
            )
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
            if not isinstance(values, dict):
                raise ValueError(f"a {type(values).__name__}, expected an object")
            return _decode(values, folder)
        except (ValueError, RecursionError) as error:
            raise BundleError(f"{path} is damaged ({error}); export the bundle again") from None


def is_bundle(folder: Path) -> bool:
    """Whether a folder holds a manifest; one that a killed replacement has moved aside is put back first."""
    restore(folder)
    return (folder / MANIFEST).is_file()


def _decode(values: dict[str, Any], folder: Path) -> Manifest:
    version = values.pop("format_version", None)
    if type(version) is not int or version < 1:
        raise ValueError(f"format_version is {version!r}, expected {FORMAT_VERSION}")
    if version > FORMAT_VERSION:
        raise BundleError(
            f"{folder} has bundle format {version}, this version reads up to {FORMAT_VERSION}; update internvl-edge"
        )
    if version == 1:
        values = upgrade(values)
    elif values.pop(DIGEST, None) != manifest_digest(values):
        raise ValueError("its own SHA-256 does not fit: it was changed")
    quality = values.pop("quality", None)
    manifest = decode(Manifest, values, strict=True)
    for name in manifest.files:
        if name in ("", "..") or Path(name).name != name:
            raise ValueError(f"files: {name!r} is not the plain name of a file in the bundle")
    return replace(manifest, quality=_quality(quality))


def manifest_digest(values: dict[str, Any]) -> str:
    """The SHA-256 of a manifest's content, whatever the order and the spacing of its JSON."""
    return hashlib.sha256(json.dumps(values, sort_keys=True, ensure_ascii=False).encode()).hexdigest()


def _quality(values: Any) -> Quality | None:
    """None where it cannot be read: it may be of a newer version, and no bundle should fail to load for that."""
    if values is None:
        return None
    try:
        quality = decode(Quality, values)
        for verdict in quality.gate:
            parse_condition(verdict.condition)
    except (ValueError, EdgeError):
        return None
    return quality
