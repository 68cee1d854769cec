"""An opened bundle: one folder with graphs, weights, tokenizer and a manifest that describes them.

`Bundle.open` verifies the bundle before any weights are loaded: the format version, and the presence, size and SHA-256
of every file. A file with a verified hash is recognized by its path, inode, size and time stamps, and is not read
again.
"""

from __future__ import annotations

import hashlib
import json
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from internvl_edge.base.errors import BundleError
from internvl_edge.base.files import replace_text
from internvl_edge.base.json_files import read, read_object
from internvl_edge.base.jsonable import decode
from internvl_edge.base.user_folders import cache_folder
from internvl_edge.checkpoint.record import QuantizationRecord

from .manifest import Manifest
from .names import EMBEDDINGS, QUANTIZATION
from .token_table import TokenTable


@dataclass(frozen=True)
class Bundle:
    """An opened, verified bundle."""

    folder: Path
    manifest: Manifest

    @staticmethod
    def open(folder: Path) -> Bundle:
        """Read the manifest and verify every file.

        Raises:
            BundleError: the folder is not a bundle, its format is newer, or a file is missing or changed (the message
                names it).
        """
        manifest = Manifest.read(folder)
        _verify(folder, manifest)
        return Bundle(folder, manifest)

    def path(self, name: str) -> Path:
        """Return the full path of one of the bundle's files.

        Raises:
            BundleError: the manifest does not list the file, so nobody verified it.
        """
        if name not in self.manifest.files:
            raise BundleError(f"{self.folder}: the manifest lists no {name}; export the bundle again")
        return self.folder / name

    def embeddings(self) -> TokenTable:
        """Return the token table [vocab, hidden]."""
        decoder = self.manifest.model.decoder
        shape = (decoder.vocab_size, decoder.hidden_size)
        return TokenTable(self.path(EMBEDDINGS), self.manifest.token_table, shape)


def read_quantization(folder: Path, manifest: Manifest) -> QuantizationRecord | None:
    """Return the record of how a bundle's checkpoint was quantized; None without one that this version reads."""
    if QUANTIZATION not in manifest.files:
        return None
    try:
        return decode(QuantizationRecord, read(folder / QUANTIZATION, BundleError, "export the bundle again"))
    except (BundleError, ValueError):
        return None


def sha256(path: Path) -> str:
    """Return the SHA-256 of a file in hexadecimal digits."""
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
        if path.stat().st_size != entry.bytes:
            raise BundleError(
                f"{folder}: {name} has {path.stat().st_size} bytes, not {entry.bytes}; copy or export it again"
            )
        if stamps.get(_stamp(path)) != entry.sha256:
            unknown.append(name)
    if not unknown:
        return
    with ThreadPoolExecutor() as pool:  # hashing releases the GIL
        digests = dict(zip(unknown, pool.map(lambda name: sha256(folder / name), unknown), strict=True))
    for name, digest in digests.items():
        if digest != manifest.files[name].sha256:
            raise BundleError(
                f"{folder}: {name} was changed (its SHA-256 is not the manifest's); copy or export it again"
            )
    _write_stamps(stamps | {_stamp(folder / name): digest for name, digest in digests.items()})


def _stamp_file() -> Path | None:
    folder = cache_folder()
    return folder and folder / "verified.json"


def _stamp(path: Path) -> str:
    status = path.stat()
    return f"{path.resolve()}:{status.st_ino}:{status.st_size}:{status.st_mtime_ns}:{status.st_ctime_ns}"


def _read_stamps() -> dict[str, str]:
    path = _stamp_file()
    try:
        return read_object(path, BundleError, "verify again") if path else {}
    except BundleError:
        return {}


def _write_stamps(stamps: dict[str, str]) -> None:
    """Store the stamps of verified files. A device without a writable cache folder verifies every time."""
    path = _stamp_file()
    if path is None:
        return
    with suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        replace_text(path, json.dumps(dict(list(stamps.items())[-512:])))
