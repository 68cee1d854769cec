"""The manifest, which describes a bundle as typed data in `manifest.json`.

It is written in format 2. Format 1, which has some of the data as text, can still be read (see `format_1` and
docs/formats.md).
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
from internvl_edge.base.hub import HubSource
from internvl_edge.base.json_files import read_object
from internvl_edge.base.jsonable import decode, dumps, encode
from internvl_edge.base.text import is_file_name, shown
from internvl_edge.checkpoint.layouts import linear_names
from internvl_edge.checkpoint.license import License
from internvl_edge.model.components import Component
from internvl_edge.model.config import ModelConfig
from internvl_edge.model.limits import require_possible
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
    """One file: its size in bytes and the SHA-256 of its content in hexadecimal digits."""

    bytes: int
    sha256: str


@dataclass(frozen=True)
class SpecialTokens:
    """Ids of special tokens: `image` is the placeholder of each image token, and each of `stop` ends an answer."""

    image: int
    stop: tuple[int, ...]


@dataclass(frozen=True)
class DecoderQuantization:
    """Facts about a quantized decoder beside the scheme of each linear.

    Attributes:
        method: quantization method of the checkpoint, "awq" or "compressed-tensors".
        bits_per_weight: mean over all linears of the decoder, scales and zero points included.
        weight_error: root mean square of the difference between the weights of the standard dialect and those of the
            checkpoint, relative to the latter, on up to 256 outputs of each linear with float inputs.
    """

    method: str
    bits_per_weight: float
    weight_error: float


@dataclass(frozen=True)
class Manifest:
    """The description of a bundle.

    Attributes:
        producer: name and version of the program that made it.
        source: hub id of the checkpoint, or the name of its folder, for information.
        model: the configuration that the graphs were built from.
        template: the conversation template of the prompt.
        tokens: ids of the special tokens.
        dtype: type of stored float weights: "float32", "float16" or "bfloat16".
        activations: type that the graphs compute in.
        kv_cache: type of the KV cache: "int8", or None for `activations`.
        token_table: type of the token table: "int8", or one of the types of `dtype`.
        linears: scheme of each quantized linear, by canonical name ("decoder.layers.0.mlp.up_proj"). All other linears
            are floats.
        components: the size of each part of the model.
        quantization: more about a quantized decoder; None for a decoder in floats.
        files: all files by name.
        quality: the results of evaluation; None where the bundle was not evaluated.
        hub: where the checkpoint came from; of a quantized one, where its original did. None where nobody knows.
        license: that of the checkpoint, as its card names it. None where nobody knows.
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
    hub: HubSource | None = None
    license: License | None = None

    @property
    def fingerprint(self) -> str:
        """One SHA-256 of the names and contents of all files. Measured figures belong to one fingerprint."""
        digests = sorted((name, entry.sha256) for name, entry in self.files.items())
        return hashlib.sha256(json.dumps(digests).encode()).hexdigest()

    @property
    def is_quantized(self) -> bool:
        """Whether any linear, the KV cache or the token table is quantized."""
        return bool(self.linears) or "int8" in (self.kv_cache, self.token_table)

    @property
    def rounds_inputs(self) -> bool:
        """Whether any linear has int8 inputs, so that its products are accumulated as integers."""
        return any(scheme.static_inputs for scheme in self.linears.values())

    def schemes(self, part: str) -> dict[str, Scheme]:
        """Return the schemes of quantized linears whose names begin with `part`, such as "decoder.layers."."""
        return {name: scheme for name, scheme in self.linears.items() if name.startswith(part)}

    def floats(self, *parts: str) -> list[str]:
        """Return the linears in floats whose names begin with one of `parts`."""
        return [name for name in linear_names(self.model, *parts) if name not in self.linears]

    def write(self, folder: Path) -> None:
        """Write `manifest.json`, which makes a folder a bundle. An existing manifest is replaced in one step."""
        values = encode(self)
        replace_text(
            folder / MANIFEST, dumps({"format_version": FORMAT_VERSION, DIGEST: manifest_digest(values), **values})
        )

    @staticmethod
    def read(folder: Path) -> Manifest:
        """Read the manifest of a folder. Raise BundleError if there is none, or this version cannot read it."""
        path = folder / MANIFEST
        if not is_bundle(folder):
            raise BundleError(
                f"{folder} is not a bundle: no {MANIFEST} in it; make one with internvl-edge export CHECKPOINT -o DIR"
            )
        try:
            return _decode(read_object(path, BundleError, "export the bundle again"), folder)
        except ValueError as error:
            raise BundleError(f"{path} is damaged ({error}); export the bundle again") from None


def is_bundle(folder: Path) -> bool:
    """Whether a folder holds a manifest; one that a killed replacement has moved aside is put back first."""
    restore(folder)
    return (folder / MANIFEST).is_file()


def _decode(values: dict[str, Any], folder: Path) -> Manifest:
    version = values.pop("format_version", None)
    if type(version) is not int or version < 1:
        raise ValueError(f"format_version is {shown(version)}, expected {FORMAT_VERSION}")
    if version > FORMAT_VERSION:
        raise BundleError(
            f"{folder} has bundle format {version}, this version reads up to {FORMAT_VERSION}; update internvl-edge"
        )
    if version == 1:
        try:
            values = upgrade(values)
        except (
            ArithmeticError,
            AttributeError,
            KeyError,
            TypeError,
        ) as error:  # no sentences or counts
            raise ValueError(f"format 1: {error!r}") from None
    elif values.pop(DIGEST, None) != manifest_digest(values):
        raise ValueError("its own SHA-256 does not fit: it was changed")
    quality = values.pop("quality", None)
    manifest = decode(Manifest, values, strict=True)
    require_possible(manifest.model)
    for name in manifest.files:
        if not is_file_name(name):
            raise ValueError(f"files: {shown(name)} is not the plain name of a file in the bundle")
    return replace(manifest, quality=_quality(quality))


def manifest_digest(values: dict[str, Any]) -> str:
    """Return the SHA-256 of a manifest's content, whatever the order and the spacing of its JSON."""
    return hashlib.sha256(json.dumps(values, sort_keys=True, ensure_ascii=False).encode()).hexdigest()


def _quality(values: Any) -> Quality | None:
    """Return the quality, or None where it cannot be read.

    It may be of a newer version, and a bundle must not fail to load for that reason.
    """
    if values is None:
        return None
    try:
        quality = decode(Quality, values)
        for verdict in quality.gate:
            parse_condition(verdict.condition)
    except (ValueError, EdgeError):
        return None
    return quality
