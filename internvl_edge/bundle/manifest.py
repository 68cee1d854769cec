"""The bundle: one folder with graphs, weights, tokenizer and a manifest that says what they are.

`Bundle.open` checks everything a device can check before it loads a byte of weights: format version, presence, sizes,
and the SHA-256 of every file. A file whose hash was once verified is recognised by size and time stamp and not read
again.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from internvl_edge.base.errors import BundleError
from internvl_edge.model.config import DecoderConfig, ModelConfig, RopeConfig, VisionConfig

from .token_table import TokenTable

FORMAT_VERSION = 1
MANIFEST = "manifest.json"
VISION = "vision.onnx"
# One decoder header per dialect; all share one weights file, but for quantized weights.
DECODERS = {"standard": "decoder.onnx", "onnxruntime": "decoder.onnxruntime.onnx"}
# Long prompts in int8, for ONNX Runtime on CPUs; optional.
PROMPTS = "prompts.onnx"
EMBEDDINGS = "embeddings.bin"
TOKENIZER = "tokenizer.json"
# How the checkpoint was quantized, where its quantizer left word: a `report.content.Making`.
QUANTIZATION = "quantization.json"


@dataclass(frozen=True)
class Manifest:
    """What a bundle says of itself.

    Attributes:
        model: the configuration the graphs were built from.
        dtype: how weights are stored: "float32", "float16" or "bfloat16".
        activations: what the graphs compute in.
        template: how a conversation is written, a `PromptTemplate` as values.
        tokens: ids by role: "image" (the placeholder each image token replaces) and "stop" (end of an answer).
        source: the checkpoint's folder name, for people.
        files: name -> {"bytes", "sha256"}.
        quantization: method, bits, group size and measured weight error of a quantized decoder; None for floats.
        vision_quantization: of tower and projector, "method", how many linears are "int8" (weights and inputs) and
            the names of those that keep "floats"; None where all do.
        kv_cache: "int8", or None for a cache in `activations`.
        token_table: "int8", or one of the types of `dtype`; None in older bundles, which have it in theirs.
        components: size of each part of the model, as `model.components` counts it; None in older bundles.
        quality: what evaluation found, a `quality.Quality` as values; None where nobody has looked.
    """

    model: ModelConfig
    dtype: str
    activations: str
    template: dict[str, Any]
    tokens: dict[str, int]
    source: str
    producer: str
    files: dict[str, dict[str, Any]]
    quantization: dict[str, Any] | None = None
    vision_quantization: dict[str, Any] | None = None
    kv_cache: str | None = None
    token_table: str | None = None
    components: list[dict[str, Any]] | None = None
    quality: dict[str, Any] | None = None

    @property
    def fingerprint(self) -> str:
        """One SHA-256 for the names and contents of all files: what figures about a bundle are tied to."""
        digests = sorted((name, entry["sha256"]) for name, entry in self.files.items())
        return hashlib.sha256(json.dumps(digests).encode()).hexdigest()

    @property
    def is_quantized(self) -> bool:
        """Whether anything has fewer bits than a float."""
        return bool(self.quantization or self.vision_quantization or self.kv_cache) or self.token_table == "int8"

    def write(self, folder: Path) -> None:
        """Write `manifest.json`, the file that makes a folder a bundle; one that is there is replaced in one step."""
        values = {"format_version": FORMAT_VERSION, **asdict(self)}
        path, temporary = folder / MANIFEST, folder / f".{MANIFEST}.{os.getpid()}"
        try:
            temporary.write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
            if path.exists():
                shutil.copymode(path, temporary)
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)

    @staticmethod
    def read(folder: Path) -> Manifest:
        """Raises BundleError when there is no manifest, or one this version cannot read."""
        path = folder / MANIFEST
        if not path.is_file():
            raise BundleError(
                f"{folder} is not a bundle: no {MANIFEST} in it; make one with internvl-edge export CHECKPOINT -o DIR"
            )
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
            version = values.pop("format_version")
            if version > FORMAT_VERSION:
                raise BundleError(
                    f"{folder} has bundle format {version}, this version reads {FORMAT_VERSION}; update internvl-edge"
                )
            model = values.pop("model")
            vision, decoder = VisionConfig(**model.pop("vision")), model.pop("decoder")
            rope = RopeConfig(**decoder.pop("rope"))
            config = ModelConfig(vision=vision, decoder=DecoderConfig(rope=rope, **decoder), **model)
            return Manifest(model=config, **values)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise BundleError(f"{path} is damaged ({error}); export the bundle again") from None


@dataclass(frozen=True)
class Bundle:
    """An opened, verified bundle."""

    folder: Path
    manifest: Manifest

    @staticmethod
    def open(folder: Path) -> Bundle:
        """Read the manifest and verify every file.

        Raises:
            BundleError: not a bundle, newer format, or a file that is missing or changed (named).
        """
        manifest = Manifest.read(folder)
        _verify(folder, manifest)
        return Bundle(folder, manifest)

    def path(self, name: str) -> Path:
        """The full path of one of the bundle's files."""
        return self.folder / name

    def embeddings(self) -> TokenTable:
        """The token table [vocab, hidden]."""
        decoder = self.manifest.model.decoder
        stored = self.manifest.token_table or self.manifest.dtype
        return TokenTable(self.path(EMBEDDINGS), stored, (decoder.vocab_size, decoder.hidden_size))


def sha256(path: Path) -> str:
    """Hex digest of a file."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        for block in iter(lambda: file.read(1 << 20), b""):
            digest.update(block)
    return digest.hexdigest()


def _verify(folder: Path, manifest: Manifest) -> None:
    stamps = _read_stamps()
    unknown = []
    for name, entry in manifest.files.items():
        path = folder / name
        if not path.is_file():
            raise BundleError(f"{folder}: {name} is missing; copy or export the bundle again")
        if path.stat().st_size != entry["bytes"]:
            raise BundleError(
                f"{folder}: {name} has {path.stat().st_size} bytes, not {entry['bytes']}; copy or export it again"
            )
        if stamps.get(_stamp(path)) != entry["sha256"]:
            unknown.append(name)
    if not unknown:
        return
    with ThreadPoolExecutor() as pool:  # hashing releases the GIL
        digests = dict(zip(unknown, pool.map(lambda name: sha256(folder / name), unknown), strict=True))
    for name, digest in digests.items():
        if digest != manifest.files[name]["sha256"]:
            raise BundleError(
                f"{folder}: {name} was changed (its SHA-256 is not the manifest's); copy or export it again"
            )
    _write_stamps(stamps | {_stamp(folder / name): digest for name, digest in digests.items()})


def _stamp_file() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "internvl-edge" / "verified.json"


def _stamp(path: Path) -> str:
    status = path.stat()
    return f"{path.resolve()}:{status.st_ino}:{status.st_size}:{status.st_mtime_ns}:{status.st_ctime_ns}"


def _read_stamps() -> dict[str, str]:
    try:
        values = json.loads(_stamp_file().read_text(encoding="utf-8"))
        return values if isinstance(values, dict) else {}
    except (OSError, ValueError):
        return {}


def _write_stamps(stamps: dict[str, str]) -> None:
    """Remember verified files; a device without a writable cache just verifies every time."""
    path = _stamp_file()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_suffix(f".{os.getpid()}")
        temporary.write_text(json.dumps(dict(list(stamps.items())[-512:])), encoding="utf-8")
        temporary.replace(path)
    except OSError:
        pass
